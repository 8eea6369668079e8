"""A checkpoint gives back all of a state, or is refused as damaged; an older usable one stays."""

import contextlib
import copy
import errno
import hashlib
import json
import math
import os
import pickle
import shutil

import numpy as np
import pytest
import torch
from disk import Disk, full, record_order
from safetensors import SafetensorError
from torch import nn

from lenslet.runs import checkpoint
from lenslet.runs.checkpoint import (
    FORMAT,
    VERSION,
    load_checkpoint,
    newest_checkpoint,
    save_checkpoint,
)
from lenslet.weights import digest


class Planted:
    """Makes a folder when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def state(step):
    """A small state, of which every part depends on the step."""
    weight = torch.arange(12.0).view(3, 4) + step
    optimizer = {"state": {0: {"step": torch.tensor(float(step)), "exp_avg": weight / 3}}}
    return {"model": {"weight": weight}, "optimizer": optimizer, "progress": {"step": step}}


def same(a, b):
    """Equal to the last bit, and of equal types; a tuple has become a list."""
    if isinstance(a, torch.Tensor):
        assert isinstance(b, torch.Tensor) and a.dtype == b.dtype and a.shape == b.shape
        bits = [t.detach().contiguous().view(-1).view(torch.uint8) for t in (a, b)]
        return torch.equal(*bits)
    if isinstance(a, dict):
        assert isinstance(b, dict) and list(map(repr, a)) == list(map(repr, b))
        return all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        assert isinstance(b, list) and len(a) == len(b)
        return all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)  # tells -0.0 from 0.0, and nan is nan


def holds(path, step):
    return same(state(step), load_checkpoint(path))


@pytest.fixture
def two(tmp_path):
    """A folder with two checkpoints, at steps 1 and 2; the newer one has weights beside it."""
    first = save_checkpoint(tmp_path / "checkpoint", 1, state(1))
    save_checkpoint(tmp_path / "checkpoint", 2, state(2), b"weights", first)
    return tmp_path / "checkpoint"


def names(folder):
    return sorted(os.listdir(folder)) if folder.exists() else []


SHARED = torch.randn(2, 3)
STATES = {
    "nothing": {},
    "keys": {0: 1, -7: 2, 2**70: 3, "0": 4, "": 5, "Öl/日本\n": 6, "tensor": "x", "dict": [["a"]]},
    "floats": [0.1, 1 / 3, math.inf, -math.inf, math.nan, -0.0, 5e-324, 1.7e308, 1e16, 1.0],
    "numbers": [0, -1, 2**63 - 1, 10**30, True, False, None, {"lr": None, "foreach": False}],
    "types": [torch.float32, torch.bfloat16, {"dtype": torch.int64}],
    "strings": ["", "Öl 日本", '\0\n"', "\udcff", "nan", "state/0"],
    "nested": {"empty": {}, "none": [], "deep": [[[{"a": [{}]}]]], "pair": (1, (2.5, "x"))},
    "tensors": {
        "zero-dim": torch.tensor(0.1),
        "int": torch.tensor([2**62 + 1, -1]),
        "bf16": torch.randn(3, 5).bfloat16(),
        "half": torch.randn(7).half(),
        "double": torch.tensor([0.1, math.inf, -math.inf, math.nan, -0.0], dtype=torch.float64),
        "bool": torch.tensor([True, False]),
        "bytes": torch.randint(0, 256, (625,), dtype=torch.uint8),
        "empty": torch.empty(0),
        "hollow": torch.empty(3, 0, 2, dtype=torch.int64),
        "channels last": torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "transposed": torch.randn(3, 4).t(),
        "strided": torch.arange(10)[::3],
        "expanded": torch.randn(1, 3).expand(4, 3),
        "parameter": nn.Parameter(torch.randn(2)),
        0: [torch.tensor(1), {1: torch.tensor(2)}],
    },
    "shared": {"one": SHARED, "two": SHARED, "part": SHARED[1], "list": [SHARED, SHARED.t()]},
}


@pytest.mark.parametrize("kind", STATES)
def test_checkpoint_round_trip(tmp_path, kind):
    """A checkpoint gives back the state to the last bit, every value of its own type."""
    path = save_checkpoint(tmp_path / "checkpoint", 3, STATES[kind])
    assert newest_checkpoint(tmp_path / "checkpoint") == (path, [])
    assert same(STATES[kind], load_checkpoint(path))


@pytest.mark.parametrize(
    ("kind", "settings"), [(torch.optim.AdamW, {}), (torch.optim.SGD, {"momentum": 0.9})]
)
def test_optimizer_round_trip(tmp_path, kind, settings):
    """Training goes on from a checkpoint to the same bits as without one."""
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(36, 2))
    network = network.to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 5, 5)

    def step(network, optimizer):
        optimizer.zero_grad()
        network(images).square().sum().backward()
        optimizer.step()

    optimizer = kind(network.parameters(), 0.1, **settings)
    step(network, optimizer)
    saved = {"model": network.state_dict(), "optimizer": optimizer.state_dict()}
    saved = load_checkpoint(save_checkpoint(tmp_path / "checkpoint", 1, saved))
    other = copy.deepcopy(network)
    other.load_state_dict(saved["model"])
    again = kind(other.parameters(), 9.0)
    again.load_state_dict(saved["optimizer"])
    for _ in range(3):
        step(network, optimizer)
        step(other, again)
    assert digest(network.state_dict()) == digest(other.state_dict())


def test_what_a_checkpoint_cannot_hold(tmp_path):
    """What would not come back as it was is refused when it is saved, and nothing is left."""
    for odd in ({1, 2}, b"bytes", np.float32(1), object()):
        with pytest.raises(TypeError):
            save_checkpoint(tmp_path / "checkpoint", 1, {"odd": [odd]})
    assert names(tmp_path / "checkpoint") == []


def test_the_new_one_and_the_one_before_stay(tmp_path):
    """Exactly the new checkpoint and `before` stay; the number grows, whatever the step does."""
    folder, before = tmp_path / "checkpoint", None
    assert newest_checkpoint(folder) == (None, [])
    for step in (5, 9, 9, 7, 12):
        path = save_checkpoint(folder, step, state(step), before=before)
        assert names(folder) == sorted(p.name for p in (before, path) if p)
        assert newest_checkpoint(folder) == (path, []) and holds(path, step)
        assert path.name.endswith(f"-step-{step}")
        before = path
    path = save_checkpoint(folder, 13, state(13))
    assert names(folder) == [path.name]


def test_the_order_of_checkpoints(tmp_path):
    """The newest is that of the largest number, beyond six digits too."""
    folder = tmp_path / "checkpoint"
    path = save_checkpoint(folder, 1, state(1))
    path.rename(folder / "999999-step-1")
    path = save_checkpoint(folder, 2, state(2), before=folder / "999999-step-1")
    assert path.name == "1000000-step-2" and newest_checkpoint(folder) == (path, [])
    assert len(names(folder)) == 2


def test_the_order_on_the_disk(tmp_path, monkeypatch):
    """Content before its names, the new name before the end of the old ones: power may fail."""
    done = []

    def spy(module, name):
        call = getattr(module, name)

        def spying(path, *args, **settings):
            done.append(f"{name} {os.path.basename(path)}")
            return call(path, *args, **settings)

        monkeypatch.setattr(module, name, spying)

    for module, name in ((checkpoint, "sync_folder"), (os, "rename"), (shutil, "rmtree")):
        spy(module, name)
    folder = tmp_path / "checkpoint"
    save_checkpoint(folder, 1, state(1))
    new = ["rmtree .000001-step-1"]  # of a crash, if any
    new += ["sync_folder .000001-step-1", "rename .000001-step-1", "sync_folder checkpoint"]
    assert done == [f"sync_folder {tmp_path.name}", *new]
    done.clear()
    save_checkpoint(folder, 2, state(2))
    assert done == [line.replace("1", "2") for line in new] + ["rmtree 000001-step-1"]


def test_what_a_crash_left(two):
    """Nothing of an unfinished checkpoint gets into the one that is saved under its name."""
    (two / ".000003-step-3" / "old").mkdir(parents=True)
    (two / ".000003-step-3" / "manifest.json").write_text("{}")
    path = save_checkpoint(two, 3, state(3))
    assert newest_checkpoint(two) == (path, []) and holds(path, 3)
    assert names(path) == ["manifest.json", "state.json", "state.safetensors"]


def test_weights_beside_a_checkpoint(two):
    """The weights file that was given is in the checkpoint as it was; otherwise there is none."""
    first, second = (two / name for name in names(two))
    assert (second / "model.safetensors").read_bytes() == b"weights"
    assert not (first / "model.safetensors").exists()


def flip(place):
    def damage(path):
        content = bytearray(path.read_bytes())
        content[int(place * (len(content) - 1))] ^= 4
        path.write_bytes(content)

    return damage


DAMAGE = {
    "removed": lambda path: path.unlink(),
    "emptied": lambda path: path.write_bytes(b""),
    "cut by a byte": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "cut by half": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "longer": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),  # what a crash of XFS left
    "noise": lambda path: path.write_bytes(os.urandom(path.stat().st_size)),
    "flipped first": flip(0),
    "flipped inside": flip(0.5),
    "flipped last": flip(1),
    "a folder": lambda path: (path.unlink(), path.mkdir()),
    "a pickle": lambda path: path.write_bytes(pickle.dumps(Planted(path.parent / "planted"))),
    "torch.save": lambda path: torch.save(Planted(path.parent / "planted"), path),
    # Reading this fails with EIO, as on a disk that has lost a sector.
    "unreadable": lambda path: (path.unlink(), path.symlink_to("/proc/self/mem")),
}
FILES = ("state.safetensors", "state.json", "model.safetensors", "manifest.json")


def refuse_newest(folder):
    """The newer of two checkpoints is named as damaged, and stays until another one is saved."""
    first, second = (folder / name for name in names(folder))
    path, notes = newest_checkpoint(folder)
    assert path == first and holds(first, 1)
    assert (
        len(notes) == 1 and notes[0].startswith(f"{second} cannot be used") and "\n" not in notes[0]
    )
    assert not list(folder.rglob("planted"))
    assert names(folder) == [first.name, second.name]
    with pytest.raises(TypeError):
        save_checkpoint(folder, 3, {"odd": object()}, before=first)
    assert names(folder) == [first.name, second.name]
    third = save_checkpoint(folder, 3, state(3), before=first)
    assert names(folder) == [first.name, third.name] and third.name > second.name
    assert newest_checkpoint(folder) == (third, []) and holds(third, 3)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", DAMAGE)
def test_damage(two, name, damage):
    """Whatever happens to a file of the newest checkpoint, it is named and the one before taken."""
    path = two / names(two)[1] / name
    if damage == "unreadable" and not os.path.exists("/proc/self/mem"):
        pytest.skip("no /proc")
    DAMAGE[damage](path)
    refuse_newest(two)


MANIFESTS = {
    "null": None,
    "number": 7,
    "nan": math.nan,
    "text": "manifest",
    "list": [],
    "pairs": [["version", VERSION], ["files", {}]],
    "empty": {},
    "version alone": {"version": VERSION},
    "files alone": {"files": {}},
    "other version": {"version": "3", "files": {}},
    "no files": {"version": VERSION, "files": {}},
    "files null": {"version": VERSION, "files": None},
    "files list": {"version": VERSION, "files": ["state.json"]},
    "files text": {"version": VERSION, "files": "state.json"},
    "sum null": {"version": VERSION, "files": {"state.json": None}},
    "sum number": {"version": VERSION, "files": {"state.json": 3}},
    "sum text": {"version": VERSION, "files": {"state.json": "ab"}},
    "sum short": {"version": VERSION, "files": {"state.json": [1]}},
    "sum long": {"version": VERSION, "files": {"state.json": [1, 2, 3]}},
    "sum of none": {"version": VERSION, "files": {"state.json": [None, None]}},
    "sum nested": {"version": VERSION, "files": {"state.json": {"a": 1, "b": 2}}},
    "other name": {"version": VERSION, "files": {"gone": [0, ""]}},
    "no name": {"version": VERSION, "files": {"": [0, ""]}},
    "up": {"version": VERSION, "files": {"..": [0, ""]}},
    "zero in name": {"version": VERSION, "files": {"a\0b": [0, ""]}},
    "surrogate in name": {"version": VERSION, "files": {"\ud800": [0, ""]}},
    "long name": {"version": VERSION, "files": {"a" * 5000: [0, ""]}},
}
TEXTS = {
    "digits": b"1" * 5000,
    "not UTF-8": b'{"version": "\xff"}',
    "deep": b"[" * 200_000,
    "two": b"{}{}",
    "UTF-16": f'{{"version": "{VERSION}"}}'.encode("utf-16"),
    "spaces": b"   ",
}


@pytest.mark.parametrize("kind", [*MANIFESTS, *TEXTS])
def test_other_manifests(two, kind):
    """A manifest of any other shape, or that is no JSON, is damage like any other."""
    path = two / names(two)[1] / "manifest.json"
    if kind in TEXTS:
        path.write_bytes(TEXTS[kind])
    else:
        manifest = MANIFESTS[kind]
        if isinstance(manifest, dict):  # nothing else is wrong with it
            manifest = {"format": FORMAT} | manifest
            if isinstance(files := manifest.get("files"), dict) and files:
                manifest["files"] = json.loads(path.read_text())["files"] | files
        path.write_text(json.dumps(manifest))
    refuse_newest(two)


@pytest.mark.parametrize(
    "change",
    [
        lambda manifest: manifest["files"].pop("state.json"),
        lambda manifest: manifest["files"].pop("state.safetensors"),
        lambda manifest: manifest.pop("format"),
        lambda manifest: manifest.update(format="lenslet"),
        lambda manifest: manifest.update(version=1),
        lambda manifest: manifest["files"].update(other=[0, ""]),
    ],
    ids=["no state.json", "no tensors", "no format", "other format", "a number", "one more"],
)
def test_altered_manifest(two, change):
    """A manifest that is whole but for one entry is none."""
    path = two / names(two)[1] / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))
    refuse_newest(two)


def test_every_byte_of_the_manifest(two):
    """A changed bit is found out wherever it matters: anywhere but in the name of the format."""
    first, second = (two / name for name in names(two))
    manifest = second / "manifest.json"
    content, missed = manifest.read_bytes(), set()
    for place in range(len(content)):
        altered = bytearray(content)
        altered[place] ^= 1 << place % 8
        manifest.write_bytes(altered)
        path, notes = newest_checkpoint(two)
        assert (path, len(notes)) in ((first, 1), (second, 0))
        if not notes:
            missed.add(place)
    assert holds(second, 2)
    line = content.index(b'"format"'), content.index(b"\n", content.index(b'"format"'))
    assert all(line[0] <= place < line[1] for place in missed)


def test_all_are_damaged(two):
    """With no usable checkpoint there is none, and each one is named, the newest first."""
    for name in names(two):
        (two / name / "state.json").write_text("{}")
    path, notes = newest_checkpoint(two)
    assert path is None
    newest_first = [two / name for name in reversed(names(two))]
    for damaged, note in zip(newest_first, notes, strict=True):
        assert note.startswith(f"{damaged} cannot be used")
    save_checkpoint(two, 3, state(3))
    assert len(names(two)) == 1


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize("write", [torch.save, lambda x, path: path.write_bytes(pickle.dumps(x))])
def test_nothing_of_a_checkpoint_is_executed(two, monkeypatch, name, write):
    """A pickle whose size and sum the manifest vouches for is not run either."""
    path = two / names(two)[1]
    write(Planted(two / "planted"), path / name)
    manifest, data = json.loads((path / "manifest.json").read_text()), (path / name).read_bytes()
    manifest["files"][name] = [len(data), hashlib.sha256(data).hexdigest()]
    (path / "manifest.json").write_text(json.dumps(manifest))
    assert newest_checkpoint(two)[0] == path
    with pytest.raises((ValueError, SafetensorError)):
        load_checkpoint(path)
    assert not (two / "planted").exists()


def test_what_else_lies_there(two):
    """Other files and folders among checkpoints are no checkpoints, and nothing ends over them."""
    newest = two / names(two)[1]
    (two / ".000003-step-9").mkdir()
    (two / "notes.txt").touch()
    (two / "old-step-3").mkdir()
    assert newest_checkpoint(two) == (newest, [])
    (two / "000009-step-1").touch()
    path, notes = newest_checkpoint(two)
    assert path == newest and len(notes) == 1
    assert save_checkpoint(two, 3, state(3), before=newest).name == "000010-step-3"


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


def interrupt():
    raise KeyboardInterrupt


def copies(base, tmp_path):
    """1, 2, 3, … and a fresh copy of a folder each (or none, where base is None)."""
    for at in range(1, 200):
        folder = tmp_path / f"copy-{at}" / "checkpoint"
        folder.parent.mkdir()
        if base:
            shutil.copytree(base, folder)
        yield at, folder


def test_what_reaches_the_disk_first(tmp_path, monkeypatch):
    """All files, then the folder with their names, are on the disk before it gets its own name, and
    that before an older one is removed.
    """
    order, folder, saved = record_order(monkeypatch, tmp_path), tmp_path / "checkpoint", [None]
    for step in (1, 2, 3):
        saved.append(save_checkpoint(folder, step, state(step), b"weights", saved[-1]))
        path, aside = saved[-1], f"checkpoint/.{saved[-1].name}"
        wanted = [("flush", f"{aside}/{name}", (path / name).stat().st_size) for name in FILES]
        wanted += [("flush", aside, None), ("rename", aside, f"checkpoint/{path.name}")]
        wanted += [("flush", "checkpoint", None)]
        if step == 1:
            wanted.insert(0, ("flush", ".", None))
        if step == 3:
            wanted.append(("remove", f"checkpoint/{saved[1].name}", None))
        assert order == wanted
        order.clear()


@pytest.mark.parametrize("act", [full, interrupt])
@pytest.mark.parametrize("lasting", [False, True])
@pytest.mark.parametrize("any_before", [False, True])
def test_each_call_fails(two, tmp_path, disk, any_before, lasting, act):
    """Wherever saving fails or is interrupted: it is said, all earlier are whole, nothing is left.

    A new one that had got its name already is whole too.
    """
    kept = names(two) if any_before else []
    tried = 0
    for at, folder in copies(two if any_before else None, tmp_path):
        before = folder / kept[1] if kept else None
        disk.arm(at, act, lasting)
        error = None
        try:
            path = save_checkpoint(folder, 3, state(3), b"weights", before)
        except (OSError, KeyboardInterrupt) as caught:
            error = caught
        if not error:
            break
        disk.arm(0, None)
        tried = at
        if isinstance(error, OSError):
            assert error.errno == errno.ENOSPC and "step-3" in error.filename
            assert os.path.dirname(error.filename) == str(folder)
        left = [name for name in names(folder) if name not in kept]
        assert set(kept) <= set(names(folder))
        assert left in ([], ["000003-step-3" if kept else "000001-step-3"])
        path, notes = newest_checkpoint(folder)
        assert not notes and (path is None) == (not kept and not left)
        assert path is None or holds(path, 3 if left else 2)
        assert not kept or (holds(folder / kept[0], 1) and holds(folder / kept[1], 2))
        path = save_checkpoint(folder, 4, state(4), before=before)
        assert names(folder) == sorted(p.name for p in (before, path) if p)
        assert newest_checkpoint(folder) == (path, []) and holds(path, 4)
    assert tried >= 15  # four files are opened, written and flushed
    assert disk.count == tried and holds(path, 3)


@pytest.mark.parametrize("act", [full, interrupt])
def test_removing_fails(two, tmp_path, disk, act):
    """Where an old checkpoint cannot be removed the new one is whole; the next save tidies up."""
    disk.count_removals()
    before = names(two)[1]
    for at, folder in copies(two, tmp_path):
        disk.arm(at, act)
        with contextlib.suppress(OSError, KeyboardInterrupt):
            save_checkpoint(folder, 3, state(3), None, folder / before)
        struck = disk.count >= at
        disk.arm(0, None)
        path, notes = newest_checkpoint(folder)
        assert not notes and holds(path, 2 if path.name == before else 3)
        new = save_checkpoint(folder, 4, state(4), before=path)
        assert names(folder) == [path.name, new.name]
        if not struck:
            break
    assert at > 15


@pytest.mark.parametrize("any_before", [False, True])
def test_killed_at_each_call(two, tmp_path, disk, any_before):
    """Wherever the process is killed the newest checkpoint is whole; the next save tidies up."""
    disk.count_removals()
    kept = names(two) if any_before else []
    seen = set()
    for at, folder in copies(two if any_before else None, tmp_path):
        before = folder / kept[1] if kept else None
        child = os.fork()
        if not child:
            try:
                disk.arm(at, lambda: os._exit(9))
                save_checkpoint(folder, 3, state(3), b"weights", before)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        path, notes = newest_checkpoint(folder)
        assert not notes
        seen.add(path and path.name)
        if path:
            assert holds(path, 3 if path.name.endswith("step-3") else 2)
        assert path or not kept
        new = save_checkpoint(folder, 4, state(4), before=path)
        assert names(folder) == sorted(p.name for p in (path, new) if p)
        assert newest_checkpoint(folder) == (new, []) and holds(new, 4)
        if not status:
            break
    assert at > 15
    assert seen == ({kept[1], "000003-step-3"} if kept else {None, "000001-step-3"})
