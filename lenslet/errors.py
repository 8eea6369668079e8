"""How every command fails: one line on standard error with the remedy, and an exit status.

A command is `main(argv=None)`; `run_main(main)` turns what it raises into one line and a
status: 2 for what the user can mend, 1 for causes outside.
"""

import contextlib
import difflib
import os
import signal
import sys

# Shown instead of obeyed on a terminal: tabs, ends of lines and progress bars' returns stay.
CONTROLS = {c: f"\\x{c:02x}" for c in (*range(32), *range(127, 160)) if chr(c) not in "\t\n\r"}


class UserError(Exception):
    """Something the user did, in one line with the remedy; exit status 2."""

    status = 2


class OutsideError(UserError):
    """Something that failed outside (disk, network, a peer), in one line; exit status 1."""

    status = 1


@contextlib.contextmanager
def error_context(what: str):
    """Put what the caller knows, an option or a file, in front of a UserError from below."""
    try:
        yield
    except UserError as error:
        raise type(error)(f"{what}: {error}") from error


def run_main(main, argv=None) -> int:
    """Call main(argv) and return the exit status; the known failures become one line each.

    main may return an exit status of its own.
    """
    if argv is None:  # a command, and not a caller in Python
        sys.stdout, sys.stderr = map(_shown, (sys.stdout, sys.stderr))
        # A shell has background jobs ignore it, and that stays.
        if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            with contextlib.suppress(ValueError):  # not the main thread
                signal.signal(signal.SIGINT, _interrupt)
    for stream in (sys.stdout, sys.stderr):  # file names need not be UTF-8
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="surrogateescape", line_buffering=True)
    try:
        status = main(argv) or 0
        sys.stdout.flush()  # here, where a full disk or a closed pipe can still be reported
        return status
    except UserError as error:
        # Every process of a run meets a user's mistake alike: the first one says it.
        if error.status != 2 or os.environ.get("RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr)
        return error.status
    except BrokenPipeError:  # `predict.py … | head`: the reader has seen enough
        _drop_output()
        return 1
    except OSError as error:
        _drop_output()
        where = f"{error.filename}: " if error.filename else ""
        print(f"error: {where}{error.strerror or error}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        short = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
        if not short and "can't allocate memory" not in str(error):  # torch's words on a CPU
            raise
        print("error: out of memory: try a smaller batch or image size", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


class _Terminal:
    """A terminal to which control characters, of a file's name or from a server, are shown as text:
    obeyed, they could hide what is printed, or worse.
    """

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        return self._stream.write(text.translate(CONTROLS))


def _shown(stream):
    return _Terminal(stream) if stream.isatty() else stream


def _interrupt(number, frame) -> None:
    """Ctrl-C: at once while modules are imported, which may not survive an exception."""
    while frame:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            os._exit(130)
        frame = frame.f_back
    raise KeyboardInterrupt


def _drop_output() -> None:
    """Let Python's own flush at exit succeed, whatever standard output is."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        return
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def counted(count: int, one: str, many: str = "") -> str:
    """How many there are of something: "1 image", "1,234 images"; many: an irregular plural."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def one_line(error, most: int = 200) -> str:
    """What an error says, in one line of so many characters at most; its type if that is empty."""
    return " ".join(str(error).split())[:most] or type(error).__name__


def nearest(word: str, known) -> str:
    """' (did you mean x?)' for a misspelt word, or '' where nothing is near."""
    known = list(known)
    begun = [other for other in known if other.startswith(word)]
    close = begun if len(begun) == 1 else difflib.get_close_matches(word, known, n=1, cutoff=0.55)
    return f" (did you mean {close[0]}?)" if close else ""
