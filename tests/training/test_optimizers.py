"""What is chosen by name does what the name says."""

import math
from argparse import ArgumentTypeError

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.optim import lr_scheduler

from lenslet.errors import UserError
from lenslet.runs import checkpoint
from lenslet.training import net, optimizers, schedules
from lenslet.training.schedules import Schedule
from model import create_model


def factors(total, warmup, schedule, per_epoch=10):
    schedule = Schedule(schedule, warmup, per_epoch)
    return [schedule.factor(k, (k + 0.5) / total, total) for k in range(total)]


@pytest.mark.parametrize("warmup", ["10", "10%"])
def test_learning_rate(warmup):
    """A linear rise, then half a cosine or a line to zero, or no change; in the middle of steps."""
    for schedule in ("constant", "cosine", "linear", "step:99", "multistep:99", "plateau"):
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
    for schedule in schedules.SCHEDULES:
        words = {"step": "step:2", "multistep": "multistep:2", "restarts": "restarts:2"}
        rates = factors(10, "40", words.get(schedule, schedule))
        if schedule != "onecycle":
            assert rates == pytest.approx([(k + 0.5) / 40 for k in range(10)])


def torch_rates(make, steps, per_epoch):
    """The rates of one of torch's schedulers that is stepped once an epoch."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    scheduler, rates = make(optimizer), []
    for step in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        if (step + 1) % per_epoch == 0:
            optimizer.step()
            scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("step:3:0.5", lambda o: lr_scheduler.StepLR(o, 3, 0.5)),
        ("multistep:2,5:0.1", lambda o: lr_scheduler.MultiStepLR(o, [2, 5], 0.1)),
    ],
)
def test_steps_are_those_of_torch(ours, theirs):
    """step and multistep fall when torch's schedulers do, which count epochs of any length."""
    for per_epoch in (1, 7, 10):
        rates = factors(9 * per_epoch, "0", ours, per_epoch)
        assert rates == pytest.approx(torch_rates(theirs, 9 * per_epoch, per_epoch))


def test_restarts_are_those_of_torch():
    """restarts is SGDR: torch's rates in the middle of every step, cycles of 2, 6 and 18 epochs."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
    scheduler, rates = lr_scheduler.CosineAnnealingWarmRestarts(optimizer, 2, 3), []
    for step in range(200):
        scheduler.step((step + 0.5) / 10)
        rates.append(scheduler.get_last_lr()[0])
    assert factors(200, "0", "restarts:2:3") == pytest.approx(rates)
    after = factors(220, "20", "restarts:2:3")[20:]  # a warm-up moves them
    assert after == pytest.approx(rates)


def test_onecycle_is_that_of_torch():
    """onecycle's rates and momenta are torch's; --warmup sets how long they rise."""
    for warmup, rise in (("0", 0.3), ("10%", 0.1)):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0, momentum=0.9)
        theirs = lr_scheduler.OneCycleLR(optimizer, 1.0, 2000, pct_start=rise)
        ours = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0, momentum=0.9)
        schedule = Schedule("onecycle", warmup, 10)
        for step in range(1999):
            schedule.apply(ours, 1.0, step, (step + 0.5) / 2000, 2000, [])
            for key in ("lr", "momentum"):
                wanted = optimizer.param_groups[0][key]
                assert ours.param_groups[0][key] == pytest.approx(wanted, abs=0.003), (step, key)
            optimizer.step()
            theirs.step()
    adam = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    schedule.apply(adam, 1.0, 0, 0.0, 2000, [])
    assert adam.param_groups[0]["betas"] == (pytest.approx(0.95), 0.999)


@pytest.mark.parametrize("patience", [0, 1, 3])
def test_plateau_is_that_of_torch(patience):
    """The rate falls when torch's ReduceLROnPlateau lets it, whatever the scores do."""
    generator = np.random.default_rng(0)
    for min_delta in (0.0, 0.2):
        scores = np.round(np.sqrt(np.arange(60)) + generator.normal(0, 1, 60), 1).tolist()
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0)
        theirs = lr_scheduler.ReduceLROnPlateau(
            optimizer, "max", 0.1, patience, min_delta, "abs", eps=0
        )
        ours = Schedule(f"plateau:0.1:{patience}", "0", 10, min_delta)
        for n, value in enumerate(scores):
            theirs.step(value)
            rate = ours.factor(10 * n + 10, n / 60, 600, scores[: n + 1])
            assert rate == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
        assert rate < 0.1


def test_stale():
    """Epochs are counted since the last that was better by more than was asked for."""
    assert schedules.epochs_without_progress([]) == 0
    assert schedules.epochs_without_progress([0.5, 0.6, 0.6, 0.55]) == 2
    assert schedules.epochs_without_progress([0.5, 0.6, 0.61, 0.62, 0.75], 0.1) == 0
    assert schedules.epochs_without_progress([0.5, 0.7, 0.71, 0.75], 0.1) == 2


@pytest.mark.parametrize(
    "text",
    "cosin step step:x step:0 step:3:0.1:4 multistep:5,5 multistep:6,5:0.1 restarts:0"
    " restarts:5:0.5 plateau:2:3 plateau:0.1:x linear:3 onecycle:1"
    " step:1e-300 restarts:1e-300:1 step:2:3".split(),
)
def test_schedules_that_are_none(text):
    """A schedule that cannot be is refused when it is parsed, and says what is wrong with it."""
    with pytest.raises(ArgumentTypeError):
        schedules.schedule_name(text)


@pytest.mark.parametrize("name", optimizers.OPTIMIZERS)
def test_optimizers_learn(name):
    """Each optimizer holds every trainable parameter once, and lowers a loss."""
    torch.manual_seed(0)
    model = create_model("fastnet", 3, 1, width=8)
    lr = {"adabelief": 0.005, "ranger": 0.05}.get(name, 0.02)
    optimizer = optimizers.create_optimizer(name, model, lr, 0.6, 0.01)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert len(held) == len(set(held))
    assert set(held) == {p for p in model.parameters() if p.requires_grad}
    images, labels = torch.randn(30, 1, 32, 32), torch.arange(30) % 3
    trace = []
    for _ in range(12):
        loss = F.cross_entropy(model(images), labels)
        trace.append(loss.item())
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert trace[-1] < 0.9 * trace[0]


def test_biases_and_norms_are_not_decayed():
    """Without gradients, weight decay shrinks matrices and filters, and nothing else."""
    for name in optimizers.OPTIMIZERS:
        torch.manual_seed(0)
        model = create_model("resnet10t", 3)
        before = {key: p.detach().clone() + 0 for key, p in model.named_parameters()}
        optimizer = optimizers.create_optimizer(name, model, 0.1, 0.0, 0.5)
        for p in model.parameters():
            p.grad = torch.zeros_like(p)
        for _ in range(6):  # ranger's slow weights move in the sixth step
            optimizer.step()
        for key, p in model.named_parameters():
            moved = not torch.equal(p, before[key])
            # muon's last layer is AdamW's, without decay
            assert moved == (p.ndim > 1 and not (name == "muon" and key == "fc.weight")), (
                name,
                key,
            )


def test_sgd_has_nesterov_momentum():
    """--nesterov gives the steps of torch.optim.SGD's, and without it the plain ones."""
    for nesterov in (False, True):
        torch.manual_seed(0)
        ours, theirs = create_model("lenet", 2), create_model("lenet", 2)
        theirs.load_state_dict(ours.state_dict())
        one = optimizers.create_optimizer("sgd", ours, 0.1, 0.9, 0.0, nesterov)
        other = torch.optim.SGD(theirs.parameters(), 0.1, 0.9, nesterov=nesterov)
        for _ in range(3):
            for model, optimizer in ((ours, one), (theirs, other)):
                model(torch.ones(2, 3, 32, 32)).square().sum().backward()
                optimizer.step()
                optimizer.zero_grad()
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            assert torch.equal(p, q)


def trained(name, folder, stop):
    """The parameters of a tiny network after 10 steps, of which a checkpoint may be after 6."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Flatten(), nn.Linear(8, 2))
    optimizer = optimizers.create_optimizer(name, network, 0.01, 0.9, 0.01)
    backward = optimizers.second_order(optimizer, 1, False)
    for step in range(10):
        if stop and step == 6:
            state = {"network": network.state_dict(), "optimizer": optimizer.state_dict()}
            path = checkpoint.save_checkpoint(folder / name, step, state)
            state = checkpoint.load_checkpoint(path)
            network.load_state_dict(state["network"])
            optimizer = optimizers.create_optimizer(name, network, 0.01, 0.9, 0.01)
            state["optimizer"].pop("rng_state", None)
            optimizer.load_state_dict(state["optimizer"])
        network(torch.linspace(-1, 1, 16).view(1, 1, 4, 4)).square().sum().backward(**backward)
        optimizers.seed_draws(optimizer, 0, step)
        optimizer.step()
        optimizer.zero_grad()
    return [p.detach() for p in network.parameters()]


@pytest.mark.filterwarnings("ignore")
def test_every_name_of_timm(tmp_path, monkeypatch):
    """Any optimizer of timm's is made, or refused in one line for what it needs; what is made goes
    on from a checkpoint to the same bits.
    """
    from timm.optim import list_optimizers

    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # kron's, for a minute
    made = 0
    for name in [*list_optimizers(), "lookahead_adam"]:
        optimizers.optimizer_name(name)
        said = f"--optimizer {name} cannot"
        try:
            ends = [trained(name, tmp_path, stop) for stop in (False, True)]
            made += 1
            assert all(torch.equal(p, q) for p, q in zip(*ends, strict=True)), name
        except UserError as error:
            said = str(error)
        assert said.startswith(f"--optimizer {name} cannot") and "\n" not in said
    assert made > 80
    with pytest.raises(ArgumentTypeError, match="did you mean adamw"):
        optimizers.optimizer_name("adamww")


def test_muon_orthogonalises_filters():
    """A filter's step has equal singular values; the last layer goes by AdamW."""
    torch.manual_seed(0)
    model = create_model("fastnet", 3, 1, width=8)
    optimizer = optimizers.create_optimizer("muon", model, 1.0, 0.0, 0.0)
    before = {name: p.clone() for name, p in model.named_parameters()}
    F.cross_entropy(model(torch.randn(30, 1, 32, 32)), torch.arange(30) % 3).backward()
    optimizer.step()
    steps = {name: p - before[name] for name, p in model.named_parameters()}
    values = torch.linalg.svdvals(steps["blocks.1.conv2.weight"].flatten(1))
    assert values.min() > 0.5 * values.max()  # Newton-Schulz gives them within bounds
    head = steps[
        "head.weight"
    ].abs()  # Adam's first step is the same for all, whatever the gradient
    assert head.std() < 0.01 * head.mean()
    assert not steps["whitening.weight"].any()


def test_l1_is_of_the_decayed_weights():
    """The penalty's gradient is the sign of each weight, and none of a bias."""
    model = create_model("lenet", 2)
    optimizers.l1_penalty(model, 0.3)().backward()
    for p in model.parameters():
        if p.ndim > 1:
            assert torch.equal(p.grad, 0.3 * p.sign())
        else:
            assert p.grad is None
    assert optimizers.l1_penalty(model, 0.0)() == 0


def test_moving_average():
    """The average follows with a decay that rises to its value; none is none."""
    assert net.create_ema(nn.Linear(1, 1), None) is None
    network = nn.Linear(1, 1)
    average = net.create_ema(network, 0.9)
    nn.init.zeros_(network.weight)
    average.update(network, 1)
    assert average.module.weight.item() == 0
    nn.init.ones_(network.weight)
    value = 0.0
    for step in range(2, 60):
        average.update(network, step)
        decay = min(0.9, 1 - step ** (-2 / 3))
        value = decay * value + 1 - decay
        assert average.module.weight.item() == pytest.approx(value, rel=1e-4), step
    assert math.isclose(decay, 0.9)
