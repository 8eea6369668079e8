"""Checkpoints: the whole state of a run as safetensors and JSON, checked by their hashes."""

import hashlib
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save
from torch import Tensor

from lenslet.files import sync_folder, write_to_disk
from lenslet.weights import storable

FORMAT = "lenslet-checkpoint"
VERSION = "5"


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
    tree = _to_json(state, tensors, "state")
    files = {"state.safetensors": save(tensors), "state.json": json.dumps(tree).encode()}
    if weights is not None:
        files["model.safetensors"] = weights
    sums = {name: [len(data), hashlib.sha256(data).hexdigest()] for name, data in files.items()}
    manifest = {"format": FORMAT, "version": VERSION, "files": sums}
    number = 1 + max(_saved(folder), default=0)
    path = folder / f"{number:06d}-step-{step}"
    aside = folder / f".{path.name}"
    try:
        if not folder.is_dir():
            folder.mkdir()
            sync_folder(folder.parent)
        shutil.rmtree(aside, ignore_errors=True)  # of a crash
        aside.mkdir()
        for name, data in files.items():
            write_to_disk(aside / name, data)
        write_to_disk(aside / "manifest.json", json.dumps(manifest, indent=1).encode())
        sync_folder(aside)
        os.rename(aside, path)
        sync_folder(folder)
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
    for _, path in sorted(_saved(folder).items(), reverse=True):
        fault = _fault(path)
        if not fault:
            return path, notes
        notes.append(f"{path} cannot be used ({fault})")
    return None, notes


def load_checkpoint(path: Path) -> dict:
    """The state that save_checkpoint() was given, tensors on the CPU, of a valid checkpoint."""
    tensors = load_file(path / "state.safetensors")

    def restore(entry):  # each of JSON's objects, the inner ones first: the inverse of _to_json()
        ((kind, value),) = entry.items()
        if kind == "tensor":
            return tensors[value]
        return getattr(torch, value) if kind == "dtype" else dict(value)

    return json.loads((path / "state.json").read_text(), object_hook=restore)


def _saved(folder: Path) -> dict[int, Path]:
    """{number: checkpoint}, damaged ones too."""
    paths = [path for path in folder.glob("*-step-*") if path.name[:1].isdigit()]
    return {int(path.name.split("-")[0]): path for path in paths}


def _fault(path: Path) -> str:
    """What is wrong with a checkpoint, '' if nothing is."""
    name = "manifest.json"
    try:
        manifest = json.loads((path / name).read_text())
        if (manifest["format"], manifest["version"]) != (FORMAT, VERSION):
            return f"of another version of this code: {manifest['version']}, not {VERSION}"
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


def _to_json(tree, tensors: dict[str, Tensor], name: str):
    """The tree as JSON can hold it; its tensors are moved to `tensors`, under their paths.

    Dicts become lists of pairs, for the keys of JSON's objects are strings only.
    """
    if isinstance(tree, Tensor):
        assert name not in tensors, name
        tensors[name] = storable(tree)
        return {"tensor": name}
    if isinstance(tree, dict):
        return {"dict": [[k, _to_json(v, tensors, f"{name}/{k}")] for k, v in tree.items()]}
    if isinstance(tree, torch.dtype):
        return {"dtype": str(tree).removeprefix("torch.")}
    if isinstance(tree, list | tuple):
        return [_to_json(v, tensors, f"{name}/{i}") for i, v in enumerate(tree)]
    return tree
