"""What is decided for photographs stays with the run, and gives way to what is asked for."""

import shutil

import pytest
import torch
import train
from accelerate.state import AcceleratorState, GradientState

from lenslet import errors, weights
from lenslet.cli import read_config
from lenslet.training import decide, options

QUICK = ["--width", 8, "--workers", 0, "--precision", "no", "--log-every", 1]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Nobody is asked for weights, and the candidates are small."""
    monkeypatch.setattr(decide, "find_pretrained", lambda models: (None, "no weights to be had"))
    small, large = (decide.Candidate("fastnet", side, 8) for side in (32, 40))
    monkeypatch.setattr(decide, "SCRATCH", ((small, 0), (large, 80)))


@pytest.fixture
def photographs(tmp_path, make_folder):
    return make_folder(tmp_path / "p", {"train": 8, "val": 3}, size=(90, 70), suffix=".jpg")


def run(*words):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return errors.run_main(train.main, [str(word) for word in words])


def stored(folder):
    return read_config(options.build_parser(), folder / "options.yaml")


def test_everything_is_decided(photographs, tmp_path, capsys):
    """A folder of photographs alone: network, size and settings are chosen, said and stored."""
    assert run("--data", photographs, "--epochs", 5, "--output", tmp_path / "r", *QUICK) == 0
    header = weights.read_header(tmp_path / "r" / "model.safetensors")
    assert (header["model"], header["model_args"]["width"]) == ("fastnet", 8)
    assert header["image_size"] == [40, 40]
    chosen = stored(tmp_path / "r")
    assert (chosen["optimizer"], chosen["image_size"], chosen["in_memory"]) == ("muon", 40, True)
    assert "width" not in chosen["decided"] and {"model", "lr", "in_memory"} <= {*chosen["decided"]}
    said = capsys.readouterr().out
    assert "no weights to be had\nfastnet of width 8 at 40x40, as there is time for about 5" in said


def test_size_follows_the_epochs(photographs, tmp_path):
    """With fewer passes over the images, they are smaller."""
    assert run("--data", photographs, "--epochs", 4, "--output", tmp_path / "r", *QUICK) == 0
    assert stored(tmp_path / "r")["image_size"] == 32


def test_what_is_given_stays(photographs, tmp_path):
    """An option that is given is not decided."""
    words = ["--image-size", 48, "--lr", 0.001, "--no-in-memory", "--pretrained", "none"]
    words += ["--data", photographs, "--epochs", 1, "--output", tmp_path / "r"]
    assert run(*words, *QUICK) == 0
    chosen = stored(tmp_path / "r")
    assert (chosen["image_size"], chosen["lr"], chosen["in_memory"]) == (48, 0.001, False)
    assert "pretrained" not in chosen and not {"lr", "image_size"} & {*chosen["decided"]}


def interrupt(monkeypatch, after):
    """Have the next training stop after some steps, as with Ctrl-C."""
    from lenslet.runs.run import Run

    agree = Run.agree

    def stop(self, interrupts):
        interrupts.stop = 130 if self.progress.step == after else 0
        return agree(self, interrupts) if not interrupts.stop else False

    monkeypatch.setattr(Run, "agree", stop)


def test_resumed_with_what_was_decided(photographs, tmp_path, monkeypatch, capsys):
    """The same command goes on with the first decisions, even if it would decide otherwise."""
    words = ["--data", photographs, "--epochs", 5, "--batch-size", 4, *QUICK]
    assert run(*words, "--output", tmp_path / "whole") == 0
    with monkeypatch.context() as patch:
        interrupt(patch, after=6)
        assert run(*words, "--output", tmp_path / "r") == 130
    monkeypatch.setattr(decide, "SCRATCH", decide.SCRATCH[:1])
    monkeypatch.setattr(decide, "fits", lambda *_: False)
    assert run(*words, "--output", tmp_path / "r") == 0
    assert not (tmp_path / "r-2").exists()
    ours, theirs = (weights.read(tmp_path / name / "model.safetensors") for name in ("r", "whole"))
    assert ours[1]["sha256"] == theirs[1]["sha256"]


def test_other_options_are_another_run(photographs, tmp_path, monkeypatch):
    """An unfinished run is not gone on with by a command that asks for something else."""
    words = ["--data", photographs, "--batch-size", 4, "--output", tmp_path / "r", *QUICK]
    with monkeypatch.context() as patch:
        interrupt(patch, after=2)
        assert run(*words, "--epochs", 2, "--lr", 0.01) == 130
    assert run(*words, "--epochs", 2) == 0
    assert stored(tmp_path / "r-2")["lr"] == 0.02
    assert run(*words, "--epochs", 2, "--lr", 0.01) == 0
    assert not (tmp_path / "r-3").exists()


def test_memory_and_files_differ_in_pixels_only(photographs, tmp_path):
    """--in-memory changes how crops are resized, so it is stored, and a network learns alike."""
    words = ["--data", photographs, "--model", "lenet", "--image-size", 32, "--epochs", 3]
    words += ["--lr", 0.01, "--augment", "light", "--workers", 0]
    losses = []
    for option in ("--in-memory", "--no-in-memory"):
        output = tmp_path / f"r{option}"
        assert run(*words, option, "--output", output) == 0
        losses.append(weights.read_header(output / "model.safetensors")["validation"]["val_loss"])
    assert losses[0] != losses[1] and abs(losses[0] - losses[1]) < 0.1


@pytest.mark.parametrize("words", [["--time", "3s"], ["--epochs", 2]])
def test_fine_tuning_our_own(photographs, tmp_path, make_folder, words):
    """Weights of ours decide the network and its size."""
    other = make_folder(
        tmp_path / "o", {"train": 8, "val": 2}, ("a", "b", "c"), (80, 80), suffix=".jpg"
    )
    assert run("--data", other, "--epochs", 2, "--output", tmp_path / "o1", *QUICK) == 0
    source = tmp_path / "o1" / "model.safetensors"
    given = ["--data", photographs, "--pretrained", source, "--output", tmp_path / "r", *words]
    assert run(*given, "--workers", 0) == 0
    header = weights.read_header(tmp_path / "r" / "model.safetensors")
    assert header["model_args"]["width"] == 8 and header["image_size"] == [32, 32]
    assert header["classes"] == ["ants", "bees"]


def test_weights_of_the_library(photographs, tmp_path, monkeypatch, capsys):
    """Where a library's weights can be had, a network is chosen among those that have them."""
    tensors = {}

    def find(models):
        assert models[0] in {candidate.model for candidate, _ in decide.PRETRAINED}
        tensors.update(create(models[-1]))
        return models[-1], f"{models[-1]}: weights from the cache"

    def create(name):
        torch.manual_seed(0)
        return decide.create_model(name, 10, size=64).state_dict()

    monkeypatch.setattr(decide, "PRETRAINED", ((decide.Candidate("resnet10t", 64), 0),))
    monkeypatch.setattr(decide, "find_pretrained", find)
    monkeypatch.setattr(
        "lenslet.training.pretrained.read_weights", lambda source, model: (tensors, {})
    )
    words = ["--data", photographs, "--epochs", 1, "--workers", 0, "--output", tmp_path / "r"]
    assert run(*words) == 0
    chosen = stored(tmp_path / "r")
    assert (chosen["model"], chosen["pretrained"]) == ("resnet10t", "timm")
    assert "resnet10t: weights from the cache" in capsys.readouterr().out


def test_a_cache_that_is_gone(photographs, tmp_path):
    """Without data/cache the same run has the same bits."""
    from lenslet import files

    words = ["--data", photographs, "--epochs", 1, *QUICK]
    assert run(*words, "--output", tmp_path / "a") == 0
    shutil.rmtree(files.DATA / "cache")
    assert run(*words, "--output", tmp_path / "b") == 0
    ours, theirs = (weights.read_header(tmp_path / n / "model.safetensors") for n in "ab")
    assert ours["sha256"] == theirs["sha256"]
