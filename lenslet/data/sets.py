"""The named data sets: how one is downloaded, checked and converted.  sets.yaml describes them.

`ensure("cifar10")` leaves data/cifar10/{train,test}.safetensors; see scripts/download.py.  A
download can be interrupted at any byte and resumed, from any source, and only bytes that were
checked are converted.
"""

import gzip
import io
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import yaml
from safetensors.numpy import save

from lenslet import files
from lenslet.data.download import digest, download, read_local
from lenslet.errors import UserError, nearest
from lenslet.files import atomic_write, lock

SETS = yaml.safe_load(Path(__file__).with_name("sets.yaml").read_bytes())


def is_set(name: str) -> bool:
    """Whether this names a known set rather than a folder.  Errors: UserError if neither."""
    if name not in SETS and ("/" in name or os.sep in name or Path(name).is_dir()):
        return False
    lookup(name, ", or give a folder of images")
    return True


def lookup(name: str, otherwise: str = "") -> dict:
    """The set's entry in SETS.  Errors: UserError with the known sets, and what else to give."""
    if name not in SETS:
        known = ", ".join(SETS)
        raise UserError(f"no such data set{nearest(name, SETS)}; known are {known}{otherwise}")
    return SETS[name]


def ensure(name: str, source: str | None = None, patience: float = 30.0) -> Path:
    """The folder data/<name>, with train.safetensors and test.safetensors in it.

    Both hold images uint8 [N, C, H, W] and labels int64 [N], and in the header classes (JSON list)
    and source_sha256 (JSON: file -> hash of its content).  Where both are on disk, no network is
    touched.  source: URL of a folder or of the archive, or an archive on disk, or a folder of
    them, instead of the set's own sources.  patience: seconds to find a source that answers.

    Errors: UserError for an unknown name, a missing or a wrong local file; OutsideError when no
    source serves; OSError when the disk is full.  What was downloaded is kept for the next call.
    """
    spec = lookup(name)
    folder = files.DATA / name
    if _is_complete(folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder, wait=True):
        if _is_complete(folder):  # another process was faster
            return folder
        if spec["kind"] == "digits":
            contents = _read_digits()
        elif source and not source.startswith(("http://", "https://")):
            contents = read_local(spec, Path(source).expanduser())
        else:
            contents = download(spec, source, folder / "download", patience)
        hashes = {file: digest("sha256", content) for file, content in contents.items()}
        header = {"classes": json.dumps(spec["classes"]), "source_sha256": json.dumps(hashes)}
        for split, (images, labels) in CONVERT[spec["kind"]](spec, contents).items():
            assert labels.max() < len(spec["classes"]), (name, split, labels.max())
            arrays = {"images": np.ascontiguousarray(images), "labels": labels.astype(np.int64)}
            atomic_write(folder / f"{split}.safetensors", save(arrays, header))
        # Only now: a call that is interrupted above starts again from the archives.
        shutil.rmtree(folder / "download", ignore_errors=True)
    return folder


def _is_complete(folder: Path) -> bool:
    return all((folder / f"{split}.safetensors").exists() for split in ("train", "test"))


# The only names that a pickled array needs; numpy 1 writes numpy.core for numpy._core.
ARRAY_NAMES = {
    "numpy.core.multiarray._reconstruct": np.zeros(0).__reduce__()[0],
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
}


class _ArraysOnly(pickle.Unpickler):
    """A pickle can call whatever it can name: here, only what makes an array."""

    def find_class(self, module, name):
        path = f"{module}.{name}".replace("numpy._core.", "numpy.core.")
        if path not in ARRAY_NAMES:
            raise UserError(f"a batch of images asks for {path}: refused")
        return ARRAY_NAMES[path]


def _convert_cifar(spec: dict, contents: dict[str, bytes]) -> dict:
    """{split: (images uint8 [N, 3, 32, 32], labels [N])} from the batches in a tar archive."""
    (archive,) = contents.values()
    splits = {}
    # Decompressed at once: the batches are out of order, and to seek back is to decompress again.
    with tarfile.open(fileobj=io.BytesIO(gzip.decompress(archive))) as tar:
        for split, members in spec["members"].items():
            # Read by exact name and never extracted: no path in the archive is followed.
            pickles = [tar.extractfile(member) for member in members]
            batches = [_ArraysOnly(pickled, encoding="latin1").load() for pickled in pickles]
            images = np.concatenate([batch["data"] for batch in batches])
            labels = np.concatenate([batch[spec["labels"]] for batch in batches])
            splits[split] = images.reshape(-1, 3, 32, 32), labels
    return splits


def _convert_idx(spec: dict, contents: dict[str, bytes]) -> dict:
    """{split: (images uint8 [N, 1, H, W], labels [N])} from the four files of MNIST."""
    arrays = []
    for content in contents.values():
        # 0, 0, type (8: uint8), number of dimensions; each dimension as big-endian int32; values
        shape = np.frombuffer(content, ">i4", count=content[3], offset=4)
        arrays.append(np.frombuffer(content, np.uint8, offset=4 + shape.nbytes).reshape(shape))
    return {"train": (arrays[0][:, None], arrays[1]), "test": (arrays[2][:, None], arrays[3])}


def _read_digits() -> dict[str, bytes]:
    """scikit-learn's own 8×8 digits, 0..16 stretched to 0..255."""
    from sklearn.datasets import load_digits

    grey, labels = load_digits(return_X_y=True)
    images = np.rint(grey * (255 / 16)).astype(np.uint8)
    return {"images": images.tobytes(), "labels": labels.astype(np.uint8).tobytes()}


def _convert_digits(spec: dict, contents: dict[str, bytes]) -> dict:
    """{split: (images uint8 [N, 1, 8, 8], labels [N])}; a fixed fifth of each class is for test."""
    from sklearn.model_selection import train_test_split

    images = np.frombuffer(contents["images"], np.uint8).reshape(-1, 1, 8, 8)
    labels = np.frombuffer(contents["labels"], np.uint8)
    split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    return {"train": (split[0], split[2]), "test": (split[1], split[3])}


CONVERT = {"cifar": _convert_cifar, "idx": _convert_idx, "digits": _convert_digits}
