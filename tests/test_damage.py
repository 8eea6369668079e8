"""A weights file that was damaged or forged is refused in one line, without a traceback."""

import functools
import json
import math
import random

import conftest
import pytest
import torch

import model
from lenslet import weights
from lenslet.errors import UserError
from lenslet.header import NEEDED, OPTIONS
from model import create_model, load_model

HEADER = conftest.HEADER | {
    "model": "fastnet",
    "model_args": {"classes": 3, "channels": 3, "size": [16, 16], "width": 8},
    "image_size": [16, 16],
    "crop": 0.875,
    "input_size": [16, 16],
    "std": [0.5, 0.25, 0.5],
    "digests": [[10, "0" * 64]],
    "plan": [[0, 0.0, 10]],
    "options": {"val": 0.1, "fold": "1/3", "limit": None, "batch_size": 64, "accumulate": 1}
    | {"workers": 0, "skip_broken": False, "augment": "light", "lr": 1e-3},
    "device": "a CPU",
    "precision": "no",
    "threads": 1,
    "processes": 1,
}
IMAGES = torch.arange(2 * 3 * 16 * 16).mul(7).remainder(251).to(torch.uint8).view(2, 3, 16, 16)
NONSENSE = [None, True, -1, 0, 2.5, 10**30, math.nan, math.inf, "", "x" * 10**5, [], [[]], {}]
SLOW = pytest.param(1, marks=pytest.mark.slow)


@functools.cache
def state():
    torch.manual_seed(0)
    return create_model(HEADER["model"], **HEADER["model_args"]).state_dict()


@pytest.fixture(scope="module")
def whole():
    """The content of an undamaged file."""
    return weights.encode(state(), HEADER)


def answer(path):
    """All that an answer depends on: the logits, and what the header says of reading."""
    network, prepare, header = load_model(path)
    with torch.no_grad():
        logits = network(prepare(IMAGES))
    return logits.tolist(), {key: header[key] for key in HEADER}


def refused(path, content):
    """The one line that says why a content is refused, without the path; '' where it is not."""
    path.write_bytes(content)
    try:
        answer(path)
    except UserError as error:
        said = str(error)
        assert said.startswith(f"{path}: ") and "\n" not in said
        assert len(said.removeprefix(f"{path}: ")) <= 300
        return said
    return ""


def forged(tensors=None, raw=(), version="2", **entries):
    """A content with right digests; raw: metadata as text; an entry that is ... is left out."""
    tensors = tensors or state()
    tensors = {name: weights.storable(tensor) for name, tensor in tensors.items()}
    header = HEADER | {"format": "lenslet", "version": version, "sha256": weights.digest(tensors)}
    header = {key: value for key, value in (header | entries).items() if value is not ...}
    metadata = {k: v if k in weights.TEXT else json.dumps(v) for k, v in header.items()}
    metadata |= dict(raw)
    names = {kind: name for name, kind in weights.TYPES.items()}
    kinds = {name: [names[t.dtype], list(t.shape)] for name, t in tensors.items()}
    metadata["header_sha256"] = weights.header_digest(metadata, kinds)
    return weights.to_bytes(tensors, metadata)


def rewritten(content, change):
    """A content whose JSON is change()'s of what it was."""
    size = int.from_bytes(content[:8], "little")
    text = change(content[8 : 8 + size])
    return len(text).to_bytes(8, "little") + text + content[8 + size :]


def damaged(whole):
    """(what was done, content): at least 174 files that are not what was saved."""
    for kept in (*range(9), *range(9, len(whole), len(whole) // 30), len(whole) - 1):
        yield f"cut off after {kept} bytes", whole[:kept]
    for more in (b"\0", b" " * 8, whole):
        yield "more at its end", whole + more
    for other in (b"PK\x03\x04", b"\x89PNG\r\n", b"\x80\x02", b"<html>", b"\x1f\x8b", bytes(64)):
        yield "another format", other + whole
        yield "another format", other * 40
    for size in (0, 1, 2**24, 2**31, 2**63, 2**64 - 1):
        yield "another length of the header", size.to_bytes(8, "little") + whole[8:]
    start = 8 + int.from_bytes(whole[:8], "little")
    for place in range(start, len(whole) - 512, (len(whole) - start) // 12):
        yield "a block overwritten", whole[:place] + b"Z" * 512 + whole[place + 512 :]
    name, tensor = next(iter(state().items()))
    for kind in (torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.bool):
        yield f"tensors of {kind}", forged(state() | {name: tensor.to(kind)})
    shapes = tensor.flatten(), tensor[None], tensor[:1], tensor[:0], torch.tensor(0.5)
    for other in shapes:
        yield f"a shape {other.shape}", forged(state() | {name: other})
    for value in (math.nan, math.inf, -math.inf):
        yield f"{value}", forged(state() | {name: torch.full_like(tensor, value)})
    for name in state():
        yield f"without {name}", forged({k: t for k, t in state().items() if k != name})
        yield f"{name} renamed", forged({k + "x" * (k == name): t for k, t in state().items()})
    yield "one tensor more", forged(state() | {"more": torch.ones(1)})
    for entry in NEEDED:
        yield f"without {entry}", forged(**{entry: ...})
        texts = ("", "[", "\x00", "[" * 20 + "]" * 20, "[" * 10**5, '{"a":1,"a":2}', "9" * 5000)
        for text in texts if entry not in weights.TEXT else ("", "x" * 10**5):
            yield f"{entry}: {text[:20]}", forged(raw={entry: text})
    for entry in NEEDED.keys() - weights.TEXT:
        for value in NONSENSE:
            if not (value in (0, 2.5) and entry in ("epoch",)) and (entry, value) != (
                "options",
                {},
            ):
                yield f"{entry} {value!s:.20}", forged(**{entry: value})
    for entry in OPTIONS:
        yield f"options: {entry}", forged(options={entry: [1]})
    for key, value in (("width", 10**9), ("width", True), ("width", 4096), ("size", [10**6] * 2)):
        yield f"{key} {value}", forged(model_args=HEADER["model_args"] | {key: value})
    for value in ("gelu", "", 1, ["relu"]):
        yield f"activation {value}", forged(model_args=HEADER["model_args"] | {"activation": value})
    for key, value in (("classes", 4), ("classes", 10**12), ("channels", 1), ("depth", 2)):
        yield f"{key} {value}", forged(model_args=HEADER["model_args"] | {key: value})
    yield "a class twice", forged(classes=["a", "a", "b"])
    yield "two names for three", forged(classes=["a", "b"])
    for name in ("lenet", "no such network", "torchvision/resnet18", "hf-hub:a/b", "../x"):
        yield name, forged(model=name)
    for key in ("threads", "precision"):
        yield f"without {key}", forged(**{key: ...})
        yield f"another {key}", forged(**{key: -1})
    for version in ("0", "3", "", "x" * 10**5):
        yield f"version {version[:5]}", forged(version=version)
    yield "no digest of the tensors", forged(sha256=...)
    size = int.from_bytes(whole[:8], "little")
    table = json.loads(whole[8 : 8 + size])
    del table["__metadata__"]["header_sha256"]
    yield "no digest", rewritten(whole, lambda _: json.dumps(table).encode())
    for change in (
        lambda text: text.replace(b'"__metadata__":{', b'"__metadata__":{"epoch":"7",', 1),
        lambda text: text.replace(b'"epoch":"7"', b'"epoch":"\xff"'),
        lambda text: text.replace(b'"epoch":"7"', b'"epoch":7'),
        lambda text: text.replace(b'"epoch":"7"', b'"epoch":"8"'),
        lambda text: text.replace(
            b'"__metadata__"', b'"x":' + b"[" * 10**5 + b',"__metadata__"', 1
        ),
        lambda text: b"[]",
        lambda text: b"null",
        lambda text: b"{}",
        lambda text: text + b" " * (1 << 24),
    ):
        yield "another text", rewritten(whole, change)


@pytest.mark.parametrize("step", [10, SLOW])
def test_a_flipped_bit_of_the_header(whole, tmp_path, step):
    """Each of 600 bits of the header, when it flips, is found out or changes no answer."""
    (tmp_path / "whole.safetensors").write_bytes(whole)
    expected, path = answer(tmp_path / "whole.safetensors"), tmp_path / "m.safetensors"
    bits = 8 * (8 + int.from_bytes(whole[:8], "little"))
    for bit in random.Random(0).sample(range(bits), 600)[::step]:
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        assert refused(path, content) or answer(path) == expected, bit


@pytest.mark.parametrize("step", [7, SLOW])
def test_damaged_and_forged_files(whole, tmp_path, step):
    """Whatever was cut, replaced, left out or made up, with right digests too, is refused."""
    cases = list(damaged(whole))
    assert len(cases) >= 174
    for what, content in cases[::step]:
        assert refused(tmp_path / "m.safetensors", content), what


def test_the_forger_makes_files_that_load(whole, tmp_path):
    """What is refused is refused for its damage: with none, both formats load alike."""
    for version in ("1", "2"):
        assert not refused(tmp_path / "m.safetensors", forged(version=version)), version
        header = load_model(tmp_path / "m.safetensors")[2]
        assert bool(weights.caution(header)) == (version == "1")


def test_old_files_have_no_checksum_of_the_header(tmp_path):
    """What is wrong in format 1, and is no damage to its tensors, is refused all the same."""
    path = tmp_path / "m.safetensors"
    assert "model_args" in refused(path, forged(version="1", classes=["a", "b"]))


def test_absurd_sizes_take_no_memory(tmp_path, monkeypatch):
    """A network of a size that the tensors do not have is never made with real values."""
    made, real = [], model.NETWORKS["fastnet"]

    def note(*args, **arguments):
        made.append(torch.empty(0).device.type)
        return real(*args, **arguments)

    monkeypatch.setitem(model.NETWORKS, "fastnet", note)
    content = forged(model_args=HEADER["model_args"] | {"width": 16})
    assert "do not fit" in refused(tmp_path / "m.safetensors", content)
    assert made == ["meta"]


def test_weights_that_are_not_finite(tmp_path):
    """NaN is named as such, with its tensor."""
    broken = state() | {"head.weight": torch.full_like(state()["head.weight"], math.nan)}
    said = refused(tmp_path / "m.safetensors", forged(broken))
    assert "its weights are not finite: head.weight" in said


def test_a_header_written_anew(tmp_path):
    """encode() renews version and digests, whatever the header that it is given says of them."""
    path = tmp_path / "m.safetensors"
    path.write_bytes(forged(version="1"))
    tensors, header = weights.read(path)
    path.write_bytes(weights.encode(tensors, header | {"epoch": 8}))
    again = weights.read_header(path)
    assert (again["version"], again["epoch"]) == ("2", 8)
    assert again["sha256"] == header["sha256"]
    assert again["header_sha256"] != header["header_sha256"]
