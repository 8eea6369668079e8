"""Any number of processes sees the same batches, and every image counts once and the same."""

import os
import pickle
from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data._utils.pin_memory import pin_memory

from lenslet.data.batches import Batch, BatchSampler, Data, Names, Split, evenly_spaced, on_device
from lenslet.data.decode import UnreadableImage, read_image
from lenslet.data.load import load
from lenslet.distributed.determinism import uniform
from lenslet.distributed.interrupts import ignore_signals

CPU = torch.device("cpu")


def joined(lists):
    return list(chain.from_iterable(lists))


def batches(loader):
    return list(on_device(loader, CPU))


def memory(count):
    """A set of `count` one-pixel images, each of which is its own index."""
    images = torch.arange(count, dtype=torch.uint8).view(-1, 1, 1, 1)
    part = Split(images, torch.arange(count) % 2, [str(i) for i in range(count)])
    return Data("memory", ["a", "b"], 1, (1, 1), 1.0, {"train": part}, "")


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 7, 12, 25])
def test_evaluation_meets_every_image_once(count, world):
    """Any number of processes evaluates exactly the images that one does, with their labels."""
    data, met = memory(count), []
    for rank in range(world):
        for batch in batches(data.loader("train", 5, rank=rank, world=world)):
            assert torch.equal(batch.images.flatten().long(), batch.index)
            assert torch.equal(batch.labels, batch.index % 2)
            met += batch.index.tolist()
    assert sorted(met) == list(range(count))


@pytest.mark.parametrize("seed", [None, 1])
@pytest.mark.parametrize("world", [2, 3, 5, 8])
@pytest.mark.parametrize("count", [24, 27, 30, 49])
def test_processes_share_a_batch(count, world, seed):
    """A step's batch holds the same images on any number of processes, the last one too.

    Its size is that of the whole batch, and each image's weight in the mean over the processes
    is 1 / size; one that is repeated counts once.
    """
    whole = {epoch_rows[1][0]: epoch_rows for epoch_rows in BatchSampler(count, 12, seed)}
    met = {}  # by the first image of the whole batch
    for rank in range(world):
        for epoch, rows, size, share in BatchSampler(count, 12, seed, rank, world):
            first = next(k for k, (_, all_rows, *_) in whole.items() if rows[0] in all_rows)
            assert (epoch, size) == (0, len(whole[first][1]))
            assert share in (0, world / size)
            met.setdefault(first, []).extend(rows if share else [])
    for first, rows in met.items():
        assert sorted(rows) == sorted(whole[first][1])
    assert met.keys() == whole.keys()


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("batch", [1, 2, 3, 16])
def test_training_batches(world, batch):
    """The steps are as many on any number of processes, and every image counts once in them.

    No process gets one image where it would get more: a last one alone is dropped.
    """
    for count in range(2 * world, 70):
        total = batch * world
        samplers = [BatchSampler(count, total, 0, rank, world) for rank in range(world)]
        parts = [list(sampler) for sampler in samplers]
        assert {len(part) for part in parts} == {len(BatchSampler(count, total, 0))}
        if batch > 1:
            assert all(len(rows) > 1 for part in parts for _, rows, *_ in part)
        met = joined(rows for part in parts for _, rows, _, share in part if share)
        assert len(met) == len(set(met)) == sum(size for _, _, size, _ in parts[0])
        assert len(met) == (count - 1 if count % total == 1 and total > 1 else count)
        for step in zip(*parts, strict=True):  # as many processes as can take part, do
            sharing = max(1, min(world, step[0][2] // 2))
            assert sum(share > 0 for *_, share in step) == sharing
            assert all(share or len(rows) == min(2, step[0][2]) for _, rows, _, share in step)
    assert list(BatchSampler(1, 5, 0)) == [(0, [0], 1, 1.0)]  # all there is


@pytest.mark.parametrize("world", range(1, 9))
@pytest.mark.parametrize("batch", [4, 30, 64])
def test_uneven_parts(world, batch):
    """Any number of processes shares any batch as evenly as can be, and its mean is one's mean."""
    for least in (1, 2):
        samplers = [BatchSampler(150, batch, 0, rank, world) for rank in range(world)]
        for sampler in samplers:
            sampler.least = least
        for parts in zip(*samplers, strict=True):
            (_, _, size, _), *_ = parts
            counted = [rows for _, rows, _, factor in parts if factor]
            assert len(counted) == max(1, min(world, size // least))
            assert max(map(len, counted)) - min(map(len, counted)) <= 1
            # As DistributedDataParallel does: the mean over the processes of their sums.
            mean = sum(factor * sum(rows) for _, rows, _, factor in parts) / world
            assert mean == pytest.approx(sum(joined(counted)) / size)


def test_one_image_left():
    """A last batch of one image is an epoch's like any other where one is enough."""
    sampler = BatchSampler(25, 8, 0)
    assert (len(sampler), sampler.used) == (3, 24)
    sampler.least = 1
    assert (len(sampler), sampler.used) == (4, 25)
    assert sorted(joined(rows for _, rows, *_ in sampler)) == list(range(25))
    assert len(BatchSampler(1, 8, 0)) == 1  # all that there is


def test_start():
    """An epoch that is gone on with has the batches that were left, and no others."""
    whole = list(BatchSampler(50, 8, 3))
    sampler = BatchSampler(50, 8, 3)
    sampler.start = 4
    assert list(sampler) == whole[4:]
    sampler.start = len(whole)
    assert list(sampler) == []


@pytest.mark.parametrize("world", [1, 4])
def test_dropped_images_change(world):
    """Which images a dropped last batch leaves out changes with the epoch: all are trained on."""
    met = set()
    for rank in range(world):
        sampler = BatchSampler(25, 8, 0, rank, world)
        assert len(sampler) == 3
        for sampler.epoch in range(20):
            met.update(joined(rows for _, rows, *_ in sampler))
    assert met == set(range(25))


def test_order():
    """An epoch's order follows from seed and epoch alone; without a seed it is the set's own."""

    def order(seed, epoch):
        sampler = BatchSampler(40, 8, seed)
        sampler.epoch = epoch
        return joined(rows for _, rows, *_ in sampler)

    first = order(0, 0)
    torch.manual_seed(7)
    assert order(0, 0) == first
    assert sorted(first) == list(range(40))
    assert len({tuple(order(*key)) for key in ((0, 0), (0, 1), (1, 0), (1, 1))}) == 4
    assert order(None, 0) == order(None, 1) == list(range(40))
    assert sorted(order(2**63 - 1, 3)) == list(range(40))


def test_global_generator_is_left_alone():
    """Reading a split draws nothing from torch's global generator."""
    torch.manual_seed(0)
    before = torch.get_rng_state()
    batches(memory(20).loader("train", 4, seed=1))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_photographs(tmp_path, make_folder, mode):
    """Larger images stay files; workers decode them to the same bytes as this process."""
    root = make_folder(tmp_path / "p", {"train": 5}, size=(80, 100), mode=mode, suffix=".jpg")
    data = load(str(root), ["train"], val=0, photo_size=32, crop=0.5)
    part = data.splits["train"]
    assert not part.in_memory
    assert data.image_size == (32, 32)
    assert data.channels == (3 if mode == "RGB" else 1)
    assert data.loader("train", 4, workers=1).persistent_workers
    assert data.loader("train", 4).num_workers == 0
    alone, shared = (batches(data.loader("train", 4, workers=n)) for n in (0, 2))
    assert len(alone) == len(shared) == 3
    for batch, other in zip(alone, shared, strict=True):
        assert isinstance(batch, Batch) and isinstance(other, Batch)
        assert all(torch.equal(a, b) for a, b in zip(batch[:3], other[:3], strict=True))
        assert batch[3:] == other[3:] == (len(batch.labels), 1 / len(batch.labels))
    images = torch.cat([batch.images for batch in alone])
    expected = read_image(part.file(3), data.channels, (32, 32), 0.5)
    assert images.dtype == torch.uint8
    assert np.array_equal(images[3].permute(1, 2, 0), expected)


@pytest.mark.parametrize(("side", "small"), [(64, True), (65, False)])
def test_what_is_small(tmp_path, make_folder, side, small):
    """Images of up to 64 pixels are kept in memory."""
    root = make_folder(tmp_path / "p", {"train": 1}, size=(20, side))
    assert load(str(root), ["train"], val=0).splits["train"].in_memory == small


def test_random_crops(tmp_path, make_folder):
    """A crop depends on seed, epoch and image: not on workers, processes or the batch."""
    root = make_folder(tmp_path / "p", {"train": 4}, size=(70, 70), suffix=".bmp")
    data = load(str(root), ["train"], val=0, photo_size=16)

    def crops(epoch, batch_size, seed=3, **settings):
        loader = data.loader("train", batch_size, seed=seed, augment="light", **settings)
        loader.sampler.epoch = epoch
        return {
            i: image
            for batch in batches(loader)
            for i, image in zip(batch.index.tolist(), batch.images.numpy(), strict=True)
        }

    first = crops(0, 8)
    for settings in ({"batch_size": 3}, {"batch_size": 4, "workers": 2}):
        for i, image in crops(0, **settings).items():
            assert np.array_equal(image, first[i])
    for rank in (0, 1):
        half = crops(0, 8, rank=rank, world=2)
        assert len(half) == 4
        assert all(np.array_equal(image, first[i]) for i, image in half.items())
    for other in (crops(1, 8), crops(0, 8, seed=4)):
        assert not any(np.array_equal(other[i], first[i]) for i in range(8))


def test_equal_photographs_are_cropped_apart(tmp_path):
    """Copies of one photograph are cropped each in its own way, and in each epoch in another."""
    down, across = np.mgrid[0:80, 0:100].astype(np.uint8)
    image = Image.fromarray(np.stack([2 * across, 3 * down, down + across], 2))
    for name in ("ants", "bees"):
        (tmp_path / "train" / name).mkdir(parents=True)
        for k in range(4):
            image.save(tmp_path / "train" / name / f"{k}.png")
    data = load(str(tmp_path), ["train"], val=0, photo_size=16)
    loader = data.loader("train", 3, seed=0, augment="standard")
    crops = set()
    for loader.sampler.epoch in range(3):
        crops |= {x.numpy().tobytes() for batch in batches(loader) for x in batch.images}
    assert len(crops) == 24


def test_batches_are_on_the_device():
    """All of a batch is where the network is, and indices are where the images are."""
    meta, data = torch.device("meta"), memory(4)  # a device that computes shapes only
    for batch in on_device(data.loader("train", 2), meta):
        assert {part.device for part in batch[:3]} == {meta}
    part = data.splits["train"]
    part.images, part.labels, part.rows = (
        tensor.to(meta) for tensor in (part.images, part.labels, part.rows)
    )
    assert {part.device for part in data.batch("train", [1, 3])[:3]} == {meta}


@pytest.mark.parametrize("gpu", [False, True])
def test_settings_of_a_loader(monkeypatch, gpu):
    """Images in memory need no worker processes, and are pinned only for a GPU to copy."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    loader = memory(4).loader("train", 2, workers=2)
    assert len(loader.dataset) == 4 and loader.worker_init_fn is ignore_signals
    assert loader.num_workers == 0 and not loader.persistent_workers
    assert loader.pin_memory == gpu


@pytest.mark.parametrize(("free", "moves"), [(48, False), (49, True)])
def test_small_images_move_to_a_gpu(monkeypatch, free, moves):
    """All splits share one copy there, made if it takes less than half of the free memory."""
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, device: tensor.clone())
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (free, 1000))
    data = memory(24)
    images, part = data.splits["train"].images, data.splits["train"]
    rows = torch.arange(5)
    data.splits["val"] = Split(images, part.labels[:5], part.names[:5], rows)
    data.splits["files"] = Split(Path("p"), torch.zeros(1), ["a.jpg"])
    before = [part.labels, part.rows]
    data.to(torch.device("cpu"))
    assert part.images is images and part.labels is before[0] and part.rows is before[1]
    data.to(SimpleNamespace(type="cuda"))
    assert (part.images is not images) == moves
    assert part.images is data.splits["val"].images and torch.equal(part.images, images)
    assert all(
        (now is not was) == moves for now, was in zip((part.labels, part.rows), before, strict=True)
    )
    assert (data.splits["val"].rows is not rows) == moves
    assert data.splits["files"].file(0) == Path("p/a.jpg")


def test_draws_of_crops(tmp_path, make_folder, monkeypatch):
    """A photograph is cropped by four numbers of its seed, epoch and index; or by none."""
    root = make_folder(tmp_path / "p", {"train": 2}, size=(70, 70))
    data = load(str(root), ["train"], val=0)
    drawn = []

    def read(path, channels, size, crop, draws):
        drawn.append(draws)
        return np.zeros((*size, channels), np.uint8)

    monkeypatch.setattr("lenslet.data.batches.read_image", read)
    loader = data.loader("train", 4, seed=3, augment="light")
    loader.sampler.epoch = 5
    (batch,) = batches(loader)
    assert torch.equal(torch.stack(drawn), uniform(3, 5, batch.index, 4))
    drawn.clear()
    batches(data.loader("train", 4, seed=3))
    assert drawn == [None] * 4


@pytest.mark.parametrize("workers", [0, 2])
def test_file_gone(tmp_path, make_folder, workers):
    """A file that vanishes after loading ends the epoch with its name, in one line."""
    root = make_folder(tmp_path / "p", {"train": 4}, size=(70, 70))
    data = load(str(root), ["train"], val=0)
    gone = root / "train" / "bees" / "2.png"
    gone.unlink()
    message = ""
    try:
        batches(data.loader("train", 2, workers=workers))
    except UnreadableImage as error:
        error.__traceback__ = None  # it holds the workers, whom the collector waits 5 s each for
        message = str(error)
    assert str(gone) in message
    assert "\n" not in message


def test_pinned_batches(monkeypatch):
    """Pinning a batch's memory, which makes its copy to a GPU faster, leaves it a Batch."""
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor, device=None: tensor.clone())
    batch = Batch(torch.zeros(2, 1, 1, 1), torch.zeros(2), torch.arange(2), 4, 0.5)
    pinned = pin_memory(batch)
    assert isinstance(pinned, Batch) and pinned[3:] == (4, 0.5)
    assert all(a is not b and torch.equal(a, b) for a, b in zip(pinned[:3], batch[:3], strict=True))


def test_batch_of_rows(tmp_path, make_folder):
    """Named rows of a split are read as for evaluation, in that order; a file gone is named."""
    batch = memory(9).batch("train", [7, 2, 2])
    assert batch.images.flatten().tolist() == batch.index.tolist() == [7, 2, 2]
    assert (batch.labels.tolist(), batch.size, batch.loss_factor) == ([1, 0, 0], 3, 1 / 3)
    root = make_folder(tmp_path / "p", {"train": 4}, size=(70, 80))
    data = load(str(root), ["train"], val=0, photo_size=16, crop=0.5)
    (whole,) = batches(data.loader("train", 8))
    assert torch.equal(data.batch("train", [5, 0]).images, whole.images[[5, 0]])
    data.splits["train"].file(5).unlink()
    with pytest.raises(UnreadableImage, match=r"bees/1\.png"):
        data.batch("train", [5, 0])


@pytest.mark.parametrize(
    ("count", "most"), [(0, 5), (1, 5), (5, 5), (3, 10), (1797, 10), (50_000, 1000)]
)
def test_evenly_spaced(count, most):
    """From the first to the last, in steps that differ by 1 at most, and no more than there are."""
    rows = evenly_spaced(count, most)
    assert len(rows) == min(count, most)
    if count:
        assert rows[0] == 0 and rows[-1] == (count - 1 if min(count, most) > 1 else 0)
        steps = [b - a for a, b in zip(rows, rows[1:], strict=False)] or [1]
        assert min(steps) >= 1 and max(steps) - min(steps) <= 1
    assert evenly_spaced(12, 5) == [0, 2, 5, 8, 11]  # truncated, which whitened weights rely on


def test_names():
    """Names come back as they went in, whatever they are, and take few bytes."""
    names = ["a.jpg", "", "b/Öl 日本.png", os.fsdecode(b"bad \xff.gif"), "a.jpg"]
    kept = Names(names)
    assert list(kept) == names and len(kept) == 5 and kept[3] == names[3]
    assert list(pickle.loads(pickle.dumps(kept))) == names
    with pytest.raises(IndexError):
        kept[5]
    many = Names(f"class-{i % 10}/image-{i:06}.jpg" for i in range(10_000))
    assert len(pickle.dumps(many)) < 35 * 10_000
