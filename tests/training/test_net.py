"""A network is frozen in parts, averaged, wrapped and given back as training needs it."""

import copy
import json
import math
from collections import OrderedDict
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from conftest import public_names
from torch import nn

import model
from lenslet.data.batches import BatchSampler
from lenslet.data.prepare import Prepare
from lenslet.errors import UserError
from lenslet.training import net
from lenslet.training.optimizers import create_optimizer


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


def distributed(accelerator=None, optimizer="sgd", classes=3, patterns=(), frozen=0, **settings):
    """A Net of tiny() that is ready for its steps."""
    network = tiny(classes=classes)
    optimizer = create_optimizer(optimizer, network, 0.1, 0.9, 0.01)
    freezer = net.Freezer(network, list(patterns), frozen, ["fc"])
    result = net.Net(network, optimizer, freezer, Prepare([0.5] * 3, [0.25] * 3, (8, 8)))
    result.distribute(accelerator or Accelerator(cpu=True), 0, **settings)
    return result


def step(trained, seed=0):
    """An optimizer step on images that follow from the seed."""
    generator = torch.Generator().manual_seed(seed)
    images = torch.randint(0, 256, (4, 3, 8, 8), dtype=torch.uint8, generator=generator)
    trained.model(trained.prepare(images)).square().sum().backward()
    trained.optimizer.step()
    trained.optimizer.zero_grad()
    trained.update_ema(seed + 1)


def test_few_names():
    """Net can be held in mind: at most 12 methods and attributes are for others."""
    assert len(public_names(net.Net)) <= 12


def test_distribute():
    """Filters are stored channels last, the frozen parts are those of the epoch, dropout is in."""
    trained = distributed(frozen=1, dropout=0.3)
    assert trained.bare.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert free(trained.bare) == {"fc.weight", "fc.bias"}
    assert trained.evaluated is trained.bare
    trained.begin_epoch(0)
    assert not trained.bare.bn.training and trained.bare.fc.training
    images = torch.rand(2, 3, 8, 8)  # dropout draws anew each time, but not for an evaluation
    assert not torch.equal(trained.model(images), trained.model(images))
    trained.bare.eval()
    assert torch.equal(trained.model(images), trained.model(images))
    trained.begin_epoch(1)
    assert len(free(trained.bare)) == 6 and trained.bare.bn.training


def test_moving_average():
    """The average follows with a decay that rises to its value; without one there is none."""
    plain = distributed()
    plain.update_ema(1)
    assert plain.evaluated is plain.bare and plain.state()["networks"].keys() == {"model"}
    trained = distributed(ema=0.9)
    ours, average = trained.bare.conv.bias.data, trained.evaluated.conv.bias.data
    assert trained.evaluated is not trained.bare
    ours.fill_(0)
    trained.update_ema(1)
    assert average.tolist() == [0] * 4
    ours.fill_(1)
    value = 0.0
    for number in range(2, 60):
        trained.update_ema(number)
        decay = min(0.9, 1 - number ** (-2 / 3))
        value = decay * value + 1 - decay
        assert average.tolist() == pytest.approx([value] * 4, rel=1e-4), number
    assert math.isclose(decay, 0.9)


class Processes(SimpleNamespace):
    """Stands for an Accelerator of which the other processes are not there."""

    device = torch.device("cpu")
    process_index = 0
    scaler = None

    def prepare(self, *parts):
        return parts

    def unwrap_model(self, network):
        return network

    def backward(self, loss):
        loss.backward()


def test_statistics_are_averaged_before_an_evaluation():
    """Batch-norm statistics are averaged over the processes, in the average too; counters and
    weights are not.
    """
    calls = []

    def reduce(tensor, how):
        calls.append(how)
        assert tensor.dtype == torch.float64  # equal statistics must stay equal
        return tensor / 2

    for world, mean in ((1, 3), (2, 1.5)):
        trained = distributed(Processes(num_processes=world, reduce=reduce), ema=0.9)
        norms = trained.bare.bn, trained.evaluated.bn
        for norm in norms:
            norm.running_mean.fill_(3.0)
            norm.num_batches_tracked.fill_(7)
        before = copy.deepcopy(list(trained.bare.parameters()))
        assert trained.evaluate(None) is None
        for norm in norms:
            assert norm.running_mean.tolist() == [mean] * 4
            assert norm.num_batches_tracked == 7
        assert all(map(torch.equal, trained.bare.parameters(), before))
    assert calls == ["mean"] * 4


def test_distribute_changes_nothing_on_several_processes():
    """The pass that fixes the order of sums leaves statistics and gradients as they were."""
    trained = distributed(Processes(num_processes=3))
    fresh = tiny()
    for name, tensor in trained.bare.state_dict().items():
        assert torch.equal(tensor, fresh.state_dict()[name]), name
    assert all(p.grad is None or not p.grad.any() for p in trained.bare.parameters())


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "ranger"])
def test_state(optimizer):
    """A net that is given another's state goes on with the same bits, and as fast: with moments
    in the memory layout of the filters.
    """
    trained = distributed(optimizer=optimizer, ema=0.9)
    for number in range(7):
        step(trained, number)
    other = distributed(optimizer=optimizer, ema=0.9)
    contiguous = {"memory_format": torch.contiguous_format}  # as a file gives them back
    state = copy.deepcopy(trained.state())
    for values in state["optimizer"]["state"].values():
        for key, value in values.items():
            values[key] = value.contiguous(**contiguous) if torch.is_tensor(value) else value
    other.load_state(state)
    kept = net.innermost(other.optimizer).state[other.bare.conv.weight]
    moments = [t for t in kept.values() if torch.is_tensor(t) and t.ndim == 4]
    assert moments
    assert all(t.is_contiguous(memory_format=torch.channels_last) for t in moments)
    for number in range(7, 10):
        for each in (trained, other):
            step(each, number)
    for key in ("bare", "evaluated"):
        ours, theirs = getattr(trained, key).state_dict(), getattr(other, key).state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_the_scale_of_fp16_goes_on():
    """A net that is given another's state scales losses as that one did, and changes the scale
    after as many steps.
    """

    def scaled():
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
        return distributed(Processes(num_processes=1, scaler=scaler)), scaler

    def step(trained, scaler):
        loss = trained.model(torch.ones(2, 3, 8, 8)).square().sum()
        scaler.scale(loss).backward()
        scaler.step(trained.optimizer)
        scaler.update()
        trained.optimizer.zero_grad()
        return scaler.get_scale()

    first, other = scaled(), scaled()
    assert [step(*first) for _ in range(5)] == [8, 8, 16, 16, 16]
    state = first[0].state()
    state["scaler"] = json.loads(json.dumps(state["scaler"]))  # as a checkpoint holds it
    other[0].load_state(state)
    assert [step(*other) for _ in range(3)] == [step(*first) for _ in range(3)] == [32, 32, 32]


def test_statistics_of_each_process_are_its_own():
    """Of a state of several processes each takes its own statistics, and of fewer in turn."""
    state = distributed().state()
    for rank in range(2):
        part = copy.deepcopy(state["buffers"][0])
        part["model"]["bn.running_mean"].fill_(rank + 5)
        state["buffers"].append(part)
    del state["buffers"][0]
    for rank, mean in ((0, 5), (1, 6), (2, 5)):
        accelerator = Processes(num_processes=3, process_index=rank)
        trained = distributed(accelerator)
        trained.load_state(state)
        assert trained.bare.bn.running_mean.tolist() == [mean] * 4


def test_the_state_of_another_precision():
    """What was trained in bf16, without a scale of gradients, goes on in fp16 with a new one."""
    state = distributed().state()
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    later = distributed(Processes(num_processes=1, scaler=scaler))
    later.load_state(state)
    assert scaler.get_scale() == 8.0


def test_the_state_of_another_network():
    """What does not fit is refused in a line that names no file."""
    for state in (distributed(classes=5).state(), distributed(optimizer="adamw").state()):
        state["optimizer"]["param_groups"] = state["optimizer"]["param_groups"][:1]
        with pytest.raises(UserError, match=r"^does not fit this network \(.+\)$"):
            distributed().load_state(state)


def fitted(network, batch, world, device, accumulate=1):
    """fit_batch_norm() for an epoch of 65 images: its notes, and the sampler."""
    accelerator = SimpleNamespace(num_processes=world, device=torch.device(device))
    sampler = BatchSampler(65, batch, seed=0, world=world)
    return net.fit_batch_norm(network, sampler, accelerator, accumulate), sampler


def test_few_images_for_batch_norm():
    """On a CPU a line says so where a process has fewer than 32 images of a batch, and only there;
    nothing changes.
    """
    for batch, world in ((64, 2), (16, 1)):
        assert not any("PROCESSES" in note for note in fitted(tiny(), batch, world, "cpu")[0])
    network = tiny()
    notes, _ = fitted(network, 62, 2, "cpu")
    assert "31 images at a time in each of 2 processes" in notes[-1] and "PROCESSES" in notes[-1]
    (_, note), _ = fitted(network, 64, 2, "cpu", accumulate=4)
    assert "8 images at a time" in note
    assert type(network.bn) is nn.BatchNorm2d
    assert fitted(nn.Linear(2, 2), 16, 8, "cpu")[0] == []


@pytest.mark.parametrize("name", ["fastnet", "resnet10t", "efficientnet_b0"])
def test_batch_norm_over_processes(name):
    """On GPUs the layers take all processes' statistics then; names, parameters, what learns and
    the answers stay as they were.
    """
    arguments = {"width": 8} if name == "fastnet" else {}
    network = model.create_model(name, 3, **arguments).eval()
    images = torch.rand(2, 3, *network.input_size)
    before, answers, learns = network.state_dict(), network(images), free(network)
    assert fitted(network, 62, 2, "cuda")[0] == []
    layers = [m for m in network.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    assert layers and all(isinstance(layer, nn.SyncBatchNorm) for layer in layers)
    assert torch.equal(network(images), answers) and free(network) == learns
    assert list(network.state_dict()) == list(before)
    wide = model.create_model(name, 3, **arguments)
    fitted(wide, 64, 2, "cuda")
    assert not any(isinstance(m, nn.SyncBatchNorm) for m in wide.modules())


def test_one_image_is_too_few_for_batch_norm():
    """A last batch of one image is left out, and said, where there is batch norm; a batch size of
    one is refused.
    """
    notes, sampler = fitted(tiny(), 64, 1, "cpu")
    assert sampler.used == 64 and "one image" in notes[0]
    notes, sampler = fitted(nn.Linear(2, 2), 64, 1, "cpu")
    assert sampler.used == 65 and not notes
    with pytest.raises(UserError, match="batch norm needs 2 images"):
        fitted(tiny(), 1, 1, "cpu")
