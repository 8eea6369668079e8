"""Weights that a training begins with, and the parts of a network that are held fixed.

    python scripts/train.py --pretrained timm               timm's own weights of the network
    python scripts/train.py --pretrained weights.pth        a file, or the URL of one
    python scripts/train.py --pretrained timm --freeze-epochs 2 --freeze conv1 bn1

`read_weights()` finds the tensors, `fit()` loads what fits, and a `Freezer` holds parameters fixed.
No code that a file brings is ever run.
"""

import argparse
import collections
import contextlib
import queue
import re
import threading
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

from lenslet import files
from lenslet.data import download as fetch
from lenslet.errors import OutsideError, UserError, nearest
from lenslet.files import lock
from lenslet.training.net import is_below
from lenslet.weights import FORMAT, read_weights_file

PATIENCE = 15.0  # s that the hub has to say which weights it holds
HUB_FILES = ("model.safetensors", "pytorch_model.bin")  # of a repository: the first that is there


def read_weights(source: str, model: str) -> tuple[dict[str, Tensor], dict]:
    """The tensors (on the CPU) that --pretrained names and, where train.py wrote them, the header.

    source: "timm" (its weights of the network `model`), an http(s) URL (kept in data/weights), or
    a file: .safetensors, or what torch.save() wrote.  Names are the file's own.  The header is {}
    for the weights of others.

    Errors: UserError for a file that is missing, damaged, without tensors, in need of code or, by
    its header, of another network, and for a network that timm has no weights of; OutsideError
    where the source does not serve.
    """
    if source == "timm":
        return _from_timm(model), {}
    url = source.startswith(("http://", "https://"))
    tensors, header = _read_file(_from_url(source) if url else Path(source).expanduser())
    if header and header["model"].partition(".")[0] != model.partition(".")[0]:
        raise UserError(
            f"--pretrained {source} is of {header['model']}, not of {model}: give "
            f"--model {header['model']}"
        )
    return tensors, header


def _from_timm(model: str) -> dict[str, Tensor]:
    """The state_dict of timm's pretrained network: what its files hold, with today's names."""
    import timm

    if not timm.is_model(model):
        raise UserError(f"--pretrained timm: {model} is no network of timm's; give a file or a URL")
    if not timm.is_model_pretrained(model):
        hint = nearest(model, timm.list_pretrained())
        raise UserError(f"--pretrained timm: timm has no weights of {model}{hint}")
    config = timm.get_pretrained_cfg(model)
    path = _from_hub(config.hf_hub_id) if config.hf_hub_id else _from_url(config.url)
    overlay = {"state_dict": _read_file(path)[0], "custom_load": False}
    with torch.random.fork_rng(devices=[]):  # or the caller's own network began differently
        network = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay)
    return network.state_dict()


def _from_hub(repository: str) -> Path:
    """A repository's weights in the hub's own cache, fetched where they are not there yet.

    Errors: OutsideError.
    """
    from huggingface_hub import constants, file_exists, hf_hub_download, hf_hub_url
    from huggingface_hub.utils import EntryNotFoundError

    for file in HUB_FILES:
        with contextlib.suppress(EntryNotFoundError):
            return Path(hf_hub_download(repository, file, local_files_only=True))
    # The hub's faster protocol still waited after ten minutes for a server that did not answer, as
    # behind a firewall; plain https gives up a transfer that stalls after about one.
    constants.HF_HUB_DISABLE_XET = True
    # hf_hub_download() tries a host that does not answer for 13 minutes, and a look-up of its name
    # can hang: so it is asked once before, in a thread that is never waited for.
    replies = queue.Queue()

    def ask():
        try:
            replies.put(HUB_FILES[0 if file_exists(repository, HUB_FILES[0]) else 1])
        except Exception as error:  # requests' or httpx's, by the hub's version
            replies.put(error)

    threading.Thread(target=ask, daemon=True).start()
    try:
        reply = replies.get(timeout=PATIENCE)
        if isinstance(reply, Exception):
            raise reply
        return Path(hf_hub_download(repository, reply))
    except queue.Empty:
        why = f"no answer in {PATIENCE:g} s"
    except Exception as error:
        why = _line(error.__cause__ or error)
    url = hf_hub_url(repository, "").partition("/resolve/")[0]
    raise OutsideError(f"--pretrained timm: {url}: {why}; a file or a URL may be given instead")


def _from_url(url: str) -> Path:
    """The file that a URL names, fetched once."""
    folder = files.DATA / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder, wait=True):  # two trainings would append to the same part
        return fetch.download_file(url, folder)


def _read_file(path: Path) -> tuple[dict[str, Tensor], dict]:
    """The tensors of a file and, if it is one of ours, its header."""
    if not path.is_file():
        what = "is a folder: name a file in it" if path.is_dir() else "no such file"
        raise UserError(f"--pretrained {path}: {what}; or give a URL, or timm")
    tensors, header = {}, {}
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="pt") as file:
                ours = (file.metadata() or {}).get("format") == FORMAT
            tensors, header = read_weights_file(path) if ours else (load_file(path), {})
        else:  # timm's own checkpoints hold their options as a Namespace, which does nothing
            with torch.serialization.safe_globals([argparse.Namespace]):
                tensors = _find(torch.load(path, map_location="cpu", weights_only=True))
    except (OSError, UserError):
        raise
    except Exception as error:  # damage takes many forms, KeyError and UnicodeDecodeError too
        if code := re.search(r"GLOBAL (\S+) was not an allowed", str(error)):
            raise UserError(
                f"--pretrained {path}: runs code ({code[1]}) when it is loaded; where you trust it,"
                " torch.load(…, weights_only=False) it and torch.save() its state_dict alone"
            ) from None
        reason = _line(str(error).rpartition("WeightsUnpickler error:")[2] or type(error).__name__)
        raise UserError(
            f"--pretrained {path}: cannot be read as weights ({reason}); "
            "if it is damaged, delete it and fetch or save it again"
        ) from None
    if not tensors:
        raise UserError(f"--pretrained {path}: holds no tensors by name; save a state_dict")
    return tensors, header


def _find(tree) -> dict[str, Tensor]:
    """Of a dict and the dicts in it, the tensors of the one that has the most.

    An optimizer's state goes by numbers, which are not followed.
    """
    if not isinstance(tree, dict):
        return {}
    entries = {key: value for key, value in tree.items() if isinstance(key, str)}
    here = {key: value.detach() for key, value in entries.items() if isinstance(value, Tensor)}
    return max([here, *map(_find, entries.values())], key=len)


@torch.no_grad()
def fit(
    network: nn.Module, tensors: dict[str, Tensor], head: list[str], keep_head: bool, source: str
) -> list[str]:
    """Load what fits, in place; an account in lines for the user.

    A prefix that the tensors' names have in common is taken off.  Where a convolution that sees the
    picture differs in its input channels alone, it is adapted; any other difference in shape leaves
    the network's own.  head: names of the last layers, which stay new unless keep_head.  Types,
    requires_grad and memory layout stay the network's.

    Errors: UserError where no weights (2 dimensions or more) outside the head fit; then the network
    is as it was.
    """
    own = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    prefix = _prefix(tensors, own)
    origin = {name: name for name in tensors if name in own}  # in the network -> in the file
    for name in tensors:
        if name.startswith(prefix) and name.removeprefix(prefix) in own:
            origin[name.removeprefix(prefix)] = name
    convs = (name for name, layer in network.named_modules() if isinstance(layer, nn.Conv2d))
    first = f"{next(convs, '')}.weight"
    stem = _channels(tensors[origin[first]], own[first]) if first in origin else None

    fitting, reshaped, skipped = {}, {}, {}
    for name, there in origin.items():
        value, needed = tensors[there], own[name]
        if is_below(name, head) and not keep_head:
            continue
        if stem and _channels(value, needed) == stem:  # RepVGG has two that see the picture
            value = _adapt(value, stem[1])
            reshaped[name] = f"{name} from {stem[0]} to {stem[1]} input channels"
        if value.shape == needed.shape:
            fitting[name] = value
        else:
            skipped[name] = f"{name} {list(value.shape)} in the file, {list(needed.shape)} here"
    if not any(value.dim() > 1 and not is_below(name, head) for name, value in fitting.items()):
        raise UserError(
            f"--pretrained {source}: nothing fits: it holds {_shapes(tensors)}; "
            f"the network needs {_shapes(own)}"
        )
    for name, value in fitting.items():
        own[name].copy_(value)

    used = {origin[name] for name in (*fitting, *skipped)}
    groups = {
        "reshaped": reshaped.values(),
        "skipped for their shapes": skipped.values(),
        "new": [name for name in own if is_below(name, head) and name not in fitting],
        "not used of the file": [name for name in tensors if name not in used],
        "not in the file": [
            name
            for name in own
            # Counters that old files lack, and that no usual batch norm reads.
            if not (name in origin or is_below(name, head) or name.endswith("num_batches_tracked"))
        ],
    }
    count = sum(p.numel() for name, p in network.named_parameters() if name in fitting)
    removed = f", without their prefix {prefix}" if prefix else ""
    account = [f"{source}: {len(fitting)} of {len(own)} tensors, {count:,} parameters{removed}"]
    return account + [f"{len(x)} {title}: {_few(x)}" for title, x in groups.items() if x]


def _prefix(tensors: dict[str, Tensor], own: dict[str, Tensor]) -> str:
    """What stands in front of most of the names that, without it, agree with shape and all."""
    votes = collections.Counter()
    for name, value in tensors.items():
        for start in range(len(name)):
            # Never within a number: 10.weight is no 0.weight with a prefix.
            if start == 0 or not name[start - 1].isalnum():
                known = own.get(name[start:])
                votes[name[:start]] += known is not None and known.shape == value.shape
    return max(votes, key=votes.get, default="")  # of equals the first: plain names


def _channels(value: Tensor, needed: Tensor) -> tuple[int, int] | None:
    """The input channels of two convolutions' weights, where those alone differ.

    Not of a stem that folds pixels into channels first, 16 for each colour.
    """
    if value.dim() != 4 or needed.dim() != 4 or value[:, :0].shape != needed[:, :0].shape:
        return None
    pair = value.shape[1], needed.shape[1]
    return pair if pair[0] != pair[1] and min(pair) <= 4 else None


def _adapt(weight: Tensor, channels: int) -> Tensor:
    """A convolution's weight [N, C, H, W] for other channels, float32 [N, channels, H, W].

    A grey picture then gives what it gave as a coloured one with all channels alike.
    """
    weight, present = weight.float(), weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)
    copies = -(-channels // present)
    return weight.repeat(1, copies, 1, 1)[:, :channels] * (present / channels)


def _few(names) -> str:
    """The first three, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(list(names)[:3]) + more


def _shapes(tensors: dict[str, Tensor]) -> str:
    return _few([f"{name} {list(value.shape)}" for name, value in tensors.items()])


def _line(error) -> str:
    """What an error says, in one line and not too long a one."""
    return " ".join(str(error).split())[:160] or type(error).__name__
