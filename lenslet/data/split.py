"""Which images are trained on, and which are kept for validation: always the same ones."""

import torch
from torch import Tensor

from lenslet.errors import UserError


def validation_mask(labels: Tensor, val: float, fold: str | None) -> Tensor:
    """Mark what is validated on, as bool [N].  labels int64 [N]."""
    if not fold:
        return stratified(labels, val)
    number, count = map(int, fold.split("/"))
    least = labels.bincount(minlength=1).min().item()
    if least < count:
        raise UserError(f"--fold {fold}: a class has {least} pictures, too few for {count} folds")
    return folds(labels, count) == number - 1


def subset(labels: Tensor, limit: int | None, name: str) -> Tensor:
    """The indices of `limit` pictures of all classes in their proportion, in order; None: of all.

    labels int64 [N].
    """
    if limit is None or limit >= len(labels):
        return torch.arange(len(labels))
    counts = labels.bincount()
    if limit < (counts > 0).sum():
        raise UserError(f"--data {name}: {limit} pictures are fewer than there are classes")
    # Each class's first picture, then whatever class has the smallest share so far.
    share = ranks(labels) / counts[labels]
    return share.argsort(stable=True)[:limit].sort().values


def ranks(labels: Tensor) -> Tensor:
    """Each picture's place among those of its class, 0…, in an order that is always the same.

    labels int64 [N]; int64 [N].  The seed is not the run's own: two runs must be judged on the same
    pictures.
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
    """The fold of each picture, 0..count-1, int64 [N]; of one size but for 1, each class in each
    as evenly as can be.  labels int64 [N].
    """
    sizes = labels.bincount()
    return (ranks(labels) + (sizes.cumsum(0) - sizes)[labels]) % count
