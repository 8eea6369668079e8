"""The model as training needs it: on many processes, partly frozen, with its moving average.

`Net.bare` is the plain module, `Net.model` is what a step calls: the same module, with Accelerate's
casts and, on several processes, wrapped in DistributedDataParallel.
"""

import contextlib
import itertools
from fnmatch import fnmatchcase

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.data import DataLoader

from lenslet.data.batches import BatchSampler
from lenslet.data.prepare import Prepare
from lenslet.distributed.determinism import fix_reduction_order
from lenslet.errors import UserError, nearest
from lenslet.metrics import evaluate
from lenslet.training.optimizers import innermost
from model import add_dropout

NORMAL = 32  # images of a batch: the statistics of fewer are so noisy that training suffers


class Net:
    """A network with its optimizer, ready for steps once distribute() was called.

    model: what a step calls.  bare: the module itself.  evaluated: the module that is validated and
    kept, which is the moving average if there is one, else bare.  prepare: makes the network's
    input from uint8 images.
    """

    def __init__(self, bare: nn.Module, optimizer, freezer: "Freezer", prepare: Prepare):
        self.model = self.bare = self.evaluated = bare
        self.optimizer, self.prepare = optimizer, prepare
        self._freezer, self._ema = freezer, None

    def distribute(
        self, accelerator: Accelerator, epoch: int, dropout=0.0, compiled=False, ema=None
    ) -> None:
        """Move everything to its device, for a run that is at an epoch, and wrap it for several
        processes.

        ema: decay of the moving average, or None.  It rises to its value as 1 - steps^(-2/3), so
        that a short run is not dominated by its first weights.
        """
        self._accelerator = accelerator
        self.prepare.to(accelerator.device)
        # Channels last: twice as fast for convolutions on a CPU, and what a GPU's tensor cores use.
        self.bare.to(memory_format=torch.channels_last)
        add_dropout(self.bare, dropout)
        if compiled:
            self.bare.compile()
        self._freezer.update(epoch)
        self.model, self.optimizer = accelerator.prepare(self.bare, self.optimizer)
        self.bare = self.evaluated = accelerator.unwrap_model(self.model)
        self._networks = {"model": self.bare}
        if ema:
            from timm.utils import ModelEmaV3  # takes seconds

            self._ema = ModelEmaV3(self.bare, ema, use_warmup=True)
            self.evaluated = self._networks["average"] = self._ema.module
        channels = self.prepare.mean.shape[1]
        black = torch.zeros(2, channels, *self.prepare.input_size, dtype=torch.uint8)
        self._example = self.prepare(black.to(accelerator.device))
        fix_reduction_order(self.model, self._example, accelerator)

    def begin_epoch(self, epoch: int) -> None:
        """For an epoch, counted from 0: freeze or release layers, and leave evaluation mode."""
        if self._freezer.update(epoch) and self._accelerator.num_processes > 1:
            # DistributedDataParallel only ever exchanges the gradients that there were at first.
            self.model = type(self.model)(
                self.bare, device_ids=self.model.device_ids, broadcast_buffers=False
            )
            fix_reduction_order(self.model, self._example, self._accelerator)
        self._freezer.train()

    def no_sync(self, unless: bool):
        """A context in which gradients are not exchanged between processes, unless told to."""
        return contextlib.nullcontext() if unless else self._accelerator.no_sync(self.model)

    def update_ema(self, step: int) -> None:
        """Move the average after optimizer step `step`, counted from 1."""
        if self._ema:
            self._ema.update(self.bare, step)

    def evaluate(self, loader: DataLoader | None, interrupts=None) -> Tensor | None:
        """The rows of metrics.evaluate(); None without a loader, or if a signal stopped it."""
        self._average_buffers()
        if loader is None:
            return None
        return evaluate(self.evaluated, loader, self.prepare, self._accelerator, interrupts)

    def _average_buffers(self) -> None:
        """Average batch-norm statistics over the processes, each of which saw only its own images.

        In double precision, which leaves equal ones as they are.
        """
        if self._accelerator.num_processes > 1:
            for network in self._networks.values():
                for buffer in network.buffers():
                    if buffer.is_floating_point():
                        buffer.copy_(self._accelerator.reduce(buffer.double(), "mean"))

    def state(self) -> dict:
        """For a checkpoint; every process calls this, for each has batch-norm statistics."""
        buffers = {
            key: {name: buffer.cpu() for name, buffer in network.named_buffers()}
            for key, network in self._networks.items()
        }
        several, scaler = self._accelerator.num_processes > 1, self._accelerator.scaler
        return {
            "networks": {key: network.state_dict() for key, network in self._networks.items()},
            "buffers": gather_object([buffers]) if several else [buffers],
            "optimizer": self.optimizer.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
        }

    def load_state(self, state: dict) -> None:
        """Go on from a state().  Errors: UserError where it is of another network."""
        buffers = state["buffers"][self._accelerator.process_index % len(state["buffers"])]
        try:
            for key, network in self._networks.items():
                network.load_state_dict(state["networks"][key])
                for name, buffer in network.named_buffers():
                    buffer.copy_(buffers[key][name])
            self.optimizer.load_state_dict(state["optimizer"])
        except (RuntimeError, ValueError) as error:
            reason = str(error).splitlines()[-1].strip()
            raise UserError(f"does not fit this network ({reason})") from error
        for p, values in innermost(self.optimizer).state.items():
            for key, value in values.items():
                if torch.is_tensor(value) and p.ndim and value.shape == p.shape:
                    # In the memory layout of p: channels last.
                    values[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)
        if self._accelerator.scaler and state["scaler"]:  # else a run in another precision goes on
            self._accelerator.scaler.load_state_dict(state["scaler"])


def fit_batch_norm(
    network: nn.Module, sampler: BatchSampler, accelerator: Accelerator, accumulate: int = 1
) -> list[str]:
    """Fit a network's batch norm, and how batches are shared, to each other; notes for the user.

    accumulate: parts that each process computes its images in.  Where a part has fewer than NORMAL
    images, the layers on GPUs take the statistics
    of all processes together, in place; torch cannot do so on a CPU.  No parameter changes.
    Errors: UserError for a batch of one image, which batch norm cannot train on.
    """
    notes, world, size = [], accelerator.num_processes, sampler.batch_size
    normalized = any(isinstance(layer, _BatchNorm) for layer in network.modules())
    sampler.least = 2 if normalized else 1
    if not normalized:
        return notes
    if size == 1:
        raise UserError("batch norm needs 2 images or more")
    if sampler.used < sampler.count:
        notes.append("a last batch of one image, on which batch norm cannot train, is left out")
    seen = max(2, size // (world * accumulate))
    if world > 1 and seen < NORMAL:
        if accelerator.device.type == "cuda":
            from timm.layers import convert_sync_batchnorm  # torch's own drops timm's activations

            convert_sync_batchnorm(network)
        else:
            notes.append(
                f"batch norm sees {seen} images at a time in each of {world} processes and needs "
                f"{NORMAL} to train well: lower PROCESSES, or raise the batch size"
            )
    return notes


class Freezer:
    """Which parameters are frozen, and until when.

    patterns: shell patterns; a parameter is never trained if its own name, or that of a module
    around it, matches one.  epochs: the first epochs, which train only what lies below the names in
    head.  Parameters that did not require gradients before never do.

    Errors: UserError for a pattern that matches nothing, and where nothing is left to train.
    """

    def __init__(self, network: nn.Module, patterns: list[str], epochs: int, head: list[str]):
        self.network, self.patterns, self.epochs, self.head = network, patterns, epochs, head
        self.head_only = epochs > 0
        parameters = dict(network.named_parameters())
        self.trainable = {name: p for name, p in parameters.items() if p.requires_grad}
        known = [*(name for name, _ in network.named_modules() if name), *parameters]
        parts = ", ".join(dict.fromkeys(name.partition(".")[0] for name in parameters))
        for pattern in patterns:
            if not any(fnmatchcase(name, pattern) for name in known):
                hint = nearest(pattern, known)
                raise UserError(
                    f"no layer or parameter is named {pattern}{hint}; "
                    f"{type(network).__name__} has {parts}"
                )
        if all(map(self._is_frozen, self.trainable)):
            only = ", as the first epochs train only the last layer" if epochs else ""
            raise UserError(f"nothing is left to train{only}; {type(network).__name__} has {parts}")

    def _is_frozen(self, name: str) -> bool:
        """Whether a parameter or module of that name is frozen now."""
        if self.head_only and not is_below(name, self.head):
            return True
        names = lineage(name)
        return any(fnmatchcase(part, pattern) for part in names for pattern in self.patterns)

    def update(self, epoch: int) -> bool:
        """Set requires_grad for an epoch, counted from 0, and return whether that changed any."""
        self.head_only = epoch < self.epochs
        before = [parameter.requires_grad for parameter in self.trainable.values()]
        for name, parameter in self.trainable.items():
            parameter.requires_grad_(not self._is_frozen(name))
        return before != [parameter.requires_grad for parameter in self.trainable.values()]

    def train(self) -> None:
        """network.train(), but frozen layers keep their running statistics as they are.

        The layer's own name decides, not its parameters: it may have none.
        """
        self.network.train()
        for name, layer in self.network.named_modules():
            if isinstance(getattr(layer, "running_mean", None), Tensor) and self._is_frozen(name):
                layer.eval()


def lineage(name: str) -> list[str]:
    """Of "a.b.c": "a", "a.b" and "a.b.c"."""
    return list(itertools.accumulate(name.split("."), lambda module, part: f"{module}.{part}"))


def is_below(name: str, roots: list[str]) -> bool:
    """Whether a name is one of roots, or of something in them."""
    return not set(roots).isdisjoint(lineage(name))
