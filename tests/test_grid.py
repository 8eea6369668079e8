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
    assert right.shape == wrong.shape == (3, 2 * 134 + 8, 8 * 120 + 8)
    red = (wrong[0].int() - wrong[1].int() > 60).nonzero()
    assert len(red) > 10
    assert (red[:, 0] > 8 + 134 + 112 - 1).all()
    assert (red[:, 1] < 120).all()
    assert not (right[0].int() - right[1].int() > 60).any()


def inked(sheet):
    """The rows and columns of a sheet that are not white all along."""
    dark = (sheet < 200).any(0)
    return dark.any(1).nonzero()[:, 0], dark.any(0).nonzero()[:, 0]


def test_captions_and_heading_have_room():
    """All lines of a caption are below its image, a long one is cut to the image's width, and the
    heading is above, on a sheet that is as wide as it needs.
    """
    image = torch.full((1, 3, 8, 8), 255, dtype=torch.uint8)
    rows, columns = inked(draw_grid(image, ["\n".join(["M" * 100] * 3)]))
    assert rows.min() >= 8 + 112 and columns.min() >= 8 and columns.max() < 8 + 112
    lines = [((rows >= y) & (rows < y + 14)).any() for y in range(120, 162, 14)]
    assert all(lines) and rows.max() < 162
    plain, headed = (draw_grid(image, ["a"], heading=text) for text in ("", "heading " * 20))
    rows, columns = inked(headed)
    assert rows.min() < 36 and columns.max() < headed.shape[2] - 8
    assert torch.equal(headed[:, 36:, : plain.shape[2]], plain[:, 8:])


@pytest.mark.parametrize("size", [(500, 1), (1, 500), (30, 200)])
def test_images_of_any_shape(size):
    """An image keeps its proportions, and one that is long and thin is drawn too."""
    drawn = draw_grid([torch.zeros(1, *size, dtype=torch.uint8)], [""])
    rows, columns = inked(drawn)
    expected = [max(1, round(112 * side / max(size))) for side in size]
    assert [len(rows), len(columns)] == expected
    assert rows.max() == 8 + 112 - 1  # right above its caption


@pytest.mark.parametrize("channels", [1, 3])
def test_encode_png(channels):
    """An image written as PNG is read back the same."""
    image = torch.randint(0, 256, (channels, 5, 7), dtype=torch.uint8)
    decoded = np.asarray(Image.open(io.BytesIO(encode_png(image)))).reshape(5, 7, channels)
    assert np.array_equal(decoded, image.permute(1, 2, 0))
