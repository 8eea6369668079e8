"""A folder's images are found, sorted into classes, and what is no such folder is refused."""

import os
from itertools import chain

import pytest
from PIL import Image

from lenslet.data.layout import find_images, list_folder, natural_sort_key
from lenslet.errors import UserError


def joined(lists):
    return list(chain.from_iterable(lists))


def listed(root):
    """The files of each split below root."""
    return {s: joined(inside.values()) for s, inside in list_folder(root).splits.items()}


def refuse(root, *parts):
    """list_folder() refuses this with one line that has all the parts."""
    with pytest.raises(UserError) as caught:
        list_folder(root)
    message = str(caught.value)
    assert "\n" not in message
    assert str(root) not in message and "--" not in message  # the caller says which data
    for part in parts:
        assert part in message


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


def test_classes_only(tmp_path, make_folder):
    """A folder of classes is divided 80/10/10 and completely; a new image moves no other."""
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


def test_wrong_folders(tmp_path, make_folder):
    """What is no folder of classes is refused with what is wrong and where."""
    make_folder(tmp_path / "odd", {"train": 3})
    make_folder(tmp_path / "odd", {"val": 3}, classes=("ant",))
    refuse(tmp_path / "odd", "val/ant", "did you mean ants?")
    make_folder(tmp_path / "one", {"train": 3}, classes=("ants",))
    refuse(tmp_path / "one", "1 class", "train/<class>")
    (tmp_path / "none").mkdir()
    refuse(tmp_path / "none", "no class")
    make_folder(tmp_path / "empty", {"train": 3})
    (tmp_path / "empty" / "train" / "wasps").mkdir()
    refuse(tmp_path / "empty", "wasps", "no images")
    make_folder(tmp_path / "few", {"": 30})
    (tmp_path / "few" / "wasps").mkdir()
    refuse(tmp_path / "few", "wasps", "no images")
    refuse(tmp_path / "nowhere", "no such folder")
    (tmp_path / "file").touch()
    refuse(tmp_path / "file", "no such folder")


def test_other_files(tmp_path, make_folder):
    """All that is ignored is counted in one note; what systems leave behind is not worth one."""
    root = make_folder(tmp_path / "p")
    image = (root / "train" / "ants" / "0.png").read_bytes()
    for name in ("__MACOSX", "@eaDir", "lost+found", ".hidden"):
        for folder in (root, root / "train", root / "train" / "ants"):
            (folder / name).mkdir()
            (folder / name / "0.png").write_bytes(image)
    for name in ("Thumbs.db", "desktop.ini", "Desktop.ini", ".DS_Store", "._0.png"):
        (root / "train" / "ants" / name).touch()
    assert list_folder(root).notes == []
    assert {split: len(found) for split, found in listed(root).items()} == {
        "train": 16,
        "val": 0,
        "test": 8,
    }
    (root / "README.txt").touch()
    (root / "holdout").mkdir()
    (root / "train" / "ants" / "notes.txt").touch()
    (root / "train" / "stray.png").write_bytes(image)
    (root / "train" / "a.csv").touch()
    said = ".csv (1), .txt (2), holdout/ (1), images in no class folder (1)"
    assert list_folder(root).notes == [f"ignored 5 files and folders: {said}"]


NAMES = [
    ("train", "val", "test"),
    ("Training", "VALID", "testing"),
    ("TRAIN", "validation", "Test"),
    ("train", "dev", None),
    ("train", "Eval", None),
]


@pytest.mark.parametrize("names", NAMES)
def test_names_of_splits(tmp_path, make_folder, names):
    """A split's folder has any of its usual names, in any case, and messages use that name."""
    counts = dict(zip(names, (3, 2, 1), strict=True))
    root = make_folder(tmp_path / "p", {name: n for name, n in counts.items() if name})
    found = listed(root)
    for split, name in zip(("train", "val", "test"), names, strict=True):
        folders = {file.relative_to(root).parts[0] for file in found[split]}
        assert folders == ({name} if name else set())
    assert list_folder(root).own_val == f"{names[1]}/" and list_folder(root).notes == []
    make_folder(root, {names[1]: 1}, classes=("ant",))
    refuse(root, f"{names[1]}/ant is a class that {names[0]}/ does not have", "did you mean ants?")


def test_two_names_of_a_split(tmp_path, make_folder):
    """Two folders for one split are refused by both names, also where one of them is empty."""
    root = make_folder(tmp_path / "p", {"train": 3, "val": 2})
    (root / "Validation").mkdir()
    refuse(root, "Validation/ and val/ are both for val")
    make_folder(tmp_path / "q", {"train": 3, "training": 3})
    refuse(tmp_path / "q", "train/ and training/ are both for train")


def test_splits_by_unusual_names(tmp_path, make_folder):
    """train_set/ and test_set/ are no two classes; a class may be called like a split."""
    make_folder(tmp_path / "a", {"train_set": 3, "test_set": 2})
    refuse(tmp_path / "a", "test_set and train_set look like splits: name them train, val and test")
    make_folder(tmp_path / "c", {"": 30}, classes=("bus", "car", "train"))
    assert list(list_folder(tmp_path / "c").splits["train"]) == ["bus", "car", "train"]


@pytest.mark.parametrize("splits", [{"train": 3}, {"train": 3, "val": 2}, {"": 20}])
def test_one_level_down(tmp_path, make_folder, splits):
    """A data set in a folder, alone there or not, is named and not read; also two levels down."""
    root = tmp_path / "p"
    make_folder(root / "flowers", splits)
    make_folder(root / "__MACOSX" / "flowers", splits)
    refuse(root, "the classes are in flowers/", ": give that folder")
    make_folder(tmp_path / "q" / "archive" / "flowers", splits)
    refuse(tmp_path / "q", "the classes are in archive/flowers/", ": give that folder")
    if "val" in splits:
        make_folder(root / "cars", splits)
        refuse(root, "the classes are in cars/: give that folder")


def test_nested_folders(tmp_path, make_folder):
    """Folders below a class are part of it, whatever they are called."""
    root = make_folder(tmp_path / "p", {"": 10})
    for folder in ("ants/2024/may", "ants/train", "bees/test"):
        (root / folder).mkdir(parents=True)
        Image.new("RGB", (2, 2)).save(root / folder / "0.png")
    assert sum(map(len, listed(root).values())) == 23


@pytest.mark.parametrize("splits", [{"train": 3}, {"": 30}])
def test_unlabelled_test(tmp_path, make_folder, splits):
    """Images directly in test/ are no split and no class; a note counts them."""
    root = make_folder(tmp_path / "p", splits)
    before = list_folder(root)
    make_folder(root, {"": 4}, classes=("Test",))
    found = list_folder(root)
    assert found.splits == before.splits
    said = "Test/ has 4 images in no class folder: it is not used, and predict.py names what is in"
    assert found.notes == [*before.notes, f"{said} them"]


def test_own_test_beside_classes(tmp_path, make_folder):
    """Where test/ has classes, the classes beside it are all for training."""
    root = make_folder(tmp_path / "p", {"": 20, "test": 3})
    assert {split: len(found) for split, found in listed(root).items()} == {
        "train": 40,
        "val": 0,
        "test": 6,
    }


def test_no_class_folders(tmp_path, make_folder):
    """Images in no folder, or directly in train/, end in a line with the layouts that would do."""
    make_folder(tmp_path, {"": 3}, classes=("flat",))
    refuse(tmp_path / "flat", "3 images in it, but no class folder", "<class>/*.png", "CSV file")
    make_folder(tmp_path / "p", {"": 3}, classes=("train", "test"))
    refuse(tmp_path / "p", "3 images in train/, but no class folder", "train/<class>/*.png")


def test_lent_images(tmp_path, make_folder):
    """A class of three images is in all splits, one line says what was lent, and with more images
    the first ones return.
    """
    root = make_folder(tmp_path / "p", {"": 60})
    assert list_folder(root).notes == []
    make_folder(root, {"": 3}, classes=("hornets", "wasps"))
    found = list_folder(root)
    for split in ("train", "val", "test"):
        assert all(len(found.splits[split][name]) == 1 for name in ("hornets", "wasps"))
    (note,) = found.notes
    assert note == "2 images of hornets, wasps lent to splits that had none of the class"
    make_folder(root, {"": 60}, classes=("hornets", "wasps"))
    assert list_folder(root).notes == []
    make_folder(tmp_path / "q", {"": 30})
    make_folder(tmp_path / "q", {"": 1}, classes=("wasps",))
    assert len(list_folder(tmp_path / "q").splits["train"]["wasps"]) == 1


def test_odd_file_names(tmp_path, make_folder):
    """Hidden folders are left out, and a name need not be UTF-8."""
    root = make_folder(tmp_path / "p", {"": 20})
    image = (root / "ants" / "0.png").read_bytes()
    (root / "ants" / ".thumbnails").mkdir()
    (root / "ants" / ".thumbnails" / "0.png").write_bytes(image)
    with open(os.fsencode(root / "ants") + b"/caf\xe9.png", "wb") as file:
        file.write(image)
    assert sum(map(len, listed(root).values())) == 41


def test_find_images(tmp_path):
    """Images of all depths and spellings, sorted; other endings; hidden files in neither.

    Links are followed.  What is named like an image is one, whether it can be read or not.
    """
    there = tmp_path / "there"
    for name in ("b.PNG", "a.jpeg", "sub/deep/c.tiff", "sub.png", ".hidden.png", "notes.txt"):
        (there / name).parent.mkdir(parents=True, exist_ok=True)
        (there / name).touch()
    (there / "README").touch()
    (there / "z.png").symlink_to(there / "b.PNG")
    (there / "nowhere.png").symlink_to(there / "gone.png")
    (there / "circle.png").symlink_to(there / "circle.png")
    (there / ".nowhere").symlink_to(there / "gone")
    (there / "d.png").mkdir()
    os.mkfifo(there / "d.png" / "pipe.png")
    (tmp_path / "other disk").mkdir()
    (tmp_path / "other disk" / "e.png").touch()
    (there / "sub" / "linked").symlink_to(tmp_path / "other disk")
    images, others, folders = find_images(there)
    assert sorted(folder.name for folder in folders) == ["d.png", "sub"]
    assert [p.relative_to(there).as_posix() for p in images] == [
        "a.jpeg",
        "b.PNG",
        "circle.png",
        "d.png/pipe.png",
        "nowhere.png",
        "sub/deep/c.tiff",  # by its parts, as paths compare
        "sub/linked/e.png",
        "sub.png",
        "z.png",
    ]
    assert sorted(others) == [".txt", "README"]


def refuse_folder(root, path, reason):
    """list_folder() refuses root with one line that names path, the reason and a remedy."""
    with pytest.raises(UserError) as caught:
        list_folder(root)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and reason in message and "remove" in message
    assert "\n" not in message and "--" not in message


@pytest.mark.parametrize("splits", [{"train": 2, "val": 1}, {"": 30}])
def test_linked_folders(tmp_path, make_folder, splits):
    """A class or a split that lies elsewhere and is linked is read as if it lay here."""
    root = make_folder(tmp_path / "p", splits)
    before = listed(root)
    folders = ("train/ants", "train", "val") if "val" in splits else ("ants",)
    for number, folder in enumerate(folders):
        (root / folder).rename(tmp_path / f"disk {number}")
        (root / folder).symlink_to(tmp_path / f"disk {number}")
    assert listed(root) == before


@pytest.mark.parametrize("folder", ["", "train", "val", "val/bees", "train/ants/deep"])
def test_unreadable_folders(tmp_path, make_folder, monkeypatch, folder):
    """A folder without permission is named; no image vanishes with it."""
    root = make_folder(tmp_path / "p", {"train": 2, "train/ants/deep": 1, "val": 1})
    real = os.scandir

    def scandir(path):
        if os.fspath(path) == str(root / folder):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    refuse_folder(root, root / folder, "Permission denied")


@pytest.mark.parametrize("target", ["gone", "itself"])
@pytest.mark.parametrize("splits", [{"train": 2, "val": 1}, {"": 30}])
def test_links_to_nowhere(tmp_path, make_folder, splits, target):
    """A link that leads nowhere may be a folder of a disk that is not mounted: it is named."""
    places = ("test", "train/wasps", "train/ants/more", "val/ants/v1.0")
    for number, place in enumerate(places if "val" in splits else ("wasps", "ants/more")):
        root = make_folder(tmp_path / str(number), splits)
        link = root / place
        link.symlink_to(link if target == "itself" else tmp_path / "gone")
        refuse_folder(root, link, "No such file" if target == "gone" else "Too many levels")


def test_circles(tmp_path, make_folder):
    """A link to a folder that contains it is refused, over two links too: walking would not end."""
    disk = tmp_path / "disk"
    (disk / "deep").mkdir(parents=True)
    (disk / "deep" / "back").symlink_to(tmp_path / "3" / "train")
    for number, place in enumerate(("train/all", "train/ants/all", "train/ants/deep/all", "val")):
        root = make_folder(tmp_path / str(number), {"train": 2, "train/ants/deep": 1})
        link = root / place
        link.symlink_to(root / "train" if place.startswith("train/") else root)
        refuse_folder(root, link, "a folder that contains it")
    link.unlink()
    (root / "train" / "ants" / "disk").symlink_to(disk / "deep")
    refuse_folder(root, root / "train" / "ants" / "disk" / "back", "a folder that contains it")
    (disk / "deep" / "back").unlink()
    (disk / "deep" / "up").symlink_to(disk)
    refuse_folder(root, root / "train" / "ants" / "disk" / "up", "a folder that contains it")
