"""model.safetensors in and out: the tensors, and a header with all that is needed to use them."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torch import Tensor

from lenslet.errors import UserError

FORMAT = "lenslet"
VERSION = "1"
TEXT = {"format", "version", "model", "stem", "data", "data_sha256", "sha256"}  # the rest is JSON


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the tensors' bytes in key order.

    Equal weights have equal digests; equal files need not, for the order of a header varies.
    """
    sha = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def storable(tensor: Tensor) -> Tensor:
    """A copy that safetensors takes: it refuses channels_last and shared memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def encode(state: dict[str, Tensor], header: dict) -> bytes:
    """A weights file of a model's state_dict and a header, see read_header()."""
    tensors = {name: storable(tensor) for name, tensor in state.items()}
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


def read_weights_file(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors (on the CPU) and the header of a weights file, see read_header().

    Errors: UserError, as there and for weights that were altered.
    """
    header = read_header(path)
    tensors = load_file(path)
    if digest(tensors) != header.get("sha256"):
        raise UserError(f"{path}: the weights are not those that were saved (damaged or altered)")
    return tensors, header
