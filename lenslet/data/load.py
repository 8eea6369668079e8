"""Opens a data set by name or folder."""

import hashlib
import json
import os
import time
from collections import Counter
from itertools import chain, compress
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

import lenslet.files
from lenslet.data import sets
from lenslet.data.batches import SMALL, Data, Names, Split, evenly_spaced
from lenslet.data.cache import decode_all, margin
from lenslet.data.decode import Inspected, longer_side, read_image
from lenslet.data.labels import read_labels
from lenslet.data.layout import Listing, find_folder, list_folder, name_in
from lenslet.data.split import subset, validation_mask
from lenslet.data.verify import Inspection, inspect_images
from lenslet.errors import OutsideError, UserError, counted, error_context
from lenslet.fonts import drawable

# The recipe that supplies the defaults for a named set; a folder's follows from its images.
RECIPES = {name: name for name in sets.SETS} | {"cifar100": "cifar10", "fashion-mnist": "mnist"}

Rows = dict[str, list[tuple[Path, int]]]  # split → (file, label) of its images


def recipe_for(name: str, labels: str | None = None) -> str:
    """The recipe whose settings are the defaults for a data set.

    A folder takes that for small images if all its images are small.  To tell, the headers of at
    most 1,000 training and validation files are read, evenly spaced: to open every file of a large
    folder takes longer than the answer is worth.  It lists the folder, so call it on one process.
    labels: see load().  Errors: UserError for an unknown name, or a folder without the layout.
    """
    if sets.is_set(name):
        return RECIPES[name]
    splits = list_images(find_folder(name), labels).splits
    files = list(chain(*splits["train"].values(), *splits["val"].values()))
    sample = [files[i] for i in evenly_spaced(len(files), 1000)]
    return "cifar10" if all(longer_side(file) <= SMALL for file in sample) else "photos"


def choose_data(name: str | None) -> str:
    """The name of a set, or a folder's full path; for None CIFAR-10, or offline the digits."""
    if name:
        return name if sets.is_set(name) else str(find_folder(name).resolve())
    try:
        sets.ensure("cifar10", patience=15)
        return "cifar10"
    except OutsideError as error:
        print(
            "CIFAR-10 is neither on disk nor reachable, so this trains on the bundled digits "
            f"instead ({error})"
        )
        return "digits"


def load(
    name: str,
    wanted: list[str],
    *,
    labels: str | None = None,
    val: float = 0.1,
    fold: str | None = None,
    limit: int | None = None,
    like: dict | None = None,
    photo_size: int = 224,
    crop: float = 0.875,
    skip_broken: bool = False,
    workers: int = 0,
    in_memory: bool = False,
) -> Data:
    """Open a data set by name or folder; only the wanted ones of train, val and test are read.

    labels: a CSV file of the images' classes, in place of class folders, see read_labels().  val:
    share of the training images kept for validation where the set has no val of its own; 0 keeps
    none.  fold: "2/5" keeps the second of five parts instead, which the set must then have no
    val of its own for.  limit: so many training images and at most so many validation images, of
    all classes in their proportion.  like: the header of trained weights, whose classes and way of
    reading are taken over.  photo_size, crop: how photographs are read otherwise; small images keep
    their own size.  in_memory: photographs to train and validate on are decoded once, see cache.py.

    A split that the set does not have, or that is empty, is missing from the result.
    Errors: UserError for an unknown name, a folder without the layout, broken images, classes that
    differ from those of the weights, and too few images for fold or limit.
    """
    if sets.is_set(name):
        if labels:
            raise UserError(f"{labels}: a file of labels is for a folder of images, not for a set")
        return _load_set(name, wanted, val, fold, limit, like)
    root = find_folder(name)
    listing = list_images(root, labels)
    classes = like["classes"] if like else list(listing.splits["train"])
    rows = _assign(listing, classes, val, fold, limit)

    # Training inspects every split: who starts it learns now of the broken files in test/ too.
    inspected = rows if "train" in wanted and not limit else wanted
    files = sorted({file for split in inspected for file, _ in rows[split]})
    inspection = inspect_images(files, SMALL, lenslet.files.DATA / "inspected.json", workers)
    notes = listing.notes + _broken_notes(inspection, skip_broken) + drawable(classes)[1]
    rows = _readable(rows, wanted, inspection, classes)
    data = Data(name, classes, 0, (0, 0), crop, {}, "", notes)
    if not rows:
        return data

    images = [inspection.images[file] for file, _ in chain(*rows.values())]
    data.channels, data.image_size, data.crop = _choose_reading(images, like, photo_size, crop)
    for split, part in rows.items():
        names = Names(name_in(root, file) for file, _ in part)
        data.splits[split] = Split(root, _labels(part), names)
    data.sha256 = _digest(rows, root, inspection, classes if labels else None)
    if max(image.side for image in images) <= SMALL and max(data.image_size) <= SMALL:
        _keep_in_memory(data, rows, files, inspection)
    elif in_memory:
        _keep_photographs(data, rows, workers)
    return data


def list_images(root: Path, labels: str | None) -> Listing:
    """The images of a folder, by its layout or by a file of labels."""
    if not labels:
        return list_folder(root)
    with error_context(labels):
        return read_labels(labels, root)


def _labels(rows: list[tuple[Path, int]]) -> Tensor:
    return torch.tensor([label for _, label in rows])


def _assign(listing: Listing, classes: list[str], val: float, fold: str | None, limit) -> Rows:
    """At most `limit` images of each split, with a part of train as val where that is wanted."""
    label_of = {name: label for label, name in enumerate(classes)}
    if unknown := [name for name in listing.splits["train"] if name not in label_of]:
        raise UserError(
            f"class {unknown[0]} is not among the {len(classes)} that the weights were trained on "
            f"({', '.join(classes[:3])}, …)"
        )
    rows = {
        split: [(file, label_of[name]) for name, files in inside.items() for file in files]
        for split, inside in listing.splits.items()
    }
    if fold and listing.own_val:
        raise UserError(f"it has a {listing.own_val} of its own, so no fold can be kept instead")
    if not listing.own_val and (fold or val == 0):
        rows["train"] += rows["val"]
        rows["val"] = []
    if (fold or val) and not rows["val"]:
        groups = None
        if numbers := {name: i for i, name in enumerate(sorted({*listing.groups.values()}))}:
            groups = torch.tensor([numbers[listing.groups[file]] for file, _ in rows["train"]])
        kept = validation_mask(_labels(rows["train"]), val, fold, groups)
        rows["val"] = list(compress(rows["train"], kept.tolist()))
        rows["train"] = list(compress(rows["train"], (~kept).tolist()))
    for split in ("train", "val"):
        kept = subset(_labels(rows[split]), limit)
        rows[split] = [rows[split][i] for i in kept.tolist()]
    return rows


def _broken_notes(inspection: Inspection, skip_broken: bool) -> list[str]:
    """What to tell the user of broken images.  Errors: UserError unless they are to be skipped."""
    broken = inspection.broken
    if broken and not skip_broken:
        raise UserError(
            f"{len(broken)} of {counted(len(inspection.images) + len(broken), 'image')} "
            "cannot be read; "
            "fix or delete them, or leave them out with the option skip-broken:\n"
            + "\n".join(broken)
        )
    return [f"left out {counted(len(broken), 'image')} that cannot be read"] if broken else []


def _readable(rows: Rows, wanted: list[str], inspection: Inspection, classes: list[str]) -> Rows:
    """The wanted splits without their broken images; one that is empty is missing."""
    rows = {s: [row for row in rows[s] if row[0] in inspection.images] for s in wanted}
    missing = set(range(len(classes))) - {label for _, label in rows.get("train", [])}
    if "train" in rows and missing:
        raise UserError(f"class {classes[min(missing)]} has no readable training images left")
    return {split: part for split, part in rows.items() if part}


def _choose_reading(images: list[Inspected], like: dict | None, photo_size: int, crop: float):
    """The channels, (height, width) and crop that all images are read with."""
    if like:
        return like["channels"], tuple(like["image_size"]), like["crop"]
    channels = 1 if all(image.grey for image in images) else 3
    if max(image.side for image in images) > SMALL:
        return channels, (photo_size, photo_size), crop
    common = Counter(image.pixels.shape[:2] for image in images)
    return channels, max(common, key=lambda size: (common[size], size)), 1.0


def _keep_in_memory(data: Data, rows: Rows, files: list[Path], inspection: Inspection) -> None:
    """Replace the splits' files (rows) by the pixels of their small images, in one array for all.

    files: those that were inspected, in the order of inspection.array.
    """

    def planes(file):  # [C, H, W]
        pixels = inspection.images[file].pixels
        if pixels.shape[:2] != data.image_size or pixels.shape[2] > data.channels:
            pixels = read_image(file, data.channels, data.image_size, data.crop)
        return np.broadcast_to(pixels, (*data.image_size, data.channels)).transpose(2, 0, 1)

    used = [file for file, _ in chain(*rows.values())]
    array = inspection.array  # serves as it is where it can: no copy
    fits = array is not None and array.shape[2:] == data.image_size
    if fits and array.shape[1] != data.channels:  # three equal channels can be one, colours cannot
        fits = data.channels == 1 and all(inspection.images[file].grey for file in used)
    if not fits:
        files, array = used, np.stack([planes(file) for file in used])
    stacked = torch.from_numpy(array[:, : data.channels])
    place = {file: i for i, file in enumerate(files)}
    for name, split in data.splits.items():
        split.rows = torch.tensor([place[file] for file, _ in rows[name]])
        split.images = stacked


def _keep_photographs(data: Data, rows: Rows, workers: int) -> None:
    """Replace the files (rows) to train on by whole images, squeezed, with a margin for crops, and
    those to validate on by what predict.py reads of them.
    """
    began = time.perf_counter()
    for name, split in data.splits.items():
        size, crop = data.image_size, data.crop
        if name == "train":
            size, crop = margin(size), None
        files = [file for file, _ in rows[name]]
        images, aspects = decode_all(files, data.channels, size, crop, workers)
        split.images, split.rows = images, torch.arange(len(split))
        split.aspects = aspects if name == "train" else None
    data.seconds = time.perf_counter() - began


def _digest(rows: Rows, root: Path, inspection: Inspection, classes: list[str] | None) -> str:
    """SHA-256 of which file is in which split, and of their contents and, if given, classes."""
    listing = "".join(
        f"{split}/{name_in(root, file)}:{inspection.images[file].sha256}"
        f"{classes[label] if classes else ''}\n"
        for split, part in rows.items()
        for file, label in part
    )
    return hashlib.sha256(os.fsencode(listing)).hexdigest()


def _load_set(name, wanted, val, fold, limit, like) -> Data:
    """load() for a named set, whose images stay mapped from its files: nothing is copied."""
    folder = sets.ensure(name)
    splits = {}
    for file in sorted({"test" if split == "test" else "train" for split in wanted}):
        path = folder / f"{file}.safetensors"
        try:
            with safe_open(path, framework="pt") as stored:
                images, labels = stored.get_tensor("images"), stored.get_tensor("labels")
                header = stored.metadata()
        except SafetensorError as error:
            raise UserError(f"{path}: damaged ({error}); remove it, and it is made anew") from error
        rows = {file: torch.arange(len(labels))}
        if file == "train":
            kept = validation_mask(labels, val, fold)
            rows = {"train": (~kept).nonzero().flatten(), "val": kept.nonzero().flatten()}
            rows = {split: part[subset(labels[part], limit)] for split, part in rows.items()}
        for split, part in rows.items():
            if split in wanted and len(part):
                names = [str(i) for i in part.tolist()]
                splits[split] = Split(images, labels[part], names, part)
    classes = json.loads(header["classes"])
    if like and like["classes"] != classes:
        raise UserError(
            f"it has {len(classes)} classes ({classes[0]}, …), but the weights were trained on "
            f"{len(like['classes'])} ({like['classes'][0]}, …): give data with those classes"
        )
    shape = tuple(images.shape[1:])
    if like and shape != (like["channels"], *like["image_size"]):
        trained = "x".join(map(str, (like["channels"], *like["image_size"])))
        its = "x".join(map(str, shape))
        raise UserError(f"its images are {its}, but the weights were trained on {trained}")
    sha256 = hashlib.sha256(header["source_sha256"].encode()).hexdigest()
    return Data(name, classes, shape[0], shape[1:], 1.0, splits, sha256)
