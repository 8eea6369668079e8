"""Which images are trained on, and which are kept for validation: always the same ones."""

import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from lenslet.errors import UserError, counted

# From where to where on _hash()'s scale; in the order in which a class needs them.
RANGES = {"train": (52, 256), "val": (26, 52), "test": (0, 26)}


def _hash(name: str) -> float:
    """A number in 0..256 that follows from a name alone."""
    return int.from_bytes(hashlib.sha256(os.fsencode(name)).digest()[:6]) / 2**40


def split_by_hash(name: str) -> str:
    """'train', 'val' or 'test', 80/10/10, for an image of a folder that has no splits of its own.

    It depends on the file's name below that folder alone: adding an image moves no other.
    """
    place = _hash(name)
    return next(split for split, (least, _) in RANGES.items() if place >= least)


def divide(pairs: Iterable[tuple[str, str]], fixed: dict[str, str]) -> tuple[dict, set[str]]:
    """unit → split, and the units that were lent to another split than split_by_hash()'s.

    pairs: (unit, class) of each image; the images of a unit, a file or a group of files, stay
    together.  fixed: unit → split where that is known.  Where a class would have none in a split,
    the unit whose hash is nearest to that split is lent to it, from train where that has two; a
    class of few units has some in train first, then in val.
    """
    units_of, classes_of = defaultdict(set), defaultdict(set)
    for unit, name in pairs:
        units_of[name].add(unit)
        classes_of[unit].add(name)
    natural = {unit: fixed.get(unit) or split_by_hash(unit) for unit in classes_of}
    splits, order = dict(natural), list(RANGES)
    counts = Counter((name, splits[unit]) for name in units_of for unit in units_of[name])
    for wanted, (least, most) in RANGES.items():
        for name, units in units_of.items():
            if counts[name, wanted]:
                continue
            free = [
                (splits[unit] != "train", max(least - _hash(unit), _hash(unit) - most), unit)
                for unit in units - fixed.keys()
                if order.index(splits[unit]) > order.index(wanted)
                or all(counts[other, splits[unit]] > 1 for other in classes_of[unit])
            ]
            if free:
                *_, unit = min(free)
                counts.subtract((other, splits[unit]) for other in classes_of[unit])
                counts.update((other, wanted) for other in classes_of[unit])
                splits[unit] = wanted
    return splits, {unit for unit in splits if splits[unit] != natural[unit]}


def validation_mask(
    labels: Tensor, val: float, fold: str | None, groups: Tensor | None = None
) -> Tensor:
    """Mark the images to validate on, as bool [N]: the share `val`, or with fold "2/5" that part.

    labels int64 [N].  groups int64 [N]: which images to keep together, None: all may be parted.
    Errors: UserError where a class has fewer images than there are folds, or too few groups.
    """
    number, count = map(int, fold.split("/")) if fold else (1, 1)
    if groups is not None:
        parts = grouped(labels, groups, [1 / count] * count if fold else [val, 1 - val])
        marked = parts == number - 1
        if len(labels[~marked].unique()) < len(labels.unique()) or (fold and not marked.any()):
            part = f"fold {fold}" if fold else "validation"
            raise UserError(
                f"too few groups: {part} has no images, or leaves a class none to train"
            )
        return marked
    if not fold:
        return stratified(labels, val)
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


def grouped(labels: Tensor, groups: Tensor, shares: list[float]) -> Tensor:
    """The part of each image, 0..len(shares)-1, int64 [N]: these shares of each class, as near as
    whole groups come to them.  labels, groups int64 [N].

    One group after the other goes where it makes the squared error smallest: in a random order
    that is always the same, and where all shares are equal the largest groups first.
    """
    _, groups = groups.unique(return_inverse=True)
    counts = torch.zeros(int(groups.max()) + 1, int(labels.max()) + 1, dtype=torch.float64)
    counts.index_put_((groups, labels), torch.ones(len(labels)).double(), accumulate=True)
    counts /= counts.sum(0).clamp(min=1)  # each group's share of each class, [groups, classes]
    lacking = torch.tensor(shares, dtype=torch.float64)[:, None].repeat(1, counts.shape[1])
    order = torch.randperm(len(counts), generator=torch.Generator().manual_seed(0))
    if len(set(shares)) == 1:
        order = order[counts[order].sum(1).argsort(descending=True, stable=True)]
    parts = torch.empty_like(order)
    for group in order.tolist():
        parts[group] = part = (lacking @ counts[group]).argmax()
        lacking[part] -= counts[group]
    return parts[groups]
