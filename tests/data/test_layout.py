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
    make_folder(tmp_path / "few", {"": 1}, classes=("wasps",))
    (tmp_path / "few" / "wasps" / "0.png").rename(tmp_path / "few" / "wasps" / "1.png")  # for test
    refuse(tmp_path / "few", "wasps", "too few")
    refuse(tmp_path / "nowhere", "no such folder")
    (tmp_path / "file").touch()
    refuse(tmp_path / "file", "no such folder")


def test_other_files(tmp_path, make_folder):
    """Files that are no images are counted in a note; hidden ones are not worth one."""
    root = make_folder(tmp_path / "p")
    assert list_folder(root).notes == []
    for name in ("notes.txt", "Thumbs.db", ".DS_Store"):
        (root / "train" / "ants" / name).touch()
    (note,) = list_folder(root).notes
    assert note == "2 files ignored: no image suffix (.db, .txt)"
    (root / "train" / "ants" / "Thumbs.db").unlink()
    assert list_folder(root).notes == ["1 file ignored: no image suffix (.txt)"]


def test_splits_by_other_names(tmp_path, make_folder):
    """Train/ and Test/ are no two classes, and a folder that is not read is named."""
    make_folder(tmp_path / "a", {"Train": 3, "Test": 2})
    refuse(tmp_path / "a", "name them train, val and test")
    make_folder(tmp_path / "b", {"train": 3, "valid": 2})
    assert "folders ignored: valid" in list_folder(tmp_path / "b").notes[0]
    make_folder(tmp_path / "c", {"": 30}, classes=("bus", "car", "train"))
    assert list(list_folder(tmp_path / "c").splits["train"]) == ["bus", "car", "train"]


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
    images, others = find_images(there)
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
