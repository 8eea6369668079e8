"""The model as training needs it: on many processes, partly frozen, with its moving average."""

import itertools
from fnmatch import fnmatchcase

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lenslet.distributed.determinism import fix_reduction_order
from lenslet.errors import UserError, nearest


def create_ema(network: nn.Module, decay: float | None):
    """timm's ModelEmaV3 of a network, or None: its `module` is the average, .update() moves it.

    The decay rises to its value, as 1 - steps^(-2/3), so that a short run is not all beginning.
    """
    if not decay:
        return None
    from timm.utils import ModelEmaV3

    return ModelEmaV3(network, decay, use_warmup=True)


def wrap_anew(model, images: torch.Tensor, accelerator: Accelerator) -> torch.nn.Module:
    """A prepared model for the parameters that are trained now: others than when it was prepared.

    DistributedDataParallel only ever exchanges the gradients that there were at first.
    """
    if accelerator.num_processes > 1:
        devices = model.device_ids
        model = type(model)(model.module, device_ids=devices, broadcast_buffers=False)
        fix_reduction_order(model, images, accelerator)
    return model


def average_buffers(model: torch.nn.Module, accelerator: Accelerator) -> None:
    """Average batch-norm statistics over the processes: each has seen its own pictures only.

    In double precision, which leaves equal ones as they are.
    """
    for buffer in model.buffers():
        if accelerator.num_processes > 1 and buffer.is_floating_point():
            buffer.copy_(accelerator.reduce(buffer.double(), "mean"))


class Freezer:
    """Which parameters are held fixed, and when they are released.

    patterns: shell patterns; a parameter whose own name, or that of a module around it, matches one
    is never trained.  epochs: for so many, nothing but what lies below the names in head is.
    Parameters that did not require gradients to begin with never do.

    Errors: UserError for a pattern that matches nothing, and where nothing is left to train.
    """

    def __init__(self, network: nn.Module, patterns: list[str], epochs: int, head: list[str]):
        self.network, self.patterns, self.epochs, self.head = network, patterns, epochs, head
        self.waiting = epochs > 0
        parameters = dict(network.named_parameters())
        self.trainable = {name: p for name, p in parameters.items() if p.requires_grad}
        known = [*(name for name, _ in network.named_modules() if name), *parameters]
        parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in parameters))
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                hint = nearest(pattern, known)
                raise UserError(
                    f"--freeze {pattern}: no layer or parameter is called so{hint}; "
                    f"{type(network).__name__} has {parts}"
                )
        if all(map(self._is_held, self.trainable)):
            raise UserError(
                f"--freeze {' '.join(patterns)}: nothing is left to train"
                f"{', for --freeze-epochs trains the last layer alone' if epochs else ''}; "
                f"{type(network).__name__} has {parts}"
            )

    def _is_held(self, name: str) -> bool:
        """Whether a parameter or module of that name is held fixed now."""
        if self.waiting and not is_below(name, self.head):
            return True
        names = lineage(name)
        return any(fnmatchcase(part, pattern) for part in names for pattern in self.patterns)

    def update(self, epoch: int) -> bool:
        """Set requires_grad for an epoch, counted from 0; whether that changed any."""
        self.waiting = epoch < self.epochs
        before = [parameter.requires_grad for parameter in self.trainable.values()]
        for name, parameter in self.trainable.items():
            parameter.requires_grad_(not self._is_held(name))
        return before != [parameter.requires_grad for parameter in self.trainable.values()]

    def train(self) -> None:
        """network.train(), where frozen layers keep their running statistics as they are.

        A layer is judged by its own name and not by its parameters: it may have none.
        """
        self.network.train()
        for name, layer in self.network.named_modules():
            if isinstance(getattr(layer, "running_mean", None), Tensor) and self._is_held(name):
                layer.eval()


def lineage(name: str) -> list[str]:
    """Of "a.b.c": "a", "a.b" and "a.b.c"."""
    return list(itertools.accumulate(name.split("."), lambda module, part: f"{module}.{part}"))


def is_below(name: str, roots: list[str]) -> bool:
    """Whether a name is one of roots, or of something in them."""
    return not set(roots).isdisjoint(lineage(name))
