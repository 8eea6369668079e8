"""Losses have the values and gradients that they should, and images their weights."""

import hashlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from sklearn.utils.class_weight import compute_class_weight
from torch.nn import functional as F
from torchvision.ops import sigmoid_focal_loss

from lenslet.data.batches import Split
from lenslet.errors import UserError
from lenslet.training import losses, options
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


@pytest.mark.parametrize("name", [*options.LOSSES, "focal:1.5", "teacher"])
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


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ({}, ""),
        ({"smoothing": 0.1}, "smoothed cross-entropy"),
        ({"loss": "focal:2"}, "focal:2"),
        ({"loss": "bce", "smoothing": 0.1}, "smoothed bce"),
        ({"weights": torch.tensor([1.0, 2.0])}, "weighted cross-entropy"),
        ({"teacher": len}, "distilled cross-entropy"),
    ],
)
def test_name(arguments, name):
    """What is minimized has a name wherever it is not the cross-entropy of the images."""
    defaults = {"loss": "cross-entropy", "classes": 3, "weights": torch.ones(2)}
    assert Objective(**defaults | arguments).name == name


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


@pytest.fixture
def split(tmp_path):
    """Names of four training images in a folder that has another one in val/."""
    for name in ("train/a/0.png", "train/a/1.png", "train/b/0.png", "train/b/1.png", "val/a/9.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    names = [f"train/{c}/{i}.png" for c in "ab" for i in range(2)]

    class Four(SimpleNamespace):
        __len__ = lambda self: 4  # noqa: E731

    return Four(names=names)


def test_image_weights(split, tmp_path):
    """Each image has the weight that the file gives it, or 1; and the file its SHA-256."""
    path = tmp_path / "weights.csv"
    read = lambda: losses.image_weights(str(path), str(tmp_path), split)  # noqa: E731
    weights, sha256 = losses.image_weights(None, str(tmp_path), split)
    assert weights.tolist() == [1, 1, 1, 1] and sha256 == ""
    text = "file,weight\ntrain/b/0.png,2.5\nval/a/9.png,7\ntrain/a/1.png,0\n"
    path.write_text(text)
    weights, sha256 = read()
    assert weights.tolist() == [1, 0, 2.5, 1] and weights.dtype == torch.float32
    assert sha256 == hashlib.sha256(text.encode()).hexdigest()
    path.write_bytes(b"\xef\xbb\xbfweight,note,file\n3,as spreadsheets write it,train/a/0.png\n")
    assert read()[0].tolist() == [3, 1, 1, 1] and read()[1] != sha256


def test_image_weights_of_a_named_set(tmp_path):
    """There an image's name is its number; a number that it has elsewhere is skipped."""
    path = tmp_path / "weights.csv"
    split = Split(torch.zeros(4, 1, 1, 1), torch.zeros(2), ["1", "3"], torch.tensor([1, 3]))
    path.write_text("file,weight\n3,5\n0,7\n2,7\n")
    assert losses.image_weights(str(path), "digits", split)[0].tolist() == [1, 5]
    for name in ("4", "01", "-1", "1.0", "a", ""):
        path.write_text(f"file,weight\n{name},1\n")
        with pytest.raises(UserError, match=f"line 2: '{name}' is not an image of digits"):
            losses.image_weights(str(path), "digits", split)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("train/a/9.png,1", "line 2: 'train/a/9.png' is not an image of "),
        ("train/a/0.png,1\ntrain/a/1.png,-1", "line 3: '-1' is not a weight"),
        ("train/a/0.png,inf", "line 2: 'inf' is not a weight"),
        ("train/a/0.png,nan", "line 2: 'nan' is not a weight"),
        ("train/a/0.png", "line 2: '' is not a weight"),
        ("train/a/0.png,0\ntrain/a/1.png,0\ntrain/b/0.png,0\ntrain/b/1.png,0", "above 0"),
        ("", "columns file and weight"),
    ],
)
def test_wrong_image_weights(split, tmp_path, text, said):
    """What is wrong is told with its line, and without the file, which the caller knows."""
    path = tmp_path / "weights.csv"
    path.write_text(f"file,weight\n{text}\n")
    with pytest.raises(UserError) as caught:
        losses.image_weights(str(path), str(tmp_path), split)
    assert said in str(caught.value)
    assert str(path) not in str(caught.value) and "--" not in str(caught.value)


def test_unreadable_image_weights(split, tmp_path):
    """No file, no text, no such columns: one line each."""
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "other").write_text("image,weight\ntrain/a/0.png,1\n")
    for name, said in (("gone", "No such file"), ("binary", "not a CSV"), ("other", "columns")):
        with pytest.raises(UserError, match=said):
            losses.image_weights(str(tmp_path / name), str(tmp_path), split)


def test_weighted_loss_is_that_of_torch():
    """A whole data set with class weights gives torch's weighted mean; mixed images mix it."""
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
    p, q = (other / 3).softmax(1), (LOGITS / 3).softmax(1)
    wanted = 9 * (p * (p.log() - q.log())).sum(1)
    torch.testing.assert_close(losses.distillation(LOGITS, other, 3.0), wanted)
    half = Objective(
        "mse", 3, torch.ones(3), teacher=lambda images: other, share=0.5, temperature=3
    )
    both = 0.5 * image_losses("mse", LOGITS, HARD) + 0.5 * wanted
    torch.testing.assert_close(half(LOGITS, HARD, None), both.sum())
    plain = Objective("mse", 3, torch.ones(3), teacher=lambda images: other, share=1.0)
    sharp = losses.distillation(LOGITS, other, 1.0)  # where no temperature is said
    torch.testing.assert_close(plain(LOGITS, HARD, None), sharp.sum())
    none = Objective("mse", 3, torch.ones(3), teacher=lambda images: other)
    torch.testing.assert_close(none(LOGITS, HARD, None), image_losses("mse", LOGITS, HARD).sum())
