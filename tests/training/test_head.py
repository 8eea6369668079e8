"""The last layer that is fitted is the best one there is for the frozen features."""

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from sklearn.linear_model import LogisticRegression
from torch import nn

from lenslet.data.batches import Data, Split
from lenslet.data.prepare import Prepare
from lenslet.errors import UserError
from lenslet.training.head import DECAY, fit_head
from model import create_model


def images(count=60, classes=3):
    """uint8 [N, 3, 16, 16]: noise, brighter at one place by the class."""
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(count) % classes
    pixels = torch.randint(0, 120, (count, 3, 16, 16), generator=generator)
    for i, label in enumerate(labels):
        pixels[i, label, 2 + 4 * label : 8 + 4 * label] += 60
    return pixels.to(torch.uint8), labels


def loader_of(pixels, labels):
    split = Split(pixels, labels, [str(i) for i in range(len(labels))])
    data = Data("x", ["a", "b", "c"], 3, (16, 16), 1.0, {"train": split}, "")
    return data.loader("train", 16, seed=0)


def unchanged(images, targets, epoch, index):
    return images, targets


def fit(network, views=1, augment=unchanged):
    prepare = Prepare([0.5] * 3, [0.5] * 3, network.input_size)
    pixels, labels = images()
    fit_head(network, prepare, loader_of(pixels, labels), augment, views, Accelerator(cpu=True))
    assert network.training
    with torch.no_grad():
        return network.eval()(prepare(pixels)), labels


@pytest.mark.parametrize("name", ["lenet", "fastnet"])
def test_head_is_logistic_regression(name):
    """The probabilities are scikit-learn's, whether the layer has a bias or a scale."""
    torch.manual_seed(0)
    network = create_model(name, 3, size=16 if name == "fastnet" else 32)
    seen = []
    head = network.head if name == "fastnet" else network.fc3
    head.register_forward_hook(lambda _, inputs, output: seen.append(inputs[0]))
    logits, labels = fit(network)
    features = seen[-1].double().numpy()
    deviation = features.std(0, ddof=1)
    deviation = deviation.clip(1e-3 * deviation.mean())
    scaled = (features - features.mean(0) * (head.bias is not None)) / deviation
    oracle = LogisticRegression(
        C=1 / (DECAY * len(labels)), fit_intercept=head.bias is not None, max_iter=10_000, tol=1e-8
    ).fit(scaled, labels)
    wanted = oracle.predict_proba(scaled)
    assert np.abs(logits.softmax(1).numpy() - wanted).max() < 0.01
    assert (logits.argmax(1) == labels).float().mean() > 0.9


def test_only_the_head_changes():
    """All other weights, the batch-norm statistics and what is drawn later stay as they were."""
    torch.manual_seed(0)
    network = create_model("fastnet", 3, size=16, width=8)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    fit(network)
    after = network.state_dict()
    assert [k for k in before if not torch.equal(before[k], after[k])] == ["head.weight"]
    assert torch.equal(state, torch.get_rng_state())
    assert all(p.grad is None for p in network.parameters())


def test_views_are_those_of_epochs():
    """Each view is augmented as the epoch of its number."""
    asked = []

    def augment(images, targets, epoch, index):
        asked.append((epoch, len(index)))
        return images, targets

    torch.manual_seed(0)
    fit(create_model("fastnet", 3, size=16, width=8), views=2, augment=augment)
    assert sorted({epoch for epoch, _ in asked}) == [0, 1]
    assert sum(count for _, count in asked) == 120


def test_no_linear_head():
    """A network that does not end in one linear layer is refused."""
    network = nn.Sequential(nn.Conv2d(3, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    network.input_size = (16, 16)
    with pytest.raises(UserError, match="not linear"):
        fit(network)
