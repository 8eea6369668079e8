"""Folders and sets are opened and split alike on any machine, and what is wrong is refused."""

import os
from collections import Counter

import numpy as np
import pytest
import torch
from PIL import Image

from lenslet import files
from lenslet.data import decode, sets, verify
from lenslet.data import load as module
from lenslet.data.load import choose_data, load, recipe_for
from lenslet.errors import OutsideError, UserError

SPLITS = ["train", "val", "test"]


def names(data):
    return {split: set(part.names) for split, part in data.splits.items()}


def refuse(*parts, **settings):
    """load() refuses this with one line that has all the parts."""
    with pytest.raises(UserError) as caught:
        load(**{"wanted": SPLITS, **settings})
    message = str(caught.value)
    assert "\n" not in message and "--" not in message  # the caller says which option
    for part in parts:
        assert part in message


def test_class_order(tmp_path, make_folder):
    """Classes are in natural order, and labels follow the folder that an image lies in."""
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


def test_folds_of_data(tmp_path, make_folder):
    """Training and validation images of each fold are the whole, and all folds' cover it once;
    of a folder of classes only, the test images are in none.
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
    refuse("9 images, too few for 10 folds", name=str(divided), fold="1/10")
    own = make_folder(tmp_path / "own", {"train": 9, "val": 3})
    refuse("val/ of its own", name=str(own), fold="1/3")


def test_limit_of_a_set():
    """So many images of a named set too, of all classes, and the test images are left alone."""
    data = load("digits", SPLITS, limit=30)
    assert {split: len(part) for split, part in data.splits.items()} == {
        "train": 30,
        "val": 30,
        "test": 360,
    }
    for part in data.splits.values():
        assert part.labels.unique().tolist() == list(range(10))


@pytest.mark.parametrize("limit", [5, 12, 50, 99])
def test_limit(tmp_path, make_folder, limit):
    """So many images, each class by its share and at least one of it, in their usual order."""
    root = make_folder(tmp_path / "f", {"train": 40, "val": 3}, classes=("a", "b"))
    make_folder(root, {"train": 2, "val": 3}, classes=("c",))
    data = load(str(root), ["train", "val"], limit=limit)
    train, val = data.splits["train"], data.splits["val"]
    assert len(train) == min(limit, 82) and len(val) == min(limit, 9)
    counts = train.labels.bincount(minlength=3)
    assert abs(counts[0] - counts[1]) <= 1 and counts[2] >= 1
    whole = load(str(root), ["train"]).splits["train"].names
    assert list(train.names) == [name for name in whole if name in set(train.names)]
    refuse("2 images: too few for 3 classes", name=str(root), wanted=["train"], limit=2)


def test_missing_class(tmp_path, make_folder):
    """A class without test images shifts no label."""
    make_folder(tmp_path / "p", {"train": 4}, classes=("a", "b", "c"))
    make_folder(tmp_path / "p", {"test": 3}, classes=("a", "c"))
    data = load(str(tmp_path / "p"), ["test"])
    assert data.classes == ["a", "b", "c"]
    assert data.splits["test"].labels.tolist() == [0, 0, 0, 2, 2, 2]


def test_broken_images(tmp_path, make_folder):
    """Broken images stop the run with a list of all, or are left out with their number."""
    root = make_folder(tmp_path / "p", {"train": 10, "val": 2})
    bad = [root / "train/ants/3.png", root / "train/bees/0.png", root / "val/bees/1.png"]
    for file, content in zip(bad, (b"", b"text", bad[2].read_bytes()[:60]), strict=True):
        file.write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(str(root), ["train", "val"])
    first, *listed = str(caught.value).splitlines()
    assert first.startswith("3 of 24 images cannot be read")
    assert "skip-broken" in first and "--" not in first
    assert all(str(file) in line for file, line in zip(bad, listed, strict=True))
    data = load(str(root), ["train", "val"], skip_broken=True)
    assert {s: len(part) for s, part in data.splits.items()} == {"train": 18, "val": 3}
    assert len(data.splits["train"].rows) == 18
    assert "train/ants/3.png" not in data.splits["train"].names
    assert any("left out 3 images" in note for note in data.notes)


def test_one_broken_image(tmp_path, make_folder):
    """The messages of broken images say "1 image" where there is one."""
    root = make_folder(tmp_path / "p", {"train": 2})
    (root / "train" / "ants" / "0.png").write_bytes(b"")
    data = load(str(root), ["train", "val"], skip_broken=True)
    assert data.notes == ["left out 1 image that cannot be read"]


@pytest.mark.parametrize("size", [(12, 10), (70, 66)])
def test_images_that_are_no_files(tmp_path, make_folder, size):
    """A link to nothing, a circle, a pipe and a device count as broken images, each with why."""
    root = make_folder(tmp_path / "p", {"train": 10}, size=size)
    ants = root / "train" / "ants"
    os.mkfifo(ants / "-.png")
    (ants / "circle.png").symlink_to("circle.png")
    (ants / "device.png").symlink_to(os.devnull)
    (ants / "nowhere.png").symlink_to(tmp_path / "gone.png")
    assert recipe_for(str(root)) == ("cifar10" if size[0] < 65 else "photos")
    for _ in range(2):  # photographs are known then
        with pytest.raises(UserError) as caught:
            load(str(root), ["train"])
        first, *listed = str(caught.value).splitlines()
        assert first.startswith("4 of 24 images cannot be read")
        for name, line in zip(("-", "circle", "device", "nowhere"), listed, strict=True):
            assert line.startswith(f"{ants / name}.png: cannot be read as an image (")
        data = load(str(root), ["train", "val"], skip_broken=True)
        assert sum(map(len, data.splits.values())) == 20
        assert data.notes == ["left out 4 images that cannot be read"]


def test_class_all_broken(tmp_path, make_folder):
    """A class of which no image can be read is not silently left out."""
    root = make_folder(tmp_path / "p", {"train": 3})
    for file in (root / "train" / "bees").iterdir():
        file.write_bytes(b"")
    refuse("class bees", name=str(root), wanted=["train"], skip_broken=True)


def test_all_broken(tmp_path, make_folder):
    """A folder of which no image can be read is refused, those that skip broken ones too."""
    root = make_folder(tmp_path / "p", {"train": 3})
    for file in root.rglob("*.png"):
        file.write_bytes(b"")
    refuse(name=str(root), wanted=["train"], skip_broken=True)


def test_commonest_size(tmp_path, make_folder):
    """Small images of several sizes are read at the size that most of them have."""
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


def test_splits_share_their_images(tmp_path, make_folder):
    """Small images of one size lie in memory once, whatever split they belong to."""
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
    """Weights of one channel are given the brightness of coloured images, not their red."""
    root = make_folder(tmp_path / "p", {"train": 4, "test": 2}, size=(12, 10))
    like = {"classes": ["ants", "bees"], "channels": 1, "image_size": [12, 10], "crop": 1.0}
    part = load(str(root), ["test"], like=like).splits["test"]
    expected = decode.read_image(root / part.names[0], 1)
    assert np.array_equal(part.pixels(torch.tensor([0]))[0].permute(1, 2, 0), expected)


def test_channels(tmp_path, make_folder):
    """One channel only if every image is grey, however it is stored."""
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


@pytest.mark.parametrize("size", [(12, 10), (70, 66)])
def test_digest_of_a_folder(tmp_path, make_folder, size):
    """The hash of a folder is that of its names and contents, wherever it lies; of photographs it
    is also noticed that two of one size and age were exchanged since they were inspected.
    """
    first = load(str(make_folder(tmp_path / "p", size=size, suffix=".bmp")), SPLITS).sha256
    root = make_folder(tmp_path / "q", size=size, suffix=".bmp")
    a, b = root / "train/ants/0.bmp", root / "train/bees/0.bmp"
    assert a.stat().st_size == b.stat().st_size
    for file in (a, b):
        os.utime(file, (1e9, 1e9))
    for _ in range(2):
        assert load(str(root), SPLITS).sha256 == first
    a.rename(tmp_path / "a")
    b.rename(a)
    (tmp_path / "a").rename(b)
    assert load(str(root), SPLITS).sha256 != first
    make_folder(root, size=size, suffix=".bmp")
    assert load(str(root), SPLITS).sha256 == first
    os.rename(a, root / "train/ants/another.bmp")
    assert load(str(root), SPLITS).sha256 != first


def test_like(tmp_path, make_folder):
    """Trained weights say which classes there are and how images are read."""
    root = make_folder(tmp_path / "p", {"train": 3, "test": 2}, classes=("a", "c"), size=(70, 70))
    like = {"classes": ["c", "b", "a"], "channels": 1, "image_size": [20, 24], "crop": 0.5}
    data = load(str(root), ["test"], like=like)
    assert data.classes == ["c", "b", "a"]
    assert data.splits["test"].labels.tolist() == [2, 2, 0, 0]
    assert (data.channels, data.image_size, data.crop) == (1, (20, 24), 0.5)
    assert data.batch("test", [0, 1, 2, 3]).images.shape == (4, 1, 20, 24)
    refuse("class c", "2 that the weights", name=str(root), like={**like, "classes": ["a", "b"]})


def test_like_a_set():
    """Weights trained on other classes or another size than a set's are refused."""
    like = {"classes": [str(k) for k in range(10)], "channels": 1, "image_size": [8, 8]}
    assert len(load("digits", ["test"], like=like).splits["test"]) == 360
    refuse("10 classes", "trained on 2", name="digits", like={**like, "classes": ["a", "b"]})
    refuse("1x8x8", "3x32x32", name="digits", like={**like, "channels": 3, "image_size": [32, 32]})


def test_digits():
    """The bundled digits: 1,437 and 360 real images of 8×8, grey values over all of 0..255."""
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


def test_recipe_for(tmp_path, make_folder):
    """A folder's recipe follows from its images: small ones as CIFAR-10, others as photos."""
    make_folder(tmp_path / "small", size=(64, 40))
    make_folder(tmp_path / "large", size=(64, 65))
    assert recipe_for(str(tmp_path / "small")) == "cifar10"
    assert recipe_for(str(tmp_path / "large")) == "photos"
    assert recipe_for("digits") == "digits"
    for name in sets.SETS:
        assert (files.RECIPES / f"{recipe_for(name)}.yaml").is_file()
    with pytest.raises(UserError, match="did you mean cifar10"):
        recipe_for("cifra10")


def test_recipe_for_reads_few_headers(tmp_path, make_folder, monkeypatch):
    """A large folder's recipe is told by 1,000 headers from all over it, none of them in test/."""
    root, read = make_folder(tmp_path / "p", {"train": 3, "val": 3, "test": 3}), []
    for split, count in (("train", 700), ("val", 300), ("test", 50)):
        for i in range(count):
            os.link(root / split / "ants" / "0.png", root / split / "bees" / f"a{i}.png")
    monkeypatch.setattr(module, "longer_side", lambda file: read.append(file) or 12)
    assert recipe_for(str(root)) == "cifar10"
    assert len(read) == len(set(read)) == 1000
    folders = [file.relative_to(root).parts[:2] for file in read]
    assert set(folders) == {(s, c) for s in ("train", "val") for c in ("ants", "bees")}
    assert 290 < sum(split == "val" for split, _ in folders) < 310


def test_many_classes_list_fast(tmp_path, make_folder):
    """A class is looked up by its name: 300 of them are never searched through for each file."""

    class Counted(list):
        def index(self, *args):
            raise AssertionError("searched through")

    root = make_folder(tmp_path / "p", {"train": 2}, classes=tuple(map(str, range(300))))
    like = {"classes": Counted(map(str, range(300))), "channels": 3, "image_size": [12, 10]}
    part = load(str(root), ["train"], val=0, like={**like, "crop": 1.0}).splits["train"]
    assert part.labels.tolist() == [k for k in range(300) for _ in range(2)]


def test_choose_data(tmp_path, monkeypatch, capsys):
    """A folder becomes its full path; without CIFAR-10 the digits are used, and why is said."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "birds").mkdir()
    assert choose_data("birds") == str(tmp_path / "birds")
    assert choose_data("mnist") == "mnist"

    def offline(name, patience):
        raise OutsideError("no source serves it")

    monkeypatch.setattr(sets, "ensure", offline)
    assert choose_data(None) == "digits"
    said = capsys.readouterr().out
    assert "CIFAR-10 is neither on disk nor reachable" in said and "(no source serves it)" in said
    monkeypatch.setattr(sets, "ensure", lambda name, patience: None)
    assert choose_data(None) == "cifar10"


def test_training_learns_of_broken_test_images(tmp_path, make_folder):
    """Every broken file is listed before training, those in test/ too; test.py reads its own."""
    root = make_folder(tmp_path / "p", {"train": 4, "test": 2})
    (root / "test" / "ants" / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"test/ants/broken\.png"):
        load(str(root), ["train"], val=0)
    (root / "train" / "ants" / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="1 of 5"):
        load(str(root), ["test"])


def test_a_damaged_set_says_how_to_mend_it():
    """A data/<name>/ file cut short is named with the remedy."""
    folder = sets.ensure("digits")
    path = folder / "train.safetensors"
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match="remove it"):
        load("digits", ["train"])


def test_a_limit_reads_few_files(tmp_path, make_folder, monkeypatch):
    """With a limit only the images that are used are decoded."""
    root, read = make_folder(tmp_path / "f", {"train": 30, "val": 20, "test": 9}), []
    real = decode.inspect_image
    monkeypatch.setattr(verify, "inspect_image", lambda *a: read.append(a) or real(*a))
    load(str(root), ["train", "val"], limit=5)
    assert len(read) == 10
