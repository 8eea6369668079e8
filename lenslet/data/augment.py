"""Random changes to whole uint8 batches on the device."""

import torch
from torch import Tensor

from lenslet.distributed.determinism import derive, uniform

# kind → (move, flip).  Small images are moved by shifting them, photographs by cropping them at
# random; trivial and rand also use operations of torchvision's, see Augment.
AUGMENTATIONS = {
    "none": (False, False),
    "light": (True, False),
    "standard": (True, True),
    "trivial": (True, True),
    "rand": (True, True),
}


class Augment:
    """Random changes to a batch, which follow from the seed, the epoch and the images' indices.

    kind: a key of AUGMENTATIONS: trivial adds one random operation (TrivialAugment: Müller, Hutter
        2021, arXiv:2103.10158), rand two (RandAugment: Cubuk et al. 2019, arXiv:1909.13719).
    decoded: photographs, which their decoder has cropped already.
    erase: share of the images that lose a rectangle (Zhong et al. 2017, arXiv:1708.04896).
    mixup, cutmix: 0, or how evenly pairs are mixed (alpha), whole or by a rectangle (Zhang et al.
        2017, arXiv:1710.09412; Yun et al. 2019, arXiv:1905.04899); with both, either is
        drawn for each batch.
    fill: what erased and uncovered parts show, a number in 0..1 for each channel.
    """

    def __init__(self, kind, decoded, seed, erase=0.0, mixup=0.0, cutmix=0.0, fill=(0.0,)):
        self.kind, self.decoded, self.seed = kind, decoded, seed
        self.each, self.mixers = [], []
        if kind in ("trivial", "rand") or erase or mixup or cutmix:
            from torchvision.transforms import v2  # takes a second

            fill = [round(255 * value) for value in fill]
            self.each += [v2.TrivialAugmentWide(fill=fill)] if kind == "trivial" else []
            self.each += [v2.RandAugment(fill=fill)] if kind == "rand" else []
            self.each += [v2.RandomErasing(erase, value=fill)] if erase else []
            self.mixers += [v2.MixUp(alpha=mixup)] if mixup else []
            self.mixers += [v2.CutMix(alpha=cutmix)] if cutmix else []

    def __call__(self, images: Tensor, targets: Tensor, epoch: int, index: Tensor) -> tuple:
        """New images uint8 [B, C, H, W] and targets float [B, classes]; index int64 [B].

        An image is mixed with its neighbour in the batch, its targets alike.  torchvision draws
        from torch's global generator, which is seeded here for each image and then for the batch.
        """
        images = augment(images, self.kind, self.decoded, self.seed, epoch, index)
        if self.each:
            changed = []
            for image, i in zip(images, index.tolist(), strict=True):
                torch.default_generator.manual_seed(derive(self.seed, epoch, i))
                for change in self.each:
                    image = change(image)
                changed.append(image)
            images = torch.stack(changed)
        if self.mixers and len(index) > 1:
            # ~i is negative, so it is no other image's index.
            torch.default_generator.manual_seed(derive(self.seed, epoch, ~index[0].item()))
            mixer = self.mixers[torch.randint(len(self.mixers), ())]
            images, targets = mixer(images.float(), targets)
            images = images.round().to(torch.uint8)
        return images, targets


def augment(images: Tensor, kind: str, decoded: bool, seed: int, epoch: int, index: Tensor):
    """Randomly shifted and mirrored copies of a uint8 batch [B, C, H, W], one draw an image.

    kind: a key of AUGMENTATIONS.  decoded: photographs, which their decoder has cropped already.
    Shifts are up to 1/14 of the side (2 pixels of 28 or 32), the border reflected.  Every image is
    mirrored in every other epoch, beginning with one that is drawn: two epochs show it both ways,
    where a new draw in each would repeat half of them (Jordan 2024, arXiv:2404.00498).
    """
    move, flip = AUGMENTATIONS[kind]
    mirrored = torch.zeros_like(index, dtype=torch.bool)
    if flip:
        mirrored = (uniform(seed, -1, index, 1)[:, 0] < 0.5) ^ (epoch % 2 == 1)
    if move and not decoded:
        side = min(images.shape[2:])
        most = min(max(1, round(side / 14)), side - 1)
        shifts = (uniform(seed, epoch, index, 2) * (2 * most + 1)).long() - most
        return _shift(images, *shifts.unbind(1), mirrored)
    return torch.where(mirrored[:, None, None, None], images.flip(3), images) if flip else images


def _shift(images: Tensor, down: Tensor, across: Tensor, mirrored: Tensor) -> Tensor:
    """Images [B, C, H, W] shifted by int64 [B] pixels, borders reflected, and mirrored: bool [B].

    One gather does all of it, which takes half the time of padding, cutting and mirroring.
    """
    height, width = images.shape[2:]

    def positions(offset, side):  # [B, side]
        place = (torch.arange(side, device=images.device) + offset[:, None]).abs()
        return torch.where(place < side, place, 2 * (side - 1) - place)

    columns = positions(across, width)
    columns = torch.where(mirrored[:, None], columns.flip(1), columns)
    pixels = positions(down, height)[:, :, None] * width + columns[:, None]  # [B, H, W]
    pixels = pixels.flatten(1)[:, None].expand(-1, images.shape[1], -1)
    return images.flatten(2).gather(2, pixels).view(images.shape)


def tta_views(images: Tensor, kind: str, decoded: bool) -> list[tuple[float, Tensor]]:
    """Copies of the same images that a network trained with augment() has learned to recognise.

    (weight, uint8 [B, C, H, W]) of each, over whose answers the mean is taken: the images as they
    are and mirrored, with half of the weight, and the same shifted by one pixel to the upper left
    and to the lower right (after airbench94: Jordan 2024, arXiv:2404.00498).
    """
    move, flip = AUGMENTATIONS[kind]
    views = [(1.0, images)]
    if move and not decoded and min(images.shape[2:]) > 1:
        one = torch.ones(len(images), dtype=torch.int64, device=images.device)
        shifted = [_shift(images, by, by, one < 0) for by in (-one, one)]
        views = [(0.5, images), *((0.25, view) for view in shifted)]
    if flip:
        views = [(weight / 2, x) for weight, view in views for x in (view, view.flip(3))]
    return views
