"""Losses have the values and gradients that they should, and pictures their weights."""

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from lenslet.errors import UserError
from lenslet.training import losses
from lenslet.training.losses import Objective, image_losses

LOGITS = torch.tensor([[2.0, 0.5, -1.0], [0.1, 0.2, 0.3], [-3.0, 1.0, 4.0]])
LABELS = torch.tensor([0, 2, 1])
HARD = F.one_hot(LABELS, 3).float()
SOFT = torch.tensor([[0.7, 0.3, 0.0], [0.2, 0.2, 0.6], [0.0, 1.0, 0.0]])


def test_cross_entropy_is_that_of_torch():
    """Hard and soft targets, with and without label smoothing."""
    for smoothing in (0.0, 0.2):
        one = image_losses("cross-entropy", LOGITS, HARD, smoothing)
        plain = F.cross_entropy(LOGITS, LABELS, reduction="none", label_smoothing=smoothing)
        torch.testing.assert_close(one, plain)
    by_hand = -(SOFT * LOGITS.log_softmax(1)).sum(1)
    torch.testing.assert_close(image_losses("cross-entropy", LOGITS, SOFT), by_hand)


def test_focal_loss():
    """With gamma 0 cross-entropy; for two classes torchvision's; else by the paper's formula."""
    entropy = image_losses("cross-entropy", LOGITS, HARD)
    torch.testing.assert_close(image_losses("focal:0", LOGITS, HARD), entropy)
    p = LOGITS.softmax(1)[torch.arange(3), LABELS]
    torch.testing.assert_close(image_losses("focal", LOGITS, HARD), -((1 - p) ** 2) * p.log())
    torch.testing.assert_close(image_losses("focal:0.5", LOGITS, HARD), -((1 - p) ** 0.5) * p.log())
    x, y = torch.linspace(-4, 4, 9), torch.arange(9) % 2
    two = image_losses("focal:2", torch.stack([torch.zeros(9), x], 1), F.one_hot(y, 2).float())
    torch.testing.assert_close(two, sigmoid_focal_loss(x, y.float(), alpha=-1, gamma=2))
    sure = torch.tensor([[80.0, 0.0]], requires_grad=True)  # 1 - p is 0 in float32
    image_losses("focal:0.5", sure, torch.tensor([[1.0, 0.0]])).sum().backward()
    assert sure.grad.isfinite().all()


def test_bce_and_mse():
    """Means over the classes, as torch has them; smoothing moves the targets of both."""
    timm_loss = pytest.importorskip("timm.loss").BinaryCrossEntropy
    for smoothing in (0.0, 0.1):
        ours = image_losses("bce", LOGITS, HARD, smoothing)
        assert ours.mean().item() == pytest.approx(timm_loss(smoothing)(LOGITS, LABELS).item())
        smoothed = HARD * (1 - smoothing) + smoothing / 3
        brier = F.mse_loss(LOGITS.softmax(1), smoothed, reduction="none").mean(1)
        torch.testing.assert_close(image_losses("mse", LOGITS, HARD, smoothing), brier)


@pytest.mark.parametrize("name", [*losses.LOSSES, "focal:1.5", "teacher"])
def test_gradients_of_each(name):
    """In double precision the gradients agree with differences (torch.autograd.gradcheck)."""
    torch.manual_seed(0)
    logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    targets = (
        F.one_hot(torch.arange(5) % 4, 4) * (1 + torch.arange(5.0, dtype=torch.float64))[:, None]
    )
    if name != "focal" and name != "focal:1.5":
        targets = targets + torch.rand(5, 4, dtype=torch.float64)
    taught = torch.randn(5, 4, dtype=torch.float64)
    weights = torch.ones(5, dtype=torch.float64)
    if name == "teacher":
        objective = Objective("bce", 4, weights, 0.1, lambda images: taught, 0.6, 3.0)
    else:
        objective = Objective(name, 4, weights, 0.0 if "focal" in name else 0.1)
    assert torch.autograd.gradcheck(lambda x: objective(x, targets, None), logits)


def test_class_weights():
    """balanced is scikit-learn's; a list is taken in the order of the classes, and counted."""
    labels = np.array([0] * 50 + [1] * 3 + [2] * 7)
    wanted = compute_class_weight("balanced", classes=np.arange(3), y=labels)
    ours = losses.class_weights("balanced", torch.tensor(labels).bincount())
    assert ours.tolist() == pytest.approx(wanted.tolist())
    counts = torch.tensor([5, 5])
    assert losses.class_weights("1,4", counts).tolist() == [1, 4]
    assert losses.class_weights(None, counts).tolist() == [1, 1]
    with pytest.raises(UserError, match="3 numbers for 2 classes"):
        losses.class_weights("1,2,3", counts)


def test_weighted_loss_is_that_of_torch():
    """A whole data set with class weights gives torch's weighted mean; mixed pictures mix it."""
    weights = torch.tensor([3.0, 1.0, 0.5])
    objective = Objective("cross-entropy", 3, weights[LABELS])
    targets = objective.targets(LABELS, torch.arange(3))
    mean = objective(LOGITS, targets, None) / 3
    torch.testing.assert_close(mean, F.cross_entropy(LOGITS, LABELS, weights))
    mixed = 0.3 * targets[:1] + 0.7 * targets[1:2]
    one, other = (
        targets[i].sum() * F.cross_entropy(LOGITS[:1], LABELS[i : i + 1]) for i in range(2)
    )
    torch.testing.assert_close(objective(LOGITS[:1], mixed, None), 0.3 * one + 0.7 * other)
    nothing = Objective("bce", 3, torch.tensor([1.0, 1.0, 0.0]))
    targets = nothing.targets(LABELS, torch.arange(3))
    assert nothing(LOGITS[2:], targets[2:], None) < 1e-10


def test_distillation():
    """Nothing is lost on a teacher's own answers; else Hinton's softened divergence."""
    assert losses.distillation(LOGITS, LOGITS, 4.0).abs().max() < 1e-6
    other = LOGITS.flip(1)
    p, q = (other / 2).softmax(1), (LOGITS / 2).softmax(1)
    wanted = 4 * (p * (p.log() - q.log())).sum(1)
    torch.testing.assert_close(losses.distillation(LOGITS, other, 2.0), wanted)
    half = Objective(
        "mse", 3, torch.ones(3), teacher=lambda images: other, share=0.5, temperature=2
    )
    both = 0.5 * image_losses("mse", LOGITS, HARD) + 0.5 * wanted
    torch.testing.assert_close(half(LOGITS, HARD, None), both.sum())
