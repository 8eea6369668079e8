"""Where things are kept, and crash-safe writing: no file is half-written, or written by two."""

import os
import platform
from pathlib import Path
from typing import IO

try:
    import fcntl
except ImportError:  # Windows: two commands in one folder are then the user's to avoid
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"
DATA = ROOT / "data"
RECIPES = ROOT / "recipes"
RESULTS = ROOT / "results"


def shown(path: Path) -> str:
    """A path as it is seen from the working directory, if it is below that."""
    return os.path.relpath(path) if path.is_relative_to(Path.cwd()) else str(path)


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write data under path so that a reader, or a crash, meets the old file or the whole new one.

    Errors: OSError naming path (disk full, no permission); then path is as it was.
    """
    aside = path.parent / f".{path.name}.{os.getpid()}"
    try:
        write_to_disk(
            aside, data.encode(errors="surrogateescape") if isinstance(data, str) else data
        )
        os.replace(aside, path)
        sync_folder(path.parent)
    except BaseException as error:  # Ctrl-C too leaves nothing behind
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def write_to_disk(path: Path, data: bytes) -> None:
    """Write a file down to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def sync_folder(folder: Path) -> None:
    """The new name itself is only durable once its folder is flushed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class Locked(Exception):
    """Another process holds a lock; the message says which."""


def lock(folder: Path, wait: bool = False) -> IO:
    """Lock a folder for this process, until the file that is returned is closed.

    The system frees the lock of a process that ends, however it does: none is ever stale.  It is a
    POSIX record lock, because the processes that decode photographs inherit any other kind, and
    live on for seconds when the training process is killed.

    Errors: Locked where another process holds it, unless this one is to wait.
    """
    file = open(folder / ".lock", "a+")  # noqa: SIM115 (closing it frees the lock)
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except (BlockingIOError, PermissionError):
        file.seek(0)
        holder = file.read().strip() or "another process"
        file.close()
        raise Locked(f"{folder} is in use by {holder}") from None
    except OSError:
        pass  # a network disk without locks: nothing else can be asked there
    file.truncate(0)
    file.write(f"process {os.getpid()} on {platform.node()}")
    file.flush()
    return file
