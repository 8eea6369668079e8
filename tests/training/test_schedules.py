"""The learning rate of each step is what the schedule's name, the warm-up and the scores say."""

from argparse import ArgumentTypeError

import numpy as np
import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from lenslet.training import schedules
from lenslet.training.clock import Plan
from lenslet.training.schedules import Schedule, canonical, parse_schedule


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
    """The rate rises for half of the steps, and nothing is divided by zero."""
    for schedule in schedules.SCHEDULES:
        words = {"step": "step:99", "multistep": "multistep:99", "restarts": "restarts:2"}
        rates = factors(10, "40", words.get(schedule, schedule))
        if schedule != "onecycle":
            assert rates[:5] == pytest.approx([(k + 0.5) / 5 for k in range(5)])
    assert factors(10, "40", "constant")[5:] == factors(10, "10", "constant")[5:] == [1.0] * 5
    assert factors(10, "9", "constant")[:9] == pytest.approx([(k + 0.5) / 9 for k in range(9)])


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
    # The middle of the third step is where a cycle ends, and the next begins.
    assert Schedule("restarts:0.25:1", "0", 10).factor(2, 0.25, 10) == 1


def test_onecycle_is_that_of_torch():
    """onecycle's rates and momenta are torch's; --warmup sets how long they rise."""
    for warmup, rise in (("0", 0.3), ("10%", 0.1)):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0, momentum=0.9)
        theirs = lr_scheduler.OneCycleLR(optimizer, 1.0, 2000, pct_start=rise)
        ours = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0, momentum=0.9)
        schedule = Schedule("onecycle", warmup, 10, lr=1.0, plan=Plan([[0, 0.0, 2000]]))
        for step in range(1999):
            schedule.apply(ours, step, [])
            for key in ("lr", "momentum"):
                wanted = optimizer.param_groups[0][key]
                assert ours.param_groups[0][key] == pytest.approx(wanted, abs=0.003), (step, key)
            optimizer.step()
            theirs.step()
    assert schedule.factor(1999, 1.0, 2000) == pytest.approx(4e-6, rel=1e-6)
    assert schedule.factor(200, 0.1, 2000) == pytest.approx(1, abs=1e-9)
    adam = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    schedule.apply(adam, 0, [])
    assert adam.param_groups[0]["betas"] == (pytest.approx(0.95, abs=1e-5), 0.999)
    none = torch.optim.SGD([nn.Parameter(torch.zeros(1))], 1.0, momentum=0.0)
    schedule.apply(none, 0, [])
    assert none.param_groups[0]["momentum"] == 0


def test_apply():
    """Every group gets the rate of its step, which is returned: the factor times lr, as the plan
    and the scores have it; the momentum stays.
    """
    groups = [{"params": [nn.Parameter(torch.zeros(1))], "lr": 9.0} for _ in range(2)]
    optimizer = torch.optim.AdamW(groups, betas=(0.8, 0.99))
    marks = [[0, 0.0, 100], [10, 0.5, 20]]  # of a plan by the clock, which went faster than thought
    for text, scores, wanted in (
        ("constant", [], lambda progress: 1),
        ("linear", [], lambda progress: 1 - progress),
        ("plateau:0.1:0", [1.0, 0.5, 0.5], lambda progress: 0.01),
        ("plateau:0.1:0", [0.1, 0.2, 0.3], lambda progress: 1),
    ):
        schedule = Schedule(text, "0", 10, lr=0.3, plan=Plan(marks))
        for step, progress in ((0, 0.005), (9, 0.095), (10, 0.525), (19, 0.975)):
            lr = schedule.apply(optimizer, step, scores)
            assert lr == pytest.approx(0.3 * wanted(progress)), (text, step)
            assert [group["lr"] for group in optimizer.param_groups] == [lr, lr]
            assert [group["betas"] for group in optimizer.param_groups] == [(0.8, 0.99)] * 2
    assert Schedule("constant", "0", 10, plan=Plan(marks)).apply(optimizer, 0, []) == 1


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


def test_epochs_without_progress():
    """Epochs are counted since the last that was better by more than was asked for."""
    assert schedules.epochs_without_progress([]) == 0
    assert schedules.epochs_without_progress([0.5, 0.6, 0.6, 0.55]) == 2
    assert schedules.epochs_without_progress([0.5, 0.6, 0.61, 0.62, 0.75], 0.1) == 0
    assert schedules.epochs_without_progress([0.5, 0.7, 0.71, 0.75], 0.1) == 2


def test_parse_schedule():
    """A name and its numbers; what is not given is the default."""
    assert parse_schedule("step:30") == ("step", [30.0, 0.1])
    assert parse_schedule("multistep:30,60.5:0.2") == ("multistep", [[30.0, 60.5], 0.2])
    assert parse_schedule("restarts:5") == ("restarts", [5.0, 2.0])
    assert parse_schedule("plateau") == ("plateau", [0.1, 3, 0.0])
    assert parse_schedule("step:1E1") == ("step", [10.0, 0.1])
    assert parse_schedule("step:0.01:1") == ("step", [0.01, 1.0])
    assert parse_schedule("multistep:0.5,2") == ("multistep", [[0.5, 2.0], 0.1])
    assert parse_schedule("restarts:5:100") == ("restarts", [5.0, 100.0])
    assert parse_schedule("restarts:5:1") == ("restarts", [5.0, 1.0])
    for name in ("constant", "cosine", "linear", "onecycle"):
        assert parse_schedule(name) == (name, [])
    for text in ("SGDR-2-2", "sgdr:2:2", "Restarts:2:2", "restarts-2-2"):
        assert canonical(text) == "restarts:2:2"
    assert canonical("plateau:0.1:3:1e-6") == "plateau:0.1:3:1e-6"


def test_plateau_has_a_floor():
    """The rate falls no lower than the floor, and never rises to it."""
    scores = [1.0] + [0.0] * 40
    schedule = Schedule("plateau:0.1:3:1e-4", "0", 10, lr=0.01)
    assert 0.01 * schedule.factor(0, 0.5, 100, scores) == pytest.approx(1e-4)
    assert schedule.factor(0, 0.5, 100, scores[:6]) == pytest.approx(0.1)
    high = Schedule("plateau:0.1:3:1", "0", 10, lr=0.01)
    assert high.factor(0, 0.5, 100, scores) == 1


@pytest.mark.parametrize(
    "text",
    "cosin step step:x step:0 step:3:0.1:4 multistep:5,5 multistep:6,5:0.1 restarts:0"
    " restarts:5:0.5 plateau:2:3 plateau:0.1:x linear:3 onecycle:1"
    " step:1e-300 restarts:1e-300:1 step:2:3 step:2:1.5 step:2:0 multistep:0,5 restarts:5:100.5"
    " plateau:0.1:-1".split(),
)
def test_schedules_that_are_none(text):
    """A schedule that cannot be is refused when it is parsed, and says what is wrong with it."""
    with pytest.raises(ArgumentTypeError) as caught:
        parse_schedule(text)
    assert str(caught.value) and "\n" not in str(caught.value)
