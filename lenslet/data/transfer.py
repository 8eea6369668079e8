"""One file over the network: appended to what there is of it, by a server that may do anything.

`append()` does it, `open_url()` only begins.  Both end, whatever a server sends once it is
connected.
"""

import contextlib
import http.client
import re
import shutil
import socket
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import urlsplit

from tqdm import tqdm

from lenslet.errors import UserError, one_line

LEAST = 1_000  # bytes/s: a slower source is abandoned in any case, as its end may never come
WINDOW = 10.0  # s over which that speed is measured
STALL = 10.0  # s without a byte, or until a response begins
UNSTATED = 1_000_000_000  # bytes of a file whose server does not say how many it has
BAR = {"unit": "B", "unit_scale": True, "leave": False, "disable": None}  # None: terminals only


class Mismatch(UserError):
    """Bytes that are not the ones expected; says what was found and what was expected."""


class Unavailable(Exception):
    """Why a source does not serve a file, in a few words."""


def append(url: str, part: Path, checks: dict, floor: float) -> tuple[float, str]:
    """Append to part what it lacks; bytes/s, and the problem that ended it ('': part is complete).

    Errors: Mismatch when more comes than the archive can have; OSError naming part.
    """
    start = have = size_of(part)
    if have == checks.get("size"):
        return 0.0, ""
    problem, began = "", time.monotonic()
    try:
        response, have, size = open_url(url, checks, have, STALL)
        start = have
        bar = tqdm(initial=have, total=size, desc=url.rpartition("/")[2], **BAR)
        with response, bar, open(part, "ab" if have else "wb") as out:
            room = shutil.disk_usage(part.parent).free
            if size and size - have > room:
                raise Unavailable(f"has {size} bytes, and there is room for {have + room}")
            for chunk in _receive(response, max(floor, LEAST)):
                out.write(chunk)
                bar.update(len(chunk))
                have += len(chunk)
                if have > limit(checks):
                    raise Mismatch(f"more than {limit(checks)} bytes")
                if not size and have > UNSTATED:
                    raise Mismatch(f"more than {UNSTATED} bytes, and no word of how many")
                if have == size:
                    break
        if size and have < size:
            problem = f"cut off at {have} of {size} bytes"
        elif not have:
            problem = "an empty answer"
    except Unavailable as error:
        problem = str(error)
    except OSError as error:  # only the disk's: the network's have become Unavailable
        error.filename = error.filename or str(part)
        raise
    return (have - start) / (time.monotonic() - began), problem


def _receive(response, floor: float):
    """The body in pieces.  Errors: Unavailable when it stalls, or a WINDOW is slower than floor."""
    since, recent = time.monotonic(), 0
    try:
        while chunk := response.read1(1 << 16):  # what has arrived: read() would wait for all of it
            yield chunk
            recent += len(chunk)
            elapsed = time.monotonic() - since
            if elapsed >= WINDOW:
                if recent < floor * elapsed:
                    raise Unavailable(f"slower than {floor / 1e3:g} kB/s")
                since, recent = time.monotonic(), 0
    except (OSError, http.client.HTTPException) as error:
        raise Unavailable(_reason(error)) from None


class NeverDowngrade(urllib.request.HTTPRedirectHandler):
    """Follows a redirection, but not from https to http."""

    def redirect_request(self, request, response, code, message, headers, url):
        if request.type == "https" and urlsplit(url).scheme != "https":
            raise urllib.error.URLError("redirects to an unencrypted address")
        return super().redirect_request(request, response, code, message, headers, url)


class Watched:
    """An opener whose sockets can be closed from outside: a server that sends a byte of its headers
    now and then would keep it waiting for ever.
    """

    def __init__(self):
        opener, self.sockets, self.closed = self, [], False

        def watched(kind):
            def connect(self):
                kind.connect(self)
                opener.sockets.append(self.sock)
                if opener.closed:  # the connection took longer than the deadline
                    raise TimeoutError

            return type(kind.__name__, (kind,), {"connect": connect})

        class Http(urllib.request.HTTPHandler):
            def http_open(self, request):
                return self.do_open(watched(http.client.HTTPConnection), request)

        class Https(urllib.request.HTTPSHandler):
            def https_open(self, request):
                kind = watched(http.client.HTTPSConnection)
                return self.do_open(kind, request, context=self._context)

        self.open = urllib.request.build_opener(NeverDowngrade, Http, Https).open

    def close(self) -> None:
        self.closed = True  # before anyone can see the sockets end
        for each in self.sockets:
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


def open_url(url: str, checks: dict, have: int, timeout: float):
    """A response, the byte of the file that its body begins with (have or 0), the file's size.

    The size is None where the server does not say.  Errors: Unavailable.
    """
    headers = {"User-Agent": "lenslet"} | ({"Range": f"bytes={have}-"} if have else {})
    opener = Watched()
    deadline = threading.Timer(timeout, opener.close)
    deadline.daemon = True
    try:
        deadline.start()
        response = opener.open(urllib.request.Request(url, headers=headers), timeout=timeout)
        if opener.closed:  # headers that were cut off there look as if they were whole
            response.close()
            raise TimeoutError
    except urllib.error.HTTPError as error:
        error.close()
        if have and error.code == 416:  # the part is no beginning of this file
            return open_url(url, checks, 0, timeout)
        raise Unavailable(f"answers {error.code} {error.reason}") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unavailable("no byte in time" if opener.closed else _reason(error)) from None
    finally:
        deadline.cancel()
    if response.status == 206:
        first, _, size = response.headers.get("Content-Range", "").rpartition("/")
        if have and not first.startswith(f"bytes {have}-"):
            response.close()
            return open_url(url, checks, 0, timeout)
    else:  # the whole file, whatever was asked for
        have, size = 0, response.headers.get("Content-Length", "")
    size = int(size) if re.fullmatch("[0-9]{1,18}", size) else checks.get("size")
    if size != checks.get("size", size):
        response.close()
        raise Unavailable(f"has {size} bytes instead of {checks['size']}")
    return response, have, size


def _reason(error: Exception) -> str:
    reason = getattr(error, "reason", error)  # urllib wraps what the socket said
    if isinstance(reason, TimeoutError):
        return "no byte in time"
    return one_line(getattr(reason, "strerror", None) or reason)


def limit(checks: dict) -> int:
    """Bytes that an archive can have at most; gzip adds far less than a megabyte."""
    return checks.get("size") or checks.get("unpacked_size", float("inf")) + 1_000_000


def size_of(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
