"""Training runs that another command starts, as processes of their own."""

import multiprocessing
import os
import signal
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor

from lenslet import files


def run_training(words: list, processes: int = 1, threads: int | None = None) -> int:
    """Run scripts/train.py with these options to its end, and return its exit status.

    A signal is passed on, so that training saves and ends.  threads: of each process.
    """
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--nproc-per-node", processes]
    environment = {k: v for k, v in os.environ.items() if k != "ACCELERATE_MIXED_PRECISION"}
    if threads or processes > 1:  # where torchrun would set 1 itself, with a warning
        environment["OMP_NUM_THREADS"] = str(threads or 1)
    command = [str(word) for word in (*launcher, files.ROOT / "scripts" / "train.py", *words)]
    process = subprocess.Popen(command, env=environment)
    # The terminal sends a Ctrl-C to training too.
    before = {signal.SIGINT: signal.signal(signal.SIGINT, lambda *_: None)}
    for number in (signal.SIGTERM, signal.SIGUSR1):
        before[number] = signal.signal(number, lambda number, _: process.send_signal(number))
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def run_apart(function, *given):
    """What function(*given) returns in a fresh process, where nothing has run before."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(function, *given).result()
