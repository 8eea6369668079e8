"""TensorBoard shows each step of a run once, however often it was interrupted, and costs no run."""

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer
from tensorboard.summary.writer.event_file_writer import RecordWriter

from lenslet import files
from lenslet.runs import tensorboard
from lenslet.runs.tensorboard import TensorBoard


@pytest.fixture(autouse=True)
def in_order(monkeypatch):
    """Files of the same second are read in the order of this counter, as text."""
    counter = event_file_writer.AtomicCounter(1000)
    monkeypatch.setattr(event_file_writer, "_global_uid", counter)


def shown(folder, tag="loss/train"):
    """Steps and values of a curve, as TensorBoard reads them."""
    events = EventAccumulator(str(folder))
    events.Reload()
    if tag not in events.Tags()["scalars"]:
        return []
    return [(event.step, event.value) for event in events.Scalars(tag)]


def log(curves, steps, value=0.0, tag="loss/train"):
    for step in steps:
        curves.add("scalar", tag, value, step)


def points(*parts):
    return [(step, value) for steps, value in parts for step in steps]


def test_points_beyond_the_checkpoint(tmp_path):
    """What was logged after the checkpoint that a run goes on from is shown as logged again."""
    first = TensorBoard(tmp_path, 0)
    log(first, range(1, 11), 1.0)
    first.flush(10)
    log(first, range(11, 16), 1.0)  # the checkpoint is that of step 10
    first.close()
    assert shown(tmp_path) == points((range(1, 16), 1.0))
    second = TensorBoard(tmp_path, 10)
    second.flush(10)
    assert shown(tmp_path) == points((range(1, 11), 1.0))
    log(second, range(11, 21), 2.0)
    second.close()
    assert shown(tmp_path) == points((range(1, 11), 1.0), (range(11, 21), 2.0))


def test_many_interruptions(tmp_path):
    """Each step is shown once after any number of interruptions, also twice at the same step."""
    expected = {}
    for begin, end in ((0, 7), (5, 9), (5, 12), (12, 14), (0, 3), (2, 6)):
        logged = TensorBoard(tmp_path, begin)
        log(logged, range(begin + 1, end + 1), float(end))
        log(logged, [end], float(begin), "accuracy/val")
        logged.close()
        expected = {step: value for step, value in expected.items() if step <= begin}
        expected |= {step: float(end) for step in range(begin + 1, end + 1)}
        assert shown(tmp_path) == sorted(expected.items())
    assert shown(tmp_path, "accuracy/val") == [(6, 2.0)]


def test_begun_again(tmp_path):
    """A run that was killed before its first checkpoint begins its curves and images again."""
    for value in (1.0, 2.0):
        logged = TensorBoard(tmp_path, 0)
        log(logged, range(0, 5), value)
        logged.close()
    assert shown(tmp_path) == points((range(0, 5), 2.0))


@pytest.mark.parametrize("cut", [1, 5, 20, 60])
def test_a_file_that_was_cut_off(tmp_path, cut):
    """A record that a crash cut off hides nothing that was logged afterwards."""
    logged = TensorBoard(tmp_path, 0)
    log(logged, range(1, 6), 1.0)
    logged.close()
    (path,) = tmp_path.iterdir()
    path.write_bytes(path.read_bytes()[:-cut])
    logged = TensorBoard(tmp_path, 3)
    log(logged, range(4, 9), 2.0)
    logged.close()
    assert shown(tmp_path) == points((range(1, 4), 1.0), (range(4, 9), 2.0))


@pytest.fixture
def disk(monkeypatch):
    """`disk.full = True`: from then on what TensorBoard writes fails."""

    class Disk:
        full = False

    write = RecordWriter.write

    def writing(self, data):
        if Disk.full:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(self, data)

    monkeypatch.setattr(RecordWriter, "write", writing)
    return Disk


# The writer has a thread of its own, whose error pytest would report.
in_a_thread = pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")


@in_a_thread
def test_a_full_disk_costs_points(tmp_path, disk):
    """While the disk is full points are lost and nothing is raised; at a flush logging goes on."""
    logged = TensorBoard(tmp_path, 0)
    log(logged, range(1, 4), 1.0)
    logged.flush(3)
    disk.full = True
    log(logged, range(4, 40), 2.0)  # more than the writer's queue holds
    logged.add("text", "note", "words", 40)
    logged.add_hparams({"lr": 1.0, "model": None}, {"val_loss": 0.5}, 40)
    disk.full = False
    log(logged, range(40, 42), 3.0)
    logged.flush(41)
    log(logged, range(42, 45), 4.0)
    logged.close()
    assert shown(tmp_path) == points((range(1, 4), 1.0), (range(42, 45), 4.0))


@in_a_thread
def test_a_disk_that_stays_full(tmp_path, disk):
    """However long the disk is full: adding, flushing and closing raise nothing."""
    logged = TensorBoard(tmp_path, 0)
    log(logged, range(1, 4), 1.0)
    logged.flush(3)
    disk.full = True
    for step in range(4, 20):
        log(logged, [step], 2.0)
        logged.flush(step)
    disk.full = False
    logged.flush(19)
    log(logged, range(20, 23), 3.0)
    logged.close()
    assert shown(tmp_path) == points((range(1, 4), 1.0), (range(20, 23), 3.0))


@in_a_thread
def test_full_when_it_begins(tmp_path, disk):
    """A disk that is full when a run goes on costs its curves, and not the run."""
    disk.full = True
    logged = TensorBoard(tmp_path, 5)
    log(logged, range(6, 9))
    disk.full = False
    logged.flush(8)
    log(logged, range(9, 11), 1.0)
    logged.close()
    assert shown(tmp_path) == points((range(9, 11), 1.0))


@in_a_thread
def test_full_at_the_end(tmp_path, disk):
    """A disk that is full when a run ends does not end it otherwise."""
    logged = TensorBoard(tmp_path, 0)
    disk.full = True
    log(logged, range(1, 3))
    logged.close()
    logged.close()
    logged.add("scalar", "loss/train", 1.0, 3)


class Failing:
    """A SummaryWriter each of whose calls fails from the second flush on."""

    def __init__(self, folder, purge_step):
        self.calls, self.purge_step = [], purge_step
        WRITERS.append(self)

    def __getattr__(self, name):
        def call(*args):
            self.calls.append(name)
            if len(WRITERS) == 1 and self.calls.count("flush") > 1:
                raise OSError(errno.EIO, os.strerror(errno.EIO))

        return call


WRITERS = []


@pytest.mark.parametrize("first", ["add", "flush", "close"])
def test_a_failing_writer_is_replaced(tmp_path, monkeypatch, first):
    """After a failure nothing is asked of that writer, and a flush begins after its step."""
    WRITERS.clear()
    monkeypatch.setattr(tensorboard, "SummaryWriter", Failing)
    logged = TensorBoard(tmp_path, 7)
    logged.flush(8)
    logged.flush(9)
    assert logged.writer is None and WRITERS[0].calls == ["flush", "flush", "close"]
    {"add": lambda: log(logged, [10]), "flush": lambda: None, "close": logged.close}[first]()
    assert len(WRITERS) == 1
    logged.flush(10)
    log(logged, [11])
    assert [writer.purge_step for writer in WRITERS] == [8, 11]
    assert WRITERS[1].calls == ["flush", "add_scalar"]


def test_a_mistake_of_ours_is_no_full_disk(tmp_path):
    """Only the disk's failures are passed over."""
    logged = TensorBoard(tmp_path, 0)
    with pytest.raises(AttributeError):
        logged.add("scalars_and_more", 1)
    logged.close()


def test_hyper_parameters(tmp_path):
    """Options and results stand in the run's own folder, where no other run is made of them."""
    logged = TensorBoard(tmp_path, 0)
    log(logged, range(1, 4))
    options = {"lr": 0.1, "epochs": 2, "model": None, "mean": [0.1, 0.2], "deterministic": False}
    record = {"epoch": 2, "lr": 0.1, "train_loss": 0.5, "val_accuracy": 0.75, "seconds": 9.0}
    logged.add_hparams(options, record, 3)
    logged.close()
    assert [path.is_file() for path in tmp_path.rglob("*")] == [True]
    assert shown(tmp_path, "result/val_accuracy") == [(3, 0.75)]
    assert shown(tmp_path, "result/train_loss") == [(3, 0.5)]
    assert not shown(tmp_path, "result/epoch") and not shown(tmp_path, "result/seconds")
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert {"_hparams_/experiment", "_hparams_/session_start_info"} <= set(events.summary_metadata)


def test_epochs(tmp_path):
    """An epoch's figures have the tags under which TensorBoard puts training and validation of the
    same figure side by side; what was not measured is not shown.
    """
    logged = TensorBoard(tmp_path, 0)
    record = {"epoch": 1, "step": 4, "train_loss": 0.5, "train_accuracy": 0.75, "lr": 0.1}
    record |= {"images_per_second": 99.0, "seconds": 2.0, "weights_sha256": "0"}
    logged.add_epoch(record, 4)
    validated = {"train_accuracy": 1.0, "val_accuracy": 0.25, "val_loss": 2.0, "val_f1": 0.125}
    logged.add_epoch(record | validated, 8)
    logged.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    curves = {tag: shown(tmp_path, tag) for tag in events.Tags()["scalars"]}
    assert curves == {
        "accuracy/train": [(4, 0.75), (8, 1.0)],
        "accuracy/val": [(8, 0.25)],
        "loss/val": [(8, 2.0)],
        "metrics/val_f1": [(8, 0.125)],
        "speed/images_per_second": [(4, 99.0), (8, 99.0)],
    }


def test_without_a_folder(tmp_path, monkeypatch):
    """The other processes of a run log nothing, whatever they are asked to."""
    monkeypatch.chdir(tmp_path)
    logged = TensorBoard(None, 0)
    log(logged, range(3))
    logged.add_epoch({"val_loss": 1.0}, 3)
    logged.add_hparams({"lr": 1.0}, {"val_loss": 1.0}, 3)
    logged.flush(3)
    logged.close()
    assert logged.writer is None and not list(tmp_path.iterdir())


SCRIPT = """
import resource, signal, sys
from pathlib import Path
from lenslet.runs.tensorboard import TensorBoard

signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
curves = TensorBoard(Path(sys.argv[1]), 0)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))
for step in range(1, 60):
    curves.add("scalar", "loss/train", 1.0, step)
    curves.flush(step)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
curves.flush(step)
curves.add("scalar", "loss/train", 2.0, 60)
curves.close()
"""


def test_a_real_limit(tmp_path):
    """Where the system itself refuses to write, a command logs on afterwards, without a word."""
    (tmp_path / "script.py").write_text(SCRIPT)
    run = tmp_path / "run"
    env = {**os.environ, "PYTHONPATH": str(Path(files.ROOT))}
    words = [sys.executable, tmp_path / "script.py", run]
    result = subprocess.run(words, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    steps = [step for step, _ in shown(run)]
    assert len(steps) == len(set(steps)) and steps[-1] == 60
    assert "Traceback" not in result.stderr
