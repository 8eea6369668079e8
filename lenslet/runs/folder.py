"""The folder of a run: which one a command trains in, who else does, and which is the newest.

    runs/<data>-<model>/, then -2, -3, …

A finished run is never overwritten.  An unfinished one is continued by the command that began it.
"""

import contextlib
import glob
import itertools
import json
import os
from pathlib import Path
from typing import NamedTuple

from lenslet import files
from lenslet.errors import UserError
from lenslet.runs.checkpoint import newest_checkpoint

LOCKS = []  # open files: a lock lasts as long as the process


class Found(NamedTuple):
    """The folder to train in, locked for this process."""

    folder: Path
    checkpoint: Path | None  # to go on from; None: a new run
    saved: dict | None  # what the checkpoint holds
    notes: list[str]  # what the user should know, a line each

    @property
    def epoch(self) -> int:
        """The epoch that training is in, from 0."""
        return self.saved["progress"]["epoch"] if self.saved else 0


def claim(folder: str | Path, compare, resume: bool = True) -> tuple[Path, Path | None, list[str]]:
    """Lock the folder to train in.

    With resume, the newest unfinished run of this name that has the same options goes on; otherwise
    the first free one of folder, folder-2, folder-3, … is made.

    compare(run): in words, how a run's options differ from those given; '' if they do not.

    Returns the folder, the checkpoint to go on from (None: begin), and what the user should know.
    Errors: Locked for a run that is being trained; UserError for a folder that cannot be made.
    """
    notes = []
    for run in reversed(numbered(folder) if resume else []):
        if not (run / "options.yaml").is_file() or is_finished(run):
            continue
        if different := compare(run):
            notes = notes or [
                f"{run} is unfinished but used other options ({different}): starting a new run"
            ]
            continue
        run, checkpoint, damaged = lock_unfinished(run)
        if checkpoint or not (run / "model.safetensors").exists():
            return run, checkpoint, damaged
        LOCKS.pop().close()
        notes.append(
            "; ".join([*damaged, f"{run} has weights but no usable checkpoint: starting a new run"])
        )
    for number in itertools.count(1):
        run = _run(folder, number)
        try:
            run.mkdir(parents=True, exist_ok=True)
            if not os.access(run, os.R_OK | os.W_OK | os.X_OK):
                raise UserError(f"{run}: no permission; name another folder")
            if any(not path.name.startswith(".") for path in run.iterdir()):
                continue
        except FileExistsError as error:
            raise UserError(f"{run} is a file; name a folder") from error
        except OSError as error:
            reason = f"cannot be written ({error.strerror}); name another folder"
            raise UserError(f"{run}: {reason}") from error
        with contextlib.suppress(files.Locked):
            LOCKS.append(files.lock(run))
            return run, None, notes


def lock_unfinished(run: Path) -> tuple[Path, Path | None, list[str]]:
    """Lock an unfinished run, and find the checkpoint that it goes on from; as claim() returns."""
    LOCKS.append(files.lock(run))
    # What a crash left of files that were being written.
    for aside in [*run.glob(".*.*"), *run.glob("epochs/.*.*")]:
        if aside.suffix[1:].isdigit():
            aside.unlink(missing_ok=True)
    checkpoint, notes = newest_checkpoint(run / "checkpoint")
    return run, checkpoint, notes


def resume(run: Path, compare) -> tuple[Path, Path | None, list[str]]:
    """lock_unfinished() for a run that was named.  Errors: UserError if it cannot be resumed."""
    if different := compare(run):
        raise UserError(f"{run} used other options ({different}): leave those out")
    run, checkpoint, damaged = lock_unfinished(run)
    if not checkpoint and (run / "model.safetensors").exists():
        raise UserError("; ".join([*damaged, f"{run} has no usable checkpoint to resume from"]))
    return run, checkpoint, damaged


def is_finished(run: Path) -> bool:
    """Whether a run came to its end."""
    try:
        return json.loads((run / "metrics.json").read_text())["summary"].get("finished", True)
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def numbered(folder: str | Path) -> list[Path]:
    """Those of folder, folder-2, folder-3, … that there are, in this order."""
    folder = Path(folder)
    others = folder.parent.glob(glob.escape(folder.name) + "-*")
    suffixes = [other.name.removeprefix(folder.name + "-") for other in others]
    numbers = {1} | {int(suffix) for suffix in suffixes if suffix.isdecimal()} - {0}
    return [run for n in sorted(numbers) if (run := _run(folder, n)).is_dir()]


def unfinished(folder: str | None) -> list[Path]:
    """The unfinished runs of this name, or of any (None), the newest first."""
    runs = numbered(folder) if folder else files.RUNS.glob("*")
    begun = {run: run / "options.yaml" for run in runs if not run.is_symlink()}
    found = [run for run in begun if begun[run].is_file() and not is_finished(run)]
    return sorted(found, key=lambda run: begun[run].stat().st_mtime, reverse=True)


def _run(folder: str | Path, number: int) -> Path:
    return Path(folder) if number == 1 else Path(f"{folder}-{number}")


def newest_finished(folder: str | Path, compare=lambda run: "") -> Path | None:
    """The finished run of this name that ended last and that compare() does not object to."""
    runs = [run for run in numbered(folder) if is_finished(run) and not compare(run)]
    return max(runs, key=lambda run: (run / "metrics.json").stat().st_mtime, default=None)


def point_latest(run: Path) -> None:
    """Make runs/latest name this run; where that cannot be written, the run goes on without."""
    aside = files.RUNS / f".latest.{os.getpid()}"
    with contextlib.suppress(OSError):
        files.RUNS.mkdir(exist_ok=True)
        aside.unlink(missing_ok=True)
        aside.symlink_to(os.path.relpath(run.resolve(), files.RUNS.resolve()))
        os.replace(aside, files.RUNS / "latest")


def weights_path(named: str | None) -> Path:
    """The weights file that a command uses: a file, a run folder's, or the newest run's (None).

    Errors: UserError where nothing has been trained yet, or the folder has no weights.
    """
    path = Path(named) if named else files.RUNS / "latest"
    if named and not path.is_dir():
        return path
    path = path / "model.safetensors"
    if path.is_file():
        return path
    if named:
        raise UserError(f"{named}: no model.safetensors in this folder; name a run or a file")
    raise UserError(f"no weights in {files.RUNS}: train first (`make train`), or name a file")
