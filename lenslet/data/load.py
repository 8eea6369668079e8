"""What each data set is, and how it is read, split and batched.

    data = load("cifar10", ["train", "val"])  # or a folder of pictures
    for images, labels, index in on_device(data.loader("val", batch_size=64), device): ...

Small pictures live in memory as uint8; photographs are decoded by worker processes.  Both come out
of the same loader as uint8 batches.  Nothing random depends on a worker, a process or a global
generator: it is a function of the seed, the epoch and the picture's index.
"""

import hashlib
import json
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

import images as pictures
import sources
from divide import first, kept_away
from folders import find_folder, is_divided, is_small, list_folder
from interrupts import ignore_signals
from options import OutsideError, UserError, nearest
from transforms import AUGMENTATIONS, uniform

SMALL = 64  # pixels: pictures with no longer side are kept in memory


@dataclass
class Split:
    """Labelled pictures, in memory or as files."""

    images: Tensor | list[Path]  # uint8 [M, C, H, W], which splits may share, or N files
    labels: Tensor  # int64 [N], 0..classes-1
    names: list[str]  # N file names below the data folder, or indices in the set's own order
    rows: Tensor | None = None  # int64 [N]: which of the images in memory are its own (all)

    def __post_init__(self):
        if self.in_memory and self.rows is None:
            self.rows = torch.arange(len(self.images))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        return isinstance(self.images, Tensor)

    def pixels(self, index: Tensor) -> Tensor:
        """Pictures in memory, uint8 [B, C, H, W].  index int64 [B], 0..N-1."""
        return self.images[self.rows[index]]


@dataclass
class Data:
    """An opened data set: its splits, and how its pictures are read."""

    name: str  # as --data gives it
    classes: list[str]
    channels: int
    image_size: tuple[int, int]  # height and width that pictures are read at
    crop: float  # share of a photograph that a centre crop keeps
    splits: dict[str, Split]
    sha256: str  # of the sources, or of a folder's file names and sizes
    notes: list[str] = field(default_factory=list)  # what the user should know, a line each

    def to(self, device: torch.device) -> None:
        """Move small pictures to a GPU where they take less than half of its free memory.

        Batches of them are then made there, and nothing is copied in training.
        """
        moved = {}  # splits share their images
        for part in self.splits.values():
            key = id(part.images)
            if device.type == "cuda" and part.in_memory:
                if key not in moved and part.images.nbytes < torch.cuda.mem_get_info()[0] / 2:
                    moved[key] = part.images.to(device)
                if key in moved:
                    part.images = moved[key]
                    part.labels, part.rows = part.labels.to(device), part.rows.to(device)

    def loader(
        self, split, batch_size, *, seed=None, augment="none", workers=0, rank=0, world=1
    ) -> DataLoader:
        """Batches of (uint8 [B, C, H, W], int64 labels [B], int64 index [B]) for one process.

        batch_size counts over all processes.  seed None: every picture once, in order; otherwise
        shuffled anew for every epoch, see Batches.
        """
        part = self.splits[split]
        workers = 0 if part.in_memory else workers
        draw_seed = seed if AUGMENTATIONS[augment][0] else None
        return DataLoader(
            Pictures(part, self, draw_seed),
            batch_size=None,  # the sampler names whole batches
            sampler=Batches(len(part), batch_size, seed, rank, world),
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=ignore_signals,
            pin_memory=torch.cuda.is_available() and part.labels.device.type == "cpu",
            generator=torch.Generator(),  # every iter() draws from it: leave the global one alone
        )


class Pictures(Dataset):
    """Whole uint8 batches of a split, for the (epoch, indices) that Batches names."""

    def __init__(self, split: Split, data: Data, draw_seed: int | None = None):
        """draw_seed: crop photographs at random by it; None: in the centre."""
        self.split, self.draw_seed = split, draw_seed
        self.reading = data.channels, data.image_size, data.crop

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, list[int]]):
        epoch, rows = key
        index = torch.tensor(rows).to(self.split.labels.device, non_blocking=True)
        labels = self.split.labels[index]
        if self.split.in_memory:
            return self.split.pixels(index), labels, index
        draws = [None] * len(rows)
        if self.draw_seed is not None:
            draws = uniform(self.draw_seed, epoch, index, 4).tolist()
        try:
            pixels = [
                pictures.read_image(self.split.images[i], *self.reading, draw)
                for i, draw in zip(rows, draws, strict=True)
            ]
        except pictures.UnreadableImage as error:
            return error  # raised by on_device: a worker's own would carry its traceback along
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), labels, index


class Batches(Sampler):
    """The part of every batch that is one process's: (epoch, [index, …]).

    A batch holds the same pictures in the same order on any number of processes.  Set `epoch`
    before iterating, and `start` to begin with a later batch than the first; with a seed every
    epoch has an order of its own.

    Batch norm cannot train on one picture.  So while training, a short last batch is shared by as
    many processes as have two for each; the others repeat two of its pictures, which do not count.
    A last batch of one picture is dropped.
    """

    def __init__(self, count, batch_size, seed=None, rank=0, world=1):
        self.total = self.count = count
        self.batch_size, self.seed = batch_size, seed
        self.rank, self.world = rank, world
        self.epoch = self.start = 0
        self.least = max(1, min(2, batch_size // world))  # pictures to a process
        if seed is not None and count % batch_size == 1 and count > 1:
            self.count -= 1

    def __len__(self) -> int:
        return -(-self.count // self.batch_size)

    def size(self, step: int) -> int:
        """Pictures in batch `step` of an epoch, over all processes."""
        return min(self.batch_size, self.count - step * self.batch_size)

    def sharing(self, size: int) -> int:
        """How many processes, the first ones, have a part of their own in a batch of this size."""
        return max(1, min(self.world, size // self.least)) if self.seed is not None else self.world

    def counts(self, step: int) -> bool:
        """Whether this process's part of batch `step` is its own, and not a repetition."""
        return self.rank < self.sharing(self.size(step))

    def __iter__(self):
        order = torch.arange(self.count)
        if self.seed is not None:
            generator = generator_for(self.seed, self.epoch)
            order = torch.randperm(self.total, generator=generator)[: self.count]
        for batch in order.split(self.batch_size)[self.start :]:
            sharing = self.sharing(len(batch))
            mine = batch[self.rank :: sharing] if self.rank < sharing else batch[: self.least]
            if len(mine):
                yield self.epoch, mine.tolist()


def on_device(loader: DataLoader, device: torch.device):
    """The loader's batches on the device.  Errors: UnreadableImage for a file gone or damaged."""
    for batch in loader:
        if isinstance(batch, Exception):
            raise batch
        # Towards the CPU nothing would wait for the copy.
        wait = torch.device(device).type == "cpu"
        yield tuple(part.to(device, non_blocking=not wait) for part in batch)


def generator_for(seed: int, epoch: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * 1_000_003 + epoch) % 2**63)


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


def choose(name: str | None) -> str:
    """--data, a folder as its full path; without it CIFAR-10 or, for want of that, the digits."""
    if name:
        return name if is_set(name) else str(find_folder(name).resolve())
    try:
        sources.ensure("cifar10", patience=15)
        return "cifar10"
    except OutsideError as error:
        print(f"CIFAR-10 is not to be had, so the bundled digits are used instead: {error}")
        return "digits"


def is_set(name: str) -> bool:
    """Whether --data names a known set; if not, a folder.  Errors: UserError if neither."""
    if name in sources.SETS:
        return True
    if "/" not in name and os.sep not in name and not Path(name).is_dir():
        raise UserError(
            f"--data {name}: no such data set{nearest(name, sources.SETS)}; known are "
            f"{', '.join(sources.SETS)}, or give a folder of pictures"
        )
    return False


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
        kept = first(torch.tensor([label for _, label in rows[split]]), limit, name)
        rows[split] = [rows[split][i] for i in kept.tolist()]
    # Whoever trains learns of every broken file now, those that test.py would meet included.
    looked_at = rows if "train" in wanted and not limit else wanted
    files = sorted({file for split in looked_at for file, _ in rows.get(split, [])})
    checked, broken, array = pictures.inspect_images(
        files, SMALL, sources.DATA / "inspected.json", workers
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
            return pictures.read_image(file, channels, image_size, crop)
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
        away = kept_away(torch.tensor([label for _, label in rows["train"]]), val, fold)
        both = list(zip(rows["train"], away.tolist(), strict=True))
        rows["train"] = [row for row, is_away in both if not is_away]
        rows["val"] = [row for row, is_away in both if is_away]
    return rows


def _load_set(name, wanted, val, fold, limit, like) -> Data:
    folder = sources.ensure(name)
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
            away = kept_away(labels, val, fold)
            parts = {"train": (~away).nonzero().flatten(), "val": away.nonzero().flatten()}
            parts = {s: rows[first(labels[rows], limit, name)] for s, rows in parts.items()}
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
