"""Which images are trained on, and which are kept for validation: always the same ones."""

import hashlib
import os

import torch
from torch import Tensor

from lenslet.errors import UserError, counted


def split_by_hash(name: str) -> str:
    """'train', 'val' or 'test', 80/10/10, for an image of a folder that has no splits of its own.

    It depends on the file's name below that folder alone: adding an image moves no other.
    """
    first = hashlib.sha256(os.fsencode(name)).digest()[0]  # 0..255
    return "test" if first < 25.6 else "val" if first < 51.2 else "train"


def validation_mask(labels: Tensor, val: float, fold: str | None) -> Tensor:
    """Mark the images to validate on, as bool [N]: the share `val`, or with fold "2/5" that part.

    labels int64 [N].  Errors: UserError where a class has fewer images than there are folds.
    """
    if not fold:
        return stratified(labels, val)
    number, count = map(int, fold.split("/"))
    least = labels.bincount(minlength=1).min().item()
    if least < count:
        raise UserError(f"a class has {counted(least, 'image')}, too few for {count} folds")
    return folds(labels, count) == number - 1


def subset(labels: Tensor, limit: int | None) -> Tensor:
    """The indices of `limit` images of all classes in their proportion, in order; None: of all.

    labels int64 [N].  Errors: UserError where there are more classes than that.
    """
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    counts = labels.bincount()
    if limit < (classes := int((counts > 0).sum())):
        raise UserError(f"{counted(limit, 'image')}: too few for {classes} classes")
    # Each class's first image, then of whatever class has the smallest share so far.
    share = ranks(labels) / counts[labels]
    return share.argsort(stable=True)[:limit].sort().values


def ranks(labels: Tensor) -> Tensor:
    """Each image's place among those of its class, 0…, in a random order that is always the same.

    labels int64 [N]; returns int64 [N].  The seed is fixed, and not the run's own: runs can only be
    compared on the same validation images.
    """
    generator = torch.Generator().manual_seed(0)
    places = torch.empty_like(labels)
    for label in labels.unique():
        members = (labels == label).nonzero().flatten()
        order = torch.randperm(len(members), generator=generator)
        places[members[order]] = torch.arange(len(members))
    return places


def stratified(labels: Tensor, share: float) -> Tensor:
    """Mark that share of each class, as bool [N]; the same ones always.  labels int64 [N]."""
    wanted = torch.tensor([round(share * n) for n in labels.bincount().tolist()])
    return ranks(labels) < wanted[labels]


def folds(labels: Tensor, count: int) -> Tensor:
    """The fold of each image, 0..count-1, int64 [N].  labels int64 [N].

    Fold sizes differ by 1 at most, and so does the number of each class in them.
    """
    sizes = labels.bincount()
    return (ranks(labels) + (sizes.cumsum(0) - sizes)[labels]) % count
