"""Folders and sets are read, split and batched alike on any machine and any number of processes."""

import os
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

import lenslet.data.load
from lenslet.data import decode, sets, verify
from lenslet.data.batches import BatchSampler, Data, Split, on_device
from lenslet.data.decode import UnreadableImage
from lenslet.data.layout import list_folder, natural_sort_key
from lenslet.data.load import load
from lenslet.data.split import folds, stratified
from lenslet.errors import UserError

CPU = torch.device("cpu")
SPLITS = ["train", "val", "test"]


def names(data):
    return {split: set(part.names) for split, part in data.splits.items()}


def refuse(*parts, **settings):
    """load() refuses this with one line that has all the parts."""
    with pytest.raises(UserError) as caught:
        load(**{"wanted": SPLITS, **settings})
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message


def joined(lists):
    return list(chain.from_iterable(lists))


def listed(root):
    """The files of each split below root."""
    return {s: joined(inside.values()) for s, inside in list_folder(root)[0].items()}


def batches(loader):
    return [tuple(part.clone() for part in batch) for batch in on_device(loader, CPU)]


# Classes and layouts


def test_natural_order():
    """Numbers in names count as numbers, and any two names can be compared."""
    words = ["10", "2", "a10", "1", "0", "a2", "b", "a", "1a", ""]
    assert sorted(words, key=natural_sort_key) == [
        "",
        "0",
        "1",
        "1a",
        "2",
        "10",
        "a",
        "a2",
        "a10",
        "b",
    ]


def test_class_order(tmp_path, make_folder):
    """Classes are in natural order, and labels follow the folder that a picture lies in."""
    make_folder(tmp_path / "p", classes=("10", "2", "0", "1"))
    data = load(str(tmp_path / "p"), SPLITS)
    assert data.classes == ["0", "1", "2", "10"]
    for part in data.splits.values():
        assert [data.classes[i] for i in part.labels] == [n.split("/")[1] for n in part.names]


def test_own_splits(tmp_path, make_folder):
    """Own train/, val/ and test/ folders are used as they are."""
    make_folder(tmp_path / "p", {"train": 6, "val": 3, "test": 2})
    data = load(str(tmp_path / "p"), SPLITS)
    assert {split: len(part) for split, part in data.splits.items()} == {
        "train": 12,
        "val": 6,
        "test": 4,
    }
    for split, part in data.splits.items():
        assert all(name.startswith(f"{split}/") for name in part.names)


def test_kept_validation(tmp_path, make_folder):
    """Without val/ a tenth of every class is kept: always the same, nothing lost, nothing twice."""
    make_folder(tmp_path / "p", {"train": 20}, classes=("a", "b", "c"))
    data = load(str(tmp_path / "p"), ["train", "val"])
    found = names(data)
    assert Counter(data.splits["val"].labels.tolist()) == {0: 2, 1: 2, 2: 2}
    assert not found["train"] & found["val"]
    assert len(found["train"] | found["val"]) == 60
    torch.manual_seed(5)
    assert names(load(str(tmp_path / "p"), ["val"])) == {"val": found["val"]}


def test_no_validation(tmp_path, make_folder):
    """A share of 0 trains on everything that is not test, and leaves an own val/ alone."""
    make_folder(tmp_path / "train only", {"train": 5})
    make_folder(tmp_path / "own", {"train": 5, "val": 2})
    make_folder(tmp_path / "classes", {"": 60})
    for name, counts in (("train only", {"train": 10}), ("own", {"train": 10, "val": 4})):
        data = load(str(tmp_path / name), SPLITS, val=0)
        assert {split: len(part) for split, part in data.splits.items()} == counts
    kept, none = (names(load(str(tmp_path / "classes"), SPLITS, val=v)) for v in (0.1, 0))
    assert none == {"train": kept["train"] | kept["val"], "test": kept["test"]}


def test_classes_only(tmp_path, make_folder):
    """A folder of classes is divided 80/10/10 and completely; a new picture moves no other."""
    make_folder(tmp_path / "p", {"": 250}, size=(2, 2))
    root = tmp_path / "p"
    found = listed(root)
    assert sum(map(len, found.values())) == len(set(joined(found.values()))) == 500
    for split, share in (("train", 0.8), ("val", 0.1), ("test", 0.1)):
        assert abs(len(found[split]) / 500 - share) < 0.05
    Image.new("RGB", (2, 2)).save(root / "ants" / "0 a new one.png")
    grown = listed(root)
    root.rename(tmp_path / "elsewhere")
    moved = listed(tmp_path / "elsewhere")
    for split, files in found.items():
        assert set(files) <= set(grown[split])
        there = {file.relative_to(tmp_path / "elsewhere") for file in moved[split]}
        assert {file.relative_to(root) for file in grown[split]} == there


def test_stratified():
    """The share of every class is marked, to the nearest picture, whatever the global seed."""
    labels = torch.tensor([0] * 50 + [1] * 20 + [2] * 4)[torch.randperm(74)]
    marked = stratified(labels, 0.1)
    assert [int(marked[labels == k].sum()) for k in range(3)] == [5, 2, 0]
    torch.manual_seed(9)
    assert torch.equal(stratified(labels, 0.1), marked)
    assert not stratified(labels, 0).any()


@pytest.mark.parametrize("count", [2, 3, 5, 10])
def test_folds(count):
    """Each picture is in one fold; sizes differ by 1 at most, and so does each class in them."""
    labels = torch.randperm(397, generator=torch.Generator().manual_seed(1)) % 7
    labels[labels > 4] = 0
    parts = folds(labels, count)
    assert parts.min() == 0 and parts.max() == count - 1
    for these in [parts, *(parts[labels == label] for label in labels.unique())]:
        sizes = these.bincount(minlength=count)
        assert sizes.max() - sizes.min() <= 1
    assert torch.equal(parts, folds(labels, count))


def test_folds_of_data(tmp_path, make_folder):
    """Training and validation pictures of each fold are the whole, and all folds' cover it once;
    of a folder of classes only, the test pictures are in none.
    """
    divided = make_folder(tmp_path / "divided", {"train": 9, "test": 3})
    undivided = make_folder(tmp_path / "undivided", {"": 40})
    for name, test in (("digits", 360), (str(divided), 6), (str(undivided), None)):
        seen = Counter()
        for k in range(1, 4):
            data = load(name, ["train", "val", "test"], fold=f"{k}/3")
            parts = [set(data.splits[split].names) for split in ("train", "val")]
            assert not parts[0] & parts[1]
            seen.update(parts[1])
            everything = parts[0] | parts[1]
            assert test in (None, len(data.splits["test"]))
            assert not everything & set(data.splits["test"].names) or name == "digits"
        assert set(seen) == everything and set(seen.values()) == {1}
    with pytest.raises(UserError, match="9 pictures, too few for 10 folds"):
        load(str(divided), ["train", "val"], fold="1/10")


@pytest.mark.parametrize("limit", [5, 12, 50, 99])
def test_limit(tmp_path, make_folder, limit):
    """So many pictures, each class by its share and at least one of it, in their usual order."""
    root = make_folder(tmp_path / "f", {"train": 40, "val": 3}, classes=("a", "b"))
    make_folder(root, {"train": 2, "val": 3}, classes=("c",))
    data = load(str(root), ["train", "val"], limit=limit)
    train, val = data.splits["train"], data.splits["val"]
    assert len(train) == min(limit, 82) and len(val) == min(limit, 9)
    counts = train.labels.bincount(minlength=3)
    assert abs(counts[0] - counts[1]) <= 1 and counts[2] >= 1
    whole = load(str(root), ["train"]).splits["train"].names
    assert train.names == [name for name in whole if name in set(train.names)]
    with pytest.raises(UserError, match="2 pictures are fewer"):
        load(str(root), ["train"], limit=2)


def test_missing_class(tmp_path, make_folder):
    """A class without test pictures shifts no label."""
    make_folder(tmp_path / "p", {"train": 4}, classes=("a", "b", "c"))
    make_folder(tmp_path / "p", {"test": 3}, classes=("a", "c"))
    data = load(str(tmp_path / "p"), ["test"])
    assert data.classes == ["a", "b", "c"]
    assert data.splits["test"].labels.tolist() == [0, 0, 0, 2, 2, 2]


def test_wrong_folders(tmp_path, make_folder):
    """What is no folder of classes is refused with what is wrong and where."""
    make_folder(tmp_path / "odd", {"train": 3})
    make_folder(tmp_path / "odd", {"val": 3}, classes=("ant",))
    refuse("val/ant", "did you mean ants?", name=str(tmp_path / "odd"))
    make_folder(tmp_path / "one", {"train": 3}, classes=("ants",))
    refuse("1 class", "train", name=str(tmp_path / "one"))
    (tmp_path / "none").mkdir()
    refuse("no class", name=str(tmp_path / "none"))
    make_folder(tmp_path / "empty", {"train": 3})
    (tmp_path / "empty" / "train" / "wasps").mkdir()
    refuse("wasps", "no pictures", name=str(tmp_path / "empty"))
    refuse("no such folder", "nowhere", name=str(tmp_path / "nowhere"))
    (tmp_path / "file").touch()
    refuse("no such folder", name=str(tmp_path / "file"))
    refuse("cifra10", "did you mean cifar10?", "digits", name="cifra10")


# Broken pictures and other files


def test_broken_pictures(tmp_path, make_folder):
    """Broken pictures stop the run with a list of all, or are left out with their number."""
    root = make_folder(tmp_path / "p", {"train": 10, "val": 2})
    bad = [root / "train/ants/3.png", root / "train/bees/0.png", root / "val/bees/1.png"]
    for file, content in zip(bad, (b"", b"text", bad[2].read_bytes()[:60]), strict=True):
        file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(str(root), ["train", "val"])
    first, *listed = str(caught.value).splitlines()
    assert "3 of 24" in first
    assert "--skip-broken" in first
    assert all(str(file) in line for file, line in zip(bad, listed, strict=True))
    data = load(str(root), ["train", "val"], skip_broken=True)
    assert {s: len(part) for s, part in data.splits.items()} == {"train": 18, "val": 3}
    assert len(data.splits["train"].rows) == 18
    assert "train/ants/3.png" not in data.splits["train"].names
    assert any("3 broken" in note for note in data.notes)


def test_class_all_broken(tmp_path, make_folder):
    """A class of which no picture can be read is not silently left out."""
    root = make_folder(tmp_path / "p", {"train": 3})
    for file in (root / "train" / "bees").iterdir():
        file.write_bytes(b"")
    refuse("class", name=str(root), wanted=["train"], skip_broken=True)


def test_all_broken(tmp_path, make_folder):
    """A folder of which no picture can be read is refused, with --skip-broken too."""
    root = make_folder(tmp_path / "p", {"train": 3})
    for file in root.rglob("*.png"):
        file.write_bytes(b"")
    refuse(name=str(root), wanted=["train"], skip_broken=True)


def test_other_files(tmp_path, make_folder):
    """Files that are no pictures are counted in a note; hidden ones are not worth one."""
    root = make_folder(tmp_path / "p")
    assert load(str(root), ["train"]).notes == []
    for name in ("notes.txt", "Thumbs.db", ".DS_Store"):
        (root / "train" / "ants" / name).touch()
    (note,) = load(str(root), ["train"]).notes
    assert note.startswith("2 files")
    assert ".db, .txt" in note


# Sizes, channels, and the two ways of holding pictures


def test_commonest_size(tmp_path, make_folder):
    """Small pictures of several sizes are read at the size that most of them have."""
    root = make_folder(tmp_path / "p", {"train": 6}, classes=("a", "b"), size=(12, 10))
    make_folder(tmp_path / "p", {"train": 4}, classes=("c", "d"), size=(20, 30))
    data = load(str(root), ["train"], val=0)
    part = data.splits["train"]
    assert data.image_size == (12, 10)
    images = part.pixels(torch.arange(20))
    assert images.shape == (20, 3, 12, 10)
    assert images.dtype == torch.uint8
    for i in (0, 19):
        expected = decode.read_image(root / part.names[i], 3, (12, 10))
        assert np.array_equal(images[i].permute(1, 2, 0), expected)


def test_splits_share_their_pictures(tmp_path, make_folder):
    """Small pictures of one size lie in memory once, whatever split they belong to."""
    root = make_folder(tmp_path / "p", {"train": 20, "test": 3}, size=(12, 10))
    Image.new("L", (10, 12), 77).save(root / "train/bees/0.png")  # a grey one among colours
    for name, count in ((str(root), 46), ("digits", 1437)):
        data = load(name, ["train", "val"], val=0.2)
        train, val = data.splits["train"], data.splits["val"]
        assert train.images is val.images
        assert len(train.images) == count
        assert not set(train.rows.tolist()) & set(val.rows.tolist())
    data = load(str(root), ["train", "val", "test"], val=0.2)
    for part in data.splits.values():
        images = part.pixels(torch.arange(len(part)))
        for i, name in enumerate(part.names):
            expected = decode.read_image(root / name, 3)
            assert np.array_equal(images[i].permute(1, 2, 0), expected)


def test_colours_by_a_grey_networks_eye(tmp_path, make_folder):
    """Weights of one channel are given the brightness of coloured pictures, not their red."""
    root = make_folder(tmp_path / "p", {"train": 4, "test": 2}, size=(12, 10))
    like = {"classes": ["ants", "bees"], "channels": 1, "image_size": [12, 10], "crop": 1.0}
    part = load(str(root), ["test"], like=like).splits["test"]
    expected = decode.read_image(root / part.names[0], 1)
    assert np.array_equal(part.pixels(torch.tensor([0]))[0].permute(1, 2, 0), expected)


def test_channels(tmp_path, make_folder):
    """One channel only if every picture is grey, however it is stored."""
    root = make_folder(tmp_path / "p", {"train": 4}, mode="L")
    Image.open(root / "train/ants/0.png").convert("RGB").save(root / "train/ants/0.png")
    data = load(str(root), ["train"], val=0)
    assert data.channels == 1
    assert data.splits["train"].pixels(torch.arange(8)).shape == (8, 1, 12, 10)
    Image.new("RGB", (10, 12), (200, 10, 10)).save(root / "train/bees/0.png")
    data = load(str(root), ["train"], val=0)
    images = data.splits["train"].pixels(torch.arange(8))
    assert data.channels == 3
    assert images[4, :, 0, 0].tolist() == [200, 10, 10]
    assert torch.equal(images[0, 0], images[0, 2])


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_photographs(tmp_path, make_folder, mode):
    """Larger pictures stay files; workers decode them to the same bytes as this process."""
    root = make_folder(tmp_path / "p", {"train": 5}, size=(80, 100), mode=mode, suffix=".jpg")
    data = load(str(root), ["train"], val=0, photo_size=32, crop=0.5)
    part = data.splits["train"]
    assert not part.in_memory
    assert data.image_size == (32, 32)
    assert data.channels == (3 if mode == "RGB" else 1)
    alone, shared = (batches(data.loader("train", 4, workers=n)) for n in (0, 2))
    assert len(alone) == len(shared) == 3
    for batch, other in zip(alone, shared, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch, other, strict=True))
    images = torch.cat([batch[0] for batch in alone])
    expected = decode.read_image(part.images[3], data.channels, (32, 32), 0.5)
    assert images.dtype == torch.uint8
    assert np.array_equal(images[3].permute(1, 2, 0), expected)


def test_random_crops(tmp_path, make_folder):
    """A crop depends on seed, epoch and picture: not on workers, processes or the batch."""
    root = make_folder(tmp_path / "p", {"train": 4}, size=(70, 70), suffix=".bmp")
    data = load(str(root), ["train"], val=0, photo_size=16)

    def crops(epoch, batch_size, seed=3, **settings):
        loader = data.loader("train", batch_size, seed=seed, augment="light", **settings)
        loader.sampler.epoch = epoch
        return {
            i: image
            for images, _, index in batches(loader)
            for i, image in zip(index.tolist(), images.numpy(), strict=True)
        }

    first = crops(0, 8)
    for settings in ({"batch_size": 3}, {"batch_size": 4, "workers": 2}):
        for i, image in crops(0, **settings).items():
            assert np.array_equal(image, first[i])
    for rank in (0, 1):
        half = crops(0, 8, rank=rank, world=2)
        assert len(half) == 4
        assert all(np.array_equal(image, first[i]) for i, image in half.items())
    for other in (crops(1, 8), crops(0, 8, seed=4)):
        assert not any(np.array_equal(other[i], first[i]) for i in range(8))


def test_inspected_once(tmp_path, make_folder, monkeypatch):
    """A photograph is inspected once, and again only after its file has changed."""
    root = make_folder(tmp_path / "p", {"train": 3}, size=(70, 66))
    seen = []
    inspect = decode.inspect_image
    monkeypatch.setattr(
        verify, "inspect_image", lambda file, small: (seen.append(file), inspect(file, small))[1]
    )
    first = load(str(root), ["train"], val=0)
    assert len(seen) == 6
    again = load(str(root), ["train"], val=0)
    assert len(seen) == 6
    assert (again.channels, again.sha256) == (first.channels, first.sha256)
    changed = root / "train" / "bees" / "1.png"
    Image.new("RGB", (70, 70)).save(changed)
    load(str(root), ["train"], val=0)
    assert seen[6:] == [changed]


@pytest.mark.parametrize("workers", [0, 2])
def test_file_gone(tmp_path, make_folder, workers):
    """A file that vanishes after loading ends the epoch with its name, in one line."""
    root = make_folder(tmp_path / "p", {"train": 4}, size=(70, 70))
    data = load(str(root), ["train"], val=0)
    gone = root / "train" / "bees" / "2.png"
    gone.unlink()
    message = ""
    try:
        batches(data.loader("train", 2, workers=workers))
    except UnreadableImage as error:
        error.__traceback__ = None  # it holds the workers, whom the collector waits 5 s each for
        message = str(error)
    assert str(gone) in message
    assert "\n" not in message


def test_digest_of_a_folder(tmp_path, make_folder):
    """The hash of a folder is that of its names and sizes, wherever it lies."""
    first = load(str(make_folder(tmp_path / "p")), SPLITS).sha256
    root = make_folder(tmp_path / "q")
    assert load(str(root), SPLITS).sha256 == first
    os.rename(root / "train/ants/0.png", root / "train/ants/another.png")
    assert load(str(root), SPLITS).sha256 != first


# Weights' headers


def test_like(tmp_path, make_folder):
    """Trained weights say which classes there are and how pictures are read."""
    root = make_folder(tmp_path / "p", {"train": 3, "test": 2}, classes=("a", "c"), size=(70, 70))
    like = {"classes": ["c", "b", "a"], "channels": 1, "image_size": [20, 24], "crop": 0.5}
    data = load(str(root), ["test"], like=like)
    assert data.classes == ["c", "b", "a"]
    assert data.splits["test"].labels.tolist() == [2, 2, 0, 0]
    assert (data.channels, data.image_size, data.crop) == (1, (20, 24), 0.5)
    ((images, _, _),) = batches(data.loader("test", 8))
    assert images.shape == (4, 1, 20, 24)
    refuse("class c", "2 that the weights", name=str(root), like={**like, "classes": ["a", "b"]})


def test_like_a_set():
    """Weights trained on other classes or another size than a set's are refused."""
    like = {"classes": [str(k) for k in range(10)], "channels": 1, "image_size": [8, 8]}
    assert len(load("digits", ["test"], like=like).splits["test"]) == 360
    refuse("10 classes", "trained on 2", name="digits", like={**like, "classes": ["a", "b"]})
    refuse("1x8x8", "3x32x32", name="digits", like={**like, "channels": 3, "image_size": [32, 32]})


def test_digits():
    """The bundled digits: 1,437 and 360 real pictures of 8×8, grey values over all of 0..255."""
    data = load("digits", SPLITS)
    counts = {split: len(part) for split, part in data.splits.items()}
    assert counts["test"] == 360
    assert counts["train"] + counts["val"] == 1437
    assert counts["val"] == pytest.approx(144, abs=5)  # a tenth of each class, rounded
    assert data.classes == [str(k) for k in range(10)]
    assert (data.channels, data.image_size) == (1, (8, 8))
    for part in data.splits.values():
        assert part.images.dtype == torch.uint8
        assert (part.images.min(), part.images.max()) == (0, 255)
        assert part.labels.unique().tolist() == list(range(10))
    assert not set(data.splits["train"].names) & set(data.splits["val"].names)
    assert len(load("digits", ["train"], val=0).splits["train"]) == 1437


# Batches


def memory(count):
    """A set of `count` one-pixel pictures, each of which is its own index."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    part = Split(images, torch.arange(count) % 2, [str(i) for i in range(count)])
    return Data("memory", ["a", "b"], 1, (1, 1), 1.0, {"train": part}, "")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 7, 12, 25])
def test_evaluation_meets_every_picture_once(count, world):
    """Any number of processes evaluates exactly the pictures that one does, with their labels."""
    data, met = memory(count), []
    for rank in range(world):
        for images, labels, index in batches(data.loader("train", 5, rank=rank, world=world)):
            assert torch.equal(images.flatten().long(), index)
            assert torch.equal(labels, index % 2)
            met += index.tolist()
    assert sorted(met) == list(range(count))


@pytest.mark.parametrize("world", [2, 3, 4])
@pytest.mark.parametrize("count", [24, 27, 30, 49])
def test_processes_share_a_batch(count, world):
    """A step's batch holds the same pictures on any number of processes, the last one too."""
    whole = list(BatchSampler(count, 12, seed=1))
    samplers = [BatchSampler(count, 12, seed=1, rank=rank, world=world) for rank in range(world)]
    for step, shares in enumerate(zip(*samplers, strict=True)):
        own = [rows for s, (_, rows) in zip(samplers, shares, strict=True) if s.counts(step)]
        assert sorted(joined(own)) == sorted(whole[step][1])
        assert len(whole[step][1]) == samplers[0].size(step)


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2, 3, 16])
def test_training_batches(world, batch):
    """The steps are as many on any number of processes, and every picture counts once in them.

    No process gets one picture where it would get more: a last one alone is dropped.
    """
    for count in range(2 * world, 70):
        size = batch * world
        samplers = [BatchSampler(count, size, 0, rank, world) for rank in range(world)]
        parts = [list(sampler) for sampler in samplers]
        assert {len(part) for part in parts} == {len(BatchSampler(count, size, 0))}
        if batch > 1:
            assert all(len(rows) > 1 for part in parts for _, rows in part)
        met = joined(
            rows
            for sampler, part in zip(samplers, parts, strict=True)
            for step, (_, rows) in enumerate(part)
            if sampler.counts(step)
        )
        assert len(met) == len(set(met)) == sum(map(samplers[0].size, range(len(samplers[0]))))
        assert len(met) == (count - 1 if count % size == 1 and size > 1 else count)


def test_start():
    """An epoch that is gone on with has the batches that were left, and no others."""
    whole = list(BatchSampler(50, 8, 3))
    sampler = BatchSampler(50, 8, 3)
    sampler.start = 4
    assert list(sampler) == whole[4:]
    sampler.start = len(whole)
    assert list(sampler) == []


@pytest.mark.parametrize("world", [1, 4])
def test_dropped_pictures_change(world):
    """Which pictures a dropped last batch leaves out changes with the epoch: all are trained on."""
    met = set()
    for rank in range(world):
        sampler = BatchSampler(25, 8, 0, rank, world)
        assert len(sampler) == 3
        for sampler.epoch in range(20):
            met.update(joined(rows for _, rows in sampler))
    assert met == set(range(25))


def test_order():
    """An epoch's order follows from seed and epoch alone; without a seed it is the set's own."""

    def order(seed, epoch):
        sampler = BatchSampler(40, 8, seed)
        sampler.epoch = epoch
        return joined(rows for _, rows in sampler)

    first = order(0, 0)
    torch.manual_seed(7)
    assert order(0, 0) == first
    assert sorted(first) == list(range(40))
    assert len({tuple(order(*key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4
    assert order(None, 0) == order(None, 1) == list(range(40))
    assert sorted(order(2**63 - 1, 3)) == list(range(40))


def test_global_generator_is_left_alone():
    """Reading a split draws nothing from torch's global generator."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(memory(20).loader("train", 4, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


def test_recipe_for(tmp_path, make_folder):
    """A folder's recipe follows from its pictures: small ones as CIFAR-10, others as photos."""
    make_folder(tmp_path / "small", size=(64, 40))
    make_folder(tmp_path / "large", size=(64, 65))
    assert lenslet.data.load.recipe_for(str(tmp_path / "small")) == "cifar10"
    assert lenslet.data.load.recipe_for(str(tmp_path / "large")) == "photos"
    assert lenslet.data.load.recipe_for("digits") == "digits"
    assert set(lenslet.data.load.RECIPES) == set(sets.SETS)


def test_splits_by_other_names(tmp_path, make_folder):
    """Train/ and Test/ are no two classes, and a folder that is not read is named."""
    make_folder(tmp_path / "a", {"Train": 3, "Test": 2})
    with pytest.raises(UserError, match="name them train, val and test"):
        load(str(tmp_path / "a"), ["train"])
    make_folder(tmp_path / "b", {"train": 3, "valid": 2})
    assert "folders ignored: valid" in load(str(tmp_path / "b"), ["train"]).notes[0]
    make_folder(tmp_path / "c", {"": 30}, classes=("bus", "car", "train"))
    assert load(str(tmp_path / "c"), ["train"]).classes == ["bus", "car", "train"]


def test_odd_file_names(tmp_path, make_folder):
    """Hidden folders are left out, and a name need not be UTF-8."""
    root = make_folder(tmp_path / "p", {"": 20})
    picture = (root / "ants" / "0.png").read_bytes()
    (root / "ants" / ".thumbnails").mkdir()
    (root / "ants" / ".thumbnails" / "0.png").write_bytes(picture)
    with open(os.fsencode(root / "ants") + b"/caf\xe9.png", "wb") as file:
        file.write(picture)
    found = load(str(root), SPLITS)
    assert sum(len(part) for part in found.splits.values()) == 41


def test_training_learns_of_broken_test_pictures(tmp_path, make_folder):
    """Every broken file is listed before training, those in test/ too; test.py reads its own."""
    root = make_folder(tmp_path / "p", {"train": 4, "test": 2})
    (root / "test" / "ants" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"test/ants/broken\.png"):
        load(str(root), ["train"], val=0)
    (root / "train" / "ants" / "broken.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match="1 of 5"):
        load(str(root), ["test"])


def test_a_damaged_set_says_how_to_mend_it():
    """A data/<name>/ file cut short is named with the remedy."""
    folder = sets.ensure("digits")
    path = folder / "train.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="remove it"):
        load("digits", ["train"])


def test_a_quick_look_reads_few_files(tmp_path, make_folder, monkeypatch):
    """With a limit only the pictures that are used are decoded."""
    root, read = make_folder(tmp_path / "f", {"train": 30, "val": 20, "test": 9}), []
    real = decode.inspect_image
    monkeypatch.setattr(verify, "inspect_image", lambda *a: read.append(a) or real(*a))
    load(str(root), ["train", "val"], limit=5)
    assert len(read) == 10
