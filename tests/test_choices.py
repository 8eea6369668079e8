"""What is chosen by name does what the name says."""

import pytest
import torch

import choices
from choices import lr_factor
from model import create_model


def factors(total, warmup, schedule):
    return [lr_factor((k + 0.5) / total, warmup, total, schedule) for k in range(total)]


@pytest.mark.parametrize("warmup", ["10", "10%"])
def test_learning_rate(warmup):
    """A linear rise, then half a cosine or a line to zero, or no change; in the middle of steps."""
    for schedule in choices.SCHEDULES:
        rates = factors(100, warmup, schedule)
        assert rates[:10] == pytest.approx([0.05 + 0.1 * k for k in range(10)])
        assert max(rates) <= 1
    cosine, linear = factors(100, warmup, "cosine"), factors(100, warmup, "linear")
    assert (
        cosine[10] > 0.99 and cosine[54] == pytest.approx(0.5, abs=0.01) and 0 < cosine[-1] < 1e-3
    )
    assert linear[10:] == pytest.approx([1 - (k + 0.5) / 90 for k in range(90)])
    assert set(factors(100, warmup, "constant")[10:]) == {1.0}
    assert set(factors(100, "0", "constant")) == {1.0}


def test_warmup_longer_than_training():
    """The rate rises all the time, and nothing is divided by zero."""
    rates = factors(10, "40", "cosine")
    assert rates == pytest.approx([(k + 0.5) / 40 for k in range(10)])


@pytest.mark.parametrize("name", choices.OPTIMIZERS)
def test_optimizers_learn(name):
    """Each optimizer holds every trainable parameter once, and lowers a loss."""
    torch.manual_seed(0)
    model = create_model("fastnet", 3, 1, width=8)
    optimizer = choices.create_optimizer(name, model, 0.02, 0.6, 0.01)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {p for p in model.parameters() if p.requires_grad}
    images, labels = torch.randn(30, 1, 32, 32), torch.arange(30) % 3
    losses = []
    for _ in range(8):
        loss = torch.nn.functional.cross_entropy(model(images), labels)
        losses.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.9 * losses[0]


def test_muon_orthogonalises_filters():
    """A filter's step has equal singular values; the last layer goes by AdamW."""
    torch.manual_seed(0)
    model = create_model("fastnet", 3, 1, width=8)
    optimizer = choices.create_optimizer("muon", model, 1.0, 0.0, 0.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    torch.nn.functional.cross_entropy(
        model(torch.randn(30, 1, 32, 32)), torch.arange(30) % 3
    ).backward()
    optimizer.step()
    steps = {name: p - before[name] for name, p in model.named_parameters()}
    values = torch.linalg.svdvals(steps["blocks.1.conv2.weight"].flatten(1))
    assert values.min() > 0.5 * values.max()  # Newton-Schulz gives them within bounds
    head = steps[
        "head.weight"
    ].abs()  # Adam's first step is the same for all, whatever the gradient
    assert head.std() < 0.01 * head.mean()
    assert not steps["whitening.weight"].any()
