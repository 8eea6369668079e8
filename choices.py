"""What is chosen by name: the optimizer and the schedule of its learning rate."""

import math

import torch
from torch import nn

OPTIMIZERS = ("sgd", "adamw", "muon")
SCHEDULES = ("constant", "cosine", "linear")


def create_optimizer(
    name: str, model: nn.Module, lr: float, momentum: float, weight_decay: float
) -> torch.optim.Optimizer:
    """The optimizer of a network's trainable parameters.

    muon (Jordan 2024, https://kellerjordan.github.io/posts/muon) turns the update of each layer's
    filters into the nearest orthogonal matrix; the last layer, biases and norms are left to AdamW
    (Nesterov's) at the same lr, without weight decay.  weight_decay is decoupled but for sgd.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "sgd":
        return torch.optim.SGD(parameters, lr, momentum, weight_decay=weight_decay)
    if name == "adamw":
        return torch.optim.AdamW(parameters, lr, weight_decay=weight_decay)
    from timm.optim import Muon

    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1:]
    others = {id(p) for m in last for p in m.parameters()} | {
        id(p) for p in parameters if p.ndim < 2
    }
    groups = [
        {"params": [p for p in parameters if id(p) not in others]},
        {
            "params": [p for p in parameters if id(p) in others],
            "use_fallback": True,
            "weight_decay": 0,
        },
    ]
    return Muon(groups, lr, weight_decay, momentum, nesterov=True)


def lr_factor(progress: float, warmup: str, total: int, schedule: str) -> float:
    """Share of --lr where `progress` (0..1) of a training of `total` steps is done.

    A linear rise over `warmup`, steps ("500") or a share of all ("20%"), then the schedule.
    """
    rise = float(warmup[:-1]) / 100 if warmup.endswith("%") else int(warmup) / total
    if progress < rise:
        return progress / rise
    done = (progress - rise) / (1 - rise)
    if schedule == "cosine":
        return 0.5 + 0.5 * math.cos(math.pi * done)
    return 1 - done if schedule == "linear" else 1.0
