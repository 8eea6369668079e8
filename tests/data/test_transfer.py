"""Whatever a server sends, a transfer ends: with the file, or in one line and without it."""

import contextlib
import itertools
import os
import shutil
import socket
import threading
from types import SimpleNamespace

import pytest

from lenslet.data import transfer
from lenslet.data.download import download_file
from lenslet.errors import OutsideError

BODY = bytes(range(256)) * 20
OK, END = b"HTTP/1.1 200 OK\r\n", b"\r\n"


def endless(data, pause=0.0):
    """The same bytes for ever, or until the other side hangs up."""
    stop = threading.Event()

    def send(connection):
        while not stop.wait(pause):
            connection.sendall(data)

    return send


class Server:
    """Answers every request on a port of its own with parts: bytes, or what sends for itself."""

    def __init__(self, *parts):
        self.parts = parts
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}/net.pth"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self):
        with contextlib.suppress(OSError):  # closed at the end
            while True:
                connection, _ = self.socket.accept()
                threading.Thread(target=self._answer, args=[connection], daemon=True).start()

    def _answer(self, connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 16)
            for part in self.parts:
                part(connection) if callable(part) else connection.sendall(part)


@pytest.fixture
def serve(monkeypatch):
    """serve(*parts): the URL of a server of these; limits that fit tiny files."""
    monkeypatch.setattr(transfer, "STALL", 0.3)
    monkeypatch.setattr(transfer, "WINDOW", 0.3)
    monkeypatch.setattr(transfer, "UNSTATED", 1_000_000)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    servers = []

    def start(*parts):
        servers.append(Server(*parts))
        return servers[-1].url

    yield start
    for server in servers:
        server.socket.close()


def fetched(url, folder):
    """The bytes that a URL gave, or the error, which is one line and leaves no file behind."""
    try:
        return download_file(url, folder).read_bytes()
    except OutsideError as error:
        said = str(error)
    assert "\n" not in said and len(said) < 400
    assert not [file for file in folder.iterdir() if file.suffix != ".part"]
    return said


@pytest.mark.parametrize(
    ("parts", "said"),
    [
        ([OK, endless(b"X-Wait: 1\r\n", 0.05)], "no byte in time"),
        ([OK, endless(b"x", 0.05)], "no byte in time"),
        ([endless(b"HTTP/1.1 100 Continue\r\n\r\n", 0.001)], "no byte in time"),
        ([OK, END, endless(bytes(1 << 16))], "more than 1000000 bytes"),
        ([OK, b"Content-Length: 9000\r\n", END, endless(b"x", 0.05)], "slower than 1 kB/s"),
        ([OK, b"Content-Length: 99999999999999999\r\n", END, BODY], "there is room for"),
        ([OK, b"X-Wait"], "an empty answer"),
        ([OK, b"Content-Length: 6000\r\n", END, BODY], "cut off at 5120 of 6000 bytes"),
    ],
)
def test_endless(serve, tmp_path, parts, said):
    """Headers that drip, interim answers without end, a body without end or bottom: all end."""
    assert said in str(fetched(serve(*parts), tmp_path))


@pytest.mark.parametrize("length", [b"\xb2", b"1" * 5000, b"-1", b"", b"1e3", b"0x10"])
def test_lengths_that_are_none(serve, tmp_path, length):
    """A Content-Length that is no number is as good as none: the body is all that comes."""
    url = serve(OK, b"Connection: close\r\nContent-Length: ", length, b"\r\n", END, BODY)
    assert fetched(url, tmp_path) == BODY


def test_an_odd_url(tmp_path):
    """A URL with bytes that are no text is one line."""
    assert "http://a/\udcff" in fetched("http://a/\udcff", tmp_path)


def test_a_full_disk_is_seen_before(serve, tmp_path, monkeypatch):
    """What has no room is not begun."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=100))
    url = serve(OK, b"Content-Length: 5120\r\n", END, BODY)
    assert "has 5120 bytes, and there is room for 100" in fetched(url, tmp_path)


STATUSES = [
    OK,
    b"HTTP/1.1 206 Partial\r\n",
    b"HTTP/9.9 x y\r\n",
    b"\x00\xff\r\n",
    b"",
    b"HTTP/1.1 \r\n",
]
STATUSES += [b"HTTP/1.1 302 \x1b[2J\r\nLocation: file:///etc/passwd\r\n", b"HTTP/1.1 500 \x07\r\n"]
HEADERS = [
    b"",
    b"Content-Length: 5120\r\n",
    b"Content-Range: bytes x/y\r\n",
    b"Transfer-Encoding: chunked\r\n",
    b"X: " + b"y" * 70_000 + b"\r\n",
    b"".join(b"X-%d: y\r\n" % i for i in range(200)),
]
BODIES = [BODY, b"", b"ffffffffffffffff\r\nx"]


@pytest.mark.slow
def test_hostile_servers(serve, tmp_path):
    """Over a hundred combinations of odd answers: a whole body, or one line; never a traceback."""
    answers = list(itertools.product(STATUSES, HEADERS, BODIES))
    assert len(answers) > 100
    for number, (status, header, body) in enumerate(answers):
        folder = tmp_path / str(number)
        os.mkdir(folder)
        got = fetched(serve(status, header, END, body), folder)
        assert isinstance(got, str) or got == body, (status, header[:40], got)
