"""Opens a data set by name or folder."""

import hashlib
import json
import os
from collections import Counter

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

import lenslet.files
from lenslet.data import sets
from lenslet.data.batches import SMALL, Data, Split
from lenslet.data.decode import read_image
from lenslet.data.layout import find_folder, is_divided, is_small, list_folder
from lenslet.data.sets import is_set
from lenslet.data.split import subset, validation_mask
from lenslet.data.verify import inspect_images
from lenslet.errors import OutsideError, UserError

# The recipe that supplies the defaults for a data set; a folder's follows from its pictures.
RECIPES = {
    "cifar10": "cifar10",
    "cifar100": "cifar10",
    "mnist": "mnist",
    "fashion-mnist": "mnist",
    "digits": "digits",
}


def recipe_for(name: str) -> str:
    """The recipe whose settings are the defaults for --data."""
    if is_set(name):
        return RECIPES[name]
    return "cifar10" if is_small(find_folder(name), SMALL) else "photos"


def choose_data(name: str | None) -> str:
    """--data, a folder as its full path; without it CIFAR-10 or, for want of that, the digits."""
    if name:
        return name if is_set(name) else str(find_folder(name).resolve())
    try:
        sets.ensure("cifar10", patience=15)
        return "cifar10"
    except OutsideError as error:
        print(f"CIFAR-10 is not to be had, so the bundled digits are used instead: {error}")
        return "digits"


def load(
    name: str,
    wanted: list[str],
    *,
    val: float = 0.1,
    fold: str | None = None,
    limit: int | None = None,
    like: dict | None = None,
    photo_size: int = 224,
    crop: float = 0.875,
    skip_broken: bool = False,
    workers: int = 0,
) -> Data:
    """Open a data set by name or folder; only the wanted ones of train, val and test are read.

    val: share of the training pictures kept for validation where the set has no val of its own; 0
    keeps none.  fold: "2/5" keeps the second of five parts instead, which the set must then have no
    val of its own for.  limit: so many training pictures and at most so many validation pictures,
    of all classes in their proportion.  like: the header of trained weights, whose classes and way
    of reading are taken over.  photo_size, crop: how photographs are read otherwise; small pictures
    keep their own size.

    A split that the set does not have, or that is empty, is missing from the result.
    Errors: UserError for an unknown name, a folder without the layout, broken pictures, classes
    that differ from those of the weights, and too few pictures for fold or limit.
    """
    if is_set(name):
        return _load_set(name, wanted, val, fold, limit, like)
    root = find_folder(name)
    found, notes = list_folder(root)
    classes = like["classes"] if like else list(found["train"])
    strange = [c for c in found["train"] if c not in classes]
    if strange:
        raise UserError(
            f"--data {name}: class {strange[0]} is none of the {len(classes)} that the weights "
            f"were trained on ({', '.join(classes[:3])}, …)"
        )
    rows = _choose_rows(name, found, classes, val, fold, is_divided(root))
    for split in ("train", "val"):
        kept = subset(torch.tensor([label for _, label in rows[split]]), limit, name)
        rows[split] = [rows[split][i] for i in kept.tolist()]
    # Whoever trains learns of every broken file now, those that test.py would meet included.
    looked_at = rows if "train" in wanted and not limit else wanted
    files = sorted({file for split in looked_at for file, _ in rows.get(split, [])})
    checked, broken, array = inspect_images(
        files, SMALL, lenslet.files.DATA / "inspected.json", workers
    )
    if broken and not skip_broken:
        raise UserError(
            f"--data {name}: {len(broken)} of {len(checked) + len(broken)} pictures are broken; "
            "mend or remove them, or leave them out with --skip-broken:\n" + "\n".join(broken)
        )
    if broken:
        notes.append(f"{len(broken)} broken pictures left out")
    rows = {s: [row for row in rows.get(s, []) if row[0] in checked] for s in wanted}
    if "train" in rows and len({label for _, label in rows["train"]}) < len(classes):
        raise UserError(f"--data {name}: a class has no readable training pictures left")
    rows = {split: part for split, part in rows.items() if part}
    if not rows:
        return Data(name, classes, 0, (0, 0), crop, {}, "", notes)

    found = [checked[file] for part in rows.values() for file, _ in part]
    sides, greys, small = zip(*found, strict=True)
    in_memory = max(sides) <= SMALL
    channels = like["channels"] if like else 1 if all(greys) else 3
    if like:
        image_size, crop = tuple(like["image_size"]), like["crop"]
    elif in_memory:
        common = Counter(pixels.shape[:2] for pixels in small)
        image_size, crop = max(common, key=lambda size: (common[size], size)), 1.0
    else:
        image_size = (photo_size, photo_size)

    def read(file):
        pixels = checked[file][2]
        if pixels.shape[:2] != image_size or pixels.shape[2] > channels:
            return read_image(file, channels, image_size, crop)
        return np.broadcast_to(pixels, (*image_size, channels))

    in_memory = in_memory and max(image_size) <= SMALL
    if in_memory:
        fits = array is not None and array.shape[2:] == image_size
        fits &= fits and array.shape[1] >= channels and (array.shape[1] == channels or all(greys))
        if not fits:
            files = [file for part in rows.values() for file, _ in part]
            array = np.stack([read(file).transpose(2, 0, 1) for file in files])
        stacked = torch.from_numpy(array[:, :channels])
        place = {file: i for i, file in enumerate(files)}
    splits = {}
    for split, part in rows.items():
        images = [file for file, _ in part]
        labels = torch.tensor([label for _, label in part])
        names = [file.relative_to(root).as_posix() for file in images]
        at = None
        if in_memory:
            at, images = torch.tensor([place[file] for file in images]), stacked
        splits[split] = Split(images, labels, names, at)
    listing = "".join(
        f"{split}/{name}:{file.stat().st_size}\n"
        for split, part in splits.items()
        for name, file in zip(part.names, (file for file, _ in rows[split]), strict=True)
    )
    digest = hashlib.sha256(os.fsencode(listing)).hexdigest()
    return Data(name, classes, channels, image_size, crop, splits, digest, notes)


def _choose_rows(name, found, classes, val, fold, divided: bool) -> dict[str, list[tuple]]:
    """split → (file, label) of its pictures, with a part of train as val where that is wanted."""
    rows = {"train": [], "val": []}
    for split, inside in found.items():
        rows[split] = [(file, classes.index(c)) for c, files in inside.items() for file in files]
    if fold and divided and rows["val"]:
        raise UserError(f"--fold {fold}: --data {name} has a val/ of its own, which stays as it is")
    if not divided and (fold or val == 0):
        rows["train"] += rows["val"]
        rows["val"] = []
    if (fold or val) and not rows["val"]:
        away = validation_mask(torch.tensor([label for _, label in rows["train"]]), val, fold)
        both = list(zip(rows["train"], away.tolist(), strict=True))
        rows["train"] = [row for row, is_away in both if not is_away]
        rows["val"] = [row for row, is_away in both if is_away]
    return rows


def _load_set(name, wanted, val, fold, limit, like) -> Data:
    folder = sets.ensure(name)
    splits = {}
    for file in {"test" if split == "test" else "train" for split in wanted}:
        path = folder / f"{file}.safetensors"
        try:
            with safe_open(path, framework="pt") as stored:
                images, labels = stored.get_tensor("images"), stored.get_tensor("labels")
                header = stored.metadata()
        except SafetensorError as error:
            raise UserError(f"{path}: damaged ({error}); remove it to have it made anew") from error
        parts = {file: torch.arange(len(labels))}
        if file == "train":
            away = validation_mask(labels, val, fold)
            parts = {"train": (~away).nonzero().flatten(), "val": away.nonzero().flatten()}
            parts = {s: rows[subset(labels[rows], limit, name)] for s, rows in parts.items()}
        for split, rows in parts.items():
            if split in wanted and len(rows):
                names = [str(i) for i in rows.tolist()]
                splits[split] = Split(images, labels[rows], names, rows)  # images: mapped, no copy
    classes = json.loads(header["classes"])
    if like and like["classes"] != classes:
        raise UserError(
            f"--data {name} has {len(classes)} classes ({classes[0]}, …), the weights were trained "
            f"on {len(like['classes'])} ({like['classes'][0]}, …): give data with those classes"
        )
    channels, *image_size = images.shape[1:]
    if like and (channels, image_size) != (like["channels"], like["image_size"]):
        raise UserError(
            f"--data {name}: pictures are {channels}x{image_size[0]}x{image_size[1]}, the weights "
            f"were trained on {like['channels']}x{like['image_size'][0]}x{like['image_size'][1]}"
        )
    digest = hashlib.sha256(header["source_sha256"].encode()).hexdigest()
    return Data(name, classes, channels, tuple(image_size), 1.0, splits, digest)
