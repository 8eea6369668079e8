"""How a folder of images is laid out: train/, val/ and test/ of classes, or classes only."""

import hashlib
import os
import re
from collections import Counter
from pathlib import Path

from lenslet import files
from lenslet.data.decode import longer_side
from lenslet.errors import UserError, nearest


def find_folder(name: str) -> Path:
    """A folder of pictures, relative to where the command runs or to the repository."""
    return Path(name) if Path(name).is_dir() else files.ROOT / name


def is_divided(root: Path) -> bool:
    """Whether a folder has train/ with classes in it, rather than classes only."""
    return any(inside.is_dir() for inside in (root / "train").glob("*"))


def list_folder(root: Path) -> tuple[dict[str, dict[str, list[Path]]], list[str]]:
    """split → class → files, and notes, for a folder with train/ (val/, test/) or classes only.

    A folder with classes only is divided 80/10/10 by a hash of each file's relative name, so that
    adding a picture moves no other.
    Errors: UserError where there is no such layout, or fewer than two classes with pictures.
    """
    if not root.is_dir():
        raise UserError(f"--data {root}: no such folder")
    divided = is_divided(root)
    tops = {s: root / s for s in ("train", "val", "test")} if divided else {"train": root}
    found, others = {}, Counter()
    for split, top in tops.items():
        folders = [d for d in top.glob("*") if d.is_dir() and not d.name.startswith(".")]
        found[split] = {}
        for folder in sorted(folders, key=lambda d: natural_sort_key(d.name)):
            found[split][folder.name], strangers = find_images(folder)
            others.update(strangers)
    classes = found["train"]
    expected = f"expected {tops['train']}/<class>/*.png (or .jpg, …) for two classes or more"
    if len(classes) < 2:
        raise UserError(f"--data {root}: {len(classes) or 'no'} class folder in it; {expected}")
    for name, inside in classes.items():
        if not inside:
            raise UserError(f"--data {root}: class {name} has no pictures; {expected}")
    splits = [name for name in classes if re.search("train|test|val", name, re.IGNORECASE)]
    if len(splits) == len(classes) and any(d.is_dir() for d in root.glob("*/*")):
        raise UserError(
            f"--data {root}: {' and '.join(splits)} look like splits: name them train, val and test"
        )
    for split, inside in found.items():
        for name in inside:
            if name not in classes:
                raise UserError(
                    f"--data {root}: {split}/{name} is a class that train/ does not have"
                    f"{nearest(name, classes)}; rename or remove it"
                )
    if not divided:
        found |= {split: {name: [] for name in classes} for split in ("train", "val", "test")}
        for name, files in classes.items():
            for file in files:
                digest = hashlib.sha256(os.fsencode(file.relative_to(root).as_posix())).digest()
                split = "test" if digest[0] < 25.6 else "val" if digest[0] < 51.2 else "train"
                found[split][name].append(file)
        if not all(found["train"].values()):
            name = next(name for name, files in found["train"].items() if not files)
            raise UserError(f"--data {root}: class {name} has too few pictures to be divided")
    notes = []
    if others:
        kinds = ", ".join(sorted(others))
        notes.append(f"{others.total()} files ignored, not pictures by their names ({kinds})")
    unused = [d.name for d in root.glob("[!.]*") if divided and d.is_dir() and d.name not in tops]
    if unused:
        notes.append(f"folders ignored: {', '.join(unused)} (train, val and test are read)")
    return found, notes


def is_small(root: Path, side: int) -> bool:
    """Whether a folder's training and validation pictures are at most `side` pixels long."""
    found, _ = list_folder(root)
    return all(
        longer_side(file) <= side
        for split in ("train", "val")
        for files in found.get(split, {}).values()
        for file in files
    )


def natural_sort_key(text: str) -> list:
    """A sort key under which 2 comes before 10."""
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p) for p in re.split(r"(\d+)", text) if p]


EXTENSIONS = frozenset(
    ".jpg .jpeg .jfif .png .gif .bmp .webp .tif .tiff .ppm .pgm .pbm .pnm .avif .jp2".split()
)


def find_images(folder: str | Path) -> tuple[list[Path], list[str]]:
    """All picture files below a folder, sorted, and the name endings of the other files there.

    Hidden files are in neither.
    """
    below = ((path, path.relative_to(folder).parts) for path in sorted(Path(folder).rglob("*")))
    files = [p for p, parts in below if not any(x.startswith(".") for x in parts) and p.is_file()]
    found = [path for path in files if path.suffix.lower() in EXTENSIONS]
    others = [path.suffix or path.name for path in files if path.suffix.lower() not in EXTENSIONS]
    return found, others
