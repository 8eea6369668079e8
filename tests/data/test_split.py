"""What is kept for validation is always the same, of all classes alike, and nothing is lost."""

import hashlib

import pytest
import torch

from lenslet.data.split import (
    divide,
    folds,
    ranks,
    split_by_hash,
    stratified,
    subset,
    validation_mask,
)
from lenslet.errors import UserError


def test_stratified():
    """The share of every class is marked, to the nearest image, whatever the global seed."""
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 4)[torch.randperm(74)]
    marked = stratified(labels, 0.1)
    assert [int(marked[labels == k].sum()) for k in range(3)] == [5, 2, 0]
    torch.manual_seed(9)
    assert torch.equal(stratified(labels, 0.1), marked)
    assert not stratified(labels, 0).any()


def test_ranks():
    """The random order of a class is this one on every machine: runs are compared by it."""
    labels = torch.tensor([0, 1, 0, 2, 1, 0, 0, 1, 2, 0, 1])
    assert ranks(labels).tolist() == [1, 2, 2, 1, 1, 4, 3, 3, 0, 0, 0]


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_folds(count):
    """Each image is in one fold; sizes differ by 1 at most, and so does each class in them."""
    labels = torch.randperm(397, generator=torch.Generator().manual_seed(1)) % 7
    labels[labels > 4] = 0
    parts = folds(labels, count)
    assert parts.min() == 0 and parts.max() == count - 1
    for these in [parts, *(parts[labels == label] for label in labels.unique())]:
        sizes = these.bincount(minlength=count)
        assert sizes.max() - sizes.min() <= 1
    assert torch.equal(parts, folds(labels, count))


def test_validation_mask():
    """A share of every class, or one of several folds, which all classes must have images for."""
    labels = torch.tensor([0] * 30 + [1] * 9)
    assert torch.equal(validation_mask(labels, 0.1, None), stratified(labels, 0.1))
    for k in range(3):
        assert torch.equal(validation_mask(labels, 0.1, f"{k + 1}/3"), folds(labels, 3) == k)
    with pytest.raises(UserError, match=r"^a class has 9 images, too few for 10 folds$"):
        validation_mask(labels, 0.1, "1/10")
    assert validation_mask(labels, 0.1, "9/9").sum() == 4  # a class of just 9 is enough
    assert validation_mask(torch.zeros(4, dtype=torch.int64), 0.1, "1/2").sum() == 2  # so is one
    with pytest.raises(UserError, match=r"^a class has 0 images, too few for 2 folds$"):
        validation_mask(torch.empty(0, dtype=torch.int64), 0.1, "1/2")


@pytest.mark.parametrize("limit", [3, 10, 41, 100])
def test_subset(limit):
    """So many images, in order, each class by its share and at least one of it."""
    labels = torch.tensor([0] * 60 + [1] * 38 + [2] * 2)[torch.randperm(100)]
    kept = subset(labels, limit)
    assert len(kept) == limit and torch.equal(kept, kept.unique())
    counts = labels[kept].bincount(minlength=3)
    assert counts.min() >= 1
    assert (counts - limit * torch.tensor([0.60, 0.38, 0.02])).abs().max() <= 2
    assert torch.equal(subset(labels, None), torch.arange(100))
    with pytest.raises(UserError, match="2 images: too few for 3 classes"):
        subset(labels, 2)


def test_subset_of_small_classes():
    """A class with one image counts, and a number that no image has does not."""
    labels = torch.tensor([2, 0, 2, 2])
    assert labels[subset(labels, 2)].sort().values.tolist() == [0, 2]
    with pytest.raises(UserError, match="1 image: too few for 2 classes"):
        subset(labels, 1)


def test_split_by_hash():
    """A file's split follows from its name alone, and never changes between versions."""
    splits = [split_by_hash(f"ants/{i}.png") for i in range(5000)]
    for split, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        assert abs(splits.count(split) / 5000 - share) < 0.02
    assert [i for i in range(40) if splits[i] == "test"] == [1, 7, 13, 22]
    assert [i for i in range(40) if splits[i] == "val"] == [14, 27, 28, 33, 35]
    # The first byte of their hashes is 25, 26, 51 and 52: next to the borders, of 256.
    borders = [split_by_hash(name) for name in ("235.png", "1238.png", "2.png", "178.png")]
    assert borders == ["test", "val", "val", "train"]


@pytest.mark.parametrize("count", range(1, 40))
def test_divide(count):
    """A class has images in train, then in val, then in test; what is not lent lies by its hash;
    and a new image moves none but those that are lent before or after, two of a class at most.
    """
    names = [f"ants/{i}.png" for i in range(count + 1)]
    before, lent = divide([(name, "ants") for name in names[:count]], {})
    after, then = divide([(name, "ants") for name in reversed(names)], {})
    assert {before[name] for name in names[:count]} == set(["train", "val", "test"][:count])
    assert all(before[name] == split_by_hash(name) for name in before.keys() - lent)
    assert len(lent) <= 2 and len(then) <= 2
    assert {name for name in before if before[name] != after[name]} <= lent | then


def test_divide_lends_the_nearest():
    """The image whose hash is nearest to the empty part is lent, from train where that has two."""
    names = [str(i) for i in range(400) if split_by_hash(str(i)) == "train"][:50]
    splits, lent = divide([(name, "a") for name in names], {})
    nearest = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    assert splits[nearest[0]] == "val" and splits[nearest[1]] == "test" and len(lent) == 2


def test_divide_groups():
    """A group of two classes is lent whole, and leaves no class without training images."""
    pairs = [(f"{i // 2}", "ab"[i % 2]) for i in range(12)] + [("x", "c"), ("0", "c")]
    splits, _ = divide(pairs, {})
    for name in "abc":
        assert "train" in {splits[unit] for unit, of in pairs if of == name}
    fixed = {str(i): "train" for i in range(6)}
    splits, lent = divide(pairs, fixed)
    assert all(splits[unit] == "train" for unit in fixed) and lent <= {"x"}


def test_grouped_folds():
    """Groups stay whole, each image is validated once, and classes are as even as groups allow."""
    generator = torch.Generator().manual_seed(3)
    groups = torch.randint(0, 40, (600,), generator=generator)
    labels = torch.randint(0, 3, (600,), generator=generator)
    masks = [validation_mask(labels, 0.1, f"{k}/5", groups) for k in range(1, 6)]
    assert torch.equal(sum(mask.int() for mask in masks), torch.ones(600, dtype=torch.int32))
    for mask in [*masks, validation_mask(labels, 0.2, None, groups)]:
        assert not set(groups[mask].tolist()) & set(groups[~mask].tolist())
        share = labels[mask].bincount(minlength=3) / labels.bincount()
        assert (share - 0.2).abs().max() < 0.05
    again = validation_mask(labels, 0.1, "1/5", groups)
    assert torch.equal(again, masks[0])


def test_too_few_groups():
    """A class in one group cannot be both trained on and validated, nor two groups in three."""
    labels = torch.tensor([0, 0, 1, 1])
    for groups, fold in (([0, 0, 1, 1], "1/2"), ([0, 1, 0, 1], "3/3")):
        with pytest.raises(UserError, match=f"too few groups: fold {fold}"):
            validation_mask(labels, 0.1, fold, torch.tensor(groups))
