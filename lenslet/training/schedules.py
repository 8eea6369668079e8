"""The learning rate of every optimizer step."""

import math
import re
from argparse import ArgumentTypeError

from lenslet.cli import number
from lenslet.errors import nearest


def _increasing(text: str) -> list[float]:
    """'30,60' as [30.0, 60.0]."""
    epochs = [number(float, 0, above=True)(word) for word in text.split(",")]
    if sorted(set(epochs)) != epochs:
        raise ArgumentTypeError(f"{text!r}: the epochs must increase")
    return epochs


_epochs, _share = number(float, 0.01), number(float, 0, 1, above=True)
# Each schedule's numbers: how one is read, and its default, in capitals if it must be given.
SCHEDULES = {
    "constant": (),
    "cosine": (),
    "linear": (),
    "step": ((_epochs, "EPOCHS"), (_share, "0.1")),
    "multistep": ((_increasing, "EPOCHS,EPOCHS"), (_share, "0.1")),
    # Cycles that shrank, or took no time, would never end.
    "restarts": ((_epochs, "EPOCHS"), (number(float, 1, 100), "2")),
    "plateau": ((_share, "0.1"), (number(int, 0), "3"), (number(float, 0), "0")),
    "onecycle": (),
}


def canonical(text: str) -> str:
    """A schedule as it is stored: 'SGDR-2-2', as papers write it, is 'restarts:2:2'."""
    text = text.lower()
    if re.fullmatch(r"[a-z]+(-[\d.]+)+", text):
        text = text.replace("-", ":")
    name, colon, numbers = text.partition(":")
    return {"sgdr": "restarts"}.get(name, name) + colon + numbers


def parse_schedule(text: str) -> tuple[str, list]:
    """'step:30:0.1' as ('step', [30.0, 0.1]); of multistep the first is a list."""
    name, *given = canonical(text).split(":")
    if name not in SCHEDULES:
        raise ArgumentTypeError(
            f"no schedule {text!r}{nearest(name, SCHEDULES)}: {', '.join(SCHEDULES)}"
        )
    defaults = [default for _, default in SCHEDULES[name]]
    words = given + defaults[len(given) :]
    if len(words) > len(defaults) or any(word.isupper() for word in words[len(given) :]):
        raise ArgumentTypeError(f"{text!r} should look like {':'.join([name, *defaults])}")
    return name, [read(word) for (read, _), word in zip(SCHEDULES[name], words, strict=True)]


class Schedule:
    """The learning rate of every optimizer step.

    text: as SCHEDULES says.  warmup: steps ("500") or a share of all ("20%") of linear rise before
    it.  per_epoch: optimizer steps of an epoch.  lr: what every factor multiplies.  plan: the
    clock.Plan that says how far training is at a step.

        constant, cosine, linear   no change, half a cosine or a line to zero at the end
        step:E:F                   times F (0.1) after every E epochs
        multistep:E,E2,…:F         times F (0.1) after each of these epochs
        restarts:E:F               cosines to zero, of E epochs and each F (2) times the one before
                                   (SGDR: Loshchilov, Hutter 2016, arXiv:1608.03983)
        plateau:F:P:L              times F (0.1) after more than P (3) epochs without a better one,
                                   to a rate of L (0) at least
        onecycle                   a cosine up from 1/25 during the warm-up (30 % if none is given),
                                   another down to 1/250,000; momentum (Adam's first beta), if not
                                   0, from 0.95 to 0.85 and back (Smith, Topin 2017:
                                   arXiv:1708.07120)

    Calls are not counted: the rate depends on the step, the plan and the validation scores, so it
    is the same on any number of processes and in a resumed run.
    """

    def __init__(self, text, warmup, per_epoch, min_delta=0.0, lr=1.0, plan=None):
        self.name, self.numbers = parse_schedule(text)
        self.warmup, self.per_epoch, self.min_delta = warmup, per_epoch, min_delta
        self.lr, self.plan = lr, plan

    def factor(self, step: int, progress: float, total: int, scores: list[float] = ()) -> float:
        """The share at optimizer step `step` (0-based) of `total`, where `progress` (0..1) is done.

        scores: of the validations so far, larger is better.
        """
        rise = self.rise(total)
        if progress < rise:
            share = progress / rise
            return 0.04 + 0.96 * _half_cosine(1 - share) if self.name == "onecycle" else share
        done = (progress - rise) / (1 - rise)
        epochs = step / self.per_epoch
        if self.name == "cosine":
            return _half_cosine(done)
        if self.name == "linear":
            return 1 - done
        if self.name == "onecycle":
            return 4e-6 + (1 - 4e-6) * _half_cosine(done)
        if self.name == "step":
            return self.numbers[1] ** (epochs // self.numbers[0])
        if self.name == "multistep":
            return self.numbers[1] ** sum(epochs >= at for at in self.numbers[0])
        if self.name == "restarts":
            length, growth = self.numbers
            since = (step + 0.5 - rise * total) / self.per_epoch
            while since >= length:
                since, length = since - length, length * growth
            return _half_cosine(since / length)
        if self.name == "plateau":
            share, patience, least = self.numbers
            fallen = share ** _count_plateaus(scores, self.min_delta, patience)[1]
            return max(fallen, min(1.0, least / self.lr))
        return 1.0

    def apply(self, optimizer, step: int, scores: list[float]) -> float:
        """Set, and return, the learning rate of step `step`; the momentum too if it changes."""
        progress, total = self.plan.progress(step)
        lr = self.lr * self.factor(step, progress, total, scores)
        momentum = self.momentum(progress, total)
        for group in optimizer.param_groups:
            group["lr"] = lr
            if momentum and "betas" in group:
                group["betas"] = (momentum, *group["betas"][1:])
            if momentum and group.get("momentum"):
                group["momentum"] = momentum
        return lr

    def momentum(self, progress: float, total: int) -> float | None:
        """What the momentum is set to; None: it stays."""
        if self.name != "onecycle":
            return None
        rise = self.rise(total)
        away = progress / rise if progress < rise else (1 - progress) / (1 - rise)
        return 0.85 + 0.1 * _half_cosine(away)  # away from either end, where it is high

    def rise(self, total: int) -> float:
        """The share of all steps that the warm-up takes; half of them, where it would not end."""
        if self.name == "onecycle" and self.warmup in ("0", "0%"):
            return 0.3
        if "%" in self.warmup:
            return float(self.warmup[:-1]) / 100
        return int(self.warmup) / total if int(self.warmup) < total else 0.5


def _half_cosine(done: float) -> float:
    """Half a cosine from 1 to 0."""
    return 0.5 + 0.5 * math.cos(math.pi * done)


def epochs_without_progress(scores: list[float], min_delta: float = 0.0) -> int:
    """Validations since the last one that was better than all before by more than min_delta."""
    return _count_plateaus(scores, min_delta)[0]


def _count_plateaus(scores: list[float], min_delta: float, patience=math.inf) -> tuple[int, int]:
    """Validations since the last better one, and how often they became more than `patience`.

    They are counted from 0 again then, as torch.optim.lr_scheduler.ReduceLROnPlateau does.
    scores: larger is better; one is better if it is so by more than min_delta.
    """
    best, waited, times = -math.inf, 0, 0
    for score in scores:
        waited += 1
        if score > best + min_delta:
            best, waited = score, 0
        elif waited > patience:
            waited, times = 0, times + 1
    return waited, times
