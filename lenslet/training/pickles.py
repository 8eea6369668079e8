"""What torch.save() wrote, in its zip and its older format: the tensors with names that it holds.

No code from a file is run, and none can ask for more memory than its own size accounts for.
"""

import argparse
import warnings
import zipfile
from pathlib import Path

import torch
from torch import Tensor

from lenslet.errors import UserError

MOST = 1 << 15  # tensors in a file: those of a network and its optimizer are a third at most
LARGER = "its tensors are larger than the file, which was cut off or damaged"


def read(path: Path) -> dict[str, Tensor]:
    """The tensors (on the CPU) of the dict in a file that has most of them; {} if there are none.

    Their names are those in the file.  A zip's checksums are compared, which torch.load() does not.

    Errors: UserError for what is no state_dict; BadZipFile and any other exception for damage.
    """
    size, count = path.stat().st_size, 0
    with open(path, "rb") as file:
        if file.read(4) == b"PK\x03\x04":
            _check_zip(file, size)

    def check(storage, _):  # in the older format, before its memory is touched
        nonlocal count
        count += 1
        if storage.nbytes() > 4 * size:
            raise UserError(LARGER)
        _check_count(count)
        return storage

    # timm's own checkpoints hold their options as a Namespace, which does nothing.
    with warnings.catch_warnings(), torch.serialization.safe_globals([argparse.Namespace]):
        warnings.simplefilter("ignore")  # an error says it all
        state = _largest_state(torch.load(path, map_location=check, weights_only=True))
    _check_count(len(state))  # any number of them may share one storage
    return state


def _check_count(count: int) -> None:
    if count > MOST:
        raise UserError(f"holds more than {MOST:,} tensors, which no network has")


def _check_zip(file, size: int) -> None:
    """Refuse a zip archive that was damaged, is much larger than its size, or holds a program."""
    with zipfile.ZipFile(file) as archive:
        entries = archive.infolist()
        if any(entry.filename.endswith("/constants.pkl") for entry in entries):
            raise UserError(
                "is a TorchScript archive: load it with torch.jit.load() and torch.save() its "
                "state_dict()"
            )
        # torch.save() compresses nothing, and weights hardly can be.
        if sum(entry.file_size for entry in entries) > 4 * size:
            raise UserError(LARGER)
        _check_count(len(entries))
        for entry in entries:
            if entry.CRC:  # 0: written without checksums
                with archive.open(entry) as record:
                    while record.read(1 << 20):
                        pass


def _largest_state(tree) -> dict[str, Tensor]:
    """Of a dict and the dicts in it, the tensors of the one that has most of them.

    An optimizer's state has numbers for keys, which are not followed.
    """
    best, seen, found = {}, set(), [tree]
    while found:  # not recursive: a file may nest dicts without end, or in each other
        tree = found.pop()
        if isinstance(tree, dict) and id(tree) not in seen:
            seen.add(id(tree))
            entries = {key: value for key, value in tree.items() if isinstance(key, str)}
            here = {k: v.detach() for k, v in entries.items() if isinstance(v, Tensor)}
            best = max(best, here, key=len)
            found += reversed(entries.values())
    return best
