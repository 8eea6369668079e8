"""What is drawn depends on nothing but its key, and what affects the last bits is known."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from lenslet.distributed import determinism, precision
from lenslet.distributed.determinism import seed_step, uniform


def correlation(a, b):
    return np.corrcoef(a.flatten(), b.flatten())[0, 1].item()


def test_uniform():
    """Draws fill [0, 1) evenly, and neighbours of any kind have nothing to do with each other."""
    index = torch.arange(20_000)
    draws = uniform(0, 0, index, 3)
    assert draws.dtype == torch.float32
    assert draws.shape == (20_000, 3)
    assert draws.min() >= 0
    assert draws.max() < 1
    counts = torch.histc(draws, 20, 0, 1)  # 3000 expected in each, with a deviation of 53
    assert (counts - 3000).abs().max() < 5 * 53
    # Chance alone gives a correlation of 20,000 pairs a deviation of 0.007.
    assert abs(correlation(draws[1:, 0], draws[:-1, 0])) < 0.035
    assert abs(correlation(draws[:, 0], draws[:, 1])) < 0.035
    for other in (uniform(0, 1, index, 3), uniform(1, 0, index, 3)):
        assert abs(correlation(draws, other)) < 0.02


def test_uniform_is_keyed():
    """An image's draws depend on seed, epoch and its index, and on no batch or global seed."""
    torch.manual_seed(1)
    together = uniform(3, 7, torch.tensor([5, 900, 2]), 4)
    torch.manual_seed(2)
    for row, index in enumerate([5, 900, 2]):
        assert torch.equal(uniform(3, 7, torch.tensor([index]), 4)[0], together[row])
    for seed, epoch in ((4, 7), (3, 8)):
        assert not torch.equal(uniform(seed, epoch, torch.tensor([5, 900, 2]), 4), together)


@pytest.mark.parametrize("seed", [0, 2**32, 20_251_231_235_959, 2**63 - 1])
def test_uniform_takes_any_seed(seed):
    """A seed may be as large as torch's own, a date and time for example."""
    draws = uniform(seed, 0, torch.arange(1000), 2)
    assert 0.45 < draws.mean() < 0.55


def test_seed_step():
    """What dropout draws differs from step to step, seed to seed and process to process, and is
    the same again whatever was drawn before.
    """
    seen = set()
    for seed, step, rank in ((0, 0, 0), (0, 1, 0), (1, 0, 0), (2**63 - 1, 0, 0), (0, 0, 1)):
        process = SimpleNamespace(num_processes=2, process_index=rank, device=torch.device("cpu"))
        draws = []
        for _ in range(2):
            seed_step(seed, step, process)
            draws.append(tuple(torch.rand(4).tolist()))
        assert draws[0] == draws[1]
        seen.add(draws[0])
    assert len(seen) == 5


@pytest.mark.parametrize(
    ("cpuinfo", "expected"),
    [
        (
            "model name\t: A 1\nflags\t\t: fpu avx512_bf16 amx_bf16 amx_tile",
            "A 1 with X, avx512_bf16, amx_bf16",
        ),
        ("model name\t: A 1\nflags\t\t: fpu avx512_bf16", "A 1 with X, avx512_bf16"),
        ("model name\t: A 1\nflags\t\t: fpu sse2", "A 1 with X"),
        ("CPU implementer\t: 0x41\nFeatures\t: fp bf16", "arm 8 with X"),
        (None, "arm 8 with X"),
    ],
)
def test_device(cpuinfo, expected, tmp_path, monkeypatch):
    """Without a GPU, the device is the processor's model and its units for bf16, AMX among them;
    where the system has no list of those, what Python knows.
    """
    monkeypatch.setattr(precision, "CPUINFO", tmp_path / "cpuinfo")
    monkeypatch.setattr(determinism.platform, "processor", lambda: "arm 8")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "X")
    before = determinism.environment("no")
    if cpuinfo:
        (tmp_path / "cpuinfo").write_text(cpuinfo)
    assert determinism.environment("no")["device"] == expected
    changes = determinism.environment_changes(before, "no")
    assert len(changes) == (expected != before["device"])
    assert not changes or f"device was arm 8 with X, is {expected}: the last bits" in changes[0]


def test_environment():
    """What is stored of versions, threads and processes is what is running."""
    found = determinism.environment("bf16")
    assert torch.__version__.startswith(found["versions"]["torch"])
    assert found["precision"] == "bf16" and found["processes"] == 1
    torch.set_num_threads(5)
    assert determinism.environment("no")["threads"] == 5


def test_environment_changes():
    """Each thing that may change the last bits is told, with what it was and is; no other is."""
    before = determinism.environment("no")
    assert determinism.environment_changes(before, "no") == []
    (line,) = determinism.environment_changes(before, "bf16")
    assert line.startswith("precision was no, is bf16")
    before |= {"processes": 4, "device": "an abacus"}
    lines = determinism.environment_changes(before, "no")
    assert [line.partition(" ")[0] for line in lines] == ["device", "processes"]
    assert "processes was 4, is 1" in lines[1]
    assert determinism.environment_changes(before | {"more": 1}, "no") == lines
