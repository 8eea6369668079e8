"""Which part of a photograph a network is shown, and that part resized, for a whole batch."""

import torch
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

    images uint8 [B, C, H, W]; boxes float [B, 4] as above; returns uint8 [B, C, *size].  Along each
    axis every pixel of the result is a weighted mean of the image's, so both are matrix products.
    """
    left, upper, width, height = boxes.unbind(1)
    rows = _weights(upper, height, images.shape[2], size[0])  # [B, size[0], H]
    columns = _weights(left, width, images.shape[3], size[1])  # [B, size[1], W]
    resized = rows[:, None] @ images.float() @ columns.transpose(1, 2)[:, None]
    return resized.round().to(torch.uint8)


def _weights(first: Tensor, length: Tensor, side: int, count: int) -> Tensor:
    """The weights of `side` pixels in each of `count`, float [B, count, side], rows of sum 1.

    first, length float [B]: of the part that is resized, as shares of the side.
    """
    step = (length * side / count)[:, None, None]  # pixels of the image to one of the result
    pixels, results = (torch.arange(n, device=first.device) + 0.5 for n in (side, count))
    centres = (first * side)[:, None, None] + results[:, None] * step
    weights = (1 - (pixels - centres).abs() / step.clamp(min=1)).clamp(min=0)
    return weights / weights.sum(2, keepdim=True)
