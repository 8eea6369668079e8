"""How far training is: by its steps, or by the clock.

What depends on how far a run is, like the learning rate, follows `Plan.progress`, which
grows from 0 at the first step to 1 after the last.
"""

import bisect

import torch
from accelerate import Accelerator

from lenslet.distributed.start import device_time

FIRST = 2  # steps before the first look at the clock: they warm up caches and libraries
# fastnet's widths, and how many epochs a run must have time for with each.
# Measured on CIFAR-10, validation accuracy by width and epochs, at about equal times of two cores:
#    60 s:  24 x 2.6 82.8 %, 32 x 2.4 84.0 %  (with AMX and ReLU, as the next line)
#   255 s:  32 x 12 87.7 %, 48 x 6.0 88.6 %
#   270 s:  32 x 8.7 88.8 %, 48 x 4.2 88.4 %  (without AMX, as now)
# `scripts/bench.py clock` measures more of it.
# Images of 24 pixels in the first half of the steps, which leaves time for 5 epochs instead of 4 or
# 15 instead of 12, gave 85.8 instead of 86.0 % and 87.6 instead of 87.7 %: so images have their
# full size from the first epoch on.
WIDTHS = ((16, 0), (32, 2), (48, 4.5), (64, 6), (96, 10), (128, 16))
APART = 0.04  # share of the time between two looks; towards the end, half of what is left


class Plan:
    """The length of a run in optimizer steps, fixed beforehand or following the clock.

    marks: [[step, progress, total], …].  From each mark's step on, progress grows evenly from what
    it was there to 1 at `total` steps, until the next one corrects it.  A fixed number of steps is
    the one mark [0, 0, total].  By the clock, progress at a mark is the share of the time that is
    spent, and total follows from the speed measured since; so the schedule ends when the time does,
    though the speed of a machine may drift.  A learning rate depends on the marks alone: a run that
    is given the marks of another takes the same steps, bit for bit.
    """

    def __init__(self, marks: list[list], seconds: float | None = None):
        """seconds: the time that a plan by the clock is for; None: the marks are all there is."""
        self.marks, self.seconds = marks, seconds
        self.spent = 0.0  # seconds of the time that were spent before the first step

    @classmethod
    def by_clock(cls, seconds: float) -> "Plan":
        """A plan before its first step; the 100 steps are a guess that holds for two of them."""
        return cls([[0, 0.0, 100]], seconds)

    @property
    def total(self) -> int:
        """Optimizer steps of the whole run, as far as is known."""
        return self.marks[-1][2]

    def progress(self, step: int) -> tuple[float, int]:
        """Progress in the middle of optimizer step `step`, 0..1, and the total as it seems then."""
        i = bisect.bisect(self.marks, step, key=lambda mark: mark[0]) - 1
        first, done, total = self.marks[i]
        return done + (1 - done) * (step + 0.5 - first) / max(1, total - first), total

    def is_due(self, step: int) -> bool:
        """Whether to look at the clock after so many steps; the same on every process.

        At 2, 4, 8, … steps, then as often as APART says.
        """
        if self.seconds is None or step >= self.total:
            return False
        last, done, total = self.marks[-1]
        apart = max(1, int(min(APART / (1 - done), 0.5) * (total - last)))
        return step >= min(last + apart, max(FIRST, 2 * last))

    def note_time(self, step: int, spent: float) -> None:
        """Note that `spent` seconds of training have gone by after so many steps."""
        done = min(spent / self.seconds, 1.0)
        # The speed of the last fifth of the time: long enough to hold what happens now and then
        # (a validation, a checkpoint), short enough to follow the machine.
        recent = [mark for mark in self.marks if mark[0] >= FIRST and mark[1] >= done - 0.2]
        first, before, _ = recent[0] if recent else self.marks[0]
        left = (1 - done) * (step - first) / max(done - before, 1e-9)
        if done < 1:
            # After slow first steps two more are taken at least, to have the speed without them.
            self.marks.append([step, done, step + max(1 if recent else 2, round(left))])
        else:
            self.marks.append([step, 1.0, step])


def choose(table, epochs):
    """The largest of a table's networks that a run has time for: rows of (network, least epochs).

    epochs(network): how many the run would make with it; asked in order, as long as they suffice.
    """
    chosen = table[0][0]
    for network, least in table[1:]:
        if epochs(network) < least:
            break
        chosen = network
    return chosen


def measure_speed(network: torch.nn.Module, images, labels, accelerator: Accelerator) -> float:
    """Images per second that this process trains a network on; nothing is learned.

    images [B, C, H, W] as it is fed them, labels [B].  0 where they do not fit into a GPU's memory.
    """
    network.to(accelerator.device, memory_format=torch.channels_last)
    seconds = []
    try:
        for _ in range(4):
            began = device_time(accelerator.device)
            with accelerator.autocast():
                loss = torch.nn.functional.cross_entropy(network(images), labels)
            loss.backward()
            seconds.append(device_time(accelerator.device) - began)
    except torch.OutOfMemoryError:
        return 0.0
    # The fastest: in the first one libraries choose their kernels, and another process that takes a
    # core for a moment would have a minute's run choose as if it were there all the time.
    return len(labels) / min(seconds)
