"""What a run leaves on disk: model.safetensors, and the checkpoints that it can go on from.

model.safetensors holds the weights and, in its header, all that is needed to use them: `encode()`
and `load_model()` are the only way in and out.  A checkpoint is a folder that holds the whole state
of a training run.  Both are safetensors and JSON: nothing is executed on loading, and whatever was
damaged or cut off is found out.  `atomic_write()` is how every file but TensorBoard's gets its
final name.
"""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from model import create_model
from options import UserError
from transforms import Prepare

FORMAT, CHECKPOINT = "lenslet", "lenslet-checkpoint"
VERSION = "1"  # of weights
STATE = "3"  # of checkpoints
TEXT = {"format", "version", "model", "stem", "data", "data_sha256", "sha256"}  # the rest is JSON


def atomic_write(path: Path, data: bytes | str) -> None:
    """Write data under path so that a reader, or a crash, meets the old file or the whole new one.

    Errors: OSError naming path (disk full, no permission); then path is as it was.
    """
    aside = path.parent / f".{path.name}.{os.getpid()}"
    try:
        _write(aside, data.encode(errors="surrogateescape") if isinstance(data, str) else data)
        os.replace(aside, path)
        _sync_folder(path.parent)
    except BaseException as error:  # Ctrl-C too leaves nothing behind
        aside.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _write(path: Path, data: bytes) -> None:
    """Write a file down to the disk."""
    with open(path, "wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


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
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def _plain(tensor: Tensor) -> Tensor:
    """A copy that safetensors takes: it refuses channels_last and shared memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def encode(state: dict[str, Tensor], header: dict) -> bytes:
    """A weights file of a model's state_dict and a header, see read_header()."""
    tensors = {name: _plain(tensor) for name, tensor in state.items()}
    header = {"format": FORMAT, "version": VERSION, **header, "sha256": digest(tensors)}
    metadata = {k: v if k in TEXT else json.dumps(v, ensure_ascii=False) for k, v in header.items()}
    return to_bytes(tensors, metadata)


def read_header(path: str | Path) -> dict:
    """The header of a weights file alone.

    model, model_args (of create_model), stem (how it was changed for small pictures), classes
    (names, in the order of the outputs), channels, image_size (height and width that pictures are
    read at), crop (share of a picture that a centre crop keeps), input_size (what the network is
    fed), mean, std (0..1 scale), data, data_sha256, epoch, validation, digests ([step, sha256 of
    the weights] of every epoch so far), plan (see clock.Plan's marks), options, versions, device,
    precision, threads, processes, sha256 (of the tensors).

    Errors: UserError for a file that is missing, cut off or not one of ours.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path}: no such weights file (train one with `make train`)")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"{path}: not a whole safetensors file ({error})") from error
    if header.get("format") != FORMAT:
        raise UserError(f"{path}: not written by train.py (its header does not say how to use it)")
    if header.get("version") != VERSION:
        raise UserError(
            f"{path}: format version {header.get('version')}, this code reads version {VERSION}"
        )
    try:
        return {k: v if k in TEXT else json.loads(v) for k, v in header.items()}
    except ValueError as error:
        raise UserError(f"{path}: its header is damaged ({error})") from error


def load(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors (on the CPU) and the header of a weights file, see read_header().

    Errors: UserError, as there and for weights that were altered.
    """
    header = read_header(path)
    tensors = load_file(path)
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


def save_checkpoint(
    folder: Path, step: int, state: dict, weights: bytes | None = None, before: Path | None = None
) -> Path:
    """Write folder/<number>-step-<step>/ and only then remove all older ones but `before`.

    state: dicts, lists, tensors and their types, numbers, strings and None, nested at will (tuples
    come back as lists).  weights: a weights file to keep with it.  The folder gets its name when
    everything in it is on the disk; a crash at any moment leaves what was there, and a folder to be
    ignored.

    Errors: OSError naming the folder; then the earlier ones are as they were.
    """
    tensors = {}
    skeleton = _take_apart(state, tensors, "state")
    files = {"state.safetensors": to_bytes(tensors), "state.json": json.dumps(skeleton).encode()}
    if weights is not None:
        files["model.safetensors"] = weights
    sums = {name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in files.items()}
    manifest = {"format": CHECKPOINT, "version": STATE, "files": sums}
    number = 1 + max((_number(old) for old in _saved(folder)), default=0)
    path = folder / f"{number:06d}-step-{step}"
    aside = folder / f".{path.name}"
    try:
        if not folder.is_dir():
            folder.mkdir()
            _sync_folder(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)  # of a crash
        aside.mkdir()
        for name, data in files.items():
            _write(aside / name, data)
        _write(aside / "manifest.json", json.dumps(manifest, indent=1).encode())
        _sync_folder(aside)
        os.rename(aside, path)
        _sync_folder(folder)
    except BaseException as error:  # Ctrl-C too leaves nothing behind, and a full disk its room
        shutil.rmtree(aside, ignore_errors=True)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise
    for old in folder.iterdir():
        if old not in (path, before):
            shutil.rmtree(old, ignore_errors=True)
    return path


def newest_checkpoint(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest valid checkpoint in a folder, if any, and a line about each damaged newer one."""
    notes = []
    for path in sorted(_saved(folder), key=_number, reverse=True):
        fault = _fault(path)
        if not fault:
            return path, notes
        notes.append(f"{path} is damaged ({fault}) and left alone")
    return None, notes


def load_checkpoint(path: Path) -> dict:
    """The state that save_checkpoint() was given, tensors on the CPU, of a valid checkpoint."""
    tensors = load_file(path / "state.safetensors")
    return _put_together(json.loads((path / "state.json").read_text()), tensors)


def _saved(folder: Path) -> list[Path]:
    return [path for path in folder.glob("*-step-*") if path.name[:1].isdigit()]


def _number(path: Path) -> int:
    return int(path.name.split("-")[0])


def _fault(path: Path) -> str:
    """What is wrong with a checkpoint, '' if nothing is."""
    name = "manifest.json"
    try:
        manifest = json.loads((path / name).read_text())
        if (manifest["format"], manifest["version"]) != (CHECKPOINT, STATE):
            return f"not of format {CHECKPOINT}, version {STATE}"
        if missing := {"state.json", "state.safetensors"} - manifest["files"].keys():
            return f"its manifest lacks {' and '.join(sorted(missing))}"
        for name, (size, sha256) in manifest["files"].items():
            data = (path / name).read_bytes()
            if len(data) != size:
                return f"{name} has {len(data)} of {size} bytes"
            if hashlib.sha256(data).hexdigest() != sha256:
                return f"{name} was altered"
    except OSError as error:
        return f"{name}: {error.strerror}"
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return "manifest.json was altered"
    return ""


def _take_apart(tree, tensors: dict[str, Tensor], name: str):
    """The tree as JSON can hold it; its tensors are moved to `tensors`, under their paths.

    Dicts become lists of pairs, for the keys of JSON's objects are strings only.
    """
    if isinstance(tree, Tensor):
        assert name not in tensors, name
        tensors[name] = _plain(tree)
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"dict": [[k, _take_apart(v, tensors, f"{name}/{k}")] for k, v in tree.items()]}
    if isinstance(tree, torch.dtype):
        return {"dtype": str(tree).removeprefix("torch.")}
    if isinstance(tree, list | tuple):
        return [_take_apart(v, tensors, f"{name}/{i}") for i, v in enumerate(tree)]
    return tree


def _put_together(tree, tensors: dict[str, Tensor]):
    """The inverse of _take_apart()."""
    if isinstance(tree, list):
        return [_put_together(value, tensors) for value in tree]
    if not isinstance(tree, dict):
        return tree
    if "tensor" in tree:
        return tensors[tree["tensor"]]
    if "dtype" in tree:
        return getattr(torch, tree["dtype"])
    return {key: _put_together(value, tensors) for key, value in tree["dict"]}
