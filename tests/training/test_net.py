"""Parts of a network are frozen and released as the options say."""

import copy
from collections import OrderedDict

import pytest
import torch
from torch import nn

import model
from lenslet.errors import UserError
from lenslet.training import net


def tiny(channels=3, classes=3, seed=0):
    """images [N, channels, H, W] -> logits [N, classes], by way of conv, bn and fc."""
    torch.manual_seed(seed)
    layers = {
        "conv": nn.Conv2d(channels, 4, 3),
        "bn": nn.BatchNorm2d(4),
        "pool": nn.AdaptiveAvgPool2d(1),
        "flat": nn.Flatten(),
        "fc": nn.Linear(4, classes),
    }
    return nn.Sequential(OrderedDict(layers))


def free(network):
    return {name for name, p in network.named_parameters() if p.requires_grad}


def test_frozen_epochs():
    """For N epochs only the head learns and statistics stand; then all does, as it was before."""
    network = tiny()
    network.conv.bias.requires_grad = False
    freezer = net.Freezer(network, [], 2, ["fc"])
    everything = free(network)
    changes = []
    for epoch in range(4):
        changes.append(freezer.update(epoch))
        freezer.train()
        assert free(network) == ({"fc.weight", "fc.bias"} if epoch < 2 else everything)
        before = network.bn.running_mean.clone()
        network(torch.rand(2, 3, 8, 8)).sum().backward()
        assert torch.equal(network.bn.running_mean, before) == (epoch < 2)
        assert network.fc.training and network.training
    assert changes == [True, False, True, False]
    assert "conv.bias" not in everything


def test_resumed_after_the_frozen_epochs():
    """A run that goes on later finds everything released, and nothing changed."""
    network = tiny()
    freezer = net.Freezer(network, [], 2, ["fc"])
    assert not freezer.update(5)
    freezer.train()
    assert len(free(network)) == 6 and network.bn.training


@pytest.mark.parametrize(
    ("patterns", "frozen", "statistics"),
    [
        (["conv"], {"conv.weight", "conv.bias"}, False),
        (["b*"], {"bn.weight", "bn.bias"}, True),
        (["bn", "conv"], {"conv.weight", "conv.bias", "bn.weight", "bn.bias"}, True),
        (["*.bias"], {"conv.bias", "bn.bias", "fc.bias"}, False),
        (["bn.*"], {"bn.weight", "bn.bias"}, False),
        (["con"], None, None),
        ([], set(), False),
    ],
)
def test_patterns(patterns, frozen, statistics):
    """Patterns are of a parameter's own name or of a layer around it, whole; a norm stands only
    where the layer's name is meant."""
    network = tiny()
    if frozen is None:
        with pytest.raises(UserError):
            net.Freezer(network, patterns, 0, ["fc"])
        return
    everything = free(network)
    freezer = net.Freezer(network, patterns, 0, ["fc"])
    assert freezer.update(0) == bool(frozen)
    freezer.train()
    assert everything - free(network) == frozen
    assert network.bn.training != statistics


def test_patterns_outlast_the_frozen_epochs():
    """What a pattern names stays fixed after the frozen epochs, and in the head too."""
    network = tiny()
    freezer = net.Freezer(network, ["bn", "fc.bias"], 1, ["fc"])
    freezer.update(0)
    assert free(network) == {"fc.weight"}
    freezer.update(1)
    freezer.train()
    assert free(network) == {"fc.weight", "conv.weight", "conv.bias"}
    assert not network.bn.training


def test_norms_are_frozen_by_name():
    """Norms that never train, or have nothing to train, stand with the part that they are in."""
    network = nn.Sequential(
        OrderedDict(
            body=nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False), nn.Dropout()),
            extra=nn.InstanceNorm2d(4, track_running_stats=True),
            fc=nn.Linear(4, 2),
        )
    )
    freezer = net.Freezer(network, ["body"], 1, ["fc"])
    for epoch, standing in ((0, {"body.1", "extra"}), (1, {"body.1"})):
        freezer.update(epoch)
        freezer.train()
        assert {n for n, m in network.named_modules() if not m.training} == standing


def test_fastnet_keeps_what_never_learns():
    """fastnet's whitening and its norms' scale stay fixed through a freeze and its end."""
    network = model.create_model("fastnet", 10, width=8)
    never = {name for name, p in network.named_parameters() if not p.requires_grad}
    freezer = net.Freezer(network, [], 1, model.head_of(network))
    freezer.update(0)
    freezer.train()
    assert free(network) == {"head.weight"}
    assert not any(m.training for m in network.modules() if isinstance(m, nn.BatchNorm2d))
    freezer.update(1)
    freezer.train()
    assert {name for name, p in network.named_parameters() if not p.requires_grad} == never
    assert all(m.training for m in network.modules())


def test_wrong_patterns():
    """A pattern that matches nothing gets the nearest name and all parts; freezing all fails."""
    with pytest.raises(UserError, match=r"named cnov .*did you mean conv.*has conv, bn, fc"):
        net.Freezer(tiny(), ["cnov"], 0, ["fc"])
    for patterns in (["*"], ["conv", "bn", "fc"]):
        with pytest.raises(UserError, match=r"^nothing is left to train; "):
            net.Freezer(tiny(), patterns, 0, ["fc"])
    with pytest.raises(UserError, match="nothing is left to train, as the first epochs"):
        net.Freezer(tiny(), ["fc"], 1, ["fc"])
    net.Freezer(tiny(), ["pool", "fc"], 0, ["fc"])


def test_frozen_parts_do_not_move():
    """A training step moves what is free and nothing else, weight decay or not."""
    network = tiny()
    freezer = net.Freezer(network, ["bn"], 1, ["fc"])
    optimizer = torch.optim.AdamW(network.parameters(), lr=0.1, weight_decay=0.5)
    for epoch, moving in ((0, {"fc"}), (1, {"fc", "conv"})):
        freezer.update(epoch)
        freezer.train()
        before = copy.deepcopy(network.state_dict())
        optimizer.zero_grad()
        network(torch.rand(2, 3, 8, 8)).square().sum().backward()
        optimizer.step()
        after = network.state_dict()
        assert {k.split(".")[0] for k in after if not torch.equal(after[k], before[k])} == moving
