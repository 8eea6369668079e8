"""Archives from several sources: resumed at any byte, and given their name only when checked.

`download()` and `read_local()` return the checked content of the archives of a set in sets.yaml,
`download_file()` fetches any one file; only these, and digest(), are used from outside.
"""

import contextlib
import gzip
import hashlib
import io
import itertools
import os
import queue
import re
import sys
import threading
import time
import zlib
from pathlib import Path
from urllib.parse import urlsplit

from lenslet.data import transfer
from lenslet.data.transfer import Mismatch, Unavailable, limit, open_url, size_of
from lenslet.errors import OutsideError, UserError, error_context

FLOOR = 200_000  # bytes/s: a slower source is abandoned while another may be faster
LITTLE = 10_000  # bytes: a try that brings fewer is the last
GRACE = 1.0  # s that the other sources have to answer once one has


def read_local(spec: dict, source: Path) -> dict[str, bytes]:
    """{archive: content} from a folder, or from the archive itself where the set has one only.

    Errors: UserError for archives that are missing or wrong.
    """
    single = source.is_file() and len(spec["archives"]) == 1
    folder = source.parent if source.is_file() else source
    contents, missing = {}, []
    for file, checks in spec["archives"].items():
        paths = [source] if single else [folder / file, folder / file.removesuffix(".gz")]
        if path := next(filter(Path.is_file, paths), None):
            with error_context(path.name):
                contents[file] = unwrap(path.read_bytes(), checks)
        else:
            missing.append(file)
    if missing:
        raise UserError(f"{', '.join(missing)} missing there")
    return contents


def unwrap(blob: bytes, checks: dict) -> bytes:
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
            found = len(blob) if key == "size" else digest(key, blob)
            if found != expected:
                raise Mismatch(f"{prefix}{key} is {found}, expected {expected}")


def digest(kind: str, blob: bytes) -> str:
    return hashlib.new(kind, blob, usedforsecurity=False).hexdigest()


def download(spec: dict, source: str | None, folder: Path, patience: float) -> dict[str, bytes]:
    """{archive: content}; what arrives is kept in the folder, incomplete archives as *.part."""
    sources = spec["sources"]
    if source:
        file = next((file for file in spec["archives"] if source.endswith("/" + file)), "")
        sources = [source.removesuffix(file).rstrip("/") + "/"]
    folder.mkdir(exist_ok=True)
    contents, problems = {}, {}
    for file, checks in spec["archives"].items():
        try:
            contents[file] = unwrap((folder / file).read_bytes(), checks)
        except (FileNotFoundError, Mismatch):
            problems = problems or _search(sources, file, checks, patience)
            contents[file] = _fetch(file, checks, problems, folder)
    return contents


def download_file(url: str, folder: Path) -> Path:
    """The file that a URL names, in folder: fetched once, and resumed where a call broke off.

    Two URLs never share a name: a hash of the URL stands before the file's own.  Where that ends in
    a hash, as torch.hub's do (resnet18-f37072fd.pth), the content must agree with it.

    Errors: OutsideError naming the URL; OSError naming the part, when the disk is full.
    """
    file = re.split("[?#]", url)[0].rpartition("/")[2]
    path = folder / f"{digest('sha256', os.fsencode(url))[:12]}-{file[-100:]}"
    part = path.with_name(f"{path.name}.part")
    if path.exists():
        return path
    problem = "not tried yet"
    while problem:
        before = size_of(part)
        try:
            _, problem = transfer.append(url, part, {}, 0)
        except Mismatch as error:
            part.unlink()
            raise OutsideError(f"{url}: {error}") from None
        # One that breaks off may bring more the next time, if it brought anything to speak of.
        if problem and size_of(part) - before < LITTLE:
            raise OutsideError(f"{url}: {problem}; download it otherwise, and give the file")
    named = re.search(r"-([0-9a-f]{8,})\.", file)
    if named and not digest("sha256", part.read_bytes()).startswith(named[1]):
        part.unlink()
        raise OutsideError(f"{url}: wrong bytes, for their SHA-256 does not begin with {named[1]}")
    part.replace(path)
    return path


def _search(sources: list[str], file: str, checks: dict, patience: float) -> dict[str, str]:
    """{source: its problem, '' for none}, those that serve first, after `patience` at most.

    All are asked at once, each in a thread that is never waited for: even a look-up of a host's
    name can hang.  Errors: OutsideError when none serves.
    """
    replies = queue.Queue()

    def ask(source):
        try:
            # Longer than the deadline below, which alone says that there was no answer.
            open_url(source + file, checks, 0, patience + GRACE)[0].close()
            replies.put((source, ""))
        except Unavailable as error:
            replies.put((source, str(error)))

    for source in sources:
        threading.Thread(target=ask, args=[source], daemon=True).start()
    deadline = time.monotonic() + patience
    problems = dict.fromkeys(sources, "no answer")
    with contextlib.suppress(queue.Empty):
        for _ in sources:
            source, problem = replies.get(timeout=max(0, deadline - time.monotonic()))
            problems[source] = problem
            if not problem:
                deadline = min(deadline, time.monotonic() + GRACE)
    if all(problems.values()):
        raise _exhausted(file, problems)
    for source, problem in problems.items():
        if problem:
            _report(file, source, problem)
    return dict(sorted(problems.items(), key=lambda item: bool(item[1])))


def _fetch(file: str, checks: dict, problems: dict[str, str], folder: Path) -> bytes:
    """The content of one archive, from the first source that sends all of it unaltered.

    One that is slow, stalls or breaks off is abandoned for the next, which resumes there.  The
    next rounds, two in all and more while they bring something to speak of, begin with the source
    that was fastest and are more patient.  Errors: OutsideError when they bring nothing.
    """
    speeds = dict.fromkeys(problems, 0.0)  # bytes/s
    furthest = 0
    for turn in itertools.count():
        before = furthest
        sources = sorted(speeds, key=speeds.get, reverse=True)  # stable: first in their own order
        while sources:
            source = sources.pop(0)
            part = folder / f"{file}.part"
            if "unpacked_sha256" in checks:  # parts from different sources would not fit together
                part = folder / f"{file}.{digest('sha256', source.encode())[:8]}.part"
            start = size_of(part)
            if turn and speeds[source]:
                minutes = (limit(checks) - start) / speeds[source] / 60
                _report(file, source, f"about {minutes:.0f} min at {speeds[source] / 1e3:.0f} kB/s")
            try:
                floor = 0 if turn else FLOOR
                speeds[source], problem = transfer.append(source + file, part, checks, floor)
                if not problem:
                    content = unwrap(part.read_bytes(), checks)
                    part.replace(folder / file)
                    return content
            except Mismatch as error:
                problem = f"wrong bytes: {error}"
                part.unlink()
                if start:  # the wrong bytes may be another's: once more, from the first byte on
                    sources.insert(0, source)
                else:
                    del speeds[source]
            problems[source] = problem
            _report(file, source, problem)
            furthest = max(furthest, size_of(part))
        if not speeds or (turn and furthest - before < LITTLE):
            raise _exhausted(file, problems)


def _exhausted(file: str, problems: dict[str, str]) -> OutsideError:
    each = "; ".join(f"{urlsplit(source).netloc}: {why}" for source, why in problems.items())
    remedy = "scripts/download.py also takes another URL, a file or a folder"
    return OutsideError(f"no source serves {file} ({each}); {remedy}")


def _report(file: str, source: str, text: str) -> None:
    print(f"{file}: {urlsplit(source).netloc}: {text}", file=sys.stderr, flush=True)
