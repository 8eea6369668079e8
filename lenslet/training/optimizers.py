"""Optimizers by name, and the L1 penalty."""

import warnings

import torch
from torch import nn

from lenslet.errors import UserError, nearest
from model import head_of

# Those tested by name: torch's classes, and timm's by timm's names.  Any other optimizer of timm's
# (timm.optim.list_optimizers()) is made by its own name.
OPTIMIZERS = {
    "sgd": torch.optim.SGD,
    "adam": torch.optim.Adam,
    "adamw": torch.optim.AdamW,
    "adabelief": "adabelief",
    "ranger": "lookahead_radam",
    "muon": "nmuon",
}


def check_optimizer(name: str) -> None:
    """Errors: UserError for a name that neither we nor timm have."""
    if name not in OPTIMIZERS:
        from timm.optim import list_optimizers  # takes seconds

        known = [*OPTIMIZERS, *list_optimizers()]
        if name.removeprefix("lookahead_") not in known:
            tested = ", ".join(OPTIMIZERS)
            raise UserError(f"no optimizer {name!r}{nearest(name, known)}: {tested}, or timm's")


def decayed_parameters(network: nn.Module) -> list[nn.Parameter]:
    """The trainable parameters that are decayed: all but biases, norms and the like."""
    exempt = getattr(network, "no_weight_decay", set)()
    return [
        p
        for name, p in network.named_parameters()
        if p.requires_grad and p.ndim > 1 and name not in exempt
    ]


def create_optimizer(
    name: str, network: nn.Module, lr: float, momentum: float, weight_decay: float, nesterov=False
) -> torch.optim.Optimizer:
    """The optimizer of a network's trainable parameters; biases and norms are never decayed.

    ranger is RAdam (Liu et al. 2019, arXiv:1908.03265) with Lookahead (Zhang et al. 2019,
    arXiv:1907.08610).  muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) turns the
    update of each layer's filters into the nearest orthogonal matrix; the last layer, biases and
    norms are left to AdamW (Nesterov's) at the same lr, without weight decay.  The weight decay of
    sgd and adam is added to the gradient, that of the other tested ones is decoupled.

    Errors: UserError for one that needs a package or a device that is missing, second derivatives,
    or random numbers of its own.
    """
    parameters = [p for p in network.parameters() if p.requires_grad]
    decayed = {id(p) for p in decayed_parameters(network)}
    kind = OPTIMIZERS.get(name, name)
    if "muon" in name:
        for layer in head_of(network):
            decayed -= {id(p) for p in network.get_submodule(layer).parameters()}
    groups = [
        {"params": [p for p in parameters if id(p) in decayed]},
        {"params": [p for p in parameters if id(p) not in decayed], "weight_decay": 0.0},
    ]
    if "muon" in name:
        groups[1]["use_fallback"] = True
    groups = [group for group in groups if group["params"]]
    if not isinstance(kind, str):
        extra = {"momentum": momentum, "nesterov": nesterov} if name == "sgd" else {}
        return kind(groups, lr=lr, weight_decay=weight_decay, **extra)
    from timm.optim import create_optimizer_v2

    # Three steps of Newton-Schulz, as its author takes on CIFAR-10, not timm's five: as good here.
    extra = {"ns_steps": 3, "ns_coefficients": "original"} if name == "muon" else {}
    try:
        with warnings.catch_warnings():  # of packages that would make one faster
            warnings.simplefilter("ignore")
            optimizer = create_optimizer_v2(groups, kind, lr, weight_decay, momentum, **extra)
    except (ImportError, AssertionError, RuntimeError, ValueError, TypeError) as error:
        reason = " ".join(str(error).split()) or "it needs a package that is not installed"
        raise UserError(f"cannot be used here: {reason}") from error
    # These are refused by what they do, as timm will have others.
    if getattr(innermost(optimizer), "is_second_order", False):
        raise UserError("it needs second derivatives, which training does not compute")
    if hasattr(innermost(optimizer), "rng") or hasattr(innermost(optimizer), "generator"):
        raise UserError("it draws random numbers of its own, which a resumed run cannot repeat")
    return optimizer


def innermost(optimizer):
    """The optimizer that Accelerate's, and Lookahead around it, wrap."""
    optimizer = getattr(optimizer, "optimizer", optimizer)
    return getattr(optimizer, "_base_optimizer", optimizer)


def l1_penalty(network: nn.Module, strength: float):
    """A function that gives strength times the sum of the decayed weights' absolute values."""
    parameters = decayed_parameters(network)
    return lambda: strength * sum(p.abs().sum() for p in parameters) if strength else 0.0
