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
    assert note.startswith("2 files")
    assert ".db, .txt" in note


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

    A link to a file counts as one, a link to a folder is not followed: it could lead in a circle.
    """
    for name in ("b.PNG", "a.jpeg", "sub/deep/c.tiff", "sub.png", ".hidden.png", "notes.txt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "README").touch()
    (tmp_path / "z.png").symlink_to(tmp_path / "b.PNG")
    (tmp_path / "nowhere.png").symlink_to(tmp_path / "gone.png")
    (tmp_path / "sub" / "circle").symlink_to(tmp_path)
    images, others = find_images(tmp_path)
    assert [p.relative_to(tmp_path).as_posix() for p in images] == [
        "a.jpeg",
        "b.PNG",
        "sub/deep/c.tiff",  # by its parts, as paths compare
        "sub.png",
        "z.png",
    ]
    assert sorted(others) == [".txt", "README"]
