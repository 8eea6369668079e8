"""A data set in memory or in files, and its uint8 batches: the same on any number of processes.

    data = load("digits", ["train", "val"])             # lenslet/data/load.py
    loader = data.loader("train", 512, seed=0)          # this process's part of every batch
    loader.sampler.epoch = 3                            # each epoch has an order of its own
    for batch in on_device(loader, device):
        batch.images, batch.labels                      # uint8 [B, C, H, W], int64 [B]

Small images are kept in memory, and so are photographs that fit, a little larger than they are read
at; else they stay files, which worker processes decode.  All come from the same DataLoader.
Nothing random depends on a worker, a process or a global generator: it is a function of the seed,
the epoch and the image's index, so a run that is resumed, or that runs on other machines, sees the
same images.  Normalising and augmenting come later, on the device.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from lenslet.data.augment import AUGMENTATIONS
from lenslet.data.crop import central_boxes, crop, random_boxes
from lenslet.data.decode import UnreadableImage, read_image
from lenslet.distributed.determinism import epoch_generator, uniform
from lenslet.distributed.interrupts import ignore_signals

SMALL = 64  # pixels: images with no longer side are kept in memory


class Batch(NamedTuple):
    """One process's part of a batch: B images of the `size` that all processes have together."""

    images: Tensor  # uint8 [B, C, H, W]
    labels: Tensor  # int64 [B], 0..classes-1
    index: Tensor  # int64 [B]: places in the split, which key all that is drawn for an image
    size: int  # images of the whole batch, over all processes
    # What this process multiplies its summed loss by: world / size, so that every image counts the
    # same whichever process has it (DistributedDataParallel takes the mean over the processes).
    # 0.0 where its images repeat another process's, see BatchSampler.
    loss_factor: float


class Names(Sequence):
    """File names, in 8 bytes each beside their letters: a list of Paths takes ten times as much."""

    def __init__(self, names: Iterable[str]):
        encoded = [os.fsencode(name) for name in names]
        self._letters = b"".join(encoded)
        self._ends = np.cumsum([0, *map(len, encoded)])

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, i: int) -> str:
        return os.fsdecode(self._letters[self._ends[i] : self._ends[i + 1]])


@dataclass
class Split:
    """Labelled images, in memory or as files."""

    images: Tensor | Path  # uint8 [M, C, H, W] of all splits together, or the data folder
    labels: Tensor  # int64 [N], 0..classes-1
    names: Sequence[str]  # N file names below the data folder, or indices in the set's own order
    rows: Tensor | None = None  # int64 [N]: which of the M in memory are its own; None: all
    # float [N], on the CPU: width / height of whole photographs in memory, squeezed to one size,
    # which are cropped when they are read; else None.
    aspects: Tensor | None = None

    def __post_init__(self):
        if self.in_memory and self.rows is None:
            self.rows = torch.arange(len(self.images))

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def in_memory(self) -> bool:
        return isinstance(self.images, Tensor)

    @property
    def is_cropped(self) -> bool:
        """Whether images are cropped when they are read: photographs, unless read for good."""
        return not self.in_memory or self.aspects is not None

    def file(self, i: int) -> Path:
        """The file of an image that is not in memory."""
        return self.images / self.names[i]

    def pixels(self, index: Tensor) -> Tensor:
        """Images in memory, uint8 [B, C, H, W].  index int64 [B], 0..N-1."""
        return self.images[self.rows[index]]


@dataclass
class Data:
    """An opened data set: its splits, and how its images are read."""

    name: str  # of a named set, or the path of a folder
    classes: list[str]
    channels: int
    image_size: tuple[int, int]  # height and width that images are read at
    crop: float  # share of a photograph's side that a centre crop keeps
    splits: dict[str, Split]
    sha256: str  # of the sources, or of a folder's file names and contents
    notes: list[str] = field(default_factory=list)  # what the user should know, a line each
    seconds: float = 0.0  # that photographs took to be decoded into memory

    def to(self, device: torch.device) -> None:
        """Move small images to a GPU where they take less than half of its free memory.

        Batches of them are then made there, and nothing is copied in training.
        """
        moved = {}  # splits share their images: one copy serves them all
        for split in self.splits.values():
            key = id(split.images)
            if device.type == "cuda" and split.in_memory:
                if key not in moved and split.images.nbytes < torch.cuda.mem_get_info()[0] / 2:
                    moved[key] = split.images.to(device)
                if key in moved:
                    split.images = moved[key]
                    split.labels, split.rows = split.labels.to(device), split.rows.to(device)

    def loader(
        self, split, batch_size, *, seed=None, augment="none", workers=0, rank=0, world=1
    ) -> DataLoader:
        """One process's parts of the batches of a split.

        batch_size counts over all processes.  seed None: every image once, in order; otherwise
        shuffled anew for every epoch, see BatchSampler.  augment: a key of AUGMENTATIONS, which
        says whether photographs are cropped at random; all else that it does comes later.
        """
        chosen = self.splits[split]
        # Indexing a tensor is faster than handing its rows from one process to another.
        workers = 0 if chosen.in_memory else workers
        moves, _ = AUGMENTATIONS[augment]
        crop_seed = seed if moves else None
        return DataLoader(
            ImageBatches(chosen, self, crop_seed),
            batch_size=None,  # the sampler names whole batches, and nothing is to be collated
            sampler=BatchSampler(len(chosen), batch_size, seed, rank, world),
            num_workers=workers,
            persistent_workers=workers > 0,
            worker_init_fn=ignore_signals,  # Ctrl-C reaches them too; the main process decides
            # Pinned memory lets the copy to a GPU overlap with what it computes.
            pin_memory=torch.cuda.is_available() and chosen.labels.device.type == "cpu",
            generator=torch.Generator(),  # every iter() draws from it: leave the global one alone
        )

    def batch(self, split: str, indices: list[int]) -> Batch:
        """These images of a split, read as for evaluation, in this order.

        Errors: UnreadableImage.
        """
        count, batches = len(indices), ImageBatches(self.splits[split], self)
        return batches.read(0, indices, count, 1 / count)


class ImageBatches(Dataset):
    """Whole batches of a split: what is looked up is not an index, but what BatchSampler yields."""

    def __init__(self, split: Split, data: Data, crop_seed: int | None = None):
        """crop_seed: crop photographs at random by it; None: in the centre."""
        self.split, self.crop_seed = split, crop_seed
        self.reading = data.channels, data.image_size, data.crop

    def __len__(self) -> int:
        return len(self.split)

    def __getitem__(self, key: tuple[int, list[int], int, float]) -> Batch | UnreadableImage:
        # An error that a worker raises reaches the user as the worker's traceback, for DataLoader
        # makes that its message.  So it is handed over like a batch, and on_device() raises it.
        try:
            return self.read(*key)
        except UnreadableImage as error:
            return error

    def read(self, epoch: int, indices: list[int], size: int, loss_factor: float) -> Batch:
        """These images of the split.  Errors: UnreadableImage for a file gone or damaged."""
        # Where the images are, which may be the GPU: indexing there copies nothing.
        index = torch.tensor(indices).to(self.split.labels.device, non_blocking=True)
        draws = None
        if self.crop_seed is not None and self.split.is_cropped:
            draws = uniform(self.crop_seed, epoch, torch.tensor(indices), 4)
        if not self.split.in_memory:
            images = self._decode(indices, draws)
        else:
            images = self.split.pixels(index)
            if self.split.is_cropped:
                images = self._crop(images, self.split.aspects[indices], draws)
        return Batch(images, self.split.labels[index], index, size, loss_factor)

    def _crop(self, images: Tensor, aspects: Tensor, draws: Tensor | None) -> Tensor:
        """Photographs in memory as uint8 [B, C, H, W]; draws float [B, 4], or None: the centre."""
        _, (height, width), share = self.reading
        if draws is None:
            boxes = central_boxes(aspects, width / height, share)
        else:
            boxes = random_boxes(aspects, draws, width / height)
        return crop(images, boxes, (height, width))

    def _decode(self, indices: list[int], draws: Tensor | None) -> Tensor:
        """Photographs as uint8 [B, C, H, W], cropped here, where all their pixels still are."""
        pixels = [
            read_image(self.split.file(i), *self.reading, None if draws is None else draws[k])
            for k, i in enumerate(indices)
        ]
        return torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2)


class BatchSampler(Sampler):
    """One process's part of every batch: (epoch, indices, size, loss factor), see Batch.

    A batch holds the same images on any number of processes: process k of n has every n-th image
    from the k-th on, so that some have one more than others where n does not divide the batch.  Set
    `epoch` before iterating, and `start` to begin with a later batch than the first; with a seed
    every epoch has an order of its own.

    Batch norm cannot train on one image.  So while training, a batch is shared by only as many
    processes as get `least` images each.  The others repeat images of it, which do not count: every
    process must take part in every step.  A last batch of fewer than `least` is dropped.
    """

    def __init__(self, count, batch_size, seed=None, rank=0, world=1):
        self.count, self.batch_size, self.seed = count, batch_size, seed
        self.rank, self.world = rank, world
        self.epoch = self.start = 0
        self.least = 2  # images to a process, while training: 1 will do without batch norm

    @property
    def used(self) -> int:
        """The images of an epoch; those left out are others in every epoch."""
        last = self.count % self.batch_size
        drop = self.seed is not None and last < self.least and last < self.count
        return self.count - last * drop

    def __len__(self) -> int:
        return -(-self.used // self.batch_size)

    def __iter__(self) -> Iterator[tuple[int, list[int], int, float]]:
        order = torch.arange(self.count)
        if self.seed is not None:
            generator = epoch_generator(self.seed, self.epoch)
            order = torch.randperm(self.count, generator=generator)
        for batch in order[: self.used].split(self.batch_size)[self.start :]:
            size, sharing = len(batch), self.world
            if self.seed is not None:  # the first processes, `least` images each
                sharing = max(1, min(self.world, size // self.least))
            is_own = self.rank < sharing
            mine = batch[self.rank :: sharing] if is_own else batch[: self.least]
            if len(mine):  # evaluating, the last batch may have none for this process
                yield self.epoch, mine.tolist(), size, is_own * self.world / size


def on_device(loader: Iterable[Batch], device: torch.device) -> Iterator[Batch]:
    """The loader's batches, on the device.  Errors: UnreadableImage for a file gone or damaged."""
    # A copy to the GPU need not be waited for: what computes with it there comes after it.  A copy
    # to the CPU must be, for nothing orders it before the read.
    non_blocking = torch.device(device).type != "cpu"
    for batch in loader:
        if isinstance(batch, UnreadableImage):
            raise batch
        images, labels, index = (part.to(device, non_blocking=non_blocking) for part in batch[:3])
        yield batch._replace(images=images, labels=labels, index=index)


def evenly_spaced(count: int, most: int) -> list[int]:
    """At most `most` of 0..count-1, in order and evenly spaced, the first and the last included.

    Truncated, not rounded: the whitening layer of FastNet is computed from such a sample, so other
    rows would change the weights of every run.
    """
    return torch.linspace(0, count - 1, min(most, count)).long().tolist()
