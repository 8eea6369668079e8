"""Weights come back exactly as they were saved, or are refused; no code from a file is run."""

import contextlib
import hashlib
import json
import os
import pickle
import re
import threading

import pytest
import safetensors.torch
import torch
from conftest import HEADER
from torch import nn

from lenslet import files, weights
from lenslet.errors import UserError
from lenslet.weights import digest, encode, read, read_header, storable
from model import create_model, load_model

README = files.ROOT / "README.md"


@pytest.fixture
def path(tmp_path):
    """A weights file of a network for three classes."""
    path = tmp_path / "model.safetensors"
    path.write_bytes(encode(create_model("lenet", 3).state_dict(), HEADER))
    return path


def refuse(path, *parts):
    """The file is refused in one line."""
    with pytest.raises(UserError) as caught:
        read(path)
    assert all(part in str(caught.value) for part in parts)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_round_trip(tmp_path, memory_format):
    """Tensors and header are what was saved, in whatever order the memory was laid out."""
    network = create_model("resnet18", 3).to(memory_format=memory_format)
    state = network.state_dict()
    (tmp_path / "m.safetensors").write_bytes(encode(state, HEADER))
    tensors, header = read(tmp_path / "m.safetensors")
    assert tensors.keys() == state.keys()
    for name, tensor in state.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)
    assert {key: header[key] for key in HEADER} == HEADER
    assert header["sha256"] == digest(state)


def test_tied_weights(tmp_path):
    """A network two of whose names share one tensor is saved and loaded too."""
    tied = nn.Linear(3, 3)
    state = {"one.weight": tied.weight, "two.weight": tied.weight}
    (tmp_path / "m.safetensors").write_bytes(encode(state, HEADER))
    tensors = read(str(tmp_path / "m.safetensors"))[0]
    assert all(torch.equal(tensors[name], tied.weight) for name in state)
    assert not storable(tied.weight).requires_grad


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
    for kind, size in ((torch.bfloat16, 2), (torch.float64, 8)):
        zeros = {"a": nn.Parameter(torch.zeros(2, 3, dtype=kind)), "b": torch.tensor(7).byte()}
        assert digest(zeros) == hashlib.sha256(bytes(6 * size) + b"\7").hexdigest()


def test_no_weights(tmp_path):
    """What is missing, a folder, a pipe, a device, or no safetensors file is refused at once."""
    refuse(tmp_path / "none.safetensors", "no such")
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "pipe", "/dev/zero"):
        refuse(path)
    for content in (b"", b"x", b"hello world" * 50, b"PK\x03\x04" * 50):
        (tmp_path / "m.safetensors").write_bytes(content)
        refuse(tmp_path / "m.safetensors")


@pytest.mark.parametrize("kept", [4, 100, 5000, -1])
def test_cut_off(path, kept):
    """A truncated file is refused."""
    path.write_bytes(path.read_bytes()[:kept])
    refuse(path)


def test_foreign_file(path):
    """A safetensors file that another program wrote, or another version of this one, is refused."""
    tensors = read(path)[0]
    for metadata in (None, {"format": "pt"}, {"format": "lenslet", "version": "0"}):
        safetensors.torch.save_file(tensors, path, metadata)
        refuse(path)
    refuse(path, "version 0")


def test_altered_tensors(path):
    """One changed bit among the weights is found out."""
    content = bytearray(path.read_bytes())
    content[-1000] ^= 1
    path.write_bytes(content)
    refuse(path, "damaged")


def test_altered_header(path):
    """A changed bit in the header gives a refusal, if it is found out, and never a traceback."""
    content = path.read_bytes()
    for place in range(8, 8 + int.from_bytes(content[:8], "little"), 3):
        altered = bytearray(content)
        altered[place] ^= 1
        path.write_bytes(altered)
        with contextlib.suppress(UserError):
            read(path)


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


def test_header_alone(tmp_path, monkeypatch):
    """The header is read without the tensors, here a GiB that is not on the disk."""
    monkeypatch.setattr(weights, "from_bytes", None)
    path, size = tmp_path / "m.safetensors", 1 << 30
    metadata = {k: v if k in weights.TEXT else json.dumps(v) for k, v in HEADER.items()}
    metadata |= {"format": "lenslet", "version": "1"}
    tensor = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    head = json.dumps({"__metadata__": metadata, "w": tensor}).encode()
    with open(path, "wb") as file:
        file.write(len(head).to_bytes(8, "little") + head)
        file.truncate(8 + len(head) + size)
    assert read_header(path)["classes"] == HEADER["classes"]


@pytest.fixture
def contents():
    """Two weights files: all that is in the tensors is the header's epoch."""
    files = [({"w": torch.full((64, 64), n)}, HEADER | {"epoch": n}) for n in (1, 2)]
    return [encode(*file) for file in files]


def replace(path, content):
    """As a training does it: at once, by another file."""
    path.with_suffix(".new").write_bytes(content)
    os.replace(path.with_suffix(".new"), path)


def test_replaced_between_header_and_tensors(path, contents, monkeypatch):
    """The header and the tensors are of one file, whatever takes its place in between."""
    replace(path, contents[0])

    def check_header(header, check=weights.check_header):
        check(header)
        replace(path, contents[1])

    monkeypatch.setattr(weights, "check_header", check_header)
    for epoch in (1, 2):
        tensors, header = read(path)
        assert header["epoch"] == epoch and (tensors["w"] == epoch).all()


def test_read_while_it_is_replaced(path, contents):
    """Each of 1,000 reads gives one of two files that take each other's place all the time."""
    replace(path, contents[0])
    done = threading.Event()

    def write():
        while not done.is_set():
            for content in contents:
                replace(path, content)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        for _ in range(1000):
            tensors, header = read(path)
            assert (tensors["w"] == header["epoch"]).all()
            assert read_header(path)["epoch"] in (1, 2)
    finally:
        done.set()
        writer.join()


def test_other_files_point_to_training(tmp_path):
    """What is no weights file of train.py says so, and which option starts a training from it."""
    state = create_model("lenet", 3).state_dict()
    path = tmp_path / "w.pth"
    for legacy in (False, True):
        torch.save(state, path, _use_new_zipfile_serialization=not legacy)
        refuse_foreign(path, "not a weights file of train.py")
    for content in (b"\x08\x07\x12\x07pytorch\x1a", b"<html></html>", bytes(100)):
        path.write_bytes(content)
        refuse_foreign(path, "not a weights file of train.py")
    for metadata in (None, {"format": "pt"}):
        safetensors.torch.save_file(state, path, metadata)
        refuse_foreign(path, "not written by train.py")


def refuse_foreign(path, said):
    with pytest.raises(UserError) as caught:
        load_model(path)
    assert str(caught.value).startswith(f"{path}: {said}")
    assert str(caught.value).endswith("`train.py --pretrained FILE`")


def test_use_in_timm(tmp_path, monkeypatch):
    """README's lines for plain timm write a .pth that timm loads, and answers alike."""
    monkeypatch.chdir(tmp_path)
    network = create_model("test_resnet", 3, size=160)
    assert not network.stem_note
    arguments = {"classes": 3, "channels": 3, "size": [160, 160]}
    header = HEADER | {"model": "test_resnet", "model_args": arguments, "input_size": [160, 160]}
    (tmp_path / "model.safetensors").write_bytes(encode(network.state_dict(), header))
    model, prepare, header = load_model("model.safetensors")
    blocks = re.findall(r"^```python\n(.*?)^```", README.read_text(), re.DOTALL | re.MULTILINE)
    (block,) = (block for block in blocks if "timm" in block)
    names = {"model": model, "header": header}
    exec(block, names)
    images = prepare(torch.randint(0, 256, (2, 3, 160, 160), dtype=torch.uint8))
    with torch.no_grad():
        torch.testing.assert_close(names["network"].eval()(images), model(images))
