"""What training minimizes: the loss of each image, times how much the image weighs."""

import contextlib
import os
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

from lenslet.data import sets
from lenslet.data.batches import Split
from lenslet.data.labels import read_table
from lenslet.data.layout import find_folder, name_in
from lenslet.errors import UserError


def image_losses(text: str, logits: Tensor, targets: Tensor, smoothing: float = 0.0) -> Tensor:
    """The loss of each image, [N], by the name that a recipe or the command line gives.

    logits [N, C], targets [N, C] float, whose rows are shares that sum to 1.  smoothing: share of
    them that is spread over all classes.

        cross-entropy   of the shares
        focal:G         cross-entropy of the largest share's class, times (1 - its probability)^G
                        (2; Lin et al. 2017, arXiv:1708.02002, for many classes)
        bce             binary cross-entropy of each class against all others, their mean
                        (Wightman et al. 2021, arXiv:2110.00476)
        mse             squared difference of probabilities (softmax) and shares, mean over classes
                        (Brier 1950, Monthly Weather Review 78)
    """
    name, _, gamma = text.partition(":")
    if name == "cross-entropy":
        return F.cross_entropy(logits, targets, reduction="none", label_smoothing=smoothing)
    if name == "focal":
        log = logits.log_softmax(1).gather(1, targets.argmax(1, keepdim=True))[:, 0]
        # expm1 keeps 1 - p exact near p = 1, where an exponent below 1 has no slope at 0.
        return -log * (-torch.expm1(log)).clamp(min=1e-12) ** float(gamma or 2)
    targets = (1 - smoothing) * targets + smoothing / targets.shape[1]
    if name == "bce":
        return F.binary_cross_entropy_with_logits(logits, targets, reduction="none").mean(1)
    return (logits.softmax(1) - targets).square().mean(1)


def distillation(logits: Tensor, taught: Tensor, temperature: float) -> Tensor:
    """How far a network is from its teacher, [N]: both logits [N, C].

    The divergence of the softened probabilities, times temperature² so that gradients keep their
    size (Hinton, Vinyals, Dean 2015, arXiv:1503.02531).
    """
    ours, theirs = ((x / temperature).log_softmax(1) for x in (logits, taught))
    return F.kl_div(ours, theirs, reduction="none", log_target=True).sum(1) * temperature**2


def class_weights(text: str | None, counts: Tensor) -> Tensor:
    """The weight of each class, float [C]: 1, "balanced" (N / (C · count), as scikit-learn has it),
    or the numbers in "w1,w2,…".

    counts int64 [C]: training images of each class.  Errors: UserError for a wrong number.
    """
    if text == "balanced":
        return counts.sum() / (len(counts) * counts.float())
    if text is None:
        return torch.ones(len(counts))
    weights = torch.tensor([float(word) for word in text.split(",")])
    if len(weights) != len(counts):
        raise UserError(f"{len(weights)} numbers for {len(counts)} classes (in their order)")
    return weights


def image_weights(
    path: str | None, name: str, split: Split, default: str | None = None
) -> tuple[Tensor, str]:
    """The weight of each image of a split in the loss, float [N], and the file's SHA-256.

    path: a CSV file with the columns file (below the data folder; in a named set the image's
    number) and weight (at least 0); images that it does not name weigh 1.  None: all do.
    default: what they weigh if there is no column weight; None: there must be one.
    Errors: UserError for such a file, a line of it, or an image that does not exist.
    """
    weights = torch.ones(len(split))
    if not path:
        return weights, ""
    rows, sha256 = read_table(path, "file", *([] if default else ["weight"]))
    place = {file: i for i, file in enumerate(split.names)}
    for line, row in rows:
        file, given, weight = row["file"], row.get("weight", default), -1.0
        with contextlib.suppress(ValueError):
            weight = float(given)
        if not 0 <= weight < float("inf"):
            raise UserError(f"line {line}: {given!r} is not a weight of 0 or more")
        known, folder = file, find_folder(name)
        if name not in sets.SETS:  # it may be absolute, or begin with ./
            known = name_in(folder, Path(os.path.normpath(folder / file)))
        if known in place:
            weights[place[known]] = weight
        elif not _is_image(file, name, split):
            raise UserError(f"line {line}: {file!r} is not an image of {name}")
    if not weights.any():
        raise UserError("no training image has a weight above 0")
    return weights, sha256


def _is_image(file: str, name: str, split: Split) -> bool:
    """Whether the data has an image of this name that is not in the training split: one for
    validation or testing, or left out by a limit.
    """
    if name in sets.SETS:
        return file.isdecimal() and file == str(int(file)) and int(file) < len(split.images)
    return (find_folder(name) / file).is_file()


class Objective:
    """What training minimizes: the loss of each image, times the image's weight.

    weights float [N]: of each training image; scaled to a mean of 1, so that a learning rate keeps
    its meaning.  teacher: a function from uint8 images [B, C, H, W] to logits.  share: of the
    teacher in the loss.
    """

    def __init__(
        self, loss, classes, weights, smoothing=0.0, teacher=None, share=0.0, temperature=1.0
    ):
        self.loss, self.classes, self.smoothing = loss, classes, smoothing
        # Not quite 0, so that targets tell the class in any case.
        self.weights = (weights / weights.mean()).clamp(min=1e-12)
        self.teacher, self.share, self.temperature = teacher, share, temperature

    @property
    def name(self) -> str:
        """What to call it beside the cross-entropy of the images; '' where it is nothing else."""
        changes = {
            "distilled": self.teacher,
            "weighted": len(self.weights.unique()) > 1,
            "smoothed": self.smoothing,
        }
        words = [word for word, changed in changes.items() if changed]
        return " ".join([*words, self.loss]) if words or self.loss != "cross-entropy" else ""

    def targets(self, labels: Tensor, index: Tensor) -> Tensor:
        """Each image's weight at its class, float [B, C]; labels, index int64 [B].

        Augmentation may mix the rows of several images.
        """
        return F.one_hot(labels, self.classes) * self.weights[index, None]

    def __call__(self, logits: Tensor, targets: Tensor, images: Tensor) -> Tensor:
        """The sum over a batch.  logits [B, C] of uint8 images [B, ?, H, W]; targets [B, C]."""
        weights = targets.sum(1)
        shares = targets / weights[:, None]
        losses = image_losses(self.loss, logits, shares, self.smoothing)
        if self.teacher:
            taught = distillation(logits, self.teacher(images), self.temperature)
            losses = (1 - self.share) * losses + self.share * taught
        return (weights * losses).sum()
