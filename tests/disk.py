"""A disk that fails, or kills the process, at any call that changes it, or notes the calls."""

import errno
import io
import os
import shutil

from lenslet import files


class Disk:
    """Counts the calls that change the disk; from the `at`-th on, or only then, act() is called.

    That is before the call, or with half of the data written.  It stands below what files.py and
    os write; what is removed counts only after count_removals().
    """

    def __init__(self, monkeypatch):
        self.count, self.at, self.act, self.lasting = 0, 0, None, False
        self.monkeypatch = monkeypatch
        self._count_calls("fsync", "rename", "replace", "mkdir")
        monkeypatch.setattr(files, "open", self._open, raising=False)

    def arm(self, at, act, lasting=False):
        self.count, self.at, self.act, self.lasting = 0, at, act, lasting

    def touch(self):
        self.count += 1
        if self.act and (self.count == self.at or (self.lasting and self.count > self.at)):
            self.act()

    def count_removals(self):
        self._count_calls("unlink", "rmdir")

    def _count_calls(self, *names):
        for name in names:
            self.monkeypatch.setattr(os, name, self._counted(getattr(os, name)))

    def _counted(self, call):
        def counting(*args, **settings):
            self.touch()
            return call(*args, **settings)

        return counting

    def _open(self, path, mode="r", *args, **settings):
        if "w" not in mode:
            return open(path, mode, *args, **settings)
        self.touch()
        file = Halting(path, mode.replace("b", ""))
        file.disk = self
        return file


class Halting(io.FileIO):
    """A file that is written in two halves, with a call of its disk between them."""

    def write(self, data):
        half = len(data) // 2
        super().write(data[:half])
        self.disk.touch()
        super().write(data[half:])
        return len(data)


def record_order(monkeypatch, root) -> list:
    """What is flushed, with a file's size, renamed and removed from now on, in this order, under
    the names below root that it has then.
    """
    order, rmtree = [], shutil.rmtree

    def below(path):
        return os.path.relpath(path, root)

    def flush(handle):
        status = os.fstat(handle)
        (path,) = (p for p in (root, *root.rglob("*")) if os.path.samestat(p.stat(), status))
        order.append(("flush", below(path), status.st_size if path.is_file() else None))

    def renamed(call):
        def rename(before, after):
            order.append(("rename", below(before), below(after)))
            call(before, after)

        return rename

    def remove(path, *settings, **more):
        if os.path.exists(path):
            order.append(("remove", below(path), None))
        rmtree(path, *settings, **more)

    monkeypatch.setattr(os, "fsync", flush)
    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, renamed(getattr(os, name)))
    monkeypatch.setattr(shutil, "rmtree", remove)
    return order


def full():
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
