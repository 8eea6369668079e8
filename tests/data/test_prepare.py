"""Preparation is plain arithmetic, and the statistics are those of all pixels."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from lenslet.data.prepare import Prepare, channel_statistics


def random_images(count, channels=3, height=28, width=28):
    generator = torch.Generator().manual_seed(0)
    shape = (count, channels, height, width)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def test_prepare():
    """Prepared pixels are (x / 255 - mean) / std of each channel, float32, channels last."""
    images, mean, std = random_images(5), [0.1, 0.5, 0.9], [0.2, 0.3, 0.4]
    prepared = Prepare(mean, std, (28, 28))(images)
    shape = (1, 3, 1, 1)
    expected = (images.numpy() / 255 - np.reshape(mean, shape)) / np.reshape(std, shape)
    assert prepared.dtype == torch.float32
    assert prepared.is_contiguous(memory_format=torch.channels_last)
    assert np.allclose(prepared, expected, atol=1e-5)


@pytest.mark.parametrize("size", [(32, 32), (14, 20)])
def test_prepare_resizes(size):
    """Images of another size are resized with anti-aliasing, and only those."""
    images = random_images(2)
    prepared = Prepare([0.5] * 3, [0.5] * 3, size)(images)
    expected = F.interpolate(images.double() / 127.5 - 1, size, mode="bilinear", antialias=True)
    assert prepared.shape == (2, 3, *size)
    assert torch.allclose(prepared.double(), expected, atol=1e-5)


def test_undo():
    """What was prepared can be looked at again: undo gives the same pixels."""
    images = random_images(5)
    prepare = Prepare([0.49, 0.48, 0.45], [0.2, 0.21, 0.22], (28, 28))
    assert torch.equal(prepare.undo(prepare(images)), images)


@pytest.mark.parametrize("count", [3, 4100])
@pytest.mark.parametrize("channels", [1, 3])
def test_channel_statistics(count, channels):
    """Mean and deviation are those of all pixels in double precision."""
    images = random_images(count, channels, 6, 7)
    images[:, 0] //= 3
    mean, std = channel_statistics(images.split(7)).values()
    pixels = images.numpy().astype(np.float64) / 255
    assert mean == pytest.approx(pixels.mean((0, 2, 3)).tolist(), rel=1e-9)
    assert std == pytest.approx(pixels.std((0, 2, 3)).tolist(), rel=1e-9)


def test_channel_without_contrast():
    """A channel of one value has a deviation of one grey level: nothing is divided by zero."""
    mean, std = channel_statistics([torch.full((3, 1, 4, 4), 51, dtype=torch.uint8)]).values()
    assert mean == pytest.approx([0.2])
    assert std == pytest.approx([1 / 255])
