"""The weights that training starts from: found in any file, and fitted to the network.

    python scripts/train.py --pretrained timm               timm's own weights for the network
    python scripts/train.py --pretrained weights.pth        a file, or the URL of one

`read_weights()` finds the tensors, and `fit()` loads those that fit.  No code from a file is run.
"""

import collections
import re
import zipfile
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from lenslet import files, weights
from lenslet.data import download
from lenslet.errors import OutsideError, UserError, nearest, one_line
from lenslet.training import hub, pickles
from lenslet.training.net import is_below
from model import find_network

AGAIN = "delete it, and download or save it again"

State = dict[str, Tensor]  # by name, as in a state_dict


def read_weights(source: str, model: str) -> tuple[State, dict]:
    """The tensors (on the CPU) of a source and, where train.py wrote them, their header.

    source: "timm" (its weights for the network `model`), an http(s) URL (kept in data/weights), or
    a file: .safetensors, or what torch.save() wrote.  The tensors have the names they have in the
    file.  The header is {} for files of other programs.

    Errors, without the source: UserError for a file that is missing, damaged, without tensors, in
    need of code or, by its header, for another network, and for a network that is unknown or that
    timm has no weights for; OutsideError where the source does not answer.
    """
    model = find_network(model)
    if source == "timm":
        return _from_timm(model), {}
    if source.startswith(("http://", "https://")):
        tensors, header = _read_download(_from_url(source))
    else:
        tensors, header = _read_file(Path(source).expanduser())
    theirs = header and find_network(header["model"].partition(".")[0])
    if header and theirs.partition(".")[0] != model.partition(".")[0]:
        raise UserError(f"these weights are for {header['model']}, not for {model}: train that one")
    return tensors, header


def find_pretrained(models: list[str]) -> tuple[str | None, str]:
    """The first of these networks that timm has weights for, and a line for the user.

    Its weights are in the hub's cache afterwards, and read_weights("timm", network) reads them.
    Where the hub is silent (see hub.silence()), only cached weights count.  None if there are no
    weights: the line says why.  It is for one process, which tells the others.

    Errors: UserError for an unknown network.
    """
    problems = {}  # in their order, each once
    for model in map(find_network, models):
        try:
            config = _timm_config(model)
            repository = config.hf_hub_id
            if not repository:
                raise UserError(f"timm's weights for {model} are not on the hub")
            held = hub.cached(repository)
            if not held and (why := hub.silence()):
                raise OutsideError(why)
            _from_timm(model)  # downloads, and shows that they can be read
        except (UserError, OSError) as error:
            silent = isinstance(error, OutsideError) and hub.silence()
            problems[silent or str(error)] = None
            continue
        place = "the hub's cache" if held else hub.address()
        size = hub.cached(repository).stat().st_size / 1e6
        known = config.license not in (None, "unknown")
        licence = config.license if known else f"see {hub.address(repository)}"
        why = "".join(f"; {problem}" for problem in problems)
        found = f"{repository} from {place}, {size:.1f} MB, licence: {licence}"
        return model, f"pretrained weights: {found}{why}"
    none = f"no pretrained weights for {' or '.join(models)}, so training starts from scratch"
    return None, f"{none}: {'; '.join(problems)}"


def _timm_config(model: str):
    """timm's configuration of its weights for a network.  Errors: UserError if it has none."""
    import timm

    if not timm.is_model(model):
        raise UserError(f"{model} is not a timm network; give a file or a URL")
    if not timm.is_model_pretrained(model):
        hint = nearest(model, timm.list_pretrained())
        raise UserError(f"timm has no weights for {model}{hint}")
    return timm.get_pretrained_cfg(model)


def _from_timm(model: str) -> State:
    """The state_dict of timm's pretrained network: what its files hold, with today's names."""
    import timm

    config = _timm_config(model)
    repository = config.hf_hub_id
    path = hub.fetch(repository, _read_file) if repository else _from_url(config.url)
    overlay = {"state_dict": _read_download(path)[0], "custom_load": False}
    # timm draws random weights first, which must not change how the caller's own network starts.
    with torch.random.fork_rng(devices=[]):
        try:
            network = timm.create_model(model, pretrained=True, pretrained_cfg_overlay=overlay)
        except (RuntimeError, KeyError) as error:  # tensors of another network
            why = f"not the weights of {model} ({one_line(error)})"
            raise UserError(f"{path}: {why}; {AGAIN}") from None
    return network.state_dict()


def _from_url(url: str) -> Path:
    """The file at a URL, downloaded only once."""
    folder = files.DATA / "weights"
    folder.mkdir(parents=True, exist_ok=True)
    with files.lock(folder, wait=True):  # two trainings would append to the same part
        return download.download_file(url, folder)


def _read_download(path: Path) -> tuple[State, dict]:
    """_read_file(), with errors that name the file: the user may have to delete it."""
    try:
        return _read_file(path)
    except UserError as error:
        remedy = "" if ";" in str(error) else f"; {AGAIN}"
        raise UserError(f"{path}: {error}{remedy}") from None


def _read_file(path: Path) -> tuple[State, dict]:
    """The tensors of a file and, if it is one of ours, its header."""
    if not path.is_file():
        what = "is a folder: name a file in it" if path.is_dir() else "no such file"
        raise UserError(f"{what}; or give a URL, or timm")
    tensors, header = {}, {}
    try:
        if path.suffix != ".safetensors":
            tensors = pickles.read(path)
        else:
            try:
                tensors, header = weights.read(path)
            except weights.ForeignError:
                tensors = load_file(path)
        if not tensors:
            raise UserError("holds no tensors with names; save a state_dict")
        _check_tensors(tensors, path.stat().st_size)
    except UserError:
        raise
    except zipfile.BadZipFile as error:
        raise UserError(f"is cut off or damaged ({one_line(error)}); {AGAIN}") from None
    except Exception as error:  # damage takes many forms, KeyError and UnicodeDecodeError too
        if isinstance(error, OSError) and error.filename:
            raise
        if code := re.search(r"GLOBAL (\S+) was not an allowed", str(error)):
            raise UserError(
                f"runs code ({one_line(code[1])}) when it is loaded; if you trust it, load it with "
                "torch.load(…, weights_only=False) and torch.save() its state_dict alone"
            ) from None
        said = str(error).rpartition("WeightsUnpickler error:")[2].strip()
        reason = one_line(re.split(r"\n|\. ", said)[0] or type(error).__name__)  # torch adds advice
        raise UserError(
            f"cannot be read as weights: cut off, damaged or something else ({reason}); {AGAIN}"
        ) from None
    return tensors, header


def _check_tensors(tensors: State, size: int) -> None:
    """Refuse tensors that are no plain arrays of real, finite numbers, or larger than their file.

    size: bytes of the file.  A tensor may be a view that repeats a few numbers 10**12 times.
    Errors: UserError with the name of the tensor.
    """
    total = 0
    for name, value in tensors.items():
        kinds = {
            "sparse": value.layout != torch.strided,
            "without values (on the meta device)": value.is_meta,
            "quantized": value.is_quantized,
            "nested": value.is_nested,
            "complex": value.is_complex(),
        }
        if wrong := [kind for kind, found in kinds.items() if found]:
            raise UserError(f"{one_line(name, 100)} is {wrong[0]}; save plain tensors")
        bytes_ = value.numel() * value.itemsize
        total += bytes_
        if bytes_ > 4 * size or total > 16 * size:  # names may share a tensor
            raise UserError(f"{one_line(name, 100)} is larger than the file")
    weights.check_finite(tensors)


@torch.no_grad()
def fit(network: nn.Module, tensors: State, head: list[str], keep_head: bool) -> list[str]:
    """Load the tensors that fit, in place; returns notes for the user, a line each.

    A prefix that the names of the tensors share is removed.  Convolutions that see the image are
    adapted if only their input channels differ; any other difference in shape leaves the network's
    own weights.  head: names of the last layers, which stay new unless keep_head.  Types,
    requires_grad and memory layout stay the network's.

    Errors: UserError if no weights (2 dimensions or more) outside the head fit; then the network
    is unchanged.
    """
    own = {name: value for name, value in network.state_dict().items() if isinstance(value, Tensor)}
    in_head = [name for name in own if is_below(name, head)]
    prefix = _shared_prefix(tensors, own)
    # {name here: name in the file}; a name with the prefix comes before the same without.
    sources = {name: name for name in tensors}
    sources |= {name.removeprefix(prefix): name for name in tensors if name.startswith(prefix)}
    matched = {
        name: tensors[source]
        for name, source in sources.items()
        if name in own and (keep_head or name not in in_head)
    }
    adapted = _adapt_input_channels(network, own, matched)
    fitting = {k: v for k, v in (matched | adapted).items() if v.shape == own[k].shape}
    if not any(value.dim() > 1 for name, value in fitting.items() if name not in in_head):
        raise UserError(
            f"nothing fits: the file has {_shapes(tensors)}; the network needs {_shapes(own)}"
        )
    for name, value in fitting.items():
        own[name].copy_(value)

    count = sum(p.numel() for name, p in network.named_parameters() if name in fitting)
    removed = f", without their prefix {prefix}" if prefix else ""
    summary = f"{len(fitting)} of {len(own)} tensors, {count:,} parameters{removed}"
    return [summary, *_describe_rest(own, in_head, tensors, sources, matched, fitting)]


def _describe_rest(own, in_head, tensors, sources, matched, fitting) -> list[str]:
    """What fit() did not simply copy, one line for each kind, with the first three names.

    own, tensors: of the network and of the file.  matched: the tensors that fit() tried to load, by
    their names in the network; fitting: those that it loaded.
    """
    changed = [name for name, value in matched.items() if value.shape != own[name].shape]
    found, used = {*sources, *in_head}, {sources[name] for name in matched}
    groups = {
        "adapted": [
            f"{name} from {matched[name].shape[1]} to {own[name].shape[1]} input channels"
            for name in changed
            if name in fitting
        ],
        "of a different shape, not loaded": [
            f"{name} {list(matched[name].shape)} in the file, {list(own[name].shape)} here"
            for name in changed
            if name not in fitting
        ],
        "new": [name for name in in_head if name not in fitting],
        "in the file but unused": [name for name in tensors if name not in used],
        # Old files lack num_batches_tracked, which no usual batch norm reads.
        "missing from the file": [
            name for name in own if name not in found and not name.endswith("num_batches_tracked")
        ],
    }
    return [
        f"{len(names)} {kind}: {_first_three(names)}" for kind, names in groups.items() if names
    ]


def _shared_prefix(tensors: State, own: State) -> str:
    """What most names have in front of a name in the network that has the same shape."""
    votes = collections.Counter({"": 0})  # the first among equals: plain names
    lengths = sorted({len(name) for name in own}, reverse=True)
    for name, value in tensors.items():
        for start in (len(name) - length for length in lengths if length <= len(name)):
            # Never within a number: 10.weight is not 0.weight with a prefix.
            if start == 0 or not name[start - 1].isalnum():
                known = own.get(name[start:])
                if known is not None and known.shape == value.shape:
                    votes[name[:start]] += 1
    return max(votes, key=votes.get)


def _adapt_input_channels(network: nn.Module, own: State, matched: State) -> State:
    """The weights of the convolutions that see the image, changed to the network's input channels.

    {} unless the network's first convolution has other input channels and is otherwise equal.
    """
    convolutions = (name for name, m in network.named_modules() if isinstance(m, nn.Conv2d))
    first = f"{next(convolutions, '')}.weight"
    change = _channels(matched[first], own[first]) if first in matched else None
    return {
        name: _adapt(value, change[1])
        for name, value in matched.items()
        if change and _channels(value, own[name]) == change  # RepVGG has two that see the image
    }


def _channels(value: Tensor, needed: Tensor) -> tuple[int, int] | None:
    """The input channels of two convolutions' weights, if nothing else differs.

    None for a stem that folds pixels into channels first, 16 for each colour.
    """
    if value.dim() != 4 or needed.dim() != 4 or value[:, :0].shape != needed[:, :0].shape:
        return None
    pair = value.shape[1], needed.shape[1]
    return pair if pair[0] != pair[1] and min(pair) <= 4 else None


def _adapt(weight: Tensor, channels: int) -> Tensor:
    """A convolution's weight [N, C, H, W] for other channels, float32 [N, channels, H, W].

    A grey image then gives what it gave before as a colour image with equal channels.
    """
    weight, present = weight.float(), weight.shape[1]
    if channels == 1:
        return weight.sum(1, keepdim=True)
    copies = -(-channels // present)
    return weight.repeat(1, copies, 1, 1)[:, :channels] * (present / channels)


def _first_three(names: list[str]) -> str:
    """The first three, and how many more there are."""
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return one_line(", ".join(names[:3])) + more


def _shapes(tensors: State) -> str:
    return _first_three([f"{name} {list(value.shape)}" for name, value in tensors.items()])
