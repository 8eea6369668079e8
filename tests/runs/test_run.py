"""Whatever interrupts a run, the same command brings it to the same weights, bit for bit."""

import contextlib
import dataclasses
import errno
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import train
from accelerate.state import AcceleratorState, GradientState
from conftest import public_names
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer import event_file_writer

from lenslet import errors, files, metrics, weights
from lenslet.data import augment, layout
from lenslet.distributed import interrupts
from lenslet.runs import checkpoint
from lenslet.runs import run as run_module
from lenslet.runs.run import Progress, Run
from lenslet.training import build, clock, losses
from lenslet.training.net import Net

TINY = ["--model", "lenet", "--epochs", "3", "--batch-size", "8", "--workers", "0"]
TINY += ["--precision", "no", "--augment", "standard", "--log-every", "3"]  # 12 steps in all


class Crash(BaseException):
    """Stands for SIGKILL: nothing in the code may catch it."""


def call(*words):
    """train.py as a process of its own would meet Accelerate: not yet set up."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.manual_seed(torch.seed())  # nothing may depend on where a generator stands
    with contextlib.suppress(Crash):
        return errors.run_main(train.main, [str(word) for word in words])
    return "crashed"


@pytest.fixture(autouse=True)
def sorted_events(monkeypatch):
    """Event files of one second and process are read in the order of their numbers: as text."""
    monkeypatch.setattr(event_file_writer, "_global_uid", type(event_file_writer._global_uid)(100))


@pytest.fixture
def pictures(make_folder, tmp_path):
    """26 small images to train on: the batches of 8 are ragged."""
    return make_folder(tmp_path / "pictures", {"train": 13, "val": 5}, size=(12, 12))


@pytest.fixture
def command(pictures, tmp_path):
    """The words of a run into tmp_path/run."""
    return ["--data", pictures, "--output", tmp_path / "run", *TINY]


@pytest.fixture(scope="module")
def undisturbed(make_folder, tmp_path_factory):
    """The outcome of the same run left alone, on images of its own."""
    folder = tmp_path_factory.mktemp("undisturbed")
    pictures = make_folder(folder / "pictures", {"train": 13, "val": 5}, size=(12, 12))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "RUNS", folder)
        assert call("--data", pictures, "--output", folder / "run", *TINY) == 0
    return outcome(folder / "run")


TIMES = {"seconds", "images_per_second"}


def outcome(run):
    """Everything that must not depend on interruptions: weights, digests, figures, curves."""
    tensors, header = weights.read(run / "model.safetensors")
    epochs = json.loads((run / "metrics.json").read_text())["epochs"]
    figures = [{k: v for k, v in record.items() if k not in TIMES} for record in epochs]
    events = EventAccumulator(str(run))
    events.Reload()
    curves = {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
        if not tag.endswith(tuple(TIMES))
    }
    return weights.digest(tensors), header["digests"], figures, curves


def at_call(monkeypatch, number, owner, name, action):
    """Have the number-th call of owner.name preceded by action()."""
    calls, real = itertools.count(1), getattr(owner, name)

    def counted(*args, **settings):
        if next(calls) == number:
            action()
        return real(*args, **settings)

    monkeypatch.setattr(owner, name, counted)


def crash():
    raise Crash


def test_few_names():
    """A run can be held in mind: at most 15 fields are saved, and 12 names are for others."""
    assert len(dataclasses.fields(Progress)) <= 15
    assert len(public_names(Run)) <= 12


def test_what_a_checkpoint_holds(command, tmp_path, monkeypatch):
    """All that a run goes on from is Progress, a field a value, and what has tensors; the rest is
    there to be compared.
    """
    interrupted(command, monkeypatch)
    newest, _ = checkpoint.newest_checkpoint(tmp_path / "run" / "checkpoint")
    saved = checkpoint.load_checkpoint(newest)
    assert list(saved["progress"]) == [field.name for field in dataclasses.fields(Progress)]
    assert Progress(**saved["progress"]).step == saved["progress"]["step"] == 4
    compared = {"inputs", "environment"}
    assert saved.keys() - compared == {
        *("progress", "meter", "networks", "buffers", "optimizer", "scaler")
    }
    assert json.dumps(saved["progress"])  # nothing of it is a tensor


@pytest.mark.parametrize("every", ["1", "2", "5m"])
@pytest.mark.parametrize("step", [1, 3, 4, 6, 9])
def test_killed_at_a_step(command, undisturbed, tmp_path, monkeypatch, step, every):
    """Killed within any step of an epoch, a run ends with the bits, figures and curves it would
    have had, none of them twice.
    """
    with monkeypatch.context() as patch:
        at_call(patch, step, interrupts.Interrupts, "agree", crash)
        assert call(*command, "--save-every", every) == "crashed"
    assert call(*command, "--save-every", every) == 0
    assert outcome(tmp_path / "run") == undisturbed
    assert not (tmp_path / "run-2").exists()


@pytest.mark.parametrize(("name", "status"), [("TERM", 143), ("INT", 130), ("USR1", 143)])
@pytest.mark.parametrize(
    ("owner", "function", "number"),
    [
        (interrupts.Interrupts, "agree", 2),
        (interrupts.Interrupts, "agree", 4),  # with the evaluation's own: the last of an epoch
        (metrics, "on_device", 2),  # while it is evaluated
        (interrupts.Interrupts, "agree", 14),  # the last of all
        (metrics, "on_device", 3),
        (checkpoint, "save_checkpoint", 1),
    ],
)
def test_signals(
    command, undisturbed, tmp_path, monkeypatch, capsys, name, status, owner, function, number
):
    """A signal ends the run after its step, saved and said; nothing is lost, nothing differs."""
    number_of_signal = getattr(signal, f"SIG{name}")
    before = signal.getsignal(number_of_signal)
    with monkeypatch.context() as patch:
        kill = lambda: os.kill(os.getpid(), number_of_signal)  # noqa: E731
        at_call(patch, number, owner, function, kill)
        assert call(*command) == status
    said = capsys.readouterr().out
    assert "run the same command to resume" in said.splitlines()[-1]
    assert signal.getsignal(number_of_signal) is before
    assert call(*command) == 0
    assert "resuming" in capsys.readouterr().out
    assert outcome(tmp_path / "run") == undisturbed


def test_second_interrupt_leaves_at_once(command, monkeypatch, tmp_path):
    """A Ctrl-C while the first one's checkpoint is written does not wait for it; 130 too."""

    def twice():
        os.kill(os.getpid(), signal.SIGINT)

    at_call(monkeypatch, 2, interrupts.Interrupts, "agree", twice)
    at_call(monkeypatch, 1, checkpoint, "save_checkpoint", twice)
    assert call(*command) == 130
    assert not list((tmp_path / "run").glob("checkpoint/*"))


def count_calls(monkeypatch, command, names):
    """How often a whole run calls each of os.<names>."""
    counts = dict.fromkeys(names, 0)

    def counting(name, real):
        def counted(*args, **settings):
            counts[name] += 1
            return real(*args, **settings)

        return counted

    with monkeypatch.context() as patch:
        for name in names:
            patch.setattr(os, name, counting(name, getattr(os, name)))
        assert call(*command) == 0
    return counts


@pytest.mark.parametrize("name", ["fsync", "rename", "replace"])
def test_killed_at_each_write(command, undisturbed, tmp_path, monkeypatch, name):
    """Killed before any flush or renaming of a run, it goes on to the same weights."""
    writes = count_calls(monkeypatch, command, [name])[name]
    assert writes >= 3
    shutil.rmtree(tmp_path / "run")
    for number in range(1, writes + 1, 1 if writes < 12 else 4):
        with monkeypatch.context() as patch:
            at_call(patch, number, os, name, crash)
            assert call(*command) == "crashed"
        assert call(*command) == 0
        assert outcome(tmp_path / "run") == undisturbed, number
        assert not (tmp_path / "run-2").exists()
        assert not [p for p in (tmp_path / "run").glob("**/.*") if p.name != ".lock"]
        shutil.rmtree(tmp_path / "run")


def full(*_):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_full_disk(command, undisturbed, tmp_path, monkeypatch, capsys):
    """A disk that is full for a while costs a line; at the end nothing is missing."""
    with monkeypatch.context() as patch:
        at_call(patch, 2, checkpoint, "save_checkpoint", full)
        assert call(*command) == 0
    said = capsys.readouterr()
    line = (
        "step 8: the checkpoint could not be saved (No space left on device), but the weights are "
    )
    (found,) = [said for said in said.out.splitlines() if said.startswith(line)]
    assert found.endswith("/model.safetensors; training continues")
    assert outcome(tmp_path / "run") == undisturbed


def test_full_disk_at_the_end(command, undisturbed, tmp_path, monkeypatch, capsys):
    """Where the last save fails, so does the run, in one line; the weights are there if they fit,
    and with room again the run goes on.
    """
    with monkeypatch.context() as patch:
        at_call(patch, 3, checkpoint, "save_checkpoint", full)
        assert call(*command) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: the checkpoint could not be saved (No space left on device)")
    assert len(error.splitlines()) == 1 and "but the weights are in " in error
    _, header = weights.read(tmp_path / "run" / "model.safetensors")
    assert len(header["digests"]) == 3  # of the last epoch
    assert call(*command) == 0
    assert outcome(tmp_path / "run") == undisturbed


def test_a_run_that_is_moved(command, undisturbed, monkeypatch, tmp_path, capsys):
    """A run whose folder goes away ends with an error, leaves no half of a run in its place, and
    goes on where it was moved to.
    """
    run, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    with monkeypatch.context() as patch:
        at_call(patch, 2, Net, "state", lambda: run.rename(elsewhere))
        assert call(*command) == 1
    assert "was moved or deleted" in capsys.readouterr().err
    assert not run.exists()
    assert call("--resume", elsewhere) == 0
    assert outcome(elsewhere) == undisturbed


def test_damaged_checkpoint(command, undisturbed, tmp_path, monkeypatch, capsys):
    """A damaged checkpoint is named and passed over, and the one before it brings the same end."""
    with monkeypatch.context() as patch:
        at_call(patch, 9, interrupts.Interrupts, "agree", crash)
        assert call(*command, "--save-every", "2") == "crashed"
    saved = sorted((tmp_path / "run" / "checkpoint").iterdir())
    assert len(saved) == 2
    content = bytearray((saved[1] / "state.safetensors").read_bytes())
    content[-9] ^= 1
    (saved[1] / "state.safetensors").write_bytes(content)
    capsys.readouterr()
    assert call(*command) == 0
    said = capsys.readouterr().out
    assert str(saved[1]) in said and "state.safetensors was altered" in said
    assert outcome(tmp_path / "run") == undisturbed


def test_a_checkpoint_of_an_older_version(command, undisturbed, tmp_path, monkeypatch, capsys):
    """It is refused in a line, and a new run begins; the weights of the old one stay."""
    interrupted(command, monkeypatch)
    run = tmp_path / "run"
    before = (run / "model.safetensors").read_bytes()
    (path,) = (run / "checkpoint").iterdir()
    manifest = json.loads((path / "manifest.json").read_text())
    (path / "manifest.json").write_text(json.dumps(manifest | {"version": "3"}))
    capsys.readouterr()
    assert call(*command) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "cannot be used" in line]
    assert len(lines) == 1 and lines[0].startswith(f"{path} cannot be used (")
    assert "3, not 5" in lines[0] and "new run" in lines[0]
    assert outcome(tmp_path / "run-2") == undisturbed
    assert (run / "model.safetensors").read_bytes() == before
    capsys.readouterr()
    assert call("--resume", run) == 2
    assert f"{path} cannot be used (" in capsys.readouterr().err


def test_lost_weights_come_back(command, undisturbed, tmp_path, monkeypatch):
    """The best weights so far are part of a checkpoint, should model.safetensors be lost."""
    with monkeypatch.context() as patch:
        at_call(patch, 9, interrupts.Interrupts, "agree", crash)
        assert call(*command) == "crashed"
    (tmp_path / "run" / "model.safetensors").unlink()
    assert call(*command) == 0
    assert outcome(tmp_path / "run") == undisturbed


def interrupted(command, monkeypatch, step=6):
    with monkeypatch.context() as patch:
        at_call(patch, step, interrupts.Interrupts, "agree", crash)
        assert call(*command) == "crashed"


def test_other_options(command, tmp_path, monkeypatch, capsys):
    """With other options a new run begins, which says how they differ; the old one stays."""
    interrupted(command, monkeypatch)
    capsys.readouterr()
    assert call(*command, "--lr", "0.002", "--epochs", "1") == 0
    said = capsys.readouterr().out
    assert "--lr was 0.001, now 0.002" in said and "--epochs was 3, now 1" in said
    assert (tmp_path / "run-2" / "model.safetensors").exists()
    assert call(*command) == 0  # and the first command still goes on
    assert "resuming" in capsys.readouterr().out
    assert not (tmp_path / "run-3").exists()


def test_options_without_a_say(command, undisturbed, tmp_path, monkeypatch, capsys):
    """Options that no weight depends on may differ between the parts of a run."""
    interrupted(command, monkeypatch)
    words = ["--workers", "1", "--save-every", "3", "--log-every", "2"]
    assert call(*command, *words) == 0
    assert "resuming" in capsys.readouterr().out
    assert outcome(tmp_path / "run")[:2] == undisturbed[:2]


def test_another_accumulate(command, tmp_path, monkeypatch, capsys):
    """A run that ran out of memory goes on with --accumulate, and says what that changes."""
    interrupted(command, monkeypatch)
    capsys.readouterr()
    assert call(*command, "--accumulate", "2") == 0
    said = capsys.readouterr().out
    assert (
        "--accumulate was 1, now 2: the last bits may differ, and with batch norm more" in said
        and "resuming" in said
    )
    assert not (tmp_path / "run-2").exists()


@pytest.mark.parametrize("named", ["run", "run/checkpoint", "run/options.yaml"])
def test_resume_by_name(command, undisturbed, tmp_path, monkeypatch, capsys, named):
    """--resume needs no other option, and once the run is finished changes nothing."""
    interrupted(command, monkeypatch)
    assert call("--resume", tmp_path / named) == 0
    assert outcome(tmp_path / "run") == undisturbed
    written = (tmp_path / "run" / "model.safetensors").read_bytes()
    assert call("--resume", tmp_path / named, "--workers", "0") == 0
    assert (tmp_path / "run" / "model.safetensors").read_bytes() == written
    assert not (tmp_path / "run-2").exists()


def test_resume_mistakes(command, tmp_path, monkeypatch, capsys):
    """--resume with an option that the run does not have, or of no run, is refused."""
    interrupted(command, monkeypatch)
    for words, named in (
        (["--resume", tmp_path / "run", "--lr", "0.5"], "--lr was 0.001, now 0.5"),
        (["--resume", tmp_path / "pictures"], "not in a run folder"),
        (["--resume", tmp_path / "nothing"], "not in a run folder"),
    ):
        capsys.readouterr()
        assert call(*words) == 2
        error = capsys.readouterr().err
        assert named in error and len(error.splitlines()) == 1


def test_a_run_that_is_being_trained(command, monkeypatch, capsys):
    """A run that another process trains is not touched; the line says who, and what to do."""
    interrupted(command, monkeypatch)
    capsys.readouterr()

    def locked(folder):
        raise files.Locked(f"{folder} is in use by process 7 on host")

    monkeypatch.setattr(files, "lock", locked)
    assert call(*command) == 2
    error = capsys.readouterr().err
    assert "is in use by process 7 on host: wait for it" in error and "--no-resume" in error


def test_no_resume(command, tmp_path, monkeypatch):
    """--no-resume begins anew, but for processes that torchrun has started again."""
    interrupted(command, monkeypatch)
    interrupted([*command, "--no-resume"], monkeypatch)
    assert (tmp_path / "run-2").exists()
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert call(*command, "--no-resume") == 0
    assert not (tmp_path / "run-3").exists()
    assert (tmp_path / "run-2" / "model.safetensors").exists()


def test_another_division(make_folder, tmp_path, monkeypatch, capsys):
    """A run whose folder of classes was divided otherwise does not go on as if nothing was."""
    root = make_folder(tmp_path / "classes", {"": 13}, size=(12, 12))
    make_folder(root, {"": 3}, classes=("wasps",), size=(12, 12))
    command = ["--data", root, "--output", tmp_path / "run", *TINY]
    with monkeypatch.context() as patch:
        by_hash = {f"wasps/{i}.png": "train" for i in range(3)}
        real = layout.divide
        patch.setattr(layout, "divide", lambda pairs, _: real(pairs, by_hash))
        interrupted(command, monkeypatch)
    capsys.readouterr()
    assert call(*command) == 2
    assert "not the same images as before; start anew with --no-resume" in capsys.readouterr().err


def test_changed_images(command, pictures, monkeypatch, capsys):
    """A run does not go on with other images than it began with."""
    interrupted(command, monkeypatch)
    next((pictures / "train" / "ants").iterdir()).unlink()
    capsys.readouterr()
    assert call(*command) == 2
    assert "--no-resume" in capsys.readouterr().err


def test_another_class(command, pictures, make_folder, monkeypatch, capsys):
    """Nor with another class, whose network would be another one."""
    interrupted(command, monkeypatch)
    make_folder(pictures, {"train": 3, "val": 1}, classes=("wasps",), size=(12, 12))
    capsys.readouterr()
    assert call(*command) == 2
    error = capsys.readouterr().err
    assert "--no-resume" in error and len(error.splitlines()) == 1


def test_an_explosion_again(command, tmp_path, capsys):
    """The same command after an explosion ends in the same line, wherever it goes on."""
    words = ["--optimizer", "sgd", "--lr", "1e4", "--save-every", "1", "--log-every", "50"]
    for _ in range(2):
        assert call(*command, *words) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: the loss is ") and len(error.splitlines()) == 1


def test_an_explosion_in_the_last_step(command, tmp_path, capsys):
    """Weights that the last step of an epoch ruined are not kept as the best."""
    words = ["--optimizer", "sgd", "--momentum", "0", "--lr", "1e18", "--schedule", "constant"]
    assert call(*command, *words, "--batch-size", "64") == 2
    assert "error: the loss is " in capsys.readouterr().err
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_threads_are_restored(command, undisturbed, tmp_path, monkeypatch, capsys):
    """The number of threads has a say in the last bits: a run keeps that it began with."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    torch.set_num_threads(1)
    interrupted(command, monkeypatch)
    torch.set_num_threads(2)
    assert call(*command) == 0
    assert torch.get_num_threads() == 1
    assert "threads was" not in capsys.readouterr().out
    assert weights.read_header(tmp_path / "run" / "model.safetensors")["threads"] == 1


@pytest.mark.parametrize(
    "words",
    [
        ["--model", "torchvision/mobilenet_v3_small"],  # batch norm and dropout
        ["--optimizer", "sgd", "--clip", "1", "--accumulate", "2", "--val", "0"],
        ["--threads", "2"],  # the other tests have one
        ["--precision", "bf16", "--schedule", "constant", "--keep", "all"],
    ],
)
def test_any_network_and_optimizer(pictures, tmp_path, monkeypatch, words):
    """Batch norm's statistics, dropout's draws, momentum and moments all go on where they were."""
    command = ["--data", pictures, *TINY, *words]
    assert call(*command, "--output", tmp_path / "whole") == 0
    interrupted([*command, "--output", tmp_path / "run", "--save-every", "1"], monkeypatch, 5)
    assert call(*command, "--output", tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")
    kept = [sorted(p.name for p in (tmp_path / r).glob("epochs/*")) for r in ("run", "whole")]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("reading", ["--in-memory", "--no-in-memory", "--no-in-memory --workers 2"])
def test_photographs(make_folder, tmp_path, monkeypatch, reading):
    """Random crops of photographs go on in mid-epoch too, whoever decodes them."""
    photos = make_folder(tmp_path / "photos", {"train": 9, "val": 2}, size=(90, 70), suffix=".jpg")
    command = ["--data", photos, *TINY, "--image-size", "32", "--epochs", "2", *reading.split()]
    assert call(*command, "--output", tmp_path / "whole") == 0
    interrupted([*command, "--output", tmp_path / "run", "--save-every", "1"], monkeypatch, 2)
    assert call(*command, "--output", tmp_path / "run") == 0
    assert outcome(tmp_path / "run") == outcome(tmp_path / "whole")


def test_loss_that_is_no_number(command, tmp_path, capsys):
    """A loss that explodes ends the run in a line with epoch, step, rate and layer; the last good
    weights and checkpoint stay.
    """
    assert call(*command, "--lr", "1e18", "--schedule", "constant") == 2
    error = capsys.readouterr().err
    assert len(error.splitlines()) == 1 and error.startswith("error: the loss is ")
    for part in ("epoch 1", "step ", "lr 1e+18", "largest gradient was that of ", "--lr"):
        assert part in error
    assert not (tmp_path / "run" / "checkpoint").exists()


def test_gradient_that_explodes_later(command, pictures, tmp_path, monkeypatch, capsys):
    """The weights of the last good epoch are kept and named, and the layer is the one to blame."""
    real = augment.augment
    calls = itertools.count(1)

    def explode(images, *args):
        if next(calls) == 5:  # the second epoch
            for p in explode.model.parameters():
                p.data.mul_(1e30)
        return real(images, *args)

    create = build.create_model

    def remember(*args, **settings):
        explode.model = create(*args, **settings)
        return explode.model

    monkeypatch.setattr(augment, "augment", explode)
    monkeypatch.setattr(build, "create_model", remember)
    assert call(*command) == 2
    error = capsys.readouterr().err
    assert "epoch 2 at step 5" in error and "at step 3" in error
    assert f"weights are in {tmp_path / 'run' / 'model.safetensors'}" in error
    assert weights.read(tmp_path / "run" / "model.safetensors")[1]["epoch"] == 1
    assert len(list((tmp_path / "run" / "checkpoint").iterdir())) == 1


def test_out_of_memory(command, monkeypatch, capsys):
    """Too large a batch for a GPU: what was tried, and which --accumulate to try."""

    def overflow(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(losses.F, "cross_entropy", overflow)
    assert call(*command, "--accumulate", "2") == 1
    error = capsys.readouterr().err
    assert "--batch-size 8 --accumulate 2" in error and "try --accumulate 4" in error
    assert len(error.splitlines()) == 1


def test_deterministic(command, undisturbed, tmp_path, monkeypatch, capsys):
    """--deterministic has torch refuse what has no fixed order, in one line, and changes no bit."""
    try:
        assert call(*command, "--deterministic") == 0
        assert torch.are_deterministic_algorithms_enabled()
        assert outcome(tmp_path / "run") == undisturbed
        message = "put_ does not have a deterministic implementation, but you set …"

        def refuse(*_, **__):
            raise RuntimeError(message)

        monkeypatch.setattr(losses.F, "cross_entropy", refuse)
        assert call(*command, "--deterministic") == 2
        error = capsys.readouterr().err
        assert "put_" in error and "--deterministic" in error and len(error.splitlines()) == 1
        message = "DataLoader worker (pid 7) is killed by signal: Killed."
        assert call(*command, "--deterministic") == 1
        assert "fewer --workers" in capsys.readouterr().err
        message = "another"
        with pytest.raises(RuntimeError, match="another"):
            call(*command, "--deterministic")
    finally:
        torch.use_deterministic_algorithms(False)


def test_vanished_image(make_folder, tmp_path, monkeypatch, capsys):
    """A photograph that is gone when its turn comes ends the run in one line that names it."""
    photos = make_folder(tmp_path / "photos", {"train": 9, "val": 2}, size=(90, 70), suffix=".jpg")
    lost = photos / "train" / "bees" / "3.jpg"
    at_call(monkeypatch, 3, interrupts.Interrupts, "agree", lambda: lost.unlink(missing_ok=True))
    words = ["--data", photos, "--output", tmp_path / "run", *TINY, "--image-size", "32"]
    words += ["--no-in-memory"]
    assert call(*words) == 1
    error = capsys.readouterr().err
    assert str(lost) in error and len(error.splitlines()) == 1


@pytest.mark.slow
def test_vanished_image_with_workers(make_folder, tmp_path):
    """With processes that decode too, which end with the run: standard error has that one line."""
    photos = make_folder(tmp_path / "photos", {"train": 9, "val": 2}, size=(90, 70), suffix=".jpg")
    lost = photos / "train" / "bees" / "3.jpg"
    words = ["--data", photos, "--output", tmp_path / "run", *TINY, "--image-size", "32"]
    words += ["--no-in-memory"]
    words += ["--workers", "2"]
    program = f"""
import sys
sys.path[:0] = ["scripts", "."]
from pathlib import Path
import train
from lenslet.distributed.interrupts import Interrupts
from lenslet.errors import run_main
agree = Interrupts.agree
def lose(*args, **more):
    Path({str(lost)!r}).unlink(missing_ok=True)
    return agree(*args, **more)
Interrupts.agree = lose
sys.exit(run_main(train.main, {[str(word) for word in words]!r}))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=files.ROOT, capture_output=True, text=True
    )
    assert (result.returncode, len(result.stderr.splitlines())) == (1, 1), result.stderr
    assert str(lost) in result.stderr


@pytest.fixture
def timer(monkeypatch):
    """The clock of runs, which moves by `timer.step` seconds at each step, and at nothing else."""
    timer, advance = SimpleNamespace(now=1000.0, step=0.2), Run.advance

    def advance_later(*args):
        timer.now += timer.step
        return advance(*args)

    monkeypatch.setattr(Run, "advance", advance_later)
    for module in (run_module, build):
        monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: timer.now))
    monkeypatch.setattr(run_module, "device_time", lambda device: timer.now)
    return timer


def test_time_budget(command, pictures, tmp_path, monkeypatch, timer):
    """A run by the clock that was killed goes on with its plan and the time left; and the plan that
    came of it gives the same weights again, whatever the clock says then.
    """
    words = [*command, "--time", "3s", "--save-every", "1"]
    with monkeypatch.context() as patch:
        at_call(patch, 12, interrupts.Interrupts, "agree", crash)
        assert call(*words) == "crashed"
    newest, _ = checkpoint.newest_checkpoint(tmp_path / "run" / "checkpoint")
    before = checkpoint.load_checkpoint(newest)["progress"]
    assert before["marks"][-1][1] > 0
    timer.step = 0.1  # the machine is faster now
    assert call(*words) == 0
    summary = json.loads((tmp_path / "run" / "metrics.json").read_text())["summary"]
    assert summary["train_seconds"] == pytest.approx(3, abs=0.11)
    assert timer.now == pytest.approx(1003.2, abs=0.11)  # one step is taken twice
    header = weights.read_header(tmp_path / "run" / "model.safetensors")
    assert header["plan"][: len(before["marks"])] == before["marks"]

    timer.step = 7.0
    again = ["--data", pictures, "--output", tmp_path / "again", *TINY, "--time", "3s"]
    assert call(*again, "--plan", tmp_path / "run" / "model.safetensors") == 0
    repeated = weights.read_header(tmp_path / "again" / "model.safetensors")
    assert repeated["digests"][: len(header["digests"])] == header["digests"]
    assert repeated["plan"][: len(header["plan"])] == header["plan"]


def test_time_budget_keeps_its_width(pictures, tmp_path, monkeypatch, timer):
    """The network that the clock chose is the one that goes on, though the machine is faster."""
    words = ["--data", pictures, "--output", tmp_path / "run", "--model", "fastnet"]
    words += ["--time", "2s", "--batch-size", "8", "--workers", "0", "--precision", "no"]
    words += ["--save-every", "1"]
    timer.step = 0.4
    with monkeypatch.context() as patch:
        patch.setattr(build, "measure_speed", lambda *_: 1e-9)
        at_call(patch, 3, interrupts.Interrupts, "agree", crash)
        assert call(*words) == "crashed"
    monkeypatch.setattr(build, "measure_speed", lambda *_: 1e9)
    assert call(*words) == 0
    header = weights.read_header(tmp_path / "run" / "model.safetensors")
    assert header["model_args"]["width"] == clock.WIDTHS[0][0]
    assert call(*words, "--seed", "1") == 0
    other = weights.read_header(tmp_path / "run-2" / "model.safetensors")
    assert other["model_args"]["width"] == clock.WIDTHS[-1][0]
