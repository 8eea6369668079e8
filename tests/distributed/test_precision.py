"""Device and precision are what was asked for, or what the machine does best."""

import pytest
import torch

from lenslet.distributed import precision
from lenslet.errors import UserError


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    """No launcher."""
    monkeypatch.delenv("ACCELERATE_MIXED_PRECISION", raising=False)


def machine(monkeypatch, kind=None, count=0):
    """A machine with so many GPUs of a kind; what becomes the current one is returned."""
    found, current = kind and torch.device(kind), []
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check: found)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "set_device_index", current.append)
    return current


@pytest.mark.parametrize(
    ("gpus", "asked", "device"),
    [
        ((), "auto", "cpu"),
        ((), "cpu", "cpu"),
        (("cuda", 2), "auto", "cuda"),
        (("cuda", 2), "cpu", "cpu"),
        (("cuda", 2), "cuda", "cuda"),
        (("cuda", 2), "cuda:1", "cuda:1"),
        (("mps", 1), "mps", "mps"),
    ],
)
def test_choose_device(monkeypatch, gpus, asked, device):
    """The GPU if there is one, or what was asked for; its number makes it the current one."""
    current = machine(monkeypatch, *gpus)
    assert precision.choose_device(asked) == torch.device(device)
    assert current == ([1] if asked == "cuda:1" else [])


@pytest.mark.parametrize("asked", ["cuda:2", "mps", "cuda:x", "meta", "cpu:0", "gpu", ""])
def test_a_device_that_is_not_there(monkeypatch, asked):
    """It is refused, in one line that names those that are."""
    machine(monkeypatch, "cuda", 2)
    with pytest.raises(UserError, match=r"^no such device here, only cpu, cuda:0, cuda:1$"):
        precision.choose_device(asked)
    machine(monkeypatch)
    with pytest.raises(UserError, match=r"only cpu$"):
        precision.choose_device("cuda")


@pytest.mark.parametrize(
    ("asked", "given", "device", "native", "chosen"),
    [
        ("auto", None, "cpu", True, "bf16"),
        ("auto", None, "cpu", False, "no"),
        ("auto", None, "cuda", True, "bf16"),
        ("auto", None, "cuda", False, "fp16"),
        ("auto", None, "mps", True, "no"),
        ("auto", "no", "cpu", True, "bf16"),  # what launchers say who were not asked
        ("auto", "fp16", "mps", True, "fp16"),
        ("auto", "bf16", "cpu", False, "bf16"),
        ("auto", "fp8", "cuda", True, "fp8"),
        ("bf16", "fp16", "cuda", True, "fp16"),
        ("bf16", None, "cpu", False, "bf16"),
        ("fp16", "no", "cuda", True, "fp16"),
        ("no", None, "cpu", True, "no"),
        ("no", "bf16", "cuda", True, "no"),
    ],
)
def test_choose_precision(monkeypatch, asked, given, device, native, chosen):
    """Given to the launcher > asked here > what the device has natively; `no` forces float32."""
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: native)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: native)
    if given:
        monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", given)
    assert precision.choose_precision(asked, device) == chosen
    if asked == "auto":  # a recipe's word comes before what the device has, and only that
        expected = given if given in ("fp16", "bf16", "fp8") else "no"
        assert precision.choose_precision("auto", device, otherwise="no") == expected


@pytest.mark.parametrize(
    ("flags", "native"),
    [
        ("flags : fpu avx512f avx512_bf16", True),
        ("flags : fpu amx_bf16", True),
        ("Features : fp asimd bf16", True),
        ("flags : fpu avx2 avx512f", False),
        ("model name : bf16-like", False),
    ],
)
def test_cpu_has_bf16(monkeypatch, tmp_path, flags, native):
    """The processor's own flags say whether it multiplies bfloat16; no such file says no."""
    (tmp_path / "cpuinfo").write_text(f"processor : 0\n\n{flags}\n")
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "cpuinfo")
    assert precision.cpu_has_bf16() is native
    (tmp_path / "cpuinfo").unlink()
    assert precision.cpu_has_bf16() is False


@pytest.mark.parametrize(
    ("trained", "device", "has", "chosen"),
    [
        ("bf16", "cpu", True, "bf16"),
        ("bf16", "cpu", False, "no"),
        ("no", "cpu", True, "no"),
        ("fp16", "cpu", True, "no"),
        ("fp16", "cuda", True, "fp16"),
        ("bf16", "cuda", False, "no"),
        ("fp8", "cuda", True, "no"),
        ("bf16", "mps", True, "no"),
    ],
)
def test_as_trained(monkeypatch, trained, device, has, chosen):
    """Weights are used in the precision of their training where the device has it, else float32."""
    monkeypatch.setattr(precision, "cpu_has_bf16", lambda: has)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: has)
    assert precision.as_trained(trained, device) == chosen


def test_autocast():
    """A product is computed in the precision chosen, and nothing changes for `no`."""
    x = torch.ones(2, 2)
    for name, kind in (("no", torch.float32), ("bf16", torch.bfloat16)):
        with precision.autocast(x.device, name):
            assert (x @ x).dtype == kind
