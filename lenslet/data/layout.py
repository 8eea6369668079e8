"""How a folder of images is laid out: train/, val/ and test/ of classes, or classes only."""

import os
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple, NoReturn

from lenslet import files
from lenslet.data.split import split_by_hash
from lenslet.errors import UserError, counted, nearest

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
    Errors: UserError where there is no such layout, fewer than two classes, one without images, or
    a folder that cannot be read, see find_images().
    """
    if not root.is_dir():
        raise UserError("no such folder")
    inside = {folder.name: folder for folder in _folders(root)}
    divided = "train" in inside and bool(_folders(inside["train"]))
    tops = {split: inside.get(split) for split in SPLITS} if divided else {"train": root}
    splits, ignored = {}, Counter()
    for split, top in tops.items():
        splits[split] = {}
        for folder in _folders(top) if top else []:
            splits[split][folder.name], others = find_images(folder)
            ignored.update(others)
    _check_classes(root, splits)
    notes = []
    if ignored:
        kinds = ", ".join(sorted(ignored))
        notes.append(f"{counted(ignored.total(), 'file')} ignored: no image suffix ({kinds})")
    if not divided:
        return Listing(_divide(root, splits["train"]), divided, notes)
    if unused := [name for name in inside if name not in SPLITS]:
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

    Links are followed, hidden files are in neither.  What is named like an image is listed even if
    it cannot be read, which is found out when it is opened.
    Errors: UserError for a folder that cannot be read, for a dangling link that is not named like
    an image, since it may stand for a folder, and for a link to a folder that contains it.
    """
    images, others = [], []
    for _, found, rest in _walk(folder):
        images += found
        others += [path.suffix or path.name for path in rest]
    return sorted(images), others


def _folders(top: Path) -> list[Path]:
    """The folders directly below one, in natural order.  Errors: as of find_images()."""
    return sorted(next(_walk(top))[0], key=lambda folder: natural_sort_key(folder.name))


def _walk(folder: str | Path) -> Iterator[tuple[list[Path], list[Path], list[Path]]]:
    """The folders, images and other files directly in a folder, then those in each one below it."""
    for top, folders, names in os.walk(folder, onerror=_refuse, followlinks=True):
        folders[:] = [name for name in folders if not name.startswith(".")]
        below = [Path(top, name) for name in folders]
        files = [Path(top, name) for name in names if not name.startswith(".")]
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
        yield below, [path for path in files if path.suffix.lower() in EXTENSIONS], others


def _refuse(error: OSError) -> NoReturn:
    raise UserError(
        f"{error.filename}: cannot be read ({error.strerror}); "
        "mount its disk, change its permissions, or remove it"
    ) from error
