"""Running loss and accuracy, and one line of advice when training goes wrong."""

import contextlib
import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from lenslet.errors import OutsideError, UserError


class Meter:
    """Counts on the device, without waiting for it; read() waits.

    recent float [3]: this process's summed loss, correct answers, and steps with a finite loss,
    since the last add_to_epoch().  sums float [3]: loss, correct answers and images of the epoch
    up to then, over all processes.
    """

    def __init__(self, accelerator: Accelerator, every: int):
        """every: steps between two points of the loss curve."""
        self._accelerator, self._every = accelerator, every
        self.recent, self.sums = torch.zeros(3, device=accelerator.device), torch.zeros(3)
        self.gradient = None  # the layer with the largest gradient, its norm and the step

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, targets: Tensor, counts: bool) -> None:
        """Count a part of a batch: summed loss, logits [B, C], targets [B, C]; unless repeated."""
        hits = (logits.argmax(1) == targets.argmax(1)).sum()
        self.recent[:2] += torch.stack([loss, hits]) * counts

    def end_step(self, network: nn.Module, step: int) -> bool:
        """Note a step, counted from 0, before the optimizer uses its gradients.

        Returns whether to read() after it: every so many steps, and after each of the first ones,
        where a learning rate that is too high shows.
        """
        self.recent[2] += self.recent[0].isfinite()
        due = self.gradient is None or step < self._every or (step + 1) % self._every == 0
        if due:
            self.gradient = largest_gradient(network, step + 1, self.gradient)
        return due

    def read(self) -> tuple[float, float, int]:
        """Loss, correct answers and steps with a finite loss since the last reset, over all
        processes.  Here the CPU waits for the device.
        """
        loss, hits, finite = self._accelerator.reduce(self.recent).tolist()
        return loss, hits, int(finite / self._accelerator.num_processes)

    def add_to_epoch(self, loss: float, hits: float, images: int) -> None:
        """Add what was read to the sums of the epoch, and start counting anew."""
        self.sums += torch.tensor([loss, hits, images])
        self.recent.zero_()

    def state(self) -> dict[str, Tensor]:
        """For a checkpoint; every process calls this."""
        return {"recent": self._accelerator.gather(self.recent[None]), "sums": self.sums}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from a state(), on as many processes as there are now."""
        rank, world = self._accelerator.process_index, self._accelerator.num_processes
        self.recent.copy_(state["recent"][rank::world].sum(0))
        self.sums.copy_(state["sums"])


def largest_gradient(network: nn.Module, step: int, before: tuple | None) -> tuple:
    """The parameter with the largest gradient, its norm and the step; the last that was finite."""
    gradients = {name: p.grad for name, p in network.named_parameters() if p.grad is not None}
    norms = torch.stack([g.norm() for g in gradients.values()])
    norms = norms.nan_to_num(nan=math.inf, posinf=math.inf)
    largest = norms.max().item()
    if before and math.isinf(largest):
        return before
    return list(gradients)[norms.argmax()], largest, step


def diverged(loss: float, where: str, gradient: tuple) -> str:
    """What to say of a loss that is infinite or not a number; gradient: see largest_gradient()."""
    layer, norm, step = gradient
    largest = f"the largest gradient was that of {layer}, {norm:.2g} at step {step}"
    return f"the loss is {loss} in {where}; {largest}"


@contextlib.contextmanager
def explain_errors(memory: str, nondeterministic: str, workers: str):
    """Say what to try, in these words, where memory is short or a GPU has no deterministic kernel.

    workers: where a process that decodes images was killed.
    """
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutsideError(f"out of GPU memory: {memory}") from error
    except RuntimeError as error:
        if "does not have a deterministic implementation" in str(error):
            operation = str(error).split()[0]
            raise UserError(f"{operation} is not deterministic: {nondeterministic}") from error
        if str(error).startswith("DataLoader worker"):  # Linux kills one where memory is short
            raise OutsideError(f"{' '.join(str(error).split())} {workers}") from error
        raise
