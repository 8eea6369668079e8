"""How a folder of images is laid out: train/, val/ and test/ of classes, or classes only."""

import os
import re
from collections import Counter
from pathlib import Path
from typing import NamedTuple

from lenslet import files
from lenslet.data.split import split_by_hash
from lenslet.errors import UserError, nearest

SPLITS = ("train", "val", "test")
EXTENSIONS = frozenset(
    ".jpg .jpeg .jfif .png .gif .bmp .webp .tif .tiff .ppm .pgm .pbm .pnm .avif .jp2".split()
)


class Listing(NamedTuple):
    """The image files of a folder."""

    splits: dict[str, dict[str, list[Path]]]  # split → class, in natural order → files, sorted
    divided: bool  # whether the folder has a train/ of its own, rather than classes only
    notes: list[str]  # what in it was ignored, a line each


def find_folder(name: str) -> Path:
    """A folder of images, relative to where the command runs or to the repository."""
    return Path(name) if Path(name).is_dir() else files.ROOT / name


def list_folder(root: Path) -> Listing:
    """The images of a folder with train/ (and val/, test/) of classes, or with classes only.

    A folder with classes only is divided, see split_by_hash().
    Errors: UserError where there is no such layout, fewer than two classes, or one without images.
    """
    if not root.is_dir():
        raise UserError("no such folder")
    divided = any(folder.is_dir() for folder in (root / "train").glob("*"))
    tops = {split: root / split for split in SPLITS} if divided else {"train": root}
    splits, ignored = {}, Counter()
    for split, top in tops.items():
        splits[split] = {}
        folders = [d for d in top.glob("[!.]*") if d.is_dir()]
        for folder in sorted(folders, key=lambda d: natural_sort_key(d.name)):
            splits[split][folder.name], others = find_images(folder)
            ignored.update(others)
    _check_classes(root, splits)
    notes = []
    if ignored:
        kinds = ", ".join(sorted(ignored))
        notes.append(f"{ignored.total()} files ignored, not images by their names ({kinds})")
    if not divided:
        return Listing(_divide(root, splits["train"]), divided, notes)
    unused = [d.name for d in root.glob("[!.]*") if d.is_dir() and d.name not in SPLITS]
    if unused:
        notes.append(f"folders ignored: {', '.join(unused)} (train, val and test are read)")
    return Listing(splits, divided, notes)


def _check_classes(root: Path, splits: dict[str, dict[str, list[Path]]]) -> None:
    """Errors: UserError for anything but two or more classes, the same in all splits."""
    classes = splits["train"]
    expected = "expected train/<class>/*.png or <class>/*.png (or .jpg, …), two classes or more"
    if len(classes) < 2:
        raise UserError(f"{len(classes) or 'no'} class folder in it; {expected}")
    if empty := [name for name, images in classes.items() if not images]:
        raise UserError(f"class {empty[0]} has no images; {expected}")
    like_splits = all(re.search("train|test|val", name, re.IGNORECASE) for name in classes)
    if like_splits and any(folder.is_dir() for folder in root.glob("*/*")):
        names = " and ".join(classes)
        raise UserError(f"{names} look like splits: name them train, val and test")
    for split, name in ((split, name) for split, inside in splits.items() for name in inside):
        if name not in classes:
            raise UserError(
                f"{split}/{name} is a class that train/ does not have{nearest(name, classes)}; "
                "rename or remove it"
            )


def _divide(root: Path, classes: dict[str, list[Path]]) -> dict[str, dict[str, list[Path]]]:
    """split → class → files, from the classes of a folder without splits."""
    splits = {split: {name: [] for name in classes} for split in SPLITS}
    for name, images in classes.items():
        for file in images:
            splits[split_by_hash(file.relative_to(root).as_posix())][name].append(file)
        if not splits["train"][name]:
            raise UserError(f"class {name} has too few images to be divided")
    return splits


def natural_sort_key(text: str) -> list:
    """A sort key under which 2 comes before 10."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", text) if p]


def find_images(folder: str | Path) -> tuple[list[Path], list[str]]:
    """All image files below a folder, sorted, and the name endings of the other files there.

    Hidden files are in neither; links to files are followed, those to folders are not.
    """
    paths = []
    for top, folders, names in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        paths += [Path(top, name) for name in names if not name.startswith(".")]
    files = [path for path in sorted(paths) if path.is_file()]
    images = [path for path in files if path.suffix.lower() in EXTENSIONS]
    others = [path.suffix or path.name for path in files if path.suffix.lower() not in EXTENSIONS]
    return images, others
