"""model.safetensors in and out: the tensors, and a header with all that is needed to use them.

Only tensors and text are read: no code that a file brings is ever run.
"""

import hashlib
import json
import math
import os
import time
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load as from_bytes
from safetensors.torch import save as to_bytes
from torch import Tensor

from lenslet.errors import UserError, counted, one_line
from lenslet.files import shown
from lenslet.header import check_header, parse_json

FORMAT = "lenslet"
VERSION = "2"
OLDER = "1"  # without header_sha256
# What is text in a header; the rest is JSON.
TEXT = {"format", "version", "model", "stem", "data", "data_sha256", "sha256", "header_sha256"}
TYPES = {
    **{"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16},
    **{"I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8},
    **{"U8": torch.uint8, "BOOL": torch.bool},
}
LARGEST = 1 << 24  # bytes of a header


class ForeignError(UserError):
    """A file that train.py did not write, whatever else it may be."""


def digest(tensors: dict[str, Tensor]) -> str:
    """SHA-256 of the tensors' bytes in the order of their names, as hexadecimal digits.

    Equal weights have equal digests.  Equal files need not: safetensors varies a header's order.
    """
    sha = hashlib.sha256()
    for _, tensor in sorted(tensors.items()):
        sha.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def header_digest(metadata: dict[str, str], kinds: dict[str, list]) -> str:
    """SHA-256 of all that a header says but this digest, as hexadecimal digits.

    kinds: [type, shape] of each tensor, in safetensors' words.  It is taken of JSON with sorted
    keys, without spaces and in ASCII, so that neither order nor spelling matters.
    """
    said = {key: text for key, text in metadata.items() if key != "header_sha256"}
    text = json.dumps([said, kinds], sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def storable(tensor: Tensor) -> Tensor:
    """A contiguous copy on the CPU: safetensors refuses channels_last and shared memory."""
    return tensor.detach().cpu().clone(memory_format=torch.contiguous_format)


def encode(state: dict[str, Tensor], header: dict) -> bytes:
    """The content of a weights file, from a model's state_dict and a header as in read_header().

    format, version, sha256 and header_sha256 are made anew, whatever the header says of them.
    """
    tensors = {name: storable(tensor) for name, tensor in state.items()}
    header = header | {"format": FORMAT, "version": VERSION, "sha256": digest(tensors)}
    metadata = {k: v if k in TEXT else json.dumps(v, ensure_ascii=False) for k, v in header.items()}
    names = {kind: name for name, kind in TYPES.items()}
    kinds = {name: [names[tensor.dtype], list(tensor.shape)] for name, tensor in tensors.items()}
    metadata["header_sha256"] = header_digest(metadata, kinds)
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
    And of the file: format, version, sha256 (the tensors' digest()), header_sha256 (of the rest).

    Errors: UserError, without the path, for a file that is missing, cut off or not one of ours, and
    for a header that was altered or does not hold what it must (header.check_header()).
    """
    with _opened(path) as file:
        return _read_head(file)[1]


def _opened(path: str | Path):
    if not Path(path).is_file():
        raise UserError("no such weights file (train one with `make train`)")
    return open(path, "rb")


def _read_head(file) -> tuple[bytes, dict]:
    """What is before the tensors in an open file, and read_header()'s header from it.

    Errors: ForeignError for a file of another program; UserError as in read_header().
    """
    head = file.read(9)
    size = int.from_bytes(head[:8], "little")
    if head[8:] not in (b"", b"{"):
        raise ForeignError("not a weights file of train.py, which are safetensors files")
    try:
        left = os.fstat(file.fileno()).st_size - 8 - size  # bytes of the tensors
        if left < 0:
            raise ValueError("cut off before the end of its header")
        if size > LARGEST:
            raise ForeignError(f"its header has {size:,} bytes, more than any of ours")
        head += file.read(size - 1)
        table = parse_json(head[8:].decode())
        metadata = table.pop("__metadata__", None) or {}
        _check_table(table, metadata, left)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"not a complete safetensors file ({one_line(error)})") from error
    if metadata.get("format") != FORMAT:
        raise ForeignError("not written by train.py (its header does not say how to use it)")
    if (version := metadata.get("version")) not in (OLDER, VERSION):
        found = f"format version {one_line(version, 20)}"
        raise UserError(f"{found}, but this code reads versions {OLDER} and {VERSION}")
    kinds = {name: [tensor["dtype"], tensor["shape"]] for name, tensor in table.items()}
    if version == VERSION and metadata.get("header_sha256") != header_digest(metadata, kinds):
        raise UserError("the header is not the one that was saved (damaged or altered)")
    if unknown := {kind for kind, _ in kinds.values()} - TYPES.keys():
        raise UserError(f"holds tensors of type {min(unknown)}, which no network here has")
    try:
        header = {k: v if k in TEXT else parse_json(v) for k, v in metadata.items()}
    except ValueError as error:
        raise UserError(f"its header is damaged ({one_line(error)})") from error
    check_header(header)
    return head, header


def _check_table(table: dict, metadata: dict, left: int) -> None:
    """Refuse tensors that do not fill what follows the header, of so many bytes, exactly.

    table: {name: type, shape and place of a tensor}.  Errors: ValueError and what Python raises
    where the types are not those of a safetensors header.
    """
    if not all(type(text) is str for text in metadata.values()):
        raise ValueError("its metadata is not text")
    end = 0
    for start, stop, name in sorted((*t["data_offsets"], name) for name, t in table.items()):
        kind, shape = table[name]["dtype"], table[name]["shape"]
        sizes = (start, stop, *shape)
        if start != end or not all(type(n) is int and n >= 0 for n in sizes):
            raise ValueError(f"no place for {name}")
        if kind in TYPES and stop - start != TYPES[kind].itemsize * math.prod(shape):
            raise ValueError(f"{name} has another size than its shape")
        end = stop
    if end != left:
        raise ValueError(f"{left} bytes of tensors, not {end}: cut off or longer")


def read(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors (on the CPU, as they were saved) and the header of a weights file.

    The file is opened and read once, so that both are of one file even while another takes its
    place.  For a moment this takes twice the memory of the tensors.

    Errors: UserError, as in read_header(), for tensors that differ from those that were saved, and
    for values that are not finite.
    """
    with _opened(path) as file:
        head, header = _read_head(file)
        content = head + file.read()
    try:
        tensors = from_bytes(content)
    except (SafetensorError, RuntimeError) as error:  # a shape that torch cannot make, say
        raise UserError(f"its tensors cannot be read ({one_line(error)})") from error
    if digest(tensors) != header.get("sha256"):
        raise UserError("the weights are not those that were saved (damaged or altered)")
    check_finite(tensors)
    return tensors, header


def check_finite(tensors: dict[str, Tensor]) -> None:
    """Refuse NaN and infinity in tensors of any real type.  Errors: UserError with a name."""
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.numel():
            wide = tensor if tensor.itemsize > 1 else tensor.float()  # no arithmetic in 8 bits
            if not torch.stack(wide.aminmax()).isfinite().all():  # isfinite() takes 15 times longer
                line = f"{one_line(name, 100)} holds NaN or infinity"
                raise UserError(f"its weights are not finite: {line}")


def check_shapes(tensors: dict[str, Tensor], create) -> None:
    """Refuse tensors that do not fit the network that create() makes, whatever size that has.

    It is made without values, which takes no memory and hardly any time.  Errors: ValueError.
    """
    try:
        with torch.device("meta"):
            state = create().state_dict()
    except RuntimeError:  # torchvision's RegNets copy values while they are made
        return
    given, fitting = ({(k, t.dtype, t.shape) for k, t in s.items()} for s in (tensors, state))
    for name, kind, shape in sorted(fitting ^ given, key=str)[:1]:
        raise ValueError(f"{name}: {kind} {list(shape)} is in one of them only")


def describe(weights: Path, header: dict) -> str:
    """Which weights these are: "runs/digits-lenet/… (digits, lenet, trained 3 hours ago)"."""
    path = weights.resolve()  # runs/latest as the run it is
    age = max(0, time.time() - path.stat().st_mtime)
    units = {"day": 86400, "hour": 3600, "minute": 60, "second": 1}
    unit = next((unit for unit, length in units.items() if age >= length), "second")
    ago = f"{counted(int(age // units[unit]), unit)} ago"
    return f"{shown(path)} ({Path(header['data']).name}, {header['model']}, trained {ago})"


def caution(header: dict) -> str:
    """What a user should know of the file that a header is from, in one line; '' if nothing."""
    old = header["version"] == OLDER
    return f"weights of format {OLDER}: their header has no checksum" if old else ""
