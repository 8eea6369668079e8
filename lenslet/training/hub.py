"""Weights files of the Hugging Face hub: from its own cache, or downloaded if the hub answers.

`cached()` and `fetch()` find a file; `silence()` says why it is of no use to ask the hub.  Its own
settings count, as its library reads them: HF_ENDPOINT, HF_HOME, HF_HUB_OFFLINE and the rest.
"""

import contextlib
import json
import queue
import re
import threading
import time
from pathlib import Path

from lenslet import files
from lenslet.errors import OutsideError, UserError, one_line

PATIENCE = 15.0  # seconds that the hub has to say which weights it holds
REMEMBERED = 24 * 3600  # seconds that a failure of the hub counts
NAMES = ("model.safetensors", "pytorch_model.bin")  # the first that a repository has is used


def cached(repository: str) -> Path | None:
    """A repository's weights file in the hub's own cache; None if it is not there."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.utils import EntryNotFoundError

    for name in NAMES:
        with contextlib.suppress(EntryNotFoundError):
            return Path(hf_hub_download(repository, name, local_files_only=True))
    return None


def address(repository: str = "") -> str:
    """The URL of the hub, or of a repository's page there."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repository}".rstrip("/")


def silence() -> str:
    """Why the hub is not to be asked: it is switched off, or failed within a day; '' to ask it."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "the hub is not asked, because HF_HUB_OFFLINE is set"
    file = files.DATA / "hub.json"
    try:
        memory = json.loads(file.read_bytes())
        age = time.time() - memory["time"]  # below 0: the clock went back
        if memory["endpoint"] == address() and 0 <= age < REMEMBERED:
            when = time.strftime("%H:%M", time.localtime(memory["time"]))
            retry = f"delete {files.shown(file)}, or ask for timm's weights by name"
            return f"{one_line(memory['why'])} (tried at {when}; to try again at once, {retry})"
    except Exception:  # no such file, or damage, which takes many forms
        pass
    return ""


def _remember(why: str) -> None:
    """Note for silence() that the hub failed; '': that it answers."""
    file = files.DATA / "hub.json"
    with contextlib.suppress(OSError):  # nothing depends on it, and the folder may be read-only
        if not why:
            file.unlink()
        else:
            memory = {"endpoint": address(), "time": time.time(), "why": why}
            file.parent.mkdir(parents=True, exist_ok=True)
            files.atomic_write(file, json.dumps(memory))


def fetch(repository: str, check) -> Path:
    """A repository's weights file, downloaded into the hub's own cache if it is not there yet.

    A hub that fails is remembered for silence(), which is not consulted here.  check: is called
    with the path of a new file, which is deleted if that raises a UserError.

    Errors: OutsideError.
    """
    from huggingface_hub import constants, file_exists, hf_hub_download

    if path := cached(repository):
        return path
    # The hub's faster protocol still waited after ten minutes for a server that did not answer, as
    # behind a firewall; plain https gives up a stalled transfer after about one.
    constants.HF_HUB_DISABLE_XET = True
    # hf_hub_download() tries a host that does not answer for 13 minutes, and resolving its name
    # can hang: so the host is asked once first, in a thread that nobody has to wait for.
    replies = queue.Queue()

    def ask():
        try:
            replies.put(NAMES[0 if file_exists(repository, NAMES[0]) else 1])
        except Exception as error:  # requests' or httpx's, by the hub's version
            replies.put(error)

    threading.Thread(target=ask, daemon=True).start()
    failed = not constants.HF_HUB_OFFLINE  # where nobody is asked
    try:
        reply = replies.get(timeout=PATIENCE)
        if isinstance(reply, Exception):
            raise reply
        failed = False
        _remember("")
        path = Path(hf_hub_download(repository, reply))
        check(path)
        return path
    except queue.Empty:
        why = f"no answer in {PATIENCE:g} s"
    except UserError as error:
        for file in {path.resolve(), path}:  # the cache links a name to the content
            file.unlink(missing_ok=True)
        why = str(error).partition(";")[0]
    except Exception as error:
        cause = error.__cause__ or error
        why = one_line(cause)
        # Its files may be on another host, which a firewall swallows.
        failed = failed or bool(re.search("Timeout|Connect", type(cause).__name__))
    if failed:
        _remember(f"{address()}: {why}")
    raise OutsideError(f"{address(repository)}: {why}; give a file or another URL instead")
