"""Every image file decoded once before training, so that broken ones are found in time."""

import contextlib
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from lenslet.data.decode import UnreadableImage, inspect_image, longer_side
from lenslet.files import atomic_write


class _Inspection(Dataset):
    """What inspect_image says of each file, or the error's text."""

    def __init__(self, files, small):
        self.files, self.small = files, small

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, i):
        try:
            return inspect_image(self.files[i], self.small)
        except UnreadableImage as error:
            return str(error)


def inspect_images(
    files: list[Path], small: int, store: Path, workers: int
) -> tuple[dict[Path, tuple], list[str], np.ndarray | None]:
    """Decode every file once: {file: (longer side, grey, pixels if small)}, and what is broken.

    Pixels are kept where the longer side is at most `small`, and where all these have one shape,
    in one array, which is returned too: uint8 [files, C, H, W].  What was found of photographs is
    kept in the file `store`: they are decoded again only after they have changed.
    """
    try:
        known = json.loads(store.read_text())
    except (FileNotFoundError, ValueError):  # it only saves time
        known = {}
    stamps = {}
    for file in files:
        state = file.stat()
        stamps[file] = [str(file.resolve()), state.st_size, state.st_mtime_ns]
    found = {
        f: (*known[s[0]][2:], None) for f, s in stamps.items() if known.get(s[0], [])[:2] == s[1:]
    }
    new = [file for file in files if file not in found]
    # Small pictures are decoded faster than they can be handed from one process to another.
    alone = len(new) <= 256 or longer_side(new[0]) <= small
    loader = DataLoader(
        _Inspection(new, small),
        64,
        collate_fn=list,
        num_workers=0 if alone else workers,
        generator=torch.Generator(),
    )
    broken, array, alike = [], None, True
    place = {file: i for i, file in enumerate(files)}
    with tqdm(total=len(new), desc="reading pictures", disable=None, leave=False) as progress:
        for file, result in zip(new, itertools.chain.from_iterable(loader), strict=True):
            progress.update()
            if isinstance(result, str):
                broken.append(result)
                continue
            side, grey, pixels = result
            if pixels is not None:
                planes = pixels.transpose(2, 0, 1)
                if array is None:
                    array = np.empty((len(files), *planes.shape), np.uint8)
                row = array[place[file]]
                fits = planes.shape in (row.shape, (1, *row.shape[1:]))
                alike &= fits
                if fits:
                    row[:] = planes  # what is grey among colours is made colour
                    pixels = row.transpose(1, 2, 0)
            found[file] = side, grey, pixels
    photos = {
        stamps[f][0]: [*stamps[f][1:], *found[f][:2]]
        for f in new
        if f in found and found[f][2] is None
    }
    if photos:
        with contextlib.suppress(OSError):
            store.parent.mkdir(parents=True, exist_ok=True)
            atomic_write(store, json.dumps(known | photos))
    return found, broken, array if alike else None
