"""Weights come back exactly as they were saved, or are refused; no file is ever half written."""

import contextlib
import errno
import os
import pickle

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from checkpoint import atomic_write, digest, encode, load, load_model
from model import create_model
from options import UserError

HEADER = {
    "model": "lenet",
    "model_args": {"classes": 3, "channels": 3},
    "stem": "",
    "classes": ["Öl", "日本", "T-shirt/top"],
    "channels": 3,
    "image_size": [32, 32],
    "crop": 1.0,
    "input_size": [32, 32],
    "mean": [0.1, 0.2, 1 / 3],
    "std": [0.5, 0.5, 0.5],
    "data": "pictures",
    "data_sha256": "0" * 64,
    "epoch": 7,
    "validation": {"val_accuracy": 0.5},
    "versions": {"torch": torch.__version__},
    "options": {"lr": 1e-3, "model": None},
}


@pytest.fixture
def weights(tmp_path):
    """A weights file of a network for three classes."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode(create_model("lenet", 3).state_dict(), HEADER))
    return path


def refuse(path, *parts):
    """The file is refused in one line that names it."""
    with pytest.raises(UserError) as caught:
        load_model(path)
    for part in (str(path), *parts):
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_round_trip(tmp_path, memory_format):
    """Tensors and header are what was saved, in whatever order the memory was laid out."""
    network = create_model("resnet18", 3).to(memory_format=memory_format)
    state = network.state_dict()
    (tmp_path / "m.safetensors").write_bytes(encode(state, HEADER))
    tensors, header = load(tmp_path / "m.safetensors")
    assert tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert {key: header[key] for key in HEADER} == HEADER
    assert header["sha256"] == digest(state)


def test_loaded_network(weights):
    """The loaded network answers as the saved one, with the preparation that the header says."""
    model, prepare, header = load_model(weights)
    original = create_model("lenet", 3)
    original.load_state_dict(load(weights)[0])
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert not model.training
    assert torch.allclose(prepare.mean.flatten() / 255, torch.tensor(header["mean"]))
    assert torch.allclose(model(prepare(images)), original(prepare(images)), atol=1e-5)


def test_tied_weights(tmp_path):
    """A network two of whose names share one tensor is saved and loaded too."""
    tied = nn.Linear(3, 3)
    state = {"one.weight": tied.weight, "two.weight": tied.weight}
    (tmp_path / "m.safetensors").write_bytes(encode(state, HEADER))
    tensors = load(tmp_path / "m.safetensors")[0]
    assert all(torch.equal(tensors[name], tied.weight) for name in state)


def test_digest():
    """The digest ignores the order of keys and of memory, and sees any changed value."""
    a, b = torch.randn(2, 3, 4, 5), torch.tensor(7)
    whole = digest({"a": a, "b": b})
    assert digest({"b": b, "a": a}) == whole
    assert digest({"a": a.to(memory_format=torch.channels_last), "b": b}) == whole
    assert digest({"a": a, "b": b + 1}) != whole
    changed = a.clone()
    changed[1, 2, 3, 4] = torch.nextafter(changed[1, 2, 3, 4], torch.tensor(9.0))
    assert digest({"a": changed, "b": b}) != whole


def test_no_weights(tmp_path):
    """A file that is missing, a folder or no safetensors file is refused by name."""
    refuse(tmp_path / "none.safetensors", "no such")
    refuse(tmp_path)
    for content in (b"", b"x", b"hello world" * 50, b"PK\x03\x04" * 50):
        (tmp_path / "m.safetensors").write_bytes(content)
        refuse(tmp_path / "m.safetensors")


@pytest.mark.parametrize("kept", [4, 100, 5000, -1])
def test_cut_off(weights, kept):
    """A truncated file is refused."""
    weights.write_bytes(weights.read_bytes()[:kept])
    refuse(weights)


def test_foreign_file(weights):
    """A safetensors file that another program wrote, or another version of this one, is refused."""
    tensors = load(weights)[0]
    for metadata in (None, {"format": "pt"}, {"format": "lenslet", "version": "0"}):
        safetensors.torch.save_file(tensors, weights, metadata)
        refuse(weights)
    refuse(weights, "version 0")


def test_incomplete_header(weights):
    """A header without what is needed to use the weights is refused."""
    for missing in ("model", "model_args", "mean", "std"):
        header = {key: value for key, value in HEADER.items() if key != missing}
        weights.write_bytes(encode(create_model("lenet", 3).state_dict(), header))
        refuse(weights)


def test_altered_tensors(weights):
    """One changed bit among the weights is found out."""
    content = bytearray(weights.read_bytes())
    content[-1000] ^= 1
    weights.write_bytes(content)
    refuse(weights, "damaged")


def test_altered_header(weights):
    """A changed bit in the header gives a refusal, if it is found out, and never a traceback."""
    content = weights.read_bytes()
    for place in range(8, 8 + int.from_bytes(content[:8], "little"), 3):
        altered = bytearray(content)
        altered[place] ^= 1
        weights.write_bytes(altered)
        with contextlib.suppress(UserError):
            load_model(weights)


def test_other_number_of_classes(tmp_path):
    """Weights for ten classes under a header of three are refused."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(encode(create_model("lenet", 10).state_dict(), HEADER))
    refuse(path, "does not fit")


def test_timm_loads_our_file(tmp_path):
    """A timm network with its own stem loads unchanged into timm, every tensor of it."""
    network = create_model("resnet18", 3, 3, (224, 224))
    assert network.stem_note == ""
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode(network.state_dict(), {**HEADER, "model": "resnet18"}))
    theirs = timm.create_model("resnet18", num_classes=3, checkpoint_path=str(path)).state_dict()
    ours = network.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.equal(theirs[name], ours[name]) for name in ours)


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_nothing_is_executed(tmp_path, write):
    """A pickle under the name of weights is refused and not run."""
    write(Planted(tmp_path / "planted"), tmp_path / "model.safetensors")
    refuse(tmp_path / "model.safetensors")
    assert not (tmp_path / "planted").exists()


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk(tmp_path, monkeypatch, call):
    """Where a write fails the old content stays, nothing is left beside it, and it is named."""
    path = tmp_path / "file"
    atomic_write(path, "old")

    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space") as caught:
        atomic_write(path, b"new content")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_write(tmp_path):
    """Text is written as UTF-8, bytes as they are, and nothing else is left in the folder."""
    atomic_write(tmp_path / "file", b"\x00\xff")
    assert (tmp_path / "file").read_bytes() == b"\x00\xff"
    atomic_write(tmp_path / "file", "Öl")
    assert (tmp_path / "file").read_bytes() == "Öl".encode()
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "none" / "file", "")
