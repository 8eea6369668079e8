"""The named sets: fetched from good and bad servers, checked, converted, exported."""

import contextlib
import errno
import gzip
import hashlib
import http.server
import io
import json
import multiprocessing
import pickle
import re
import socket
import struct
import tarfile
import threading
import time
import urllib.error
import urllib.request

import download
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from sklearn.datasets import load_digits

import lenslet.files
from lenslet import errors
from lenslet.data import download as fetch
from lenslet.data import load as loading
from lenslet.data import sets, transfer
from lenslet.errors import OutsideError, UserError

COUNTS = {"train": 60, "test": 20}


class Evil:
    """Writes a file when it is unpickled by an ordinary unpickler."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return open, (self.path, "w")


class Python2Pickler(pickle._Pickler):
    """Writes bytes as Python 2 wrote its strings, which is what the original batches hold."""

    dispatch = dict(pickle._Pickler.dispatch)  # noqa: RUF012

    def save_string(self, value):
        self.write(pickle.BINSTRING + struct.pack("<i", len(value)) + value)

    dispatch[bytes] = save_string


def pickle_batch(images, labels, **others):
    stream = io.BytesIO()
    batch = {b"data": images.reshape(-1, 3072), b"labels": labels.tolist()}
    batch |= {name.encode(): value.tolist() for name, value in others.items()}
    Python2Pickler(stream, protocol=2).dump(batch)
    return stream.getvalue().replace(b"numpy._core", b"numpy.core")  # as numpy 1 spelt it


def make_batch(split, shape):
    """Images and labels that are the same every time; every class occurs."""
    random = np.random.default_rng(len(split))
    images = random.integers(0, 256, (COUNTS[split], *shape), np.uint8)
    return images, np.arange(COUNTS[split]) % 10


def make_tar(members):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, content in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return stream.getvalue()


def make_cifar(extra=None):
    members = {}
    for split in COUNTS:
        members[f"tiny/{split}"] = pickle_batch(*make_batch(split, (3, 32, 32)))
    return make_tar(members | (extra or {}))


def cifar_spec(archive, bases):
    checks = {"size": len(archive), "sha256": hashlib.sha256(archive).hexdigest()}
    return {
        "kind": "cifar",
        "sources": bases,
        "archives": {"tiny.tar.gz": checks},
        "members": {"train": ["tiny/train"], "test": ["tiny/test"]},
        "labels": "labels",
        "classes": [*"abcdefghi", "T-shirt/top"],
    }


def idx_files():
    """{name: content} of the four files of MNIST, tiny."""
    files = {}
    for split, prefix in (("train", "train"), ("test", "t10k")):
        images, labels = make_batch(split, (28, 28))
        files[f"{prefix}-images-idx3-ubyte"] = (
            struct.pack(">4B3i", 0, 0, 8, 3, *images.shape) + images.tobytes()
        )
        files[f"{prefix}-labels-idx1-ubyte"] = (
            struct.pack(">4Bi", 0, 0, 8, 1, len(labels)) + labels.astype(np.uint8).tobytes()
        )
    return files


def idx_spec(files, bases):
    archives = {
        f"{name}.gz": {
            "unpacked_size": len(content),
            "unpacked_sha256": hashlib.sha256(content).hexdigest(),
        }
        for name, content in files.items()
    }
    return {"kind": "idx", "sources": bases, "archives": archives, "classes": [*"0123456789"]}


class Server(http.server.ThreadingHTTPServer):
    """Serves files by name; `how` says in which bad way."""

    daemon_threads = True

    def __init__(self, files, how="well"):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.how = files, how
        self.ranges = []  # the Range header of every request that was answered
        self.closing = threading.Event()
        threading.Thread(target=self.serve_forever, args=[0.01], daemon=True).start()

    @property
    def base(self):
        return f"http://127.0.0.1:{self.server_port}/"

    def close(self):
        self.closing.set()
        self.shutdown()
        self.server_close()


class Handler(http.server.BaseHTTPRequestHandler):
    def log_message(self, *args):
        pass

    def do_GET(self):
        how, body = self.server.how, self.server.files[self.path[1:]]
        span = self.headers["Range"]
        self.server.ranges.append(span)
        if isinstance(how, int):
            return self.send_error(how)
        if how == "wrong":
            body = bytes(len(body))
        size, start = len(body), 0
        if span and how == "refuses range":
            return self.send_error(416)
        if span and how == "other range":
            self.send_response(206)
            self.send_header("Content-Range", f"bytes 1-{size - 1}/{size}")
        elif span and how != "ignores range":
            start = int(span.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(size - start))
        self.end_headers()
        with contextlib.suppress(ConnectionError):  # the client hangs up, as it should
            self.send_body(how, body[start:])

    def send_body(self, how, body):
        if how in ("cut", "stall"):
            self.wfile.write(body[: len(body) // 2])
            if how == "stall":
                self.server.closing.wait(120)
        elif how in ("drip", "drip faster"):
            pace = 2000 if how == "drip" else 6000  # bytes in a twentieth of a second
            for at in range(0, len(body), pace):
                self.wfile.write(body[at : at + pace])
                time.sleep(0.05)
        else:
            self.wfile.write(body)


@pytest.fixture(autouse=True)
def patient(monkeypatch, tmp_path):
    """A data folder of one's own, and patience with a busy machine."""
    monkeypatch.setattr(lenslet.files, "DATA", tmp_path / "data")
    monkeypatch.setattr(fetch, "GRACE", 60)
    monkeypatch.setattr(fetch, "LITTLE", 300)
    for name in ("STALL", "WINDOW"):
        monkeypatch.setattr(transfer, name, 60)
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def hurried(monkeypatch):
    """Limits that fit tiny archives."""
    monkeypatch.setattr(transfer, "WINDOW", 0.3)
    monkeypatch.setattr(fetch, "FLOOR", 1_000_000)


@pytest.fixture
def serve(monkeypatch):
    """serve("cut", 404): servers of the tiny CIFAR archive, which become the set's sources."""
    servers = []

    def start(*hows):
        archive = make_cifar()
        servers.extend(Server({"tiny.tar.gz": archive}, how) for how in hows)
        spec = cifar_spec(archive, [server.base for server in servers])
        monkeypatch.setitem(sets.SETS, "tiny", spec)
        return servers

    yield start
    for server in servers:
        server.close()


def read(folder, split):
    with safe_open(folder / f"{split}.safetensors", "pt") as file:
        return file.get_tensor("images"), file.get_tensor("labels"), file.metadata()


def check(folder, shape=(3, 32, 32)):
    """The folder holds exactly the images that the archive was made from."""
    for split in COUNTS:
        images, labels, _ = read(folder, split)
        expected_images, expected_labels = make_batch(split, shape)
        assert images.dtype == torch.uint8
        assert labels.dtype == torch.int64
        assert np.array_equal(images.reshape(-1, *shape), expected_images)
        assert np.array_equal(labels, expected_labels)
    assert {path.name for path in folder.iterdir()} <= {
        "train.safetensors",
        "test.safetensors",
        ".lock",
    }


def test_good_source(serve, capfd):
    """A set is fetched and converted in silence, with classes and hashes in the header."""
    (server,) = serve("well")
    folder = sets.ensure("tiny")
    check(folder)
    metadata = read(folder, "test")[2]
    assert json.loads(metadata["classes"])[9] == "T-shirt/top"
    digest = hashlib.sha256(server.files["tiny.tar.gz"]).hexdigest()
    assert json.loads(metadata["source_sha256"]) == {"tiny.tar.gz": digest}
    assert capfd.readouterr() == ("", "")


def test_on_disk_needs_no_network(serve, monkeypatch):
    """With both files on disk no socket is opened; with one missing the set is made again."""
    serve("well")
    folder = sets.ensure("tiny")
    with monkeypatch.context() as offline:
        offline.setattr(socket, "socket", None)
        offline.setattr(transfer, "Watched", None)
        assert sets.ensure("tiny") == folder
    (folder / "test.safetensors").unlink()
    check(sets.ensure("tiny"))


def test_cut_off_is_resumed_by_the_next_source(serve):
    """What a broken connection brought is kept: the next source is asked for the rest only."""
    first, second = serve("cut", "well")
    check(sets.ensure("tiny"))
    assert second.ranges[-1] == f"bytes={len(first.files['tiny.tar.gz']) // 2}-"


def test_every_round_goes_further(serve):
    """One source that breaks off every time is asked again as long as it brings something."""
    (server,) = serve("cut")
    with pytest.raises(OutsideError, match="cut off"):
        sets.ensure("tiny")
    positions = [int(span[6:-1]) for span in server.ranges if span]
    assert len(positions) > 8
    assert positions[:8] == sorted(set(positions[:8]))


def test_next_call_resumes(serve):
    """A part that an earlier call left behind is resumed."""
    (server,) = serve("well")
    part = lenslet.files.DATA / "tiny" / "download" / "tiny.tar.gz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(server.files["tiny.tar.gz"][:1000])
    check(sets.ensure("tiny"))
    assert server.ranges[-1] == "bytes=1000-"


@pytest.mark.parametrize("how", ["ignores range", "other range", "refuses range"])
def test_source_without_ranges_starts_over(serve, how, capfd):
    """What is not the range asked for is not appended to the part: the file starts over."""
    serve("cut", how)
    check(sets.ensure("tiny"))
    assert "wrong bytes" not in capfd.readouterr().err


@pytest.mark.parametrize("code", [403, 404])
def test_refusal_moves_on_to_the_next_source(serve, capfd, code):
    """A source that refuses is skipped, which is reported in one line."""
    serve(code, "well")
    check(sets.ensure("tiny"))
    assert capfd.readouterr().err.count(f"answers {code}") == 1


def test_stalled_source_is_abandoned(serve, monkeypatch, capfd):
    """A source that stalls is abandoned for the next, which resumes from there."""
    monkeypatch.setattr(transfer, "STALL", 1)
    _, second = serve("stall", "well")
    check(sets.ensure("tiny"))
    assert second.ranges[-1].startswith("bytes=")
    assert "no byte in time" in capfd.readouterr().err


def test_slow_source_is_abandoned(serve, hurried, capfd):
    """A source below the floor is abandoned for a faster one."""
    _, second = serve("drip", "well")
    check(sets.ensure("tiny"))
    assert second.ranges[-1].startswith("bytes=")
    assert "slower than 1000 kB/s" in capfd.readouterr().err


def test_slow_sources_come_last_and_the_fastest_first(serve, hurried, capfd):
    """When no other source remains the fastest of the slow ones is used, however slow."""
    slow, faster, gone = serve("drip", "drip faster", 404)
    check(sets.ensure("tiny"))
    assert [len(server.ranges) for server in (slow, faster, gone)] == [2, 3, 2]
    assert "about 0 min at" in capfd.readouterr().err


def test_wrong_bytes_are_discarded(serve):
    """Wrong bytes never reach a final name, and the next source is asked from the start."""
    _, second = serve("wrong", "well")
    check(sets.ensure("tiny"))
    assert second.ranges[-1] is None


def test_mixed_parts_start_over(serve):
    """A part begun by a source with other bytes does not spoil the good source after it."""
    _, second = serve("well", "well")
    part = lenslet.files.DATA / "tiny" / "download" / "tiny.tar.gz.part"
    part.parent.mkdir(parents=True)
    part.write_bytes(bytes(1000))
    check(sets.ensure("tiny"))
    assert second.ranges == [None]


def test_all_fail(serve, capfd):
    """With no good source: one line with the problem of each and the remedy, and status 1."""
    servers = serve("wrong", 403, "wrong")
    assert errors.run_main(download.main, ["tiny"]) == 1
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("error: no source serves tiny.tar.gz")
    assert "answers 403" in last
    assert last.count("wrong bytes: sha256") == 2
    assert all(server.base[7:-1] in last for server in servers)
    assert "scripts/download.py also takes another URL, a file or a folder" in last
    assert not list(lenslet.files.DATA.rglob("*.gz")) + list(
        lenslet.files.DATA.rglob("*.safetensors")
    )


def test_search_is_bounded_by_patience(serve, monkeypatch):
    """Hosts that take a connection and never answer cost `patience` seconds in all, not each."""
    with socket.create_server(("127.0.0.1", 0)) as mute:
        base = "http://127.0.0.1:{}/{}/"
        bases = [base.format(mute.getsockname()[1], number) for number in range(200)]
        monkeypatch.setitem(sets.SETS, "tiny", cifar_spec(b"", bases))
        started = time.monotonic()
        with pytest.raises(OutsideError, match="no answer"):
            sets.ensure("tiny", patience=0.5)
        assert time.monotonic() - started < 60


def test_a_mute_source_does_not_hold_up_the_others(serve, monkeypatch):
    """Once a source has answered the others have GRACE seconds, not the whole patience."""
    monkeypatch.setattr(fetch, "GRACE", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as mute:
        serve("well")
        bases = sets.SETS["tiny"]["sources"]
        bases.insert(0, f"http://127.0.0.1:{mute.getsockname()[1]}/")
        started = time.monotonic()
        check(sets.ensure("tiny", patience=100))
        assert time.monotonic() - started < 60


@pytest.fixture
def one_file(tmp_path):
    """(server, URL, folder): 100 kB under a name with torch.hub's hash."""
    body = np.random.default_rng(0).bytes(100_000)
    name = f"net-{hashlib.sha256(body).hexdigest()[:8]}.pth"
    server = Server({name: body})
    yield server, server.base + name, tmp_path
    server.close()


def test_one_file(one_file, monkeypatch):
    """A file is fetched once; the second call asks nobody."""
    server, url, folder = one_file
    path = fetch.download_file(url, folder)
    assert path.read_bytes() in server.files.values() and path.name.endswith("-" + url[-16:])
    monkeypatch.setattr(transfer, "Watched", None)
    assert fetch.download_file(url, folder) == path
    assert list(folder.iterdir()) == [path]


@pytest.mark.parametrize("how", ["cut", "stall"])
def test_one_file_goes_on(one_file, monkeypatch, how):
    """A line that breaks off or falls silent is asked again while it brings something to speak of.

    Until it is whole nothing has the final name, and a later call resumes where this one ended.
    """
    server, url, folder = one_file
    if how == "stall":
        server.files[url.rpartition("/")[2]] = next(iter(server.files.values()))[:2]
        monkeypatch.setattr(transfer, "STALL", 1)
    server.how = how
    with pytest.raises(OutsideError, match=f"{url}: (cut off|no byte)") as caught:
        fetch.download_file(url, folder)
    assert "\n" not in str(caught.value) and caught.value.status == 1
    (part,) = folder.iterdir()
    assert part.suffix == ".part"
    monkeypatch.setattr(transfer, "STALL", 60)
    body = np.random.default_rng(0).bytes(100_000)
    server.files, server.how = {url.rpartition("/")[2]: body}, "well"
    have = part.stat().st_size
    assert fetch.download_file(url, folder).read_bytes() == body
    assert server.ranges[-1] == f"bytes={have}-" and have
    assert len(server.ranges) > 1 + (how == "cut")


@pytest.mark.parametrize(
    ("how", "problem"), [("wrong", "wrong bytes"), (404, "answers 404"), (403, "answers 403")]
)
def test_one_file_that_is_not_there(one_file, how, problem):
    """A refusal, or other bytes than the name's hash says: one line, and nothing is left."""
    server, url, folder = one_file
    server.how = how
    with pytest.raises(OutsideError, match=f"{url}: {problem}"):
        fetch.download_file(url, folder)
    assert list(folder.iterdir()) == []


@pytest.mark.parametrize("url", ["http://[x/y.pth", "https://no-such-host.invalid/y", "http:///é"])
def test_urls_that_are_none(url, tmp_path):
    """What is no URL, or names no host, is one line as well."""
    with pytest.raises(OutsideError, match=re.escape(url)):
        fetch.download_file(url, tmp_path)


def test_no_downgrade_to_http():
    """A redirection from https to http counts as a refusal; the reverse is followed."""
    handler = transfer.NeverDowngrade()
    secure = urllib.request.Request("https://a/x")
    with pytest.raises(urllib.error.URLError, match="unencrypted"):
        handler.redirect_request(secure, None, 302, "Found", {}, "http://a/x")
    plain = urllib.request.Request("http://a/x")
    assert handler.redirect_request(plain, None, 302, "Found", {}, "https://a/x").type == "https"


def test_source_on_disk(serve, tmp_path, monkeypatch):
    """--source takes an archive under any name, or the folder that holds it; no network."""
    (server,) = serve("well")
    monkeypatch.setattr(transfer, "Watched", None)
    named, renamed = tmp_path / "tiny.tar.gz", tmp_path / "renamed"
    for path in (named, renamed):
        path.write_bytes(server.files["tiny.tar.gz"])
    for number, source in enumerate([named, renamed, tmp_path]):
        monkeypatch.setattr(lenslet.files, "DATA", tmp_path / f"data-{number}")
        check(sets.ensure("tiny", str(source)))


def test_source_url(serve, monkeypatch):
    """--source takes the archive's URL or that of its folder, and asks nowhere else."""
    usual, _ = serve("well", "well")
    other = sets.SETS["tiny"]["sources"].pop()
    check(sets.ensure("tiny", other.rstrip("/")))
    monkeypatch.setattr(lenslet.files, "DATA", lenslet.files.DATA / "again")
    check(sets.ensure("tiny", other + "tiny.tar.gz"))
    assert usual.ranges == []


def test_wrong_or_missing_source_on_disk(serve, tmp_path):
    """A wrong archive names both hashes, an absent one its name; nothing is written."""
    serve()
    (tmp_path / "tiny.tar.gz").write_bytes(bytes(len(make_cifar())))
    with pytest.raises(UserError, match=r"sha256 is \w{64}, expected \w{64}"):
        sets.ensure("tiny", str(tmp_path / "tiny.tar.gz"))
    with pytest.raises(UserError, match=r"tiny.tar.gz missing"):
        sets.ensure("tiny", str(tmp_path / "nowhere"))
    assert not list(lenslet.files.DATA.rglob("*.safetensors"))


@pytest.mark.parametrize("suffix", [".gz", ""])
def test_mnist_on_disk(tmp_path, monkeypatch, suffix):
    """The idx files are taken with or without their gzip wrapping."""
    files = idx_files()
    monkeypatch.setitem(sets.SETS, "tiny-mnist", idx_spec(files, []))
    for name, content in files.items():
        (tmp_path / (name + suffix)).write_bytes(gzip.compress(content) if suffix else content)
    check(sets.ensure("tiny-mnist", str(tmp_path)), (28, 28))


def test_mnist_parts_do_not_mix(monkeypatch):
    """A part with one server's gzip wrapping is not continued with bytes from another."""
    files = idx_files()
    small = Server({f"{name}.gz": gzip.compress(file, 1) for name, file in files.items()}, "cut")
    large = Server({f"{name}.gz": gzip.compress(file, 9) for name, file in files.items()})
    bases = [small.base, large.base]
    monkeypatch.setitem(sets.SETS, "tiny-mnist", idx_spec(files, bases))
    check(sets.ensure("tiny-mnist"), (28, 28))
    assert set(large.ranges) == {None}


def test_gzip_bomb():
    """A small file that unpacks to far more than it should is refused, not unpacked."""
    spec = {"unpacked_size": 1000, "unpacked_sha256": "0" * 64}
    with pytest.raises(fetch.Mismatch, match="unpacked_size is 1001, expected 1000"):
        fetch.unwrap(gzip.compress(bytes(10_000_000)), spec)


def test_broken_gzip():
    """A gzip file that is truncated or altered is refused, also where only its size is known."""
    content = bytes(range(250)) * 4
    packed = gzip.compress(content)
    assert fetch.unwrap(packed, {"unpacked_size": 1000}) == content
    for broken in (packed[:-20], packed[:-8] + bytes(8)):  # without its end; with another CRC
        with pytest.raises(fetch.Mismatch, match=r"unpacked_size is|broken gzip"):
            fetch.unwrap(broken, {"unpacked_size": 1000})


def test_malicious_pickle_is_refused(tmp_path, monkeypatch):
    """A batch that names anything but arrays is refused in one line, and nothing of it runs."""
    archive = make_cifar({"tiny/test": pickle.dumps(Evil(tmp_path / "ran"), protocol=4)})
    monkeypatch.setitem(sets.SETS, "tiny", cifar_spec(archive, []))
    (tmp_path / "tiny.tar.gz").write_bytes(archive)
    with pytest.raises(UserError, match=r"asks for \w+\.open: refused"):
        sets.ensure("tiny", str(tmp_path))
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("module", [b"numpy.core", b"numpy._core"])
def test_pickles_of_numpy_1_and_2(module):
    """A batch is read whichever numpy wrote it, and whichever reads it."""
    images, labels = make_batch("test", (3, 32, 32))
    pickled = pickle_batch(images, labels).replace(b"numpy.core", module)
    batch = sets._ArraysOnly(io.BytesIO(pickled), encoding="latin1").load()
    assert np.array_equal(batch["data"], images.reshape(-1, 3072))


def test_path_traversal(tmp_path, monkeypatch):
    """Nothing of an archive is written where its own names say."""
    archive = make_cifar({"../../../outside": b"x", str(tmp_path / "absolute"): b"x"})
    monkeypatch.setitem(sets.SETS, "tiny", cifar_spec(archive, []))
    (tmp_path / "tiny.tar.gz").write_bytes(archive)
    check(sets.ensure("tiny", str(tmp_path)))
    assert {path.name for path in tmp_path.iterdir()} == {"data", "tiny.tar.gz"}


def test_two_at_once(serve):
    """Two processes at once fetch once and both end with the whole set."""
    (server,) = serve("well")
    fork = multiprocessing.get_context("fork")
    processes = [fork.Process(target=sets.ensure, args=["tiny"]) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0, 0]
    check(lenslet.files.DATA / "tiny")
    assert len(server.ranges) == 2  # the search and the transfer


@pytest.mark.parametrize("full", ["train", "test"])
def test_disk_full(serve, monkeypatch, capfd, full):
    """A full disk is one line and status 1; the next call mends what is missing."""
    serve("well")
    write = lenslet.files.atomic_write

    def fail(path, data):
        if path.stem == full:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        write(path, data)

    with monkeypatch.context() as small_disk:
        small_disk.setattr(sets, "atomic_write", fail)
        assert errors.run_main(download.main, ["tiny"]) == 1
    path = lenslet.files.DATA / "tiny" / f"{full}.safetensors"
    assert capfd.readouterr().err == f"error: {path}: No space left on device\n"
    assert not path.exists()
    monkeypatch.setattr(transfer, "Watched", None)
    check(sets.ensure("tiny"))  # from the archive that was kept


def test_disk_full_while_downloading(serve, monkeypatch, capfd):
    """A full disk is not taken for a bad source: the command ends and names the part."""
    serve("well", "well")
    real_open = open

    class Full(io.RawIOBase):
        def writable(self):
            return True

        def write(self, data):
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(
        transfer,
        "open",
        lambda path, mode: Full() if "b" in mode else real_open(path, mode),
        raising=False,
    )
    assert errors.run_main(download.main, ["tiny"]) == 1
    assert capfd.readouterr().err.endswith("tiny.tar.gz.part: No space left on device\n")


def test_unknown_name(capsys):
    """A misspelt name suggests the nearest, lists the sets, and is status 2."""
    assert errors.run_main(download.main, ["cifar1O"]) == 2
    message = capsys.readouterr().err
    assert "did you mean cifar10" in message
    assert all(name in message for name in sets.SETS)
    with pytest.raises(UserError, match=r"^no such data set .*, or give a folder of images$"):
        sets.is_set("cifar1O")


def test_cifar100_has_its_hundred_classes():
    """CIFAR-100's batches hold 20 coarse classes too: the labels are the fine ones', by name."""
    spec, fine = sets.SETS["cifar100"], np.arange(100) * 37 % 100
    images = np.zeros((100, 3, 32, 32), np.uint8)
    batch = pickle_batch(images, fine // 50, coarse_labels=fine // 5, fine_labels=fine)
    archive = make_tar({member: batch for [member] in spec["members"].values()})
    for _, labels in sets.CONVERT["cifar"](spec, {"archive": archive}).values():
        assert np.array_equal(labels, fine)
    classes = spec["classes"]  # in alphabetical order, as in the archive's own list
    assert len(set(classes)) == 100 and classes == sorted(classes)
    assert (classes[0], classes[53], classes[99]) == ("apple", "orange", "worm")


def test_digits(capsys):
    """digits needs no network: grey 0..16 becomes 0..255, a fifth of each class is the test."""
    assert errors.run_main(download.main, ["digits"]) == 0
    folder = lenslet.files.DATA / "digits"
    parts = [read(folder, split)[:2] for split in COUNTS]
    images, labels = torch.cat([part[0] for part in parts]), torch.cat([part[1] for part in parts])
    grey, target = load_digits(return_X_y=True)
    expected = np.column_stack([np.rint(grey / 16 * 255), target]).astype(int).tolist()
    assert sorted(np.column_stack([images.flatten(1), labels]).tolist()) == sorted(expected)
    share = parts[1][1].bincount() / labels.bincount()
    assert torch.allclose(share, torch.tensor(0.2), atol=0.005)
    assert "1437 train, 360 test images of 1×8×8, 10 classes; next: make train " in (
        capsys.readouterr().out
    )


@pytest.mark.parametrize("name", ["tiny", "tiny-mnist"])
def test_export(serve, tmp_path, monkeypatch, name, capsys):
    """Exported PNG files hold the same images, in folders named after their classes."""
    (server,) = serve("well")
    files = idx_files()
    monkeypatch.setitem(sets.SETS, "tiny-mnist", idx_spec(files, [server.base]))
    server.files |= {f"{file}.gz": gzip.compress(content) for file, content in files.items()}
    monkeypatch.setitem(loading.RECIPES, name, "digits")
    target = tmp_path / "exported"
    assert errors.run_main(download.main, [name, "--export", str(target)]) == 0
    images, labels, metadata = read(lenslet.files.DATA / name, "test")
    classes = json.loads(metadata["classes"])
    for path in target.glob("test/*/*.png"):
        index = int(path.stem)
        assert path.parent.name == classes[labels[index]].replace("/", "-")
        with Image.open(path) as image:
            assert image.mode == ("L" if name == "tiny-mnist" else "RGB")
            pixels = np.asarray(image).reshape(*images.shape[2:], -1)
        assert np.array_equal(pixels.transpose(2, 0, 1), images[index])
    assert len(list(target.glob("test/*/*.png"))) == COUNTS["test"]
    # Trained on as a folder, it is validated on what the set would be.
    kept = loading.load(name, ["val"], val=0.1).splits["val"].names
    assert {int(path.stem) for path in target.glob("val/*/*.png")} == set(map(int, kept))
    rest = {int(path.stem) for path in target.glob("train/*/*.png")}
    assert rest == set(range(COUNTS["train"])) - set(map(int, kept))
    assert f"next: make train DATA={target}" in capsys.readouterr().out
    assert {path.name for path in tmp_path.iterdir()} == {"data", "exported"}


def test_export_refuses_a_filled_folder(tmp_path, capsys):
    """A folder with something in it is not exported into, and nothing is fetched first."""
    (tmp_path / "kept.txt").touch()
    assert errors.run_main(download.main, ["digits", "--export", str(tmp_path)]) == 2
    assert "not an empty folder" in capsys.readouterr().err
    assert not lenslet.files.DATA.exists()


def test_source_goes_with_one_set(capsys):
    """One source cannot serve two sets."""
    assert errors.run_main(download.main, ["mnist", "digits", "--source", "x"]) == 2
    assert "one data set" in capsys.readouterr().err
