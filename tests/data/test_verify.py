"""Every file is decoded once before training, and photographs only when they have changed."""

import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from lenslet.data import verify
from lenslet.data.decode import inspect_image
from lenslet.data.verify import inspect_images


def test_inspected_once(tmp_path, make_folder, monkeypatch):
    """A photograph is inspected once, and again only after its file has changed."""
    root = make_folder(tmp_path / "p", {"train": 3}, size=(70, 66))
    files, seen, store = sorted(root.rglob("*.png")), [], tmp_path / "data" / "inspected.json"
    monkeypatch.setattr(verify, "inspect_image", lambda *a: seen.append(a[0]) or inspect_image(*a))
    first = inspect_images(files, 64, store, 0)
    assert len(seen) == 6
    assert inspect_images(files, 64, store, 0) == first
    assert len(seen) == 6
    Image.new("L", (70, 70)).save(files[4])
    changed = inspect_images(files, 64, store, 0).images
    assert seen[6:] == [files[4]]
    assert changed[files[4]][:2] == (70, True) and changed[files[4]].pixels is None
    store.write_text("no JSON")
    assert inspect_images(files, 64, store, 0).images == changed


@pytest.mark.parametrize("key", ["st_size", "st_mtime_ns", "st_ctime_ns"])
def test_what_changes_with_a_file(tmp_path, make_folder, monkeypatch, key):
    """Another size, another time of change, and another file of the same two: each is noticed."""
    root = make_folder(tmp_path / "p", {"train": 2}, size=(70, 66))
    files, seen, store = sorted(root.rglob("*.png")), [], tmp_path / "inspected.json"
    monkeypatch.setattr(verify, "inspect_image", lambda *a: seen.append(a[0]) or inspect_image(*a))
    inspect_images(files, 64, store, 0)
    real = Path.stat

    def changed(path, **how):
        state = real(path, **how)
        if path != files[1]:
            return state
        kept = {name: getattr(state, name) for name in dir(state) if name.startswith("st_")}
        return SimpleNamespace(**kept | {key: kept[key] + 1})

    monkeypatch.setattr(Path, "stat", changed)
    inspect_images(files, 64, store, 0)
    assert seen[4:] == [files[1]]


def test_a_store_without_hashes(tmp_path, make_folder):
    """What an older store says of a photograph is not taken over: the hash is missing there."""
    root = make_folder(tmp_path / "p", {"train": 2}, size=(70, 66))
    files, store = sorted(root.rglob("*.png")), tmp_path / "inspected.json"
    old = {str(f): [f.stat().st_size, f.stat().st_mtime_ns, 70, False] for f in files}
    store.write_text(json.dumps(old))
    assert inspect_images(files, 64, store, 0).images == {f: inspect_image(f, 64) for f in files}


@pytest.mark.parametrize("damage", ["[]", "5", "{0: 1}", "[" * 100_000, None, [1], "folder"])
def test_a_store_that_is_none(tmp_path, make_folder, damage):
    """Whatever is in the store, or in an entry, the images are inspected: it only saves time."""
    files = sorted(make_folder(tmp_path / "p", {"train": 2}, size=(70, 66)).rglob("*.png"))
    store = tmp_path / "data" / "inspected.json"
    found = inspect_images(files, 64, store, 0).images
    if damage == "folder":
        store.unlink()
        store.mkdir()
    elif isinstance(damage, str):
        store.write_text(damage)
    else:
        store.write_text(json.dumps(dict.fromkeys(json.loads(store.read_text()), damage)))
    assert inspect_images(files, 64, store, 0).images == found


def test_small_images_share_an_array(tmp_path, make_folder):
    """Small images of one shape lie in one array, a grey one among colours too; others do not."""
    root = make_folder(tmp_path / "p", {"train": 3})
    files = sorted(root.rglob("*.png"))
    Image.new("L", (10, 12), 77).save(files[2])
    found = inspect_images(files, 64, tmp_path / "inspected.json", 0)
    assert found.array.shape == (6, 3, 12, 10) and found.array.dtype == np.uint8
    for file, planes in zip(files, found.array, strict=True):
        expected = np.broadcast_to(inspect_image(file, 64).pixels, (12, 10, 3))
        assert np.array_equal(planes.transpose(1, 2, 0), expected)
        assert np.shares_memory(found.images[file].pixels, found.array)
    Image.new("RGB", (11, 12)).save(files[2])
    assert inspect_images(files, 64, tmp_path / "inspected.json", 0).array is None
    assert not (tmp_path / "inspected.json").exists()  # small images are read every time


def test_broken_files_are_listed(tmp_path, make_folder):
    """Every broken file is named with its reason, in order; the others are found all the same."""
    root = make_folder(tmp_path / "p", {"train": 3})
    files = sorted(root.rglob("*.png"))
    for i, content in ((1, b""), (4, b"text")):
        files[i].write_bytes(content)
    found = inspect_images(files, 64, tmp_path / "inspected.json", 0)
    assert [file for file in files if file not in found.images] == [files[1], files[4]]
    for i, line in zip((1, 4), found.broken, strict=True):
        assert line.startswith(f"{files[i]}: cannot be read as an image")
