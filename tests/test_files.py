"""A file is the old one or the whole new one, whatever happens while it is written."""

import os

import pytest
from disk import Disk, full, record_order

from lenslet.files import atomic_write


@pytest.fixture
def disk(monkeypatch):
    return Disk(monkeypatch)


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_full_disk(tmp_path, monkeypatch, call):
    """Where a write fails the old content stays, nothing is left beside it, and it is named."""
    path = tmp_path / "file"
    atomic_write(path, "old")
    monkeypatch.setattr(os, call, lambda *_: full())
    with pytest.raises(OSError, match="No space") as caught:
        atomic_write(path, b"new content")
    assert caught.value.filename == str(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_atomic_write(tmp_path):
    """Text is written as UTF-8, bytes as they are, and nothing else is left in the folder."""
    atomic_write(tmp_path / "file", b"\x00\xff")
    assert (tmp_path / "file").read_bytes() == b"\x00\xff"
    atomic_write(tmp_path / "file", "Öl")
    assert (tmp_path / "file").read_bytes() == "Öl".encode()
    assert os.listdir(tmp_path) == ["file"]
    with pytest.raises(FileNotFoundError):
        atomic_write(tmp_path / "none" / "file", "")


def test_what_reaches_the_disk_first(tmp_path, monkeypatch):
    """The whole new file is on the disk before it gets its name, and the name after that."""
    atomic_write(tmp_path / "file", "old")
    order = record_order(monkeypatch, tmp_path)
    atomic_write(tmp_path / "file", "contents")
    aside = order[0][1]
    assert aside != "file"
    assert order == [("flush", aside, 8), ("rename", aside, "file"), ("flush", ".", None)]


def test_atomic_write_killed_at_each_call(tmp_path, disk):
    """Wherever the process is killed the file is the old one or the whole new one."""
    path, seen = tmp_path / "file", set()
    for at in range(1, 20):
        atomic_write(path, "old" * 99)
        child = os.fork()
        if not child:
            try:
                disk.arm(at, lambda: os._exit(9))
                atomic_write(path, "new" * 99)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        assert status in (0, 9)
        seen.add(path.read_text())
        if not status:
            break
    assert seen == {"old" * 99, "new" * 99} and at > 5
