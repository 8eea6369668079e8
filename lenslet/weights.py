"""model.safetensors in and out: the tensors, and a header with all that is needed to use them.

Only tensors and text are read: no code that a file brings is ever run.
"""

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
    """SHA-256 of the tensors' bytes in the order of their names, as hexadecimal digits.

    Equal weights have equal digests.  Equal files need not: safetensors varies a header's order.
    """
    sha = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def storable(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU: safetensors refuses channels_last and shared memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def encode(state: dict[str, Tensor], header: dict) -> bytes:
    """The content of a weights file, from a model's state_dict and a header as in read_header().

    format, version and sha256 are added to the header.
    """
    tensors = {name: storable(tensor) for name, tensor in state.items()}
    header = {"format": FORMAT, "version": VERSION, **header, "sha256": digest(tensors)}
    metadata = {k: v if k in TEXT else json.dumps(v, ensure_ascii=False) for k, v in header.items()}
    return to_bytes(tensors, metadata)


def read_header(path: str | Path) -> dict:
    """The header of a weights file, without its tensors.

    What is needed to use the weights:
        model, model_args   the arguments of create_model()
        stem                the strides that were changed for small images, '' for none
        classes             their names, in the order of the logits
        channels            1 or 3
        image_size          (height, width) that images are read at
        crop                share of the side that the centre crop of a photograph keeps, 0..1
        input_size          (height, width) that the network is fed
        mean, std           of each channel, 0..1 scale
    How they were made:
        data, data_sha256   the data set, and the SHA-256 of its content
        epoch, validation   after which they were kept, and its figures
        digests             [step, digest of the weights] of every epoch so far
        plan                see clock.Plan's marks
        options             of the training
        versions, device, precision, threads, processes
    And of the file: format, version, sha256 (the tensors' digest()).

    Errors: UserError, without the path, for a file that is missing, cut off or not one of ours.
    """
    if not Path(path).is_file():
        raise UserError("no such weights file (train one with `make train`)")
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except SafetensorError as error:
        raise UserError(f"not a complete safetensors file ({error})") from error
    if header.get("format") != FORMAT:
        raise UserError("not written by train.py (its header does not say how to use it)")
    if (version := header.get("version")) != VERSION:
        raise UserError(f"format version {version}, but this code reads version {VERSION}")
    try:
        return {k: v if k in TEXT else json.loads(v) for k, v in header.items()}
    except ValueError as error:
        raise UserError(f"its header is damaged ({error})") from error


def read(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors (on the CPU, as they were saved) and the header of a weights file.

    Errors: UserError, as in read_header(), and for tensors that differ from those that were saved.
    """
    header = read_header(path)
    tensors = load_file(path)
    if digest(tensors) != header.get("sha256"):
        raise UserError("the weights are not those that were saved (damaged or altered)")
    return tensors, header
