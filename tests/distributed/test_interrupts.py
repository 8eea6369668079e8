"""A signal is answered between two steps, by all processes alike; a lost process is named."""

import contextlib
import itertools
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import together

import lenslet.files
from lenslet.distributed import interrupts
from lenslet.distributed.interrupts import LAUNCHERS, Interrupts, ignore_signals

SIGNALS = [(signal.SIGTERM, 143), (signal.SIGUSR1, 143), (signal.SIGINT, 130)]


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    """No launcher; whatever a test does, the handlers of signals are as before."""
    for key in LAUNCHERS:
        monkeypatch.delenv(key, raising=False)
    before = {number: signal.getsignal(number) for number, _ in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def clock(monkeypatch):
    """A clock that stands until it is set."""
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(interrupts, "time", SimpleNamespace(monotonic=lambda: clock.now))
    return clock


def send(number):
    """A signal from outside; its handler has run when this returns."""
    os.kill(os.getpid(), number)


@pytest.mark.parametrize(("number", "status"), SIGNALS)
def test_a_signal_asks(number, status):
    """The first signal asks to stop, with its exit status, and interrupts nothing."""
    with Interrupts(1) as waiting:
        assert (waiting.asked, waiting.agree(), waiting.stop) == (0, False, 0)
        send(number)
        assert (waiting.asked, waiting.stop) == (status, 0)
        assert waiting.agree() is False
        assert waiting.stop == status


def test_the_second_ctrl_c_leaves():
    """The second Ctrl-C ends the command at once; a scheduler's repeated signals do not."""
    with Interrupts(1) as waiting:
        send(signal.SIGINT)
        assert waiting.asked == 130
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)
    with Interrupts(1) as waiting:
        for number in (signal.SIGTERM, signal.SIGUSR1) * 3:
            send(number)
        assert waiting.asked == 143


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("later", [0.0, 1.9])
def test_a_launcher_s_repeat_counts_once(monkeypatch, clock, launcher, later):
    """Ctrl-C reaches a process from the terminal and from its launcher: that is one Ctrl-C."""
    monkeypatch.setenv(launcher, "no")
    with Interrupts(1) as waiting:
        send(signal.SIGINT)
        clock.now += later
        send(signal.SIGINT)
        assert waiting.asked == 130
        clock.now += 2.1
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


def test_without_a_launcher_a_quick_second_leaves(clock):
    """Nothing repeats the Ctrl-C of a process that was started by hand."""
    with Interrupts(1):
        send(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            send(signal.SIGINT)


@pytest.mark.parametrize("failure", [None, ValueError, KeyboardInterrupt, SystemExit])
def test_handlers_are_restored(failure):
    """However the loop is left, signals mean again what they meant before."""
    said = []
    mine = [lambda number, frame: said.append(number), signal.SIG_IGN, signal.default_int_handler]
    for (number, _), handler in zip(SIGNALS, mine, strict=True):
        signal.signal(number, handler)
    with contextlib.suppress(ValueError, KeyboardInterrupt, SystemExit), Interrupts(1) as waiting:
        assert all(signal.getsignal(number) == waiting._note for number, _ in SIGNALS)
        if failure:
            raise failure
    assert [signal.getsignal(number) for number, _ in SIGNALS] == mine
    send(signal.SIGTERM)
    send(signal.SIGUSR1)
    assert said == [signal.SIGTERM] and waiting.asked == 0


def test_one_process_agrees_with_itself():
    """Alone there is no message to wait for: each call answers for itself."""
    with Interrupts(1) as waiting:
        for save, wait in itertools.product((True, False), repeat=2):
            assert waiting.agree(save, wait) is save
        send(signal.SIGTERM)
        assert waiting.agree(True) is True and waiting.stop == 143


def test_decoding_processes_outlive_signals():
    """What training waits for goes on decoding when all processes of the terminal are signalled."""
    child = os.fork()
    if not child:
        try:
            ignore_signals(0)
            for number, _ in SIGNALS:
                send(number)
            os._exit(7)
        finally:
            os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7


def environment(**extra):
    ours = ("OMP_", "ACCELERATE_", "MAKE", "TORCHELASTIC", "RANK", "WORLD_", "MASTER_", "LOCAL_")
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    paths = f"{lenslet.files.ROOT}{os.pathsep}{lenslet.files.ROOT / 'scripts'}"
    return {
        **env,
        "PYTHONPATH": paths,
        "ACCELERATE_USE_CPU": "true",
        "OMP_NUM_THREADS": "1",
        **extra,
    }


def torchrun(folder, world, script):
    """Run a script on several processes; the finished launcher."""
    (folder / "script.py").write_text(script)
    words = [Path(sys.executable).parent / "torchrun", "--nproc-per-node", str(world)]
    words += ["--master-port", str(free_port()), folder / "script.py", folder]
    return subprocess.run(words, env=environment(), capture_output=True, text=True, timeout=120)


def launch(folder, script, **extra):
    """Run a script on two processes that no launcher watches, which is faster.

    Their exit status, standard output, standard error and pid; ended ones are reaped late.
    """
    (folder / "script.py").write_text(script)
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    env |= {"MASTER_PORT": str(free_port()), **extra}
    with contextlib.ExitStack() as stack:
        processes, files = [], []
        for rank in ("0", "1"):
            files.append([stack.enter_context(open(folder / f"{rank}.{n}", "w+")) for n in "oe"])
            process = subprocess.Popen(
                [sys.executable, folder / "script.py", folder],
                env=environment(RANK=rank, LOCAL_RANK=rank, **env),
                stdout=files[-1][0],
                stderr=files[-1][1],
            )
            stack.callback(process.wait)
            stack.callback(process.kill)
            processes.append(process)
        deadline = time.monotonic() + 120
        while not all(is_over(process.pid) for process in processes):
            assert time.monotonic() < deadline
            time.sleep(0.02)
        said = [[file.seek(0) or file.read() for file in pair] for pair in files]
        return [(p.wait(), *texts, p.pid) for p, texts in zip(processes, said, strict=True)]


def is_over(pid):
    """Whether a process has ended; it is left to be reaped."""
    return bool(os.waitid(os.P_PID, pid, os.WEXITED | os.WNOHANG | os.WNOWAIT))


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


# Every process writes down the answer to each of its calls.  Between two calls they wait for each
# other, and for a while: signals have arrived, and messages could have.
AGREE = """
import json, os, pathlib, random, signal, time
from lenslet.distributed import start
from torch import distributed
from lenslet.distributed.interrupts import Interrupts

rank, world, said = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), []
start.start_processes()
last = world - 1
with Interrupts(world) as interrupts:
    for call in range(14):
        time.sleep(random.random() / 50)
        wish = (call, rank) in ((1, last), (4, 0), (6, last))
        if call == 9 and rank == last:
            os.kill(os.getpid(), signal.SIGINT)
        if call == 11 and rank == 0:
            os.kill(os.getpid(), signal.SIGUSR1)
        said.append([interrupts.agree(wish, wait=call in (4, 12)), interrupts.stop])
pathlib.Path(__file__).with_name(f"{rank}.json").write_text(json.dumps(said))
distributed.barrier()
distributed.destroy_process_group()
"""


def test_workers_end_unnoticed():
    """At the exit workers are killed, and torch's handler, which would raise, is not called."""
    killed, before = [], signal.signal(signal.SIGCHLD, lambda *args: killed.append(args))
    try:
        worker = multiprocessing.get_context("fork").Process(target=time.sleep, args=(60,))
        worker.start()
        interrupts.end_workers()
        worker.join()
        assert (worker.exitcode, killed) == (-signal.SIGKILL, [])
    finally:
        signal.signal(signal.SIGCHLD, before)


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_all_agree(tmp_path, world):
    """All processes get the same answers at the same calls: one call late, or at once with wait."""
    if world == 2:
        together.programs(world, tmp_path, AGREE)
    else:
        result = torchrun(tmp_path, world, AGREE)
        assert result.returncode == 0, result.stderr
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(world)]
    assert all(answers == said[0] for answers in said)
    assert [call for call, (save, _) in enumerate(said[0]) if save] == [2, 4, 7]
    stops = [stop for _, stop in said[0]]
    assert stops[:13] == [0] * 10 + [130, 130, 143]


# The first process wishes until it is met, as train.py does for a checkpoint every so many minutes.
STANDING = """
import json, os, pathlib
from lenslet.distributed import start
from torch import distributed
from lenslet.distributed.interrupts import Interrupts

rank, world, saved = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), []
start.start_processes()
due = [3, 9]
with Interrupts(world) as interrupts:
    for call in range(14):
        if interrupts.agree(rank == 0 and bool(due) and call >= due[0]):
            saved.append(call)
            due = due[1:] if due and call >= due[0] else due
pathlib.Path(__file__).with_name(f"{rank}.json").write_text(json.dumps(saved))
distributed.barrier()
distributed.destroy_process_group()
"""


def test_a_standing_wish_is_met_once(tmp_path):
    """A checkpoint that is due until it is written is written once, not at two steps in a row."""
    together.programs(2, tmp_path, STANDING)
    said = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert said[0] == said[1] and len(said[0]) == 2


# `lost` kills itself while the others are in a collective, or about to begin it.
LOSE = """
import os, pathlib, signal, sys, time
import torch
from lenslet.distributed import start
from lenslet.distributed.interrupts import Interrupts
from torch import distributed

rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
lost = int(os.environ.get("LOST", "1"))
start.start_processes()
pathlib.Path(sys.argv[1], f"{rank}.pid").write_text(str(os.getpid()))
with Interrupts(world):
    for step in range(3):
        if step == 2 and rank == lost:
            time.sleep(0.5)
            os.kill(os.getpid(), signal.SIGKILL)
        distributed.all_reduce(torch.ones(1000))
print("went on", rank)
"""


@pytest.mark.parametrize("lost", [0, 1])
def test_the_lost_one_is_named(tmp_path, lost):
    """The survivor of two says in one line which process is gone, and leaves with status 1."""
    ended, other = launch(tmp_path, LOSE, LOST=str(lost)), 1 - lost
    status, out, err, _ = ended[other]
    assert status == 1 and out == ""
    assert ended[lost][0] == -signal.SIGKILL
    line = f"error: process {lost} (pid {ended[lost][3]}) of 2 ended, so process {other} does too"
    assert [text for text in err.splitlines() if text.startswith("error")] == [line]
    assert "Traceback" not in err


@pytest.mark.parametrize("world", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_torchrun_and_the_lost_one(tmp_path, world):
    """Under torchrun, which then ends the others too, the one that was killed is named."""
    result = torchrun(tmp_path, world, LOSE)
    assert result.returncode != 0 and result.stdout == ""
    pid = (tmp_path / "1.pid").read_text()
    lines = [line for line in result.stderr.splitlines() if line.startswith("error: process")]
    assert any(f"process 1 (pid {pid})" in line for line in lines), result.stderr
    if world == 2:
        assert lines == [f"error: process 1 (pid {pid}) of 2 ended, so process 0 does too"]


FAIL = LOSE.replace("os.kill(os.getpid(), signal.SIGKILL)", 'raise ValueError("of our own")')


def test_an_error_of_one_s_own_keeps_its_traceback(tmp_path):
    """A bug in one process is shown as such; only its consequence in the others is one line."""
    (status, _, err, _), (other_status, _, other_err, pid) = launch(tmp_path, FAIL)
    assert status == other_status == 1
    assert "ValueError: of our own" in other_err and "error: process" not in other_err
    assert f"error: process 1 (pid {pid}) of 2 ended, so process 0 does too\n" in err
    assert "Traceback" not in err
