"""Running loss and accuracy, and one line of advice when training goes wrong."""

import contextlib
import math

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F

from lenslet.errors import OutsideError, UserError


class Meter:
    """Counts on the device, without waiting for it; read() waits.

    The loss that is reported is the cross-entropy, as in validation, so that the two can be
    compared; what is minimized, where that is another quantity, is counted beside it.

    recent float [4]: this process's sums of the objective, of the cross-entropy, of correct answers
    and of steps with a finite objective, since the last add_to_epoch().  sums float [4]: objective,
    cross-entropy, correct answers and images of the epoch up to then, over all processes.
    """

    def __init__(self, accelerator: Accelerator, every: int, objective: str = ""):
        """every: steps between two points of the loss curve.  objective: see Objective.name."""
        self._accelerator, self._every, self.objective = accelerator, every, objective
        self.recent, self.sums = torch.zeros(4, device=accelerator.device), torch.zeros(4)
        self.gradient = None  # the layer with the largest gradient, its norm and the step

    @torch.no_grad()
    def add(self, objective: Tensor, logits: Tensor, targets: Tensor, counts: bool) -> None:
        """Count a part of a batch, unless it repeats another process's.

        objective: summed over the images; logits [B, C]; targets [B, C], each image's shares of the
        classes times its weight.
        """
        shares = targets / targets.sum(1, keepdim=True)
        loss = F.cross_entropy(logits, shares, reduction="sum")
        hits = (logits.argmax(1) == targets.argmax(1)).sum()
        self.recent[:3] += torch.stack([objective, loss, hits]) * counts

    def end_step(self, network: nn.Module, step: int) -> bool:
        """Note a step, counted from 0, before the optimizer uses its gradients.

        Returns whether to read() after it: every so many steps, and after each of the first ones,
        where a learning rate that is too high shows.
        """
        self.recent[3] += self.recent[0].isfinite()
        due = self.gradient is None or step < self._every or (step + 1) % self._every == 0
        if due:
            self.gradient = largest_gradient(network, step + 1, self.gradient)
        return due

    def read(self) -> tuple[float, float, float, int]:
        """Objective, cross-entropy, correct answers and steps with a finite objective since the
        last reset, over all processes.  Here the CPU waits for the device.
        """
        *sums, finite = self._accelerator.reduce(self.recent).tolist()
        return *sums, int(finite / self._accelerator.num_processes)

    def add_to_epoch(self, objective: float, loss: float, hits: float, images: int) -> None:
        """Add what was read to the sums of the epoch, and start counting anew."""
        self.sums += torch.tensor([objective, loss, hits, images])
        self.recent.zero_()

    def figures(self) -> dict[str, float]:
        """The means of the epoch so far, as metrics.json has them."""
        objective, loss, hits = (self.sums[:3] / self.sums[3]).tolist()
        beside = {"train_objective": objective} if self.objective else {}
        return {"train_loss": loss, **beside, "train_accuracy": hits}

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
