"""A damaged .pth is refused in one line, or loads with the values that were saved."""

import argparse
import io
import math
import pickle
import zipfile

import numpy as np
import pytest
import torch
from torch import nn

from lenslet.errors import UserError
from lenslet.training import pretrained

STATE = {
    "conv.weight": torch.arange(8 * 27.0).view(8, 3, 3, 3),
    "bn.weight": torch.arange(8.0),
    "bn.num_batches_tracked": torch.tensor(7),
    "fc.weight": torch.arange(4096.0).view(64, 64),
}


class Code:
    """Runs code when it is unpickled by an ordinary unpickler."""

    def __reduce__(self):
        return print, ("code was run",)


def saved(tree, legacy=False):
    """What torch.save() writes."""
    file = io.BytesIO()
    torch.save(tree, file, _use_new_zipfile_serialization=not legacy)
    return file.getvalue()


def archive(kind=zipfile.ZIP_STORED, **records):
    """A zip as torch.save() writes it, of any records."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", kind) as made:
        for name, content in {"version": b"3\n", "byteorder": b"little", **records}.items():
            made.writestr(f"x/{name}", content)
    return file.getvalue()


def repacked(content, change, kind=zipfile.ZIP_STORED):
    """A zip with other contents: change(name, content)."""
    with zipfile.ZipFile(io.BytesIO(content)) as made:
        names = {name.partition("/")[2]: made.read(name) for name in made.namelist()}
    return archive(kind, **{name: change(name, text) for name, text in names.items()})


def nested(depth):
    """A pickle of a dict in a dict in a dict, which pickle itself could not write."""
    return b"\x80\x02" + b"}X\x01\x00\x00\x00a" * depth + b"}" + b"s" * depth + b"."


def bomb():
    """A small file of 10 MB of zeros."""
    content = saved({"w": torch.zeros(10**7 // 4)})
    return repacked(content, lambda _, text: text, zipfile.ZIP_DEFLATED)


def script():
    file = io.BytesIO()
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), file)
    return file.getvalue()


def structures():
    """{what a training script may have saved: content}, with the tensors of STATE in it."""
    network = nn.Linear(2, 2)
    adam = torch.optim.Adam(network.parameters())
    network(torch.ones(1, 2)).sum().backward()
    adam.step()
    rest = {"optimizer": adam.state_dict(), "epoch": 3, "args": argparse.Namespace(lr=0.1)}
    for what, tree in {
        "bare": STATE,
        "state_dict": {"state_dict": STATE} | rest,
        "model": rest | {"model": {"module": STATE}},
    }.items():
        for legacy in (False, True):
            yield f"{what}, {'legacy' if legacy else 'zip'}", saved(tree, legacy)


def damaged():
    """(what was done, content, whether it must be refused or may load as STATE)."""
    for what, content in structures():
        yield what, content, False
        for tenth in range(10):
            yield f"{what}: cut at {tenth}0 %", content[: len(content) * tenth // 10], True
        if "zip" in what:  # the older format has no checksums
            for place in range(0, len(content), len(content) // 40):
                flipped = bytearray(content)
                flipped[place] ^= 1 << place % 8
                yield f"{what}: bit flipped in byte {place}", bytes(flipped), False
    weight = STATE["fc.weight"]
    for what, value in {
        "NaN": weight.clone().fill_(math.nan),
        "infinity": weight.clone().index_fill_(0, torch.tensor(3), math.inf),
        "NaN in 8 bits": torch.full((4,), math.nan).to(torch.float8_e4m3fn),
        "sparse": weight.to_sparse(),
        "sparse rows": weight.to_sparse_csr(),
        "meta": weight.to("meta"),
        "quantized": torch.quantize_per_tensor(weight, 1.0, 0, torch.qint8),
        "nested": torch.nested.nested_tensor([torch.ones(2), torch.ones(3)]),
        "complex": weight.to(torch.complex64),
        "10**12 of one number": torch.ones(1).expand(10**12),
        "an array": weight.numpy(),
        "code": Code(),
        "a network": nn.Linear(2, 2),
    }.items():
        for legacy in (False, True):
            yield what, saved(STATE | {"fc.weight": value}, legacy), True
    for tree in ({}, [], None, 7, "text", [STATE], tuple(STATE.values()), {1: weight}, weight):
        yield f"{tree!s:.20}", saved(tree), True
    for tree in (STATE, {}, Code(), np.ones(3), [1]):
        yield "a bare pickle", pickle.dumps(tree), True
    for what, text in {"deep": nested(10_000), "empty": b"", "cut": nested(9)[:-3]}.items():
        yield f"a dict: {what}", archive(**{"data.pkl": text}), True
    yield "a dict in itself", archive(**{"data.pkl": b"\x80\x02}q\x00X\1\0\0\0ah\x00s."}), True
    yield "TorchScript", script(), True
    whole = saved(STATE)
    yield (
        "short records",
        repacked(whole, lambda name, text: text[: 50 + 9**9 * ("." in name)]),
        True,
    )
    yield "a bomb", archive(zipfile.ZIP_DEFLATED, **{"data/0": bytes(10**7)}), True
    # 4096 numbers of fc.weight become 2**31, in a file of 20,000 bytes.
    huge = b"\x8a\x05" + (2**31).to_bytes(5, "little")
    yield "8 GiB", saved(STATE, True).replace(b"M\x00\x10", huge), True


@pytest.fixture
def read(tmp_path):
    """read(content): the tensors, or the line that refuses them."""

    def read(content):
        path = tmp_path / "w.pth"
        path.write_bytes(content)
        try:
            return pretrained.read_weights(str(path), "lenet")[0]
        except UserError as error:
            said, status = str(error), error.status
        assert status == 2 and "\n" not in said and len(said) <= 400
        return said

    return read


@pytest.mark.filterwarnings("ignore")  # of formats that torch itself no longer likes
def test_damaged_files(read, capfd):
    """66 files and more that are not as they were saved: one line each, or the values saved."""
    cases = list(damaged())
    assert len(cases) >= 66
    for what, content, refused in cases:
        found = read(content)
        assert isinstance(found, str) if refused else True, what
        if not isinstance(found, str):
            assert found.keys() == STATE.keys(), what
            assert all(torch.equal(found[name], STATE[name]) for name in STATE), what
    assert capfd.readouterr() == ("", "")


@pytest.mark.filterwarnings("ignore")
def test_what_is_said(read):
    """What is wrong with a file is named, with the tensor."""
    weight, whole = STATE["fc.weight"], saved(STATE)
    for content, said in {
        whole[:-9]: "is cut off or damaged",
        whole.replace(weight.numpy().tobytes(), bytes(weight.nbytes)): "is cut off or damaged",
        saved(STATE, True)[:-9]: "cut off, damaged or",
        saved(STATE | {"x": weight * math.nan}): "not finite: x holds NaN",
        saved(STATE | {"x": weight.to("meta")}): "x is without values",
        saved(STATE | {"x": weight.to_sparse()}): "x is sparse",
        saved(STATE | {"x": torch.ones(1).expand(10**12)}): "x is larger than the file",
        bomb(): "larger than the file",
        script(): "is a TorchScript archive",
        archive(**{"data.pkl": nested(10_000)}): "holds no tensors with names",
    }.items():
        assert said in read(content)


def test_types_are_kept(read):
    """Tensors of any real type load as they are."""
    for kind in ("float16", "bfloat16", "float64", "int8", "int64", "bool", "float8_e4m3fn"):
        value = torch.ones(4, 4).to(getattr(torch, kind))
        assert read(saved({"w": value}))["w"].dtype == value.dtype


def test_too_many(read, monkeypatch):
    """More tensors than any network has are refused, in both formats, also those of one storage."""
    monkeypatch.setattr(pretrained.pickles, "MOST", 20)
    one = torch.ones(30)
    for tree in ({str(i): torch.ones(1) for i in range(30)}, {str(i): one[i] for i in range(30)}):
        for legacy in (False, True):
            assert "which no network has" in read(saved(tree, legacy))


def test_no_checksums(read):
    """A file that was written without checksums loads; so does one that was compressed."""
    options = torch.serialization
    options.set_crc32_options(False)
    try:
        whole = saved({"w": torch.ones(3)})
    finally:
        options.set_crc32_options(True)
    assert read(whole)["w"].sum() == 3
    again = repacked(saved({"w": torch.rand(999)}), lambda _, text: text, zipfile.ZIP_DEFLATED)
    assert len(read(again)["w"]) == 999
