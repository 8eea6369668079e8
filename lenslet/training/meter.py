"""Running loss and accuracy, and one line of advice when training goes wrong."""

import contextlib
import math

import torch

from lenslet.errors import OutsideError, UserError


def largest_gradient(model: torch.nn.Module, step: int, before: tuple | None) -> tuple:
    """The parameter with the largest gradient, its norm and the step; the last that was finite."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    norms = torch.stack([g.norm() for g in gradients.values()]).nan_to_num(nan=math.inf)
    largest = norms.max().item()
    if before and math.isinf(largest):
        return before
    return list(gradients)[norms.argmax()], largest, step


def diverged(loss: float, epoch: int, step: int, lr: float, gradient: tuple, kept) -> str:
    """What is said of a loss that is infinite or not a number.

    gradient: as largest_gradient() found it.  kept: where good weights are, '' if nowhere.
    """
    layer, norm, when = gradient
    return (
        f"the loss is {loss} in epoch {epoch} at step {step}, lr {lr:.2g}; the largest gradient "
        f"was that of {layer}, {norm:.2g} at step {when}: lower --lr, or give --clip; "
        + (f"the last good weights are in {kept}" if kept else "no weights are kept yet")
    )


@contextlib.contextmanager
def memory_advice(batch_size: int, accumulate: int):
    """Say what to try where memory is short, or a GPU has no way to the same bits every time."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise OutsideError(
            f"out of GPU memory with --batch-size {batch_size} --accumulate {accumulate}: try "
            f"--accumulate {2 * accumulate}, which gives the same result, or --batch-size "
            f"{max(1, batch_size // 2)}"
        ) from error
    except RuntimeError as error:
        if "does not have a deterministic implementation" in str(error):
            operation = str(error).split()[0]
            raise UserError(f"{operation} has only a random order: no --deterministic") from error
        if str(error).startswith("DataLoader worker"):  # Linux kills one where memory is short
            reason = f"{' '.join(str(error).split())} If memory was short, try fewer --workers"
            raise OutsideError(f"{reason}; the same command goes on") from error
        raise
