"""Images with captions are drawn on one sheet, and PNG files read back the same."""

import io

import numpy as np
import pytest
import torch
from PIL import Image

from lenslet.grid import draw_grid, encode_png


@pytest.mark.parametrize("channels", [1, 3])
def test_draw_grid(channels):
    """A grid is eight tiles across, and only the captions of wrong answers are red."""
    batch = torch.full((9, channels, 8, 8), 128, dtype=torch.uint8)
    right = draw_grid(batch, ["cat"] * 9, [False] * 9)
    wrong = draw_grid(batch, ["cat"] * 9, [False] * 8 + [True])
    assert right.dtype == torch.uint8
    assert right.shape == wrong.shape == (3, 2 * 142 + 8, 8 * 120 + 8)
    red = (wrong[0].int() - wrong[1].int() > 60).nonzero()
    assert len(red) > 10
    assert (red[:, 0] > 8 + 142 + 112 - 1).all()
    assert (red[:, 1] < 120).all()
    assert not (right[0].int() - right[1].int() > 60).any()


@pytest.mark.parametrize("channels", [1, 3])
def test_encode_png(channels):
    """An image written as PNG is read back the same."""
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    decoded = np.asarray(Image.open(io.BytesIO(encode_png(image)))).reshape(5, 7, channels)
    assert np.array_equal(decoded, image.permute(1, 2, 0))
