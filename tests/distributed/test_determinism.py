"""What is drawn depends on nothing but its key."""

import numpy as np
import pytest
import torch

from lenslet.distributed.determinism import uniform


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
    """A picture's draws depend on seed, epoch and its index, and on no batch or global seed."""
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
