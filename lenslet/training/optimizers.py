"""Optimizers by name."""

import warnings
from argparse import ArgumentTypeError

import torch
from torch import nn

from lenslet.errors import UserError, nearest
from model import head_of

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


def decayed_parameters(network: nn.Module) -> list[nn.Parameter]:
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
    pulled = {id(p) for p in decayed_parameters(network)}
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
    parameters = decayed_parameters(network)
    return lambda: strength * sum(p.abs().sum() for p in parameters) if strength else 0.0
