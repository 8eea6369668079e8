"""How a folder of images is laid out: train/, val/ and test/ of classes, or classes only."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import NamedTuple, NoReturn

from lenslet import files
from lenslet.data.split import divide
from lenslet.errors import UserError, counted, nearest

SPLITS = ("train", "val", "test")
SPLIT_NAMES = {"train": "train", "training": "train", "test": "test", "testing": "test"}
SPLIT_NAMES |= dict.fromkeys(("val", "valid", "validation", "dev", "eval"), "val")  # in any case
EXTENSIONS = frozenset(
    ".jpg .jpeg .jfif .png .gif .bmp .webp .tif .tiff .ppm .pgm .pbm .pnm .avif .jp2 "
    ".heic .heif".split()
)
# What systems put beside images, in lower case; as good as hidden.
SYSTEM = frozenset("__macosx @eadir lost+found thumbs.db desktop.ini".split())
EXPECTED = "expected train/<class>/*.png or <class>/*.png (or .jpg, …), two classes or more"


class Listing(NamedTuple):
    """The image files of a folder."""

    splits: dict[str, dict[str, list[Path]]]  # split → class, in natural order → files, sorted
    own_val: str  # what the user calls images set apart for validation ("valid/"); "": none are
    notes: list[str]  # what in it was ignored, unused or lent, a line each
    groups: dict[Path, str]  # what each image must not be parted from; {}: of nothing


def find_folder(name: str) -> Path:
    """A folder of images, relative to where the command runs or to the repository."""
    return Path(name) if Path(name).is_dir() else files.ROOT / name


def name_in(root: Path, file: Path) -> str:
    """What a file is called in a data folder: its path from there."""
    try:
        return file.relative_to(root).as_posix()
    except ValueError:  # a file of labels may name what lies elsewhere
        return Path(os.path.relpath(file, root)).as_posix()


def list_folder(root: Path) -> Listing:
    """The images of a folder with train/ (and val/, test/) of classes, or with classes only.

    A split's folder has one of SPLIT_NAMES.  Classes only are divided, see divide_classes().
    Errors: UserError where there is no such layout, fewer than two classes, one without images, or
    a folder that cannot be read, see find_images().
    """
    if not root.is_dir():
        raise UserError("no such folder")
    tops = _find_splits(root)
    splits, inside, ignored, notes = {split: {} for split in SPLITS}, {}, Counter(), []
    for split, top in tops.items():
        folders, images, kinds = _look(top)
        ignored.update(kinds)
        folders = [folder for folder in folders if folder not in tops.values()]
        if split == "":
            ignored.update(f"{folder.name}/" for folder in folders)
            folders = []
        if images and not folders and split in ("val", "test"):
            there = f"{top.name}/ has {counted(len(images), 'image')} in no class folder"
            notes.append(f"{there}: it is not used, and predict.py names what is in them")
        elif images:
            ignored["images in no class folder"] += len(images)
        for folder in folders:
            splits[split][folder.name], kinds, inside[folder] = find_images(folder)
            ignored.update(kinds)
    _check_classes(root, tops, splits, inside)
    if ignored:
        kinds = [f"{kind} ({count})" for kind, count in sorted(ignored.items())]
        notes.append(f"ignored {ignored.total():,} files and folders: {some(kinds)}")
    own_val = f"{tops['val'].name}/" if any(splits["val"].values()) else ""
    if tops["train"] == root and not (splits["val"] or splits["test"]):
        names = {file: name_in(root, file) for file in chain(*splits["train"].values())}
        splits, lent = divide_classes(splits["train"], names)
        notes += lent
    return Listing(splits, own_val, notes, {})


def _find_splits(root: Path) -> dict[str, Path]:
    """split → its folder; "" → the root, which is that of train where there is no such folder.

    Errors: UserError for two folders of one split.
    """
    named = {"": [root], **{split: [] for split in SPLITS}}
    folders = _look(root)[0]
    for folder in folders:
        if split := SPLIT_NAMES.get(folder.name.lower()):
            named[split].append(folder)
    only_splits = sum(map(len, named.values())) == len(folders) + 1
    if not any(only_splits or _look(folder)[0] for folder in named["train"]):  # a class "train"
        named["train"] = named.pop("")
    for split, found in named.items():
        if len(found) > 1:
            names = " and ".join(f"{folder.name}/" for folder in found)
            raise UserError(f"{names} are both for {split}: move the images of one to the other")
    return {split: found[0] for split, found in named.items() if found}


def _check_classes(root: Path, tops: dict, splits: dict, inside: dict[Path, list[Path]]) -> None:
    """Errors: UserError for anything but two or more classes, the same in all splits.

    tops: of _find_splits(); splits: as in Listing; inside: class folder → folders in it.
    """
    classes, top = splits["train"], tops["train"]
    where = "it" if top == root else f"{top.name}/"
    if top == root:
        if found := _find_data_set({root / name: inside[root / name] for name in classes}):
            raise UserError(f"the classes are in {name_in(root, found)}/: give that folder")
        names = [folder.name for folder in _look(root)[0]]
        like_splits = all(re.search("train|test|val", name, re.IGNORECASE) for name in names)
        if like_splits and (splits["val"] or any(inside.values())):
            names = " and ".join(names)
            raise UserError(f"{names} look like splits: name them train, val and test")
    if not classes and (images := _look(top)[1]):
        there = f"{counted(len(images), 'image')} in {where}, but no class folder"
        raise UserError(f"{there}; {EXPECTED}, or a CSV file of labels")
    if len(classes) < 2:
        raise UserError(f"{len(classes) or 'no'} class folder in {where}; {EXPECTED}")
    if empty := [name for name, images in classes.items() if not images]:
        raise UserError(f"class {empty[0]} has no images; {EXPECTED}")
    for split, name in ((split, name) for split, found in splits.items() for name in found):
        if name not in classes:
            raise UserError(
                f"{tops[split].name}/{name} is a class that {where} does not have"
                f"{nearest(name, classes)}; rename or remove it"
            )


def _find_data_set(inside: dict[Path, list[Path]]) -> Path | None:
    """The one of these folders that has train/ and val/ or test/ or, if it is alone, has classes.

    inside: folder → folders in it.
    """
    for folder, below in inside.items():
        if below and {"", "train"} < _find_splits(folder).keys():
            return folder
        if below and len(inside) == 1:
            return folder if len(below) > 1 else _find_data_set({below[0]: _look(below[0])[0]})
    return None


def divide_classes(
    classes: dict[str, list[Path]], units: dict[Path, str], fixed: dict[str, str] | None = None
) -> tuple[dict[str, dict[str, list[Path]]], list[str]]:
    """split → class → files, and a note of those that were lent, see split.divide().

    classes: class → files.  units: the name of each file, or of the group that it is part of.
    """
    pairs = ((units[file], name) for name, files in classes.items() for file in files)
    placed, lent = divide(pairs, fixed or {})
    splits = {
        split: {n: [f for f in files if placed[units[f]] == split] for n, files in classes.items()}
        for split in SPLITS
    }
    moved = [name for name, files in classes.items() for file in files if units[file] in lent]
    what = f"{counted(len(moved), 'image')} of {some([*dict.fromkeys(moved)])}"
    return splits, [f"{what} lent to splits that had none of the class"] if moved else []


def some(names: list[str]) -> str:
    """The first five names, to read."""
    return ", ".join([*names[:5], *["…"] * (len(names) > 5)])


def natural_sort_key(text: str) -> list:
    """A sort key under which 2 comes before 10."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", text) if p]


def find_images(folder: str | Path) -> tuple[list[Path], list[str], list[Path]]:
    """All image files below a folder, sorted; the name endings of the other files there; and the
    folders directly in it.

    Links are followed; hidden files and SYSTEM's are in none.  What is named like an image is
    listed even if it cannot be read, which is found out when it is opened.
    Errors: UserError for a folder that cannot be read, for a dangling link that is not named like
    an image, since it may stand for a folder, and for a link to a folder that contains it.
    """
    images, kinds, folders = [], [], None
    for below, found, others in _walk(folder):
        images += found
        kinds += others
        folders = below if folders is None else folders
    return sorted(images), kinds, folders


def _look(top: Path) -> tuple[list[Path], list[Path], list[str]]:
    """The folders, in natural order, and images directly in a folder, and the other files' endings.

    Errors: as of find_images().
    """
    folders, images, kinds = next(_walk(top))
    return sorted(folders, key=lambda folder: natural_sort_key(folder.name)), images, kinds


def _walk(folder: str | Path) -> Iterator[tuple[list[Path], list[Path], list[str]]]:
    """The folders, images and other files' endings in a folder, then those in each one below it."""
    for top, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = filter(_counts, folders)
        below = [Path(top, name) for name in folders]
        files = [Path(top, name) for name in filter(_counts, names)]
        others = [path for path in files if path.suffix.lower() not in EXTENSIONS]
        for path in others:  # whether an image can be read is found out by reading it
            try:
                path.stat()
            except OSError as error:
                _refuse(error)
        for link in filter(Path.is_symlink, below):
            here = link.parent.absolute()  # what contains it, by the way taken and by the real one
            containing = here, *here.parents, *here.resolve().parents
            if link.resolve() in map(Path.resolve, containing):  # following it would never end
                raise UserError(f"{link}: a link to a folder that contains it; remove the link")
        images = [path for path in files if path.suffix.lower() in EXTENSIONS]
        yield below, images, [path.suffix or path.name for path in others]


def _counts(name: str) -> bool:
    """Whether a file or folder is the user's, neither hidden nor of SYSTEM."""
    return not name.startswith(".") and name.lower() not in SYSTEM


def _refuse(error: OSError) -> NoReturn:
    raise UserError(
        f"{error.filename}: cannot be read ({error.strerror}); "
        "mount its disk, change its permissions, or remove it"
    ) from error
