"""A data set in memory or in files, and its uint8 batches: the same on any number of processes.

Nothing random depends on a worker, a process or a global generator: it is a function of the seed,
the epoch and the image's index.
"""

from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lenslet.data.augment import AUGMENTATIONS
from lenslet.data.decode import UnreadableImage, read_image
from lenslet.distributed.determinism import epoch_generator, uniform
from lenslet.distributed.interrupts import ignore_signals

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
            ImageBatches(part, self, draw_seed),
            batch_size=None,  # the sampler names whole batches
            sampler=BatchSampler(len(part), batch_size, seed, rank, world),
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=ignore_signals,
            pin_memory=torch.cuda.is_available() and part.labels.device.type == "cpu",
            generator=torch.Generator(),  # every iter() draws from it: leave the global one alone
        )


class ImageBatches(Dataset):
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
                read_image(self.split.images[i], *self.reading, draw)
                for i, draw in zip(rows, draws, strict=True)
            ]
        except UnreadableImage as error:
            return error  # raised by on_device: a worker's own would carry its traceback along
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2), labels, index


class BatchSampler(Sampler):
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
            generator = epoch_generator(self.seed, self.epoch)
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
