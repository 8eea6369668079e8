"""Signals and lost processes: how training is stopped without losing a step.

With several processes a decision is taken by all of them at the same step, and when one of them
dies the others say which, instead of waiting for it.
"""

import contextlib
import multiprocessing
import os
import platform
import signal
import sys
import time

import torch
from torch import distributed

# Exit statuses.  SIGUSR1 is what schedulers send ahead of taking the machine away.
STATUS = {signal.SIGTERM: 143, signal.SIGUSR1: 143, signal.SIGINT: 130}
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "ACCELERATE_MIXED_PRECISION")


class Interrupts:
    """Within `with Interrupts(world) as interrupts`, signals wait until the loop asks for them.

    asked: the exit status that a signal has asked this process for, 0 before the first.
    stop: the same for all processes, as far as they have agreed().
    """

    def __init__(self, world: int):
        # A group of its own on the CPU: on a GPU nothing waits for a kernel to finish.
        self.group = distributed.new_group(backend="gloo") if world > 1 else None
        self.asked, self.stop, self.when = 0, 0, 0.0
        self.pending, self.wished = None, False

    def __enter__(self):
        self.before = {number: signal.signal(number, self._note) for number in STATUS}
        return self

    def __exit__(self, kind, error, trace):
        if self.group and kind and issubclass(kind, RuntimeError):
            return  # of a lost process, maybe: torchrun's SIGTERM must not come before it is named
        for number, handler in self.before.items():
            signal.signal(number, handler)

    def _note(self, number, frame):
        # torchrun passes on the Ctrl-C that its processes have had from the terminal already.
        repeat = time.monotonic() - self.when < 2 and any(key in os.environ for key in LAUNCHERS)
        if number == signal.SIGINT and self.asked and not repeat:
            raise KeyboardInterrupt  # the second Ctrl-C leaves at once
        self.asked, self.when = STATUS[number], time.monotonic()

    def agree(self, save: bool = False, wait: bool = False) -> bool:
        """Whether any process wants to save; `stop` is set alike.  All call this at the same steps.

        With several processes this tells what was the case at the call before, so that no step
        waits for a message; `wait` takes in what is the case now.
        """
        if not self.group:
            self.stop = self.asked
            return save
        agreed = torch.zeros(2, dtype=torch.int64)
        if self.pending:
            handle, agreed = self.pending
            handle.wait()
        self.wished = save and not self.wished  # a wish is granted once, at the next call
        mine = torch.tensor([self.asked, self.wished])
        handle = distributed.all_reduce(mine, distributed.ReduceOp.MAX, self.group, async_op=True)
        self.pending = handle, mine
        if wait:
            handle.wait()
            self.pending, agreed = None, torch.maximum(agreed, mine)
        stop, save = agreed.tolist()
        self.stop = max(self.stop, stop)
        return bool(save)


def ignore_signals(worker: int) -> None:
    """Let a process that decodes photographs outlive a signal to all of them: it is still needed.

    It ends when the training process tells it to, or is gone.
    """
    for number in STATUS:
        signal.signal(number, signal.SIG_IGN)


def end_workers() -> None:
    """For the exit: Python would ask workers to end, by a signal that they ignore, and wait."""
    with contextlib.suppress(AttributeError, ValueError):  # Windows; not in the main thread
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler raises for a killed worker
    for worker in multiprocessing.active_children():
        worker.kill()


def name_lost_processes(rank: int) -> None:
    """From now on, an error that comes of another process's end is one line that names it."""
    import psutil
    from accelerate.utils import gather_object

    here = platform.node()
    peers = gather_object([(here, os.getpid())])

    def is_gone(host, pid):
        try:
            ended = (psutil.STATUS_ZOMBIE, psutil.STATUS_DEAD)
            return host == here and psutil.Process(pid).status() in ended
        except psutil.NoSuchProcess:
            return True

    def explain(kind, error, trace):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # of torchrun, before the line is out
        lost, deadline = [], time.monotonic() + 2
        while issubclass(kind, RuntimeError) and not lost and time.monotonic() < deadline:
            lost = [r for r, peer in enumerate(peers) if r != rank and is_gone(*peer)]
            time.sleep(0.05)  # its sockets close a moment before it is gone
        if not lost:
            return sys.__excepthook__(kind, error, trace)
        names = " and ".join(f"process {r} (pid {peers[r][1]})" for r in lost)
        print(f"error: {names} of {len(peers)} ended, so process {rank} does too", file=sys.stderr)
        # A regular exit runs clean-up that may wait for the lost process.
        sys.stderr.flush()
        os._exit(1)

    sys.excepthook = explain
