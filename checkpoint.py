"""model.safetensors: the weights and, in its header, all that is needed to use them.

`save()` and `load_model()` are the only way in and out.  Nothing is executed on loading, and no
other file is needed.  `atomic_write()` is how every file but TensorBoard's gets its final name.
"""

import hashlib
import itertools
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import options
from model import create_model
from options import UserError
from transforms import Prepare

FORMAT = "lenslet"
VERSION = "1"
TEXT = {"format", "version", "model", "stem", "data", "data_sha256", "sha256"}  # the rest is JSON


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write data under path so that a reader, or a crash, meets the old file or the whole new one.

    Errors: OSError naming path (disk full, no permission); then path is as it was.
    """
    aside = path.parent / f".{path.name}.{os.getpid()}"
    try:
        with open(aside, "wb") as file:
            file.write(data.encode(errors="surrogateescape") if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(aside, path)
        _sync_folder(path.parent)
    except BaseException as error:  # Ctrl-C too leaves nothing behind
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _sync_folder(folder: Path) -> None:
    """The new name itself is only durable once its folder is flushed."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the tensors' bytes in key order.

    Equal weights have equal digests; equal files need not, for the order of a header varies.
    """
    sha = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        sha.update(tensor.contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def save(path: Path, state: dict[str, Tensor], header: dict) -> None:
    """Write a model's state_dict and its header; see load() for the header's keys."""
    # safetensors refuses channels_last and shared memory.
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format)
        for name, t in state.items()
    }
    header = {"format": FORMAT, "version": VERSION, **header, "sha256": digest(tensors)}
    metadata = {k: v if k in TEXT else json.dumps(v, ensure_ascii=False) for k, v in header.items()}
    atomic_write(path, to_bytes(tensors, metadata))


def load(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors (on the CPU) and the header of a weights file.

    The header's keys: model, model_args (of create_model), stem (how it was changed for small
    pictures), classes (names, in the order of the outputs), channels, image_size (height and width
    that pictures are read at), crop (share of a picture that a centre crop keeps), input_size (what
    the network is fed), mean, std (0..1 scale), data, data_sha256, epoch, validation, versions,
    options, sha256 (of the tensors).

    Errors: UserError for a file that is missing, cut off, altered or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file (train one with `make train`)")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
    if header.get("format") != FORMAT:
        raise UserError(f"{path}: not written by train.py (its header does not say how to use it)")
    if header.get("version") != VERSION:
        raise UserError(
            f"{path}: format version {header.get('version')}, this code reads version {VERSION}"
        )
    try:
        header = {k: v if k in TEXT else json.loads(v) for k, v in header.items()}
    except ValueError as error:
        raise UserError(f"{path}: its header is damaged ({error})") from error
    if digest(tensors) != header.get("sha256"):
        raise UserError(f"{path}: the weights are not those that were saved (damaged or altered)")
    return tensors, header


def load_model(path: str | Path) -> tuple[nn.Module, Prepare, dict]:
    """The trained network in evaluation mode, what prepares pictures for it, and the header.

    Errors: UserError, see load().
    """
    tensors, header = load(path)
    try:
        model = create_model(header["model"], **header["model_args"])
        model.load_state_dict(tensors)
        prepare = Prepare(header["mean"], header["std"], model.input_size)
    except (RuntimeError, TypeError, KeyError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{path}: does not fit its header ({reason})") from error
    return model.eval().to(memory_format=torch.channels_last), prepare, header


def new_run(folder: str | Path) -> Path:
    """Make a run's folder, or the first free one of folder-2, folder-3, … where it has content.

    Errors: UserError where it cannot be made.
    """
    for number in itertools.count(1):
        run = Path(folder) if number == 1 else Path(f"{folder}-{number}")
        try:
            run.mkdir(parents=True)
            return run
        except FileExistsError as error:
            if not run.is_dir():
                raise UserError(f"--output {run} is a file: name a folder") from error
            if not os.access(run, os.R_OK | os.W_OK | os.X_OK):
                raise UserError(f"--output {run}: no permission; name another folder") from error
            if not any(run.iterdir()):
                return run
        except OSError as error:
            raise UserError(
                f"--output {run}: cannot be written ({error.strerror}); name another folder"
            ) from error


def point_latest(run: Path) -> None:
    """Make runs/latest name this run."""
    options.RUNS.mkdir(exist_ok=True)
    aside = options.RUNS / f".latest.{os.getpid()}"
    aside.symlink_to(os.path.relpath(run, options.RUNS))
    os.replace(aside, options.RUNS / "latest")


def latest_weights() -> Path:
    """The newest run's weights file.  Errors: UserError where nothing has been trained yet."""
    path = options.RUNS / "latest" / "model.safetensors"
    if not path.is_file():
        raise UserError(f"no weights in {options.RUNS}: run `make train`, or give --weights FILE")
    return path
