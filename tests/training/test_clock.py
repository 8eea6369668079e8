"""A run by the clock ends with the time, whatever the machine's speed does."""

import pytest
import torch
from accelerate import Accelerator
from torch import nn

from lenslet.training import clock
from lenslet.training.clock import WIDTHS, Plan, choose, measure_speed


def drive(seconds, step_seconds):
    """The plan of a run whose step k takes step_seconds(k), and when it ended."""
    plan, step, spent = Plan.by_clock(seconds), 0, 0.0
    while step < plan.total:
        spent += step_seconds(step)
        step += 1
        if plan.is_due(step):
            plan.note_time(step, spent)
    return plan, step, spent


SPEEDS = {
    "steady": lambda k: 0.1,
    "a slow start": lambda k: 5.0 if k == 0 else 0.1,
    "a very slow start": lambda k: 40.0 if k == 0 else 0.1,
    "slower half-way": lambda k: 0.1 if k < 300 else 0.2,
    "faster half-way": lambda k: 0.1 if k < 300 else 0.05,
    "noisy": lambda k: 0.05 + 0.1 * (k * 7919 % 13) / 13,
    "a validation in between": lambda k: 2.0 if k % 50 == 49 else 0.1,
}


@pytest.mark.parametrize("speed", SPEEDS.values(), ids=SPEEDS)
def test_ends_with_the_time(speed):
    """Within 3 % of 60 seconds, and the schedule comes down to its end."""
    plan, step, spent = drive(60, speed)
    assert spent == pytest.approx(60, rel=0.03)
    progress = [plan.progress(k)[0] for k in range(step)]
    assert 0 < progress[0] < 0.01
    assert all(0 <= p < 1 for p in progress)
    assert progress[-1] > 0.97
    assert len(plan.marks) < 60  # looking is rare


def test_a_long_step():
    """Where a step takes longer than the time there is, one is taken, or two."""
    plan, step, _ = drive(1, lambda k: 3.0)
    assert step == 2
    assert plan.marks[-1][1] == 1


def test_stored_marks_repeat_the_run():
    """A plan of marks gives the same progress at each step, and never asks for the time."""
    plan, steps, _ = drive(20, SPEEDS["noisy"])
    again = Plan(plan.marks)
    assert again.total == steps
    assert not any(again.is_due(k) for k in range(steps + 1))
    assert [again.progress(k) for k in range(steps)] == [plan.progress(k) for k in range(steps)]


def test_a_number_of_steps():
    """Without a clock, progress grows evenly over the steps."""
    plan = Plan([[0, 0.0, 4]])
    assert [plan.progress(k) for k in range(4)] == [(p, 4) for p in (0.125, 0.375, 0.625, 0.875)]
    assert not any(plan.is_due(k) for k in range(5))


def test_measured_speed():
    """Images per second of the fastest of four steps; the network is fed, and learns nothing."""
    times, shapes = iter([0.0, 9.0, 10.0, 12.0, 20.0, 21.0, 30.0, 35.0]), []
    network = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    network.register_forward_pre_hook(lambda _, args: shapes.append(args[0].shape))
    before = [p.clone() for p in network.parameters()]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(clock, "device_time", lambda device: next(times))
        speed = clock.measure_speed(
            network, torch.rand(8, 3, 2, 2), torch.arange(8) % 3, Accelerator(cpu=True)
        )
    assert speed == 8 / (21.0 - 20.0)
    assert shapes == [(8, 3, 2, 2)] * 4
    assert all(torch.equal(p, q) for p, q in zip(network.parameters(), before, strict=True))


def test_too_wide_for_the_memory():
    """A width that does not fit into memory has no speed, so that a narrower one is taken."""

    class Large(nn.Linear):
        def forward(self, images):
            raise torch.OutOfMemoryError

    accelerator = Accelerator(cpu=True)
    assert measure_speed(Large(2, 2), torch.rand(4, 2), torch.zeros(4).long(), accelerator) == 0


def test_wider_with_more_time():
    """The widest network is taken that sees the images often enough, narrower ones first."""
    tried = []

    def choose_in(seconds):
        def epochs(width):
            tried.append(width)
            return 16 * seconds / width

        return choose(WIDTHS, epochs)

    chosen = [choose_in(seconds) for seconds in (1e-3, 10, 100, 1e6)]
    assert chosen == sorted(chosen)
    assert (chosen[0], chosen[-1]) == (WIDTHS[0][0], WIDTHS[-1][0])
    for seconds in (10, 100):
        width = choose_in(seconds)
        assert 16 * seconds / width >= dict(WIDTHS)[width]
