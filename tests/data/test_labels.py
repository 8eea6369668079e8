"""A file of labels stands for class folders: every image has one class and one split, or a line."""

import csv

import pytest

from lenslet.data import layout
from lenslet.data.labels import read_labels
from lenslet.data.load import load, recipe_for
from lenslet.data.split import split_by_hash
from lenslet.errors import UserError

SPLITS = ["train", "val", "test"]


@pytest.fixture
def flat(tmp_path, make_folder):
    """40 images in one folder, and a function that writes labels.csv and returns its path."""
    make_folder(tmp_path, {"": 40}, classes=("flat",))

    def write(rows, columns="file,label", encoding="utf-8"):
        path = tmp_path / "labels.csv"
        with path.open("w", encoding=encoding, newline="") as file:
            csv.writer(file).writerows([columns.split(","), *rows])
        return str(path)

    return tmp_path / "flat", write


def alternating(*more):
    """40 rows of ants and bees, with further columns by number."""
    return [(f"{i}.png", ("ants", "bees")[i % 2], *(f(i) for f in more)) for i in range(40)]


def loaded(flat, path, **settings):
    """split → {name: class} of load()."""
    data = load(str(flat), SPLITS, labels=path, **settings)
    return {
        split: dict(zip(part.names, [data.classes[k] for k in part.labels], strict=True))
        for split, part in data.splits.items()
    }


def test_labels(flat):
    """Without a split each image's name decides by its hash, whatever the order of the lines."""
    folder, write = flat
    path = write(alternating(), encoding="utf-8-sig")
    found = loaded(folder, path)
    assert found["train"] | found["val"] | found["test"] == dict(alternating())
    listing = read_labels(path, folder)
    placed = {f.name: s for s, of in listing.splits.items() for fs in of.values() for f in fs}
    assert sum(placed[name] != split_by_hash(name) for name in placed) <= 4
    assert recipe_for(str(folder), path) == "cifar10"
    absolute = [(str(folder / name), label) for name, label in reversed(alternating())]
    assert loaded(folder, write(absolute)) == found
    repeated = [*alternating(), ("../flat/0.png", "ants")]
    assert loaded(folder, write(repeated)) == found


def test_images_elsewhere(flat, make_folder, tmp_path):
    """An absolute file may lie outside of the folder, and is then named by the way to it."""
    folder, write = flat
    make_folder(tmp_path, {"": 1}, classes=("elsewhere",))
    rows = [*alternating(), (str(tmp_path / "elsewhere" / "0.png"), "ants")]
    found = loaded(folder, write(rows))
    assert "ants" in [of.get("../elsewhere/0.png") for of in found.values()]


def test_splits_of_labels(flat):
    """A column split has any name of a split, and a share of train is kept where it has no val."""
    folder, write = flat
    names = ["Training", "train", "dev", "TEST"]
    path = write(alternating(lambda i: names[i // 10]), "file,label,split")
    found = loaded(folder, path)
    assert {split: len(part) for split, part in found.items()} == {
        "train": 20,
        "val": 10,
        "test": 10,
    }
    with pytest.raises(UserError, match="it has a val split of its own"):
        load(str(folder), ["train"], labels=path, fold="1/2")
    path = write(alternating(lambda i: "test" if i >= 30 else "train"), "file,label,split")
    found = loaded(folder, path, val=0.2)
    assert {split: len(part) for split, part in found.items()} == {
        "train": 24,
        "val": 6,
        "test": 10,
    }
    path = write(alternating(lambda i: "test" if i < 4 else ""), "file,label,split")
    assert {f"{i}.png" for i in range(4)} <= loaded(folder, path)["test"].keys()


@pytest.mark.parametrize("settings", [{}, {"val": 0.2}, {"fold": "1/3"}])
@pytest.mark.parametrize("split", ["", "train"])
def test_groups(flat, settings, split):
    """All images of a group land on one side, whether a hash, a share or a fold decides."""
    folder, write = flat
    path = write(
        alternating(lambda i: f"p{i // 3}", lambda i: split and (i % 3 == 0) * split),
        "file,label,group,split",
    )
    found = loaded(folder, path, **settings)
    assert sum(map(len, found.values())) == 40
    groups = [{int(name[:-4]) // 3 for name in part} for part in found.values()]
    assert sum(map(len, groups)) == len(set.union(*groups)) == 14


WRONG = [
    ([("a.png", "ants")], "line 2: no such file 'a.png'"),
    ([("", "ants")], "line 2: no such file ''"),
    ([("0.png", "ants"), ("1.png", " ")], "line 3: '1.png' has no label"),
    ([("0.png", "a", "trian")], "line 2: 'trian' is no split (did you mean train?)"),
    ([("0.png", "a"), ("1.png", "b"), ("0.png", "b")], "line 4: '0.png' is in line 2 too"),
    ([("0.png", "a", "val", "p"), ("1.png", "b", "test", "p")], "line 3: group 'p' is in test and"),
    ([("0.png", "a"), ("1.png", "a")], "one label only"),
    ([], "has no rows with the columns file and label"),
]


@pytest.mark.parametrize(("rows", "said"), WRONG)
def test_wrong_labels(flat, rows, said):
    """What is wrong is told in one line with the file and its line."""
    folder, write = flat
    path = write(rows, "file,label,split,group")
    with pytest.raises(UserError) as caught:
        load(str(folder), SPLITS, labels=path)
    message = str(caught.value)
    assert message.startswith(f"{path}: ") and said in message
    assert "\n" not in message and "--" not in message


def test_wrong_tables(flat):
    """No file, another column, and a data set with labels of its own: one line each."""
    folder, write = flat
    for path, said in (
        ("gone.csv", "cannot be read"),
        (write(alternating(), "image,label"), "columns file and label"),
    ):
        with pytest.raises(UserError, match=said):
            load(str(folder), SPLITS, labels=path)
    with pytest.raises(UserError, match="not for a set"):
        load("digits", SPLITS, labels=path)


@pytest.mark.parametrize(("column", "value"), [(1, "bees"), (2, "test"), (2, "val")])
def test_digest_of_labels(flat, column, value):
    """The data's hash covers the class of each image and the split that it is in."""
    folder, write = flat
    files = sorted(f"{i}.png" for i in range(40))  # so that the class alone changes, not the order
    rows = [[file, "ants" if file < files[20] else "bees", "train"] for file in files]

    def digest():
        path = write(rows, "file,label,split")
        return load(str(folder), ["train", "val"], labels=path, val=0).sha256

    first = digest()
    rows[19][column] = value
    assert digest() != first


def test_digest_of_lent_images(tmp_path, make_folder, monkeypatch):
    """The hash of a folder of classes tells where no image was lent, as in older runs."""
    root = make_folder(tmp_path / "p", {"": 30})
    make_folder(root, {"": 3}, classes=("wasps",))
    lending = load(str(root), ["train", "val"])
    monkeypatch.setattr(
        layout, "divide", lambda pairs, _: ({unit: split_by_hash(unit) for unit, _ in pairs}, set())
    )
    assert load(str(root), ["train", "val"]).sha256 != lending.sha256
