"""Crops of whole batches are the ones that the decoder cuts."""

import numpy as np
import pytest
import torch
from PIL import Image

from lenslet.data.crop import central_boxes, crop, random_boxes
from lenslet.data.decode import read_image


def smooth(height, width):
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 9) + np.cos(y / 7), np.sin(x / 5 + y / 11), np.cos(x / 13)]
    return (127 + 60 * np.stack(waves, -1)).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("size", [(24, 24), (16, 40), (100, 100)])
def test_crop_is_pillows(size):
    """Boxes, enlarged or reduced, come out as Pillow resizes them, to a grey level."""
    pixels = smooth(70, 90)
    image, images = Image.fromarray(pixels), torch.from_numpy(pixels).permute(2, 0, 1)
    boxes = random_boxes(torch.full((20,), 90 / 70), torch.rand(20, 4), size[1] / size[0])
    cut = crop(images.expand(20, -1, -1, -1), boxes, size).permute(0, 2, 3, 1)
    boxes[:, 2:] += boxes[:, :2]
    corners = (boxes * torch.tensor([90, 70, 90, 70])).round().tolist()
    for box, found in zip(map(tuple, corners), cut, strict=True):
        wanted = np.asarray(image.crop(box).resize(size[::-1], Image.Resampling.BILINEAR))
        assert np.abs(wanted.astype(int) - found.numpy()).max() <= 1


def test_squeezed_images_keep_their_shapes(tmp_path):
    """A crop of an image that was squeezed into a square is the decoder's crop of its file."""
    Image.fromarray(smooth(300, 450)).save(tmp_path / "a.png")
    whole = torch.from_numpy(read_image(tmp_path / "a.png", 3, (192, 192), None)).permute(2, 0, 1)
    aspect = torch.tensor([450 / 300])
    for draws in torch.rand(5, 4, generator=torch.Generator().manual_seed(0)):
        found = crop(whole[None], random_boxes(aspect, draws[None], 1.0), (64, 64))[0]
        wanted = torch.from_numpy(read_image(tmp_path / "a.png", 3, (64, 64), 1.0, draws))
        assert (found.permute(1, 2, 0).int() - wanted.int()).abs().float().mean() < 4
    found = crop(whole[None], central_boxes(aspect, 1.0, 0.8), (64, 64))[0]
    wanted = torch.from_numpy(read_image(tmp_path / "a.png", 3, (64, 64), 0.8))
    assert (found.permute(1, 2, 0).int() - wanted.int()).abs().float().mean() < 4


def test_boxes_lie_inside():
    """Whatever is drawn for an image of any shape, its box is not empty and lies inside it."""
    aspects = torch.tensor([0.01, 0.5, 1.0, 3.0, 100.0]).repeat_interleave(81)
    corners = torch.cartesian_prod(*[torch.tensor([0.0, 0.5, 0.9999999])] * 4).repeat(5, 1)
    boxes = random_boxes(aspects, corners, 1.5)
    assert (boxes >= 0).all() and (boxes[:, 2:] > 0).all()
    assert (boxes[:, :2] + boxes[:, 2:] <= 1 + 1e-6).all()
