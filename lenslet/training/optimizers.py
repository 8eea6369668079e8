"""What is chosen by name: the optimizer, the schedule of its learning rate, and the objective.

python scripts/train.py --optimizer ranger --schedule restarts:5:2 --loss focal:2
"""

import math
import warnings
from argparse import ArgumentTypeError

import torch
from torch import Tensor, nn

from losses import Objective
from model import head_of
from options import UserError, nearest, number

# Optimizers that are tested by name; those with a name of timm's own are made by timm, as is any
# other that timm has (timm.optim.list_optimizers()).
OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adabelief": "adabelief",
    "ranger": "lookahead_radam",
    "muon": "nmuon",
}
# Schedules, and what their numbers are and default to.
SCHEDULES = {
    "constant": (),
    "cosine": (),
    "linear": (),
    "step": ("epochs", 0.1),
    "multistep": ("epochs,epochs", 0.1),
    "restarts": ("epochs", 2),
    "plateau": (0.1, 3),
    "onecycle": (),
}


def optimizer_name(text: str) -> str:
    """An argparse type: a name of OPTIMIZERS or of timm's."""
    if text not in OPTIMIZERS:
        from timm.optim import list_optimizers

        known = [*OPTIMIZERS, *list_optimizers()]
        if text.removeprefix("lookahead_") not in known:
            tested = ", ".join(OPTIMIZERS)
            raise ArgumentTypeError(
                f"no optimizer {text!r}{nearest(text, known)}: {tested}, or any of timm's"
            )
    return text


def decayed(network: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters that are pulled to zero: all but biases, norms and the like."""
    exempt = getattr(network, "no_weight_decay", set)()
    return [
        p
        for name, p in network.named_parameters()
        if p.requires_grad and p.ndim > 1 and name not in exempt
    ]


def create_optimizer(
    name: str,
    network: nn.Module,
    lr: float,
    momentum: float,
    weight_decay: float,
    nesterov: bool = False,
) -> torch.optim.Optimizer:
    """The optimizer of a network's trainable parameters; biases and norms are never decayed.

    ranger is RAdam (Liu et al. 2019, arXiv:1908.03265) with Lookahead (Zhang et al. 2019,
    arXiv:1907.08610).  muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) turns the
    update of each layer's filters into the nearest orthogonal matrix; the last layer, biases and
    norms are left to AdamW (Nesterov's) at the same lr, without weight decay.  The weight decay of
    sgd and adam is added to the gradient, that of the other tested ones is decoupled.

    Errors: UserError for one that needs a package or a device that is not there.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    pulled = {id(p) for p in decayed(network)}
    kind = OPTIMIZERS.get(name, name)
    if "muon" in name:
        for layer in head_of(network):
            pulled -= {id(p) for p in network.get_submodule(layer).parameters()}
    groups = [
        {"params": [p for p in parameters if id(p) in pulled]},
        {"params": [p for p in parameters if id(p) not in pulled], "weight_decay": 0.0},
    ]
    if "muon" in name:
        groups[1]["use_fallback"] = True
    groups = [group for group in groups if group["params"]]
    if not isinstance(kind, str):
        extra = {"momentum": momentum, "nesterov": nesterov} if name == "sgd" else {}
        return kind(groups, lr=lr, weight_decay=weight_decay, **extra)
    from timm.optim import create_optimizer_v2

    try:
        return create_optimizer_v2(groups, kind, lr, weight_decay, momentum)
    except (ImportError, AssertionError, RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split()) or "it needs a package that is not installed"
        raise UserError(f"--optimizer {name} cannot be used here: {reason}") from error


def innermost(optimizer):
    """The optimizer that Accelerate's, and Lookahead around it, wrap."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return getattr(optimizer, "_base_optimizer", optimizer)


def seed_draws(optimizer, seed: int, step: int) -> None:
    """Have an optimizer that draws numbers itself (kron, adahessian) draw alike on all processes,
    and in a run that goes on.
    """
    key, inner = (seed * 1_000_003 + step) % 2**63, innermost(optimizer)
    if hasattr(inner, "rng"):
        inner.rng.seed(key)
        torch.manual_seed(key)
    if hasattr(inner, "generator"):
        device = inner.param_groups[0]["params"][0].device
        inner.generator = torch.Generator(device).manual_seed(key)


def second_order(optimizer, world: int, compiled: bool) -> dict:
    """What backward() is given besides, where an optimizer (adahessian) needs second derivatives.

    Errors: UserError where there are none.
    """
    if not getattr(optimizer, "is_second_order", False):
        return {}
    if world > 1 or compiled:
        raise UserError("--optimizer adahessian: only for one process, and without --compile")
    # The gradients are let go at every step, so that no memory is lost.
    warnings.filterwarnings("ignore", "Using backward\\(\\) with create_graph=True")
    return {"create_graph": True}


def l1_penalty(network: nn.Module, strength: float):
    """A function that gives strength times the sum of the decayed weights' absolute values."""
    parameters = decayed(network)
    return lambda: strength * sum(p.abs().sum() for p in parameters) if strength else 0.0


def schedule_name(text: str) -> str:
    """An argparse type: a name of SCHEDULES with its numbers, as it was written."""
    parse_schedule(text)
    return text


def parse_schedule(text: str) -> tuple[str, list]:
    """'step:30:0.1' as ('step', [30.0, 0.1]); of multistep the first is a list."""
    name, *given = text.split(":")
    if name not in SCHEDULES:
        raise ArgumentTypeError(
            f"no schedule {text!r}{nearest(name, SCHEDULES)}: {', '.join(SCHEDULES)}"
        )
    wanted = SCHEDULES[name]
    needed = sum(isinstance(value, str) for value in wanted)
    if not needed <= len(given) <= len(wanted):
        form = ":".join([name, *("EPOCHS" if isinstance(x, str) else str(x) for x in wanted)])
        raise ArgumentTypeError(f"{text!r} has not the form {form}")
    words = [*given, *map(str, wanted[len(given) :])]
    if name == "multistep":
        epochs = [number(float, 0, above=True)(word) for word in words[0].split(",")]
        if sorted(set(epochs)) != epochs:
            raise ArgumentTypeError(f"{text!r}: its epochs do not rise")
        return name, [epochs, number(float, 0, 1, above=True)(words[1])]
    if name == "plateau":
        return name, [number(float, 0, 1, above=True)(words[0]), number(int, 0)(words[1])]
    # Cycles that shrank, or took no time, would never end.
    factor = number(float, 1, 100) if name == "restarts" else number(float, 0, 1, above=True)
    kinds = [number(float, 0.01), factor]
    return name, [kind(word) for kind, word in zip(kinds, words, strict=False)]


class Schedule:
    """The learning rate of every optimizer step, as a share of --lr.

    text: as SCHEDULES says.  warmup: steps ("500") or a share of all ("20%") of linear rise before
    it.  per_epoch: optimizer steps of an epoch.

        constant, cosine, linear   no change, half a cosine or a line to zero at the end
        step:E:F                   times F (0.1) after every E epochs
        multistep:E,E2,…:F         times F (0.1) after each of these epochs
        restarts:E:F               cosines to zero, of E epochs and each F (2) times the one before
                                   (SGDR: Loshchilov, Hutter 2016, arXiv:1608.03983)
        plateau:F:P                times F (0.1) after more than P (3) epochs without a better one
        onecycle                   a cosine up from 1/25 during the warm-up (30 % if none is given),
                                   another down to 1/250,000; momentum (Adam's first beta), if not
                                   0, from 0.95 to 0.85 and back (Smith, Topin 2017:
                                   arXiv:1708.07120)

    Nothing is counted in calls: the rate depends on the step, the plan, and validation scores, so
    it is the same on any number of processes and in a run that goes on.
    """

    def __init__(self, text: str, warmup: str, per_epoch: int, min_delta: float = 0.0):
        self.name, self.numbers = parse_schedule(text)
        self.warmup, self.per_epoch, self.min_delta = warmup, per_epoch, min_delta

    def factor(self, step: int, progress: float, total: int, scores: list[float] = ()) -> float:
        """The share at optimizer step `step` (0-based) of `total`, where `progress` (0..1) is done.

        scores: of the validations so far, larger is better.
        """
        rise = self.rise(total)
        if progress < rise:
            share = progress / rise
            return 0.04 + 0.96 * _wave(1 - share) if self.name == "onecycle" else share
        done = (progress - rise) / (1 - rise)
        epochs = step / self.per_epoch
        if self.name == "cosine":
            return _wave(done)
        if self.name == "linear":
            return 1 - done
        if self.name == "onecycle":
            return 4e-6 + (1 - 4e-6) * _wave(done)
        if self.name == "step":
            return self.numbers[1] ** (epochs // self.numbers[0])
        if self.name == "multistep":
            return self.numbers[1] ** sum(epochs >= at for at in self.numbers[0])
        if self.name == "restarts":
            length, growth = self.numbers
            since = (step + 0.5 - rise * total) / self.per_epoch
            while since >= length:
                since, length = since - length, length * growth
            return _wave(since / length)
        if self.name == "plateau":
            return self.numbers[0] ** reduced(scores, self.numbers[1], self.min_delta)
        return 1.0

    def apply(self, optimizer, lr: float, step: int, progress: float, total: int, scores) -> None:
        """Set the learning rate of step `step`, and the momentum where the schedule has one."""
        momentum = self.momentum(progress, total)
        for group in optimizer.param_groups:
            group["lr"] = lr * self.factor(step, progress, total, scores)
            if momentum and "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            if momentum and group.get("momentum"):
                group["momentum"] = momentum

    def momentum(self, progress: float, total: int) -> float | None:
        """What the momentum is set to, if it is."""
        if self.name != "onecycle":
            return None
        rise = self.rise(total)
        high = _wave(progress / rise) if progress < rise else _wave((1 - progress) / (1 - rise))
        return 0.85 + 0.1 * high

    def rise(self, total: int) -> float:
        """The share of all steps that the warm-up takes; more than 1 where it does not end."""
        if self.name == "onecycle" and self.warmup in ("0", "0%"):
            return 0.3
        return float(self.warmup[:-1]) / 100 if "%" in self.warmup else int(self.warmup) / total


def _wave(done: float) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 + 0.5 * math.cos(math.pi * done)


def reduced(scores: list[float], patience: int, min_delta: float = 0.0) -> int:
    """How many times `patience` + 1 validations in a row have not beaten the best one before.

    As torch.optim.lr_scheduler.ReduceLROnPlateau counts.  scores: larger is better; one is better
    if it is so by more than min_delta.
    """
    best, waited, times = -math.inf, 0, 0
    for score in scores:
        waited += 1
        if score > best + min_delta:
            best, waited = score, 0
        elif waited > patience:
            waited, times = 0, times + 1
    return times


def stale(scores: list[float], min_delta: float = 0.0) -> int:
    """Validations since the last one that was better than all before by more than min_delta."""
    best, waited = -math.inf, 0
    for score in scores:
        waited += 1
        if score > best + min_delta:
            best, waited = score, 0
    return waited


def create_objective(args, data, weights: Tensor, teacher: tuple | None, accelerator) -> Objective:
    """The Objective of train.py's options.

    weights float [N]: of the training pictures; teacher: as checkpoint.load_model() gives it.
    """
    teach = None
    if teacher:
        network, prepare, _ = teacher
        network.to(accelerator.device).requires_grad_(False)
        prepare.to(accelerator.device)

        def teach(images):
            with torch.no_grad(), accelerator.autocast():
                return network(prepare(images)).float()

    share = 0.5 if args.teacher_share is None else args.teacher_share
    return Objective(
        args.loss,
        len(data.classes),
        weights,
        args.label_smoothing,
        teach,
        share,
        args.temperature or 4.0,
    )


def moving_average(network: nn.Module, decay: float | None):
    """timm's ModelEmaV3 of a network, or None: its `module` is the average, .update() moves it.

    The decay rises to its value, as 1 - steps^(-2/3), so that a short run is not all beginning.
    """
    if not decay:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(network, decay, use_warmup=True)
