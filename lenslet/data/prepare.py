"""From uint8 images to what the network is fed: the one preprocessing of all commands."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Prepare(nn.Module):
    """uint8 images [B, C, H, W] to what a network is fed: float32 [B, C, h, w], channels last.

    mean, std: of each channel, 0..1 scale.  input_size (h, w): images of another size are resized
    to it (bilinear, anti-aliased).
    """

    def __init__(self, mean: list[float], std: list[float], input_size: tuple[int, int]):
        super().__init__()
        self.input_size = tuple(input_size)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        # Channels are moved last only here: arithmetic on three at a time cannot be vectorised.
        images = images.float().sub_(self.mean).div_(self.std)
        images = images.contiguous(memory_format=torch.channels_last)
        if images.shape[2:] != self.input_size:
            images = F.interpolate(images, self.input_size, mode="bilinear", antialias=True)
        return images

    def undo(self, images: Tensor) -> Tensor:
        """What the network was fed, as uint8 images [B, C, h, w] to show."""
        return (images.float() * self.std + self.mean).round().clamp(0, 255).to(torch.uint8)


def channel_statistics(parts: Iterable[Tensor]) -> dict[str, list[float]]:
    """mean and std (standard deviation) of each channel over all pixels, 0..1 scale.

    parts: uint8 [B, C, H, W] each.  A channel without contrast gets a deviation of one grey level.
    """
    count, total, squares = 0, 0, 0
    for images in parts:
        count += images.numel() / images.shape[1]
        total += images.sum((0, 2, 3))
        squares += images.int().square().sum((0, 2, 3))
    mean = total.double() / count
    std = (squares.double() / count - mean.square()).clamp(min=1).sqrt()
    return {"mean": (mean / 255).tolist(), "std": (std / 255).tolist()}
