"""The figures agree with scikit-learn, and an evaluation counts every image once."""

import contextlib
import json
from types import SimpleNamespace

import numpy as np
import pytest
import sklearn.metrics
import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F

from lenslet.data.batches import Data, Split
from lenslet.data.prepare import Prepare
from lenslet.metrics import evaluate, evaluation_batch, figures, score


def rows_of(logits, labels):
    """What evaluate() promises for these logits [N, C] and labels [N]."""
    probability, predicted = logits.softmax(1).max(1)
    better = (logits > logits.gather(1, labels[:, None])).sum(1)
    loss = F.cross_entropy(logits, labels, reduction="none")
    index = torch.arange(len(labels))
    return torch.stack([index, labels, predicted, better < 5, probability, loss], 1).double()


@pytest.mark.parametrize(
    ("classes", "met", "claimed"),
    [(10, 10, 10), (3, 3, 3), (2, 2, 2), (7, 4, 7), (7, 7, 4), (12, 5, 3), (6, 1, 1)],
)
def test_figures(classes, met, claimed):
    """All figures are scikit-learn's; a class never predicted has 0, one never met is left out."""
    generator = torch.Generator().manual_seed(classes * met)
    labels = torch.randint(0, met, (200,), generator=generator)
    logits = torch.randn(200, classes, generator=generator)
    logits[:, :claimed] += 8
    logits[range(200), labels] += 1
    result = figures(rows_of(logits, labels), classes)
    assert json.loads(json.dumps(result)) == result  # plain numbers

    names = list(range(classes))
    predicted = logits.argmax(1)
    each = sklearn.metrics.precision_recall_fscore_support(
        labels, predicted, labels=names, zero_division=0
    )
    *each, images = each
    there = images > 0
    assert [row["images"] for row in result["per_class"]] == images.tolist()
    for key, expected in zip(("precision", "recall", "f1"), each, strict=True):
        found = [row[key] for row in result["per_class"]]
        assert [value is not None for value in found] == there.tolist()
        found = [value for value in found if value is not None]
        assert found == pytest.approx(expected[there].tolist(), abs=1e-6)
        assert result[f"macro_{key}"] == pytest.approx(expected[there].mean(), abs=1e-6)
    for row in result["per_class"]:
        assert row["accuracy"] == row["recall"]
    confusion = sklearn.metrics.confusion_matrix(labels, predicted, labels=names)
    assert result["confusion"] == confusion.tolist()
    assert result["images"] == 200
    assert result["top1"] == sklearn.metrics.accuracy_score(labels, predicted)
    scores = logits.double().softmax(1).numpy()
    loss = sklearn.metrics.log_loss(labels, scores, labels=names)
    assert result["loss"] == pytest.approx(loss, abs=1e-5)
    top5 = 1.0
    if classes > 5:
        top5 = sklearn.metrics.top_k_accuracy_score(labels, scores, k=5, labels=names)
    assert result["top5"] == pytest.approx(top5)


def test_figures_of_few_images():
    """One image is enough for a class to have its figures."""
    rows = torch.tensor([[0, 0, 0, 1, 0.5, 1.0], [1, 2, 2, 1, 0.5, 0.5]]).double()
    every = figures(rows, 3)["per_class"]
    assert [row["f1"] for row in every] == [1, None, 1]
    assert [row["recall"] for row in every] == [row["precision"] for row in every] == [1, None, 1]


class Stub(nn.Module):
    """Logits [N, classes] that are a fixed function of the image's first pixels."""

    def __init__(self, classes):
        super().__init__()
        weight = torch.randn(12, classes, generator=torch.Generator().manual_seed(1))
        self.weight = nn.Parameter(weight)

    def forward(self, images):
        assert not self.training
        return images.flatten(1) @ self.weight


PREPARE = Prepare([0.5] * 3, [0.25] * 3, (2, 2))


def noise(count, classes):
    """A data set of tiny images, with labels of all classes."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (count, 3, 2, 2), dtype=torch.uint8, generator=generator)
    labels = torch.randint(0, classes, (count,), generator=generator)
    names = [str(i) for i in range(classes)]
    part = Split(images, labels, [str(i) for i in range(count)])
    return Data("images", names, 3, (2, 2), 1.0, {"test": part}, "")


@pytest.mark.parametrize("classes", [3, 8])
@pytest.mark.parametrize("batch_size", [1, 5, 23, 64])
def test_evaluate(batch_size, classes):
    """A row per image, in order, whatever the batches; the loss is the cross-entropy."""
    data, model = noise(23, classes), Stub(classes)
    rows = evaluate(model, data.loader("test", batch_size), PREPARE, Accelerator(cpu=True))

    part = data.splits["test"]
    logits = model(PREPARE(part.images)).detach()
    expected = rows_of(logits, part.labels)
    assert rows.dtype == torch.float64
    assert torch.equal(rows[:, :4], expected[:, :4])
    assert np.allclose(rows, expected, atol=1e-5)

    loader = data.loader("test", batch_size)
    more = evaluate(model, loader, PREPARE, Accelerator(cpu=True), probabilities=classes)
    assert torch.equal(more[:, :6], rows) and figures(more, classes) == figures(rows, classes)
    assert np.allclose(more[:, 6:], logits.softmax(1), atol=1e-5)


class Small(Stub):
    """A network on a device with room for so many images; it keeps how many it was given."""

    def __init__(self, classes, room):
        super().__init__(classes)
        self.room, self.given = room, []

    def forward(self, images):
        self.given.append(len(images))
        if len(images) > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return super().forward(images)


@pytest.mark.parametrize(
    ("room", "given"),
    [(23, [10, 10, 3]), (9, [10, 5, 5, 5, 5, 3]), (4, [10, 5, *[3, 3, 3, 1] * 2, 3])],
)
def test_evaluate_with_little_memory(capsys, room, given):
    """Batches that do not fit are halved, all later ones too: the rows are the same."""
    data, model = noise(23, 8), Small(8, room)
    loaders = data.loader("test", 10), data.loader("test", 10)
    expected = evaluate(Stub(8), loaders[0], PREPARE, Accelerator(cpu=True))
    rows = evaluate(model, loaders[1], PREPARE, Accelerator(cpu=True))
    assert torch.equal(rows[:, :4], expected[:, :4]) and np.allclose(rows, expected, atol=1e-6)
    assert model.given == given
    said = {23: "", 9: "out of memory: measured 5 images at a time\n"}
    said[4] = "out of memory: measured 3 images at a time\n"
    assert capsys.readouterr().err == said[room]


def test_evaluate_without_memory():
    """It ends where there is no room for one image."""
    data, model = noise(23, 3), Small(3, 0)
    with pytest.raises(torch.OutOfMemoryError):
        evaluate(model, data.loader("test", 10), PREPARE, Accelerator(cpu=True))
    assert model.given == [10, 5, 3, 2, 1]


def test_evaluate_leaves_no_gradients():
    """Measuring a network records nothing for a backward pass."""
    data, model = noise(2, 2), Stub(2).train()
    rows = evaluate(model, data.loader("test", 2), PREPARE, Accelerator(cpu=True))
    assert not rows.requires_grad
    assert model.weight.grad is None
    assert not model.training


def test_views_are_averaged():
    """What counts is the mean of the probabilities, by the weights of the views."""
    data, model = noise(9, 4), Stub(4)
    loader, images = data.loader("test", 9), data.splits["test"].images
    views = lambda images: [(0.75, images), (0.25, images.flip(3))]  # noqa: E731
    rows = evaluate(model, loader, PREPARE, Accelerator(cpu=True), views=views)
    one, other = (model(PREPARE(x)).softmax(1) for x in (images, images.flip(3)))
    expected = rows_of((0.75 * one + 0.25 * other).log().detach(), data.splits["test"].labels)
    assert np.allclose(rows, expected, atol=1e-5)


def test_only_some_images():
    """Of these alone there are rows, and the network is shown no others."""
    data, model = noise(9, 4), Stub(4)
    loader, only = data.loader("test", 4), torch.zeros(9, dtype=torch.bool)
    only[[1, 3, 8]] = True  # none of the second batch
    seen, accelerator = [], Accelerator(cpu=True)
    views = lambda images: seen.append(len(images)) or [(1.0, images)]  # noqa: E731
    rows = evaluate(model, loader, PREPARE, accelerator, views=views, only=only)
    assert torch.equal(rows, evaluate(model, loader, PREPARE, accelerator)[only])
    assert sum(seen) == 3


def test_losses_are_exact_in_bf16():
    """The network computes in the precision of the run; its losses are taken in float32."""
    data, model = noise(9, 4), Stub(4)
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    rows = evaluate(model, data.loader("test", 9), PREPARE, accelerator)
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(PREPARE(data.splits["test"].images))
    assert logits.dtype == torch.bfloat16
    expected = rows_of(logits.detach().float(), data.splits["test"].labels)
    assert np.allclose(rows, expected, atol=1e-5)


def test_rows_of_other_processes():
    """Rows that pad those of a process are left out, and all are put in the split's order."""
    data, model = noise(9, 4), Stub(4)
    whole = evaluate(model, data.loader("test", 4), PREPARE, Accelerator(cpu=True))
    other = whole[[1, 3, 5, 7]].float()
    accelerator = SimpleNamespace(
        device=torch.device("cpu"),
        autocast=contextlib.nullcontext,
        pad_across_processes=lambda rows, pad_index=0: F.pad(rows, (0, 0, 0, 1), value=pad_index),
        gather=lambda rows: torch.cat([other, rows]),
    )
    rows = evaluate(model, data.loader("test", 4, world=2), PREPARE, accelerator)
    assert torch.equal(rows, whole)


def test_a_signal_ends_an_evaluation():
    """It ends before the next batch, and has no rows, where the processes agree to stop."""
    data, model, met, accelerator = noise(6, 4), Stub(4), [], Accelerator(cpu=True)

    def agree(wait=False):
        assert wait
        interrupts.stop = interrupts.asked

    def views(images):
        met.append(len(images))
        interrupts.asked = 143 * (len(met) == last)
        return [(1.0, images)]

    for last, batches in ((2, 2), (9, 3)):
        met.clear()
        interrupts = SimpleNamespace(asked=0, stop=0, agree=agree)
        rows = evaluate(model, data.loader("test", 2), PREPARE, accelerator, interrupts, views)
        assert met == [2] * batches and (rows is None) == (last == 2)


@pytest.mark.parametrize(
    ("given", "wanted"),
    [
        ((512, 1, 1, True), 2048),
        ((512, 4, 1, True), 512),
        ((16, 1, 1, True), 256),
        ((16, 1, 1, False), 64),
        ((2, 4, 1, False), 1),
        ((2, 4, 8, False), 8),
        ((7, 2, 1, False), 12),
    ],
)
def test_evaluation_batch(given, wanted):
    """Four times the images of a training step, at least one a process, and 256 small ones."""
    assert evaluation_batch(*given) == wanted


def test_score():
    """A larger score is a better epoch: accuracy if nothing is said, or minus the loss."""
    record = {"val_loss": 0.25, "val_accuracy": 0.5, "val_f1": 0.75}
    assert [score(record, metric) for metric in (None, "accuracy", "f1", "loss")] == [
        0.5,
        0.5,
        0.75,
        -0.25,
    ]
