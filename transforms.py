"""What happens to a batch of uint8 pictures on the device: augmentation, and `Prepare`.

Training, testing and predicting all prepare pictures with the same `Prepare`, whose settings are in
the header of the weights.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

# What --augment means: move (small pictures are shifted, photographs cropped at random) and flip.
AUGMENTATIONS = {"none": (False, False), "light": (True, False), "standard": (True, True)}


def uniform(seed: int, epoch: int, index: Tensor, draws: int) -> Tensor:
    """Random numbers in [0, 1), float32 [B, draws], that depend on nothing but the arguments.

    index int64 [B].  A counter-based generator on Wellons' 32-bit hash ("lowbias32").
    """
    mask = 0xFFFFFFFF
    x = (index[:, None] * draws + torch.arange(draws, device=index.device)) & mask
    for key in (0, epoch + 1, seed + 1):
        x = x ^ (key * 0x9E3779B9 & mask)
        x = ((x ^ (x >> 16)) * 0x21F0AAAD) & mask
        x = ((x ^ (x >> 15)) * 0xD35A2D97) & mask
        x = x ^ (x >> 15)
    return (x >> 8).float() / (1 << 24)


def augment(images: Tensor, kind: str, decoded: bool, seed: int, epoch: int, index: Tensor):
    """Randomly shifted and mirrored copies of a uint8 batch [B, C, H, W], one draw a picture.

    kind: a key of AUGMENTATIONS.  decoded: photographs, which their decoder has cropped already.
    Shifts are up to 1/14 of the side (2 pixels of 28 or 32), the border reflected.  Every picture
    is mirrored in every other epoch, which ones first being drawn: two epochs show it both ways,
    where a new draw in each would repeat half of them (Jordan 2024, arXiv:2404.00498).
    """
    move, flip = AUGMENTATIONS[kind]
    if move and not decoded:
        height, width = images.shape[2:]
        reach = min(max(1, round(min(height, width) / 14)), min(height, width) - 1)
        windows = _windows(images, reach)
        draws = uniform(seed, epoch, index, 2)
        down, across = (draws * (2 * reach + 1)).long().unbind(1)
        images = windows[torch.arange(len(images), device=images.device), :, down, across]
    if flip:
        mirrored = (uniform(seed, -1, index, 1) < 0.5) ^ (epoch % 2 == 1)
        images = torch.where(mirrored[:, :, None, None], images.flip(3), images)
    return images


def _windows(images: Tensor, reach: int) -> Tensor:
    """All shifted copies of a batch, [B, C, 2 reach + 1 down, 2 reach + 1 across, H, W], as a view.

    The border is reflected.
    """
    height, width = images.shape[2:]
    padded = F.pad(images.float(), [reach] * 4, mode="reflect").to(torch.uint8)
    return padded.unfold(2, height, 1).unfold(3, width, 1)


def views(images: Tensor, kind: str, decoded: bool) -> list[tuple[float, Tensor]]:
    """What a network that was trained with augment() may also be shown of the same pictures.

    (weight, uint8 [B, C, H, W]) of each, whose answers are to be averaged: both of mirrored and
    not; half of the weight for the pictures where they are, and half for shifts by one pixel to
    the upper left and lower right (after airbench94: Jordan 2024, arXiv:2404.00498).
    """
    move, flip = AUGMENTATIONS[kind]
    found = [(1.0, images)]
    if move and not decoded and min(images.shape[2:]) > 1:
        windows = _windows(images, 1)
        found = [(0.5, images), *((0.25, windows[:, :, k, k]) for k in (0, 2))]
    if flip:
        found = [
            (w / 2, x)
            for weight, view in found
            for w, x in ((weight, view), (weight, view.flip(3)))
        ]
    return found


class Prepare(nn.Module):
    """uint8 pictures [B, C, H, W] to what a network is fed: float32 [B, C, h, w], channels last.

    mean, std: of each channel, 0..1 scale.  input_size (h, w): resized to it (bilinear,
    anti-aliased) where the pictures differ.  The one preprocessing of all commands.
    """

    def __init__(self, mean: list[float], std: list[float], input_size: tuple[int, int]):
        super().__init__()
        self.input_size = tuple(input_size)
        self.register_buffer("mean", 255 * torch.tensor(mean).view(1, -1, 1, 1))
        self.register_buffer("std", 255 * torch.tensor(std).view(1, -1, 1, 1))

    def forward(self, images: Tensor) -> Tensor:
        images = images.to(torch.float32, memory_format=torch.channels_last)
        images = images.sub_(self.mean).div_(self.std)
        if images.shape[2:] != self.input_size:
            images = F.interpolate(images, self.input_size, mode="bilinear", antialias=True)
        return images

    def undo(self, images: Tensor) -> Tensor:
        """What the network was fed as uint8 pictures [B, C, h, w], to look at."""
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
