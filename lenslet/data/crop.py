"""Which part of a photograph a network is shown, and that part resized, for a whole batch."""

import torch
import torch.nn.functional as F
from torch import Tensor


def random_boxes(aspects: Tensor, draws: Tensor, shape: float) -> Tensor:
    """Boxes to crop at random (Inception-style: Szegedy et al. 2014, arXiv:1409.4842).

    aspects float [B]: width / height of the images.  draws float [B, 4], in 0..1: for the area, 25
    to 100 % of the image's; the sides, 3:4 to 4:3 times `shape`, which is width / height of what
    the boxes are resized to; and the place.  A box that would not fit is cut to fit instead of
    being drawn again.  Returns left, upper, width and height as shares of the image's, float
    [B, 4].
    """
    area, sides, across, down = draws.unbind(1)
    area, sides = 0.25 + 0.75 * area, (4 / 3) ** (2 * sides - 1) * shape / aspects
    width, height = (area * sides).sqrt().clamp(max=1), (area / sides).sqrt().clamp(max=1)
    return torch.stack([across * (1 - width), down * (1 - height), width, height], 1)


def central_boxes(aspects: Tensor, shape: float, crop: float) -> Tensor:
    """The centred boxes with the sides `shape` and `crop` (0..1) of the largest size, as above."""
    width = crop * (shape / aspects).clamp(max=1)
    height = crop * (aspects / shape).clamp(max=1)
    return torch.stack([(1 - width) / 2, (1 - height) / 2, width, height], 1)


def crop(images: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """The boxes of images, resized to size (height, width): bilinear, anti-aliased.

    images uint8 [B, C, H, W], on any device; boxes float [B, 4] as above, on the CPU, and rounded
    to whole pixels here; returns uint8 [B, C, *size].  One by one, which on a CPU takes a sixth of
    the time of matrix products for the whole batch.
    """
    sides = torch.tensor([images.shape[3], images.shape[2]])
    first = torch.minimum((boxes[:, :2] * sides).round(), sides - 1)
    last = torch.maximum(((boxes[:, :2] + boxes[:, 2:]) * sides).round(), first + 1)
    pieces = []
    for image, place in zip(images, torch.cat([first, last], 1).int().tolist(), strict=True):
        left, upper, right, lower = place
        piece = image[None, :, upper:lower, left:right]
        piece = piece if piece.device.type == "cpu" else piece.float()  # CUDA has no other kernel
        pieces.append(F.interpolate(piece, size, mode="bilinear", antialias=True))
    cropped = torch.cat(pieces)
    return cropped.round().to(torch.uint8) if cropped.is_floating_point() else cropped
