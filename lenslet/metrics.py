"""What a network gets right: one pass over a split, and every figure derived from it."""

import math
import sys

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lenslet.data.batches import on_device
from lenslet.data.prepare import Prepare
from lenslet.distributed.interrupts import Interrupts
from lenslet.errors import counted

COLUMNS = ("index", "label", "predicted", "in_top5", "probability", "loss")


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    loader: DataLoader,
    prepare: Prepare,
    accelerator: Accelerator,
    interrupts: Interrupts | None = None,
    views=lambda images: [(1.0, images)],
    probabilities: int = 0,
    only: Tensor | None = None,
) -> Tensor | None:
    """One row per image of a split, float64 [N, 6] as COLUMNS says, in the split's order.

    Every process gets all rows, however the images were divided: each image counts once.
    in_top5 is 0 or 1 (with fewer than 5 classes: among all of them); probability is that of the
    predicted class; loss is the cross-entropy.  Leaves the model in evaluation mode.

    probabilities: of so many classes, from the first on, as more columns: [N, 6 + probabilities].
    views: of images, pairs of weight and images that the network is shown instead, over which the
    probabilities are averaged; see augment.tta_views().
    only: bool [N], on the CPU: the images to evaluate; the rows are theirs alone.
    Where a batch does not fit into the device's memory, this process goes on with half as many
    images at a time, and says so on standard error.
    Returns None where a signal, which `interrupts` waits for, asks any process to stop.
    Errors: UnreadableImage for a file gone or damaged; OutOfMemoryError where not one image fits.
    """
    model.eval()
    most = len(loader.dataset)  # images at a time
    parts = [torch.empty(0, len(COLUMNS) + probabilities, device=accelerator.device)]
    for batch in on_device(loader, accelerator.device):
        if interrupts and interrupts.asked:
            break
        shown, done = batch[:3], 0
        if only is not None:
            shown = [x[only[batch.index.cpu()]] for x in shown]
        while done < len(shown[1]):
            images, labels, index = (x[done : done + most] for x in shown)
            try:
                with accelerator.autocast():
                    logs = [
                        math.log(weight) + model(prepare(view)).float().log_softmax(1)
                        for weight, view in views(images)
                    ]
                logs = torch.stack(logs).logsumexp(0)  # of the mean probabilities, [B, classes]
                parts.append(_rows(logs, labels, index, probabilities))
                done += most
            except torch.OutOfMemoryError:
                if len(labels) == 1:
                    raise
                most = (len(labels) + 1) // 2
    if most < len(loader.dataset):
        print(f"out of memory: measured {counted(most, 'image')} at a time", file=sys.stderr)
    if interrupts:
        interrupts.agree(wait=True)
        if interrupts.stop:
            return None
    rows = _gather(torch.cat(parts), accelerator)
    wanted = torch.arange(len(loader.dataset)) if only is None else only.nonzero()[:, 0]
    assert torch.equal(rows[:, 0], wanted.double()), f"{len(rows)} rows of {len(wanted)}"
    return rows


def _gather(rows: Tensor, accelerator: Accelerator) -> Tensor:
    """The rows of all processes, float64 [N, …], sorted by the first column, which is an index."""
    # Processes may have different numbers of rows; what pads them has the index -1.
    rows = accelerator.pad_across_processes(rows, pad_index=-1)
    rows = accelerator.gather(rows).cpu().double()
    rows = rows[rows[:, 0] >= 0]
    return rows[rows[:, 0].argsort()]


def _rows(logs: Tensor, labels: Tensor, index: Tensor, probabilities: int) -> Tensor:
    """evaluate()'s rows, float32, for log-probabilities [B, classes].  Waits for no GPU."""
    probability, predicted = logs.max(1)
    in_top5 = (logs.topk(min(5, logs.shape[1])).indices == labels[:, None]).any(1)
    loss = F.nll_loss(logs, labels, reduction="none")
    # float32 holds an index exactly up to 16.7 million images.
    columns = [index, labels, predicted, in_top5, probability.exp(), loss]
    return torch.stack([*columns, *logs[:, :probabilities].exp().unbind(1)], 1)


def evaluation_batch(batch_size: int, accumulate: int, world: int, in_memory: bool) -> int:
    """Images to evaluate at a time, over all processes, after training with these settings.

    Without gradients four times as many fit; small images are faster in batches of 256 or more.
    """
    return max(4 * (batch_size // accumulate), world, 256 if in_memory else 1)


def figures(rows: Tensor, classes: int) -> dict:
    """Every figure of an evaluation, as fractions in 0..1; a class never predicted has 0.

    rows [N, 6 or more] from evaluate().  confusion[true][predicted] counts images; the macro
    figures are means over the classes that there are images of, the others' figures are None.
    """
    _, label, predicted, in_top5, _, loss = rows[:, : len(COLUMNS)].unbind(1)
    cells = (label * classes + predicted).long()
    confusion = cells.bincount(minlength=classes**2).view(classes, classes)
    hits, actual, guessed = confusion.diagonal(), confusion.sum(1), confusion.sum(0)
    precision = hits / guessed.clamp(min=1)
    recall = hits / actual.clamp(min=1)
    f1 = 2 * hits / (actual + guessed).clamp(min=1)
    met = actual > 0
    columns = [
        [value if n else None for value, n in zip(values.tolist(), actual.tolist(), strict=True)]
        for values in (precision, recall, f1)
    ]
    return {
        "images": len(rows),
        "loss": loss.mean().item(),
        "top1": hits.sum().item() / len(rows),
        "top5": in_top5.mean().item(),
        "macro_precision": precision[met].mean().item(),
        "macro_recall": recall[met].mean().item(),
        "macro_f1": f1[met].mean().item(),
        "per_class": [
            {"images": n, "accuracy": r, "precision": p, "recall": r, "f1": f}
            for n, p, r, f in zip(actual.tolist(), *columns, strict=True)
        ],
        "confusion": confusion.tolist(),
    }


def score(record: dict, metric: str | None) -> float:
    """What the best epoch has the largest of; record: an epoch's, as metrics.json has it.

    metric: accuracy (None), f1 (the mean over all classes) or loss.
    """
    return -record["val_loss"] if metric == "loss" else record[f"val_{metric or 'accuracy'}"]
