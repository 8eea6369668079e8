"""Where things are kept, and crash-safe writing: no file is half-written, or written by two."""

import contextlib
import os
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows: two downloads of one set at once are then the user's to avoid
    fcntl = None

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "runs"
RECIPES = ROOT / "recipes"
RESULTS = ROOT / "results"


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


DATA = ROOT / "data"


@contextlib.contextmanager
def exclusive(folder: Path):
    """One process at a time; the lock goes with the process that held it."""
    with open(folder / ".lock", "w") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
