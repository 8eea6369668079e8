"""What happens to a batch of uint8 pictures on the device: augmentation, and `Prepare`.

Training, testing and predicting all prepare pictures with the same `Prepare`, whose settings are in
the header of the weights.
"""

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
    Shifts are up to 1/14 of the side (2 pixels of 28 or 32), the border reflected.
    """
    move, flip = AUGMENTATIONS[kind]
    if not (move or flip):
        return images
    draws = uniform(seed, epoch, index, 3)
    if move and not decoded:
        height, width = images.shape[2:]
        reach = min(max(1, round(min(height, width) / 14)), min(height, width) - 1)
        padded = F.pad(images.float(), [reach] * 4, mode="reflect").to(torch.uint8)
        windows = padded.unfold(2, height, 1).unfold(3, width, 1)  # [B, C, shifts, shifts, H, W]
        down, across = (draws[:, :2] * (2 * reach + 1)).long().unbind(1)
        images = windows[torch.arange(len(images), device=images.device), :, down, across]
    if flip:
        images = torch.where(draws[:, 2, None, None, None] < 0.5, images.flip(3), images)
    return images


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


def channel_statistics(images: Tensor) -> dict[str, list[float]]:
    """mean and std (standard deviation) of each channel over all pixels, 0..1 scale.

    images uint8 [N, C, H, W].  A channel without contrast gets a deviation of one grey level.
    """
    count = images.numel() / images.shape[1]
    total = sum(part.sum((0, 2, 3)) for part in images.split(4096))
    squares = sum(part.int().square().sum((0, 2, 3)) for part in images.split(4096))
    mean = total.double() / count
    std = (squares.double() / count - mean.square()).clamp(min=1).sqrt()
    return {"mean": (mean / 255).tolist(), "std": (std / 255).tolist()}
