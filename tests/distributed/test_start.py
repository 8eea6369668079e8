"""Processes, threads and the Accelerator are what was asked for, or what the machine does best."""

import os
import platform
from types import SimpleNamespace

import pytest
import torch
from accelerate import DistributedType, PartialState

from lenslet.distributed import start
from lenslet.errors import UserError

LAUNCHED = ("ACCELERATE_MIXED_PRECISION", "LOCAL_WORLD_SIZE", "WORLD_SIZE", "OMP_NUM_THREADS")


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    """No launcher, no thread count; Accelerate on the CPU."""
    for key in LAUNCHED:
        monkeypatch.delenv(key, raising=False)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    monkeypatch.setattr(start, "cpu_count", lambda: 12)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_accelerator(monkeypatch, precision):
    """The Accelerator computes in the precision asked for."""
    start.start_processes()
    assert start.create_accelerator(precision).mixed_precision == precision


def test_impossible_precision():
    """fp16 on a CPU, where Accelerate would silently ignore it, is refused with a remedy."""
    start.start_processes()
    with pytest.raises(UserError, match=r"^fp16 does not run on a CPU") as caught:
        start.create_accelerator("fp16")
    assert "bf16" in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("asked", "before", "after"),
    [("cpu", "false", "true"), ("auto", "false", "false"), ("cuda", "true", "false")],
)
def test_use_device(monkeypatch, asked, before, after):
    """Accelerate is told of a device that is asked for, and only then."""
    monkeypatch.setattr(start, "choose_device", lambda _: torch.device("cuda"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", before)
    start.use_device(asked)
    assert os.environ["ACCELERATE_USE_CPU"] == after


def test_a_numbered_gpu_is_for_one_process(monkeypatch):
    """Several processes have a GPU each, and do not share the one that is named."""
    monkeypatch.setattr(start, "choose_device", torch.device)
    start.use_device("cuda:1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="of its own"):
        start.use_device("cuda:1")


@pytest.mark.parametrize(
    ("environment", "threads"),
    [
        ({}, 12),
        ({"LOCAL_WORLD_SIZE": "4"}, 3),
        ({"LOCAL_WORLD_SIZE": "1", "OMP_NUM_THREADS": "1"}, 12),
        ({"LOCAL_WORLD_SIZE": "100"}, 1),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "1"}, 12),
        ({"ACCELERATE_MIXED_PRECISION": "no", "OMP_NUM_THREADS": "2"}, 5),  # the user's own
        ({"OMP_NUM_THREADS": "1"}, 5),
        ({"OMP_NUM_THREADS": "2"}, 5),
    ],
)
def test_threads(monkeypatch, environment, threads):
    """A launcher's OMP_NUM_THREADS=1 gives way to all cores; the user's own count stands."""
    for key, value in environment.items():
        monkeypatch.setenv(key, value)
    torch.set_num_threads(5)
    start.start_processes()
    assert torch.get_num_threads() == threads


def test_processes_apart(monkeypatch):
    """Processes that do not find each other stop instead of each training alone."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr(start, "PartialState", lambda **_: SimpleNamespace(num_processes=1))
    with pytest.raises(UserError, match="2 processes were launched, but this one sees 1"):
        start.start_processes()


def test_launched_on_a_cpu(monkeypatch):
    """Several processes without a GPU are told to Accelerate, unless the user has a say."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    kind = DistributedType.MULTI_CPU
    state = SimpleNamespace(num_processes=2, process_index=1, distributed_type=kind)
    monkeypatch.setattr(start, "PartialState", lambda **_: state)
    watched = []
    monkeypatch.setattr(start, "name_lost_processes", watched.append)
    start.start_processes()
    assert os.environ["ACCELERATE_USE_CPU"] == "true" and watched == [1]


def test_other_kinds(monkeypatch):
    """A device that Accelerate does not drive by data parallelism is refused by its name."""
    state = SimpleNamespace(num_processes=1, distributed_type=DistributedType.XLA)
    monkeypatch.setattr(start, "PartialState", lambda **_: state)
    with pytest.raises(UserError, match="distributed type XLA"):
        start.start_processes()


def test_workers(monkeypatch):
    """Decoding takes the cores of this process, at most eight, at least one."""
    for processes, workers in (("1", 8), ("3", 4), ("12", 1), ("40", 1)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        assert start.decoding_workers(None) == workers


def test_from_main_process():
    """What the first process chooses is what everyone gets."""
    assert start.from_main_process(PartialState(), lambda: {"a": 1}) == {"a": 1}


@pytest.mark.parametrize(("error", "status"), [(UserError("a"), 2), (OSError("b"), 1)])
def test_from_main_process_fails(monkeypatch, error, status):
    """Where the first process cannot go on it says so; the others leave with its status."""

    def work():
        raise error

    state = SimpleNamespace(is_main_process=True)
    with pytest.raises(type(error)) as caught:
        start.from_main_process(state, work)
    assert caught.value is error
    sent = [None, status]  # what the others receive
    monkeypatch.setattr(start, "broadcast_object_list", lambda _: sent)
    with pytest.raises(SystemExit) as left:
        start.from_main_process(SimpleNamespace(is_main_process=False), work)
    assert left.value.code == status


def test_main_process_first(monkeypatch):
    """Every process does the work itself, once; the others after the first has succeeded."""
    done = []

    def work():
        done.append(1)
        return len(done)

    assert start.main_process_first(PartialState(), work) == 1
    monkeypatch.setattr(start, "broadcast_object_list", lambda _: done.append(2) or [None, 0])
    assert start.main_process_first(SimpleNamespace(is_main_process=False), work) == 3
    assert done == [1, 2, 1]


@pytest.mark.parametrize(("error", "status"), [(UserError("a"), 2), (OSError("b"), 1)])
def test_the_first_says_what_failed_elsewhere(monkeypatch, error, status):
    """Work that only fails on another machine is named there by the process that prints."""

    def fail():
        raise error

    found = []  # what the others are told
    monkeypatch.setattr(start, "broadcast_object_list", lambda _: [None, 0])
    monkeypatch.setattr(start, "gather_object", lambda said: found.extend(said) or [None, *said])
    with pytest.raises(SystemExit) as left:
        start.main_process_first(SimpleNamespace(is_main_process=False), fail)
    assert left.value.code == status
    monkeypatch.setattr(start, "gather_object", lambda said: [*said, *found])
    with pytest.raises(UserError, match=f"^on {platform.node()}: {error}$") as caught:
        start.main_process_first(SimpleNamespace(is_main_process=True), lambda: 1)
    assert caught.value.status == status


def test_first_difference(monkeypatch):
    """A value that differs between processes is found, with the key and the machine."""
    assert start.first_difference({"a": 1, "b": [2]}) is None
    others = [("one", {"a": 1, "b": [2]}), ("two", {"a": 1, "b": [3]})]
    monkeypatch.setattr(start, "gather_object", lambda mine: mine + others)
    assert start.first_difference({"a": 1, "b": [2]}) == ("b", "two")
