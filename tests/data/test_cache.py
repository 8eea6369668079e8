"""Photographs are decoded once, and what is kept of them is never taken for something else."""

import os
import shutil
from collections import namedtuple

import numpy as np
import pytest
import torch

from lenslet import files
from lenslet.data import cache
from lenslet.data.decode import UnreadableImage, read_image
from lenslet.data.load import load


@pytest.fixture
def photographs(tmp_path, make_folder):
    return make_folder(tmp_path / "p", {"train": 3, "val": 2}, size=(90, 70), suffix=".jpg")


def decoded(root, crop=None):
    images = sorted(root.glob("train/*/*"))
    return images, cache.decode_all(images, 3, (48, 48), crop, 2)


def stored():
    return sorted((files.DATA / "cache").iterdir())


def test_decoded_once(photographs, monkeypatch):
    """The second time nothing is decoded, and the pixels and shapes are the same."""
    names, (images, aspects) = decoded(photographs)
    assert images.shape == (6, 3, 48, 48) and images.dtype == torch.uint8
    assert aspects.tolist() == pytest.approx([70 / 90] * 6)
    wanted = read_image(names[4], 3, (48, 48), None)
    assert np.array_equal(images[4].permute(1, 2, 0), wanted)
    monkeypatch.setattr(cache, "_read", None)
    _, again = decoded(photographs)
    assert torch.equal(again[0], images) and torch.equal(again[1], aspects)
    assert len(stored()) == 1


def test_other_files_are_decoded_anew(photographs):
    """A file of other content, and another way of reading, have a cache of their own."""
    names, (before, _) = decoded(photographs)
    shutil.copy(names[5], names[0])
    _, (after, _) = decoded(photographs)
    assert torch.equal(after[0], before[5]) and not torch.equal(after[0], before[0])
    decoded(photographs, crop=0.5)
    assert len(stored()) == 3


@pytest.mark.parametrize("damage", ["cut", "bit", "empty", "text"])
def test_damage_is_made_anew(photographs, damage):
    """A cache that is cut off, altered or something else is not believed, but replaced."""
    _, (images, _) = decoded(photographs)
    (path,) = stored()
    whole = path.read_bytes()
    middle = len(whole) // 2
    flipped = whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :]
    path.write_bytes({"cut": whole[:-9], "bit": flipped, "empty": b"", "text": b"x" * 99}[damage])
    _, (again, _) = decoded(photographs)
    assert torch.equal(again, images)
    assert path.read_bytes() == whole


def test_no_room_on_disk(photographs, monkeypatch):
    """Where the disk is full, or not ours to write, the images are decoded and nothing is left."""
    usage = namedtuple("usage", "free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(1000))
    _, (images, _) = decoded(photographs)
    assert len(images) == 6 and not stored()
    monkeypatch.undo()


def test_writing_fails(photographs, monkeypatch):
    """A write that fails half-way leaves no file behind."""

    def save(tensors, path, header):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(cache, "save_file", save)
    _, (images, _) = decoded(photographs)
    assert len(images) == 6 and not stored()


def test_unreadable(photographs):
    """A file that vanished since it was listed is named."""
    names = sorted(photographs.glob("train/*/*"))
    os.remove(names[2])
    with pytest.raises(UnreadableImage, match=names[2].name):
        cache.decode_all(names, 3, (48, 48), None, 2)


def test_fits(monkeypatch):
    """A quarter of the free memory is the limit, counted with the margin for crops."""
    memory = namedtuple("memory", "available")
    monkeypatch.setattr(cache.psutil, "virtual_memory", lambda: memory(4 * 100 * 3 * 128 * 128))
    assert cache.fits(100, 64) and not cache.fits(101, 64) and not cache.fits(100, 65)


def test_batches_from_memory(photographs):
    """Training sees crops by the same draws as from files; validation sees the very same pixels."""
    given = {"photo_size": 48, "workers": 2}
    memory = load(str(photographs), ["train", "val"], in_memory=True, **given)
    from_files = load(str(photographs), ["train", "val"], **given)
    assert memory.sha256 == from_files.sha256 and memory.seconds > 0
    ours, theirs = (data.batch("val", [0, 3, 1]) for data in (memory, from_files))
    assert torch.equal(ours.images, theirs.images) and torch.equal(ours.labels, theirs.labels)
    for augment, seed in (("standard", 3), ("none", 3)):
        ours, theirs = (
            next(iter(data.loader("train", 6, seed=seed, augment=augment)))
            for data in (memory, from_files)
        )
        assert ours.images.shape == (6, 3, 48, 48) and torch.equal(ours.index, theirs.index)
        apart = (ours.images.int() - theirs.images.int()).abs().float().mean()
        other = (ours.images.int() - theirs.images.flip(0).int()).abs().float().mean()
        assert apart < 8 and apart < other / 2
