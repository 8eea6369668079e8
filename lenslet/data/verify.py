"""Every image file decoded once before training, so that broken ones are found in time."""

import contextlib
import itertools
import json
import os
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from lenslet.data.decode import Inspected, UnreadableImage, inspect_image, longer_side
from lenslet.files import atomic_write


class Inspection(NamedTuple):
    """What was found in many image files."""

    images: dict[Path, Inspected]  # of the files that can be read
    broken: list[str]  # what is wrong with each of the others
    array: np.ndarray | None  # uint8 [files, C, H, W]: the small images, if all have one shape


def inspect_images(files: list[Path], small: int, store: Path, workers: int) -> Inspection:
    """Decode every file once, and keep the pixels where the longer side is at most `small`.

    What was found of photographs is kept in the file `store`: they are read again only after they
    have changed.
    """
    stamps, known = {file: stamp(file) for file in files}, _read_store(store)
    images = {
        file: Inspected(*known[path][3:], None)
        for file, (path, *state) in stamps.items()
        if known.get(path, [])[:-3] == state
    }
    new = [file for file in files if file not in images]
    place = {file: i for i, file in enumerate(files)}
    broken, photographs, array, alike = [], {}, None, True
    for file, image in zip(new, _decode(new, small, workers), strict=True):
        if isinstance(image, str):
            broken.append(image)
            continue
        if image.pixels is None:
            path, *state = stamps[file]
            photographs[path] = [*state, *image[:3]]
        else:
            # Moved into the array one by one: to stack them at the end would need twice the memory.
            planes = image.pixels.transpose(2, 0, 1)  # [C, H, W]
            if array is None:
                array = np.empty((len(files), *planes.shape), np.uint8)
            row = array[place[file]]
            if planes.shape in (row.shape, (1, *row.shape[1:])):
                row[:] = planes  # a grey one among coloured ones gets three channels
                image = image._replace(pixels=row.transpose(1, 2, 0))
            else:
                alike = False
        images[file] = image
    if photographs:
        with contextlib.suppress(OSError):  # it only saves time
            store.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(store, json.dumps(known | photographs))
    return Inspection(images, broken, array if alike else None)


def stamp(file: Path) -> list:
    """What changes when a file does: [full path, size, mtime, ctime], the times in nanoseconds.

    Only ctime changes where two files of the same size and mtime exchange their names.
    """
    path = os.path.realpath(file)
    try:
        state = file.stat()
    except OSError:  # the inspection says why it cannot be read
        return [path, None]
    return [path, state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def _read_store(store: Path) -> dict[str, list]:
    """{full path: [size, mtime, ctime, longer side, grey, sha256]}, see stamp() and Inspected.

    It only saves time: what cannot be read, or is no such entry, is as good as none.
    """
    try:
        entries = json.loads(store.read_text()).items()
    except (OSError, ValueError, AttributeError, RecursionError):
        return {}
    kinds = [int, int, int, int, bool, str]
    return {k: v for k, v in entries if type(v) is list and [*map(type, v)] == kinds}


def _decode(files: list[Path], small: int, workers: int):
    """What _inspect() says of each file, in order."""
    # Small images are decoded faster than they can be handed from one process to another.
    if len(files) <= 256 or longer_side(files[0]) <= small:
        workers = 0
    loader = DataLoader(
        files,
        64,
        collate_fn=partial(_inspect, small=small),
        num_workers=workers,
        generator=torch.Generator(),  # iterating draws from it: leave the global one alone
    )
    found = itertools.chain.from_iterable(loader)
    return tqdm(found, "reading images", len(files), disable=None, leave=False)


def _inspect(files: list[Path], small: int) -> list[Inspected | str]:
    """inspect_image() of each file, or the text of its error."""
    found = []
    for file in files:
        try:
            found.append(inspect_image(file, small))
        except UnreadableImage as error:
            found.append(str(error))
    return found
