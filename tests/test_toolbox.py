"""Every option of training does what it says, from train.py's command line on tiny data."""

import csv
import importlib
import json
import re
import statistics

import folds
import pytest
import together
import torch
import train
from accelerate.state import AcceleratorState, GradientState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import lenslet.data.load
import lenslet.files
import lenslet.runs.run
import lenslet.weights
import model
from lenslet import errors
from lenslet.data import sets
from lenslet.runs import launch
from lenslet.training import build, checks, options

measure = importlib.import_module("test")  # scripts/test.py, not the standard library's

TINY = ["--model", "lenet", "--precision", "no", "--workers", "0", "--batch-size", "16"]
DIGITS = ["--data", "digits", "--limit", "48", "--epochs", "2", *TINY]
FASTNET = ["--model", "fastnet", "--width", "8"]


@pytest.fixture(autouse=True, scope="module")
def digits(tmp_path_factory):
    """The digits are made once for this file."""
    folder = tmp_path_factory.mktemp("data")
    before, lenslet.files.DATA = lenslet.files.DATA, folder
    sets.ensure("digits")
    lenslet.files.DATA = before
    return folder


@pytest.fixture(autouse=True)
def shared_digits(digits, isolated, monkeypatch):
    monkeypatch.setattr(lenslet.files, "DATA", digits)


def call(main, *words):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return errors.run_main(main, [str(word) for word in words])


def fit(run, *words, status=0):
    """Train on a few digits into a folder; tensors, header and metrics."""
    assert call(train.main, *DIGITS, "--output", run, *words) == status
    tensors, header = lenslet.weights.read(run / "model.safetensors")
    return tensors, header, json.loads((run / "metrics.json").read_text())


@pytest.fixture(scope="module")
def plain(tmp_path_factory, digits):
    """What training without any of the options ends with."""
    runs, data = lenslet.files.RUNS, lenslet.files.DATA
    folder = tmp_path_factory.mktemp("plain")
    lenslet.files.RUNS, lenslet.files.DATA = folder, digits
    result = fit(folder / "run")
    lenslet.files.RUNS, lenslet.files.DATA = runs, data
    return result


def test_the_loss_is_the_same_quantity_whatever_is_minimized(tmp_path, capsys):
    """train loss and val loss are both the cross-entropy; the objective is beside it by its name.

    In a first step on all images every training has the same logits.
    """
    losses = []
    for words, name in (
        ([], None),
        (["--loss", "focal:2"], "focal:2"),
        (["--loss", "mse"], "mse"),
        (["--loss", "bce"], "bce"),
        (["--label-smoothing", "0.2"], "smoothed cross-entropy"),
        (["--class-weights", "balanced"], "weighted cross-entropy"),
    ):
        capsys.readouterr()
        run = tmp_path / str(name).replace(":", "-")
        *_, metrics = fit(run, "--batch-size", "48", "--epochs", "1", *words)
        (record,) = metrics["epochs"]
        losses.append(record["train_loss"])
        (line,) = [t for t in capsys.readouterr().out.splitlines() if t.startswith("epoch 1")]
        objective = record.get("train_objective")
        events = EventAccumulator(str(run)).Reload()
        assert ("loss/objective" in events.Tags()["scalars"]) == bool(name)
        if name:
            assert f"train loss {losses[0]:.4f} ({name} {objective:.4f}) accuracy" in line
            assert abs(objective - losses[0]) > 1e-4
        else:
            assert objective is None and "(" not in line
    assert losses == pytest.approx([losses[0]] * len(losses), rel=1e-5)


@pytest.fixture(scope="module")
def fastnet(tmp_path_factory, digits):
    """A weights file of fastnet, which has batch norm; its tensors and header."""
    folder = tmp_path_factory.mktemp("fastnet")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lenslet.files, "RUNS", folder)
        patch.setattr(lenslet.files, "DATA", digits)
        tensors, header, _ = fit(folder / "run", *FASTNET)
    return folder / "run" / "model.safetensors", tensors, header


@pytest.mark.parametrize(
    "words",
    [
        ["--optimizer", "sgd", "--nesterov"],
        ["--optimizer", "adam"],
        ["--optimizer", "adabelief"],
        ["--optimizer", "ranger"],
        ["--optimizer", "muon"],
        ["--optimizer", "lamb"],
        ["--optimizer", "lookahead_adam"],
        ["--l1", "0.001"],
        ["--weight-decay", "0.5"],
        ["--clip", "0.1"],
        ["--schedule", "constant"],
        ["--schedule", "linear", "--warmup", "2"],
        ["--schedule", "step:1:0.1"],
        ["--schedule", "multistep:0.5,1:0.1"],
        ["--schedule", "restarts:0.5:2"],
        ["--schedule", "onecycle"],
        ["--loss", "focal"],
        ["--loss", "focal:1"],
        ["--loss", "bce"],
        ["--loss", "mse"],
        ["--label-smoothing", "0.1"],
        ["--class-weights", "1,2,3,4,5,6,7,8,9,10"],
        ["--augment", "light"],
        ["--augment", "standard"],
        ["--augment", "trivial"],
        ["--augment", "rand"],
        ["--erase", "0.5"],
        ["--mixup", "0.4"],
        ["--cutmix", "1", "--loss", "bce"],
        ["--mixup", "0.2", "--cutmix", "1", "--accumulate", "2"],
        ["--dropout", "0.3"],
        ["--ema", "0.9"],
        ["--freeze", "conv*"],
        ["--fold", "2/5"],
        ["--seed", "1"],
    ],
    ids=" ".join,
)
def test_each_option(plain, tmp_path, words):
    """Each one trains, changes the weights, and gives the same bits again from options.yaml."""
    _, header, metrics = fit(tmp_path / "run", *words)
    assert header["sha256"] != plain[1]["sha256"]
    assert all(torch.tensor(e["train_loss"]).isfinite() for e in metrics["epochs"])
    again = ["--config", tmp_path / "run" / "options.yaml", "--output", tmp_path / "again"]
    assert call(train.main, *again) == 0
    path = tmp_path / "again" / "model.safetensors"
    assert lenslet.weights.read_header(path)["sha256"] == header["sha256"]


@pytest.mark.parametrize(
    "words",
    [
        ["--optimizer", "ranger"],
        ["--optimizer", "adabelief", "--schedule", "onecycle"],
        ["--optimizer", "muon", "--schedule", "onecycle"],
        ["--augment", "trivial", "--mixup", "0.2", "--dropout", "0.2"],
        ["--model", "fastnet", "--width", "8", "--ema", "0.9"],
        ["--schedule", "plateau:0.1:0", "--patience", "2"],
        ["--teacher", "teacher.safetensors"],
    ],
    ids=" ".join,
)
def test_what_was_interrupted_ends_alike(plain, tmp_path, monkeypatch, words):
    """A run that is stopped in its second epoch, and goes on, ends with the same bits."""
    monkeypatch.chdir(tmp_path)
    header = {k: v for k, v in plain[1].items() if k not in ("format", "version", "sha256")}
    lenslet.files.atomic_write(
        tmp_path / "teacher.safetensors", lenslet.weights.encode(plain[0], header)
    )
    words += ["--epochs", "3"]
    _, whole, _ = fit(tmp_path / "whole", *words)
    real, steps = lenslet.weights.digest, []

    def stop(state):
        steps.append(1)
        if len(steps) == 2:
            raise KeyboardInterrupt
        return real(state)

    monkeypatch.setattr(lenslet.runs.run, "digest", stop)
    command = [*DIGITS, *words, "--save-every", "2", "--output", tmp_path / "run"]
    assert call(train.main, *command) == 130
    monkeypatch.setattr(lenslet.runs.run, "digest", real)
    assert call(train.main, *command) == 0
    again = lenslet.weights.read_header(tmp_path / "run" / "model.safetensors")
    assert again["sha256"] == whole["sha256"] and again["digests"] == whole["digests"]


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--loss", "focal", "--mixup", "0.2"], "--mixup"),
        (["--loss", "focal", "--cutmix", "1", "--label-smoothing", "0.1"], "--cutmix and --label"),
        (["--val", "0", "--metric", "f1"], "--metric needs validation"),
        (["--val", "0", "--patience", "2"], "--patience needs validation"),
        (["--val", "0", "--keep", "best"], "--keep best needs validation"),
        (["--val", "0", "--schedule", "plateau"], "--schedule plateau needs validation"),
        (["--min-delta", "0.1"], "--min-delta needs --patience"),
        (["--nesterov"], "--nesterov needs --optimizer sgd"),
        (["--optimizer", "sgd", "--momentum", "0", "--nesterov"], "--nesterov needs"),
        (["--freeze-epochs", "1"], "--pretrained"),
        (["--temperature", "2"], "--teacher"),
        (["--teacher-share", "0.5"], "--teacher"),
        (["--teacher", "gone.safetensors"], "--teacher: gone.safetensors"),
        (["--pretrained", "gone.safetensors"], "--pretrained gone.safetensors: "),
        (["--pretrained", "timm"], "lenet"),
        (["--image-weights", "gone.csv"], "--image-weights gone.csv: cannot be read"),
        (["--picture-weights", "gone.csv"], "did you mean --image-weights"),
        (["--fold", "6/5"], "--fold"),
        (["--fold", "2"], "--fold"),
        (["--fold", "1/1"], "--fold"),
        (["--class-weights", "1,2"], "--class-weights: 2 numbers for 10 classes"),
        (["--class-weights", "1,-2"], "--class-weights"),
        (["--class-weights", "even"], "--class-weights"),
        (["--limit", "9"], "9 images: too few for 10 classes"),
        (["--overfit", "20", "--limit", "20"], "--overfit"),
        (["--overfit", "20", "--fold", "1/2"], "--overfit"),
        (["--overfit", "20", "--time", "9s"], "--overfit"),
        (["--freeze", "conv9*"], "--freeze: no layer or parameter is named conv9*"),
        (["--freeze", "*"], "--freeze: nothing"),
        (["--optimizer", "sgdd"], "did you mean sgd"),
        (["--optimizer", "bnbadam"], "--optimizer bnbadam: cannot be used here: "),
        (["--optimizer", "adahessian"], "--optimizer adahessian: it needs second derivatives"),
        (["--optimizer", "kron"], "--optimizer kron: it draws random numbers of its own"),
        (["--optimizer", "lookahead_kronw"], "--optimizer lookahead_kronw: it draws random"),
        (["--schedule", "step"], "step:EPOCHS:0.1"),
        (["--schedule", "cosin"], "did you mean cosine"),
        (["--loss", "hinge"], "--loss"),
        (["--ema", "1"], "--ema"),
        (["--mixup", "-1"], "--mixup"),
        (["--cutmix", "1e-300"], "--cutmix"),
        (["--metric", "f1", "--keep", "last"], "--metric"),
        (["--overfit", "5000"], "there are only 1437 training images"),
        (["--optimizer", "muon", "--momentum", "1"], "--optimizer muon"),
        (["--label-smoothing", "1"], "--label-smoothing"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_nonsense_ends_in_one_line(words, named, capsys):
    """What makes no sense is refused with the remedy, status 2, and leaves no run behind."""
    base = [] if "--limit" in words or "--overfit" in words else ["--limit", "48"]
    assert call(train.main, "--data", "digits", *base, *TINY, *words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and len(said.err.splitlines()) == 1
    assert named in said.err
    assert not lenslet.files.RUNS.exists() or not list(lenslet.files.RUNS.iterdir())


def test_accumulation_with_everything(tmp_path):
    """A batch in parts is the whole batch also with weights, a penalty, mixing and a teacher."""
    words = ["--optimizer", "sgd", "--lr", "0.1", "--l1", "0.001", "--class-weights", "balanced"]
    words += ["--mixup", "1", "--erase", "0.5", "--label-smoothing", "0.1"]
    whole, _, _ = fit(tmp_path / "a", *words)
    parts, _, _ = fit(tmp_path / "b", *words, "--accumulate", "3")
    assert max((whole[k] - parts[k]).abs().max() for k in whole) < 1e-5


def test_patience_ends_a_run(tmp_path, capsys):
    """Training stops when that many epochs have not been better, and says so."""
    words = ["--lr", "1e-9", "--patience", "2", "--epochs", "9", "--min-delta", "0.01"]
    _, _, metrics = fit(tmp_path / "run", *words)
    assert len(metrics["epochs"]) == 3 and metrics["summary"]["finished"]
    assert "stopped early: 2 epochs without" in capsys.readouterr().out
    words += ["--metric", "loss", "--min-delta", "0", "--lr", "1e-5"]
    _, _, metrics = fit(tmp_path / "loss", *words)
    assert len(metrics["epochs"]) == 9  # the loss falls, ever so little


def test_plateau_lowers_the_rate(tmp_path):
    """The rate falls after an epoch that was not better, from the next one on."""
    words = ["--lr", "1e-9", "--schedule", "plateau:0.1:0", "--epochs", "4"]
    _, _, metrics = fit(tmp_path / "run", *words)
    rates = [e["lr"] for e in metrics["epochs"]]
    assert rates == pytest.approx([1e-9, 1e-9, 1e-10, 1e-11])


def test_plateau_reaches_the_optimizer(tmp_path, monkeypatch):
    """The optimizer steps at the rates that the scores so far bring it to."""
    rates, create = [], build.create_optimizer

    def create_watched(*settings):
        optimizer = create(*settings)
        optimizer.register_step_pre_hook(lambda o, *_: rates.append(o.param_groups[0]["lr"]))
        return optimizer

    monkeypatch.setattr(build, "create_optimizer", create_watched)
    # No epoch is better than the first by more than 1; an epoch has three steps.
    words = ["--schedule", "plateau:0.1:0", "--min-delta", "1", "--epochs", "4"]
    fit(tmp_path / "run", *words)
    assert rates == pytest.approx([1e-3] * 6 + [1e-4] * 3 + [1e-5] * 3)


def test_keep_and_metric(tmp_path):
    """--keep last and all, and --metric, choose which epoch's weights are left."""
    words = ["--epochs", "4", "--lr", "0.01"]
    _, header, metrics = fit(tmp_path / "last", *words, "--keep", "last")
    assert header["epoch"] == 4 and not (tmp_path / "last" / "epochs").exists()
    for metric, best in (("loss", min), ("f1", max)):
        run = tmp_path / metric
        _, header, metrics = fit(run, *words, "--metric", metric, "--keep", "all")
        values = [e[f"val_{metric}"] for e in metrics["epochs"]]
        assert values[header["epoch"] - 1] == best(values)
        assert len(list((run / "epochs").iterdir())) == 4


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_the_average_is_what_is_validated_and_kept(tmp_path, precision):
    """With --ema the weights that are kept are the average's, whose figures metrics.json has."""
    words = ["--lr", "0.004", "--epochs", "4", "--precision", precision]
    _, _, plain = fit(tmp_path / "plain", *words)
    _, _, averaged = fit(tmp_path / "ema", *words, "--ema", "0.999", "--keep", "last")
    assert plain["epochs"][0]["train_loss"] == averaged["epochs"][0]["train_loss"]
    assert plain["epochs"][3]["val_loss"] < 0.98 * averaged["epochs"][3]["val_loss"]  # behind
    network, prepare, _ = model.load_model(tmp_path / "ema" / "model.safetensors")
    data = lenslet.data.load.load("digits", ["val"], limit=48)
    part = data.splits["val"]
    with torch.no_grad():
        logits = network(prepare(part.pixels(torch.arange(len(part)))))
    loss = torch.nn.functional.cross_entropy(logits, part.labels).item()
    error = 1e-5 if precision == "no" else 0.004
    assert loss == pytest.approx(averaged["epochs"][3]["val_loss"], rel=error)


def test_overfit_tells_the_truth(tmp_path, monkeypatch, capsys):
    """A network that can learn images by heart does, with status 0; one that cannot, 1."""
    words = ["--data", "digits", *TINY, "--overfit", "12", "--output"]
    assert call(train.main, *words, tmp_path / "able", "--augment", "rand") == 0
    said = capsys.readouterr().out
    assert "memorized all 12 images after " in said and "12 training images" in said
    stored = options.parse(["--config", str(tmp_path / "able" / "options.yaml")])
    assert stored["augment"] == "none"
    monkeypatch.setattr(checks, "MEMORIZED_AFTER", 20)  # epochs, of which none gets anywhere
    assert call(train.main, *words, tmp_path / "unable", "--lr", "1e-9") == 1
    said = capsys.readouterr().out
    assert re.search(r"memorized only \d+ of 12 images in 20 epochs: check --lr", said)


def test_limit(tmp_path, capsys):
    """So many images are trained on, of all classes; test.py still measures all test images."""
    fit(tmp_path / "run", "--limit", "25", "--epochs", "1")
    assert "25 training images, 25 validation images" in capsys.readouterr().out
    assert call(measure.main, "--weights", tmp_path / "run" / "model.safetensors") == 0
    report = json.loads((tmp_path / "run" / "report" / "metrics.json").read_text())
    assert report["images"] == 360


@pytest.mark.parametrize(
    "words",
    [["--val", "0.5"], ["--val", "0.5", "--limit", "3"], ["--fold", "2/3"]],
    ids=" ".join,
)
def test_without_test_images_those_of_the_validation_are_measured(make_folder, tmp_path, words):
    """They are the very images that the epochs were validated on, and the figures are the same."""
    pictures = make_folder(tmp_path / "pictures", {"train": 12}, size=(12, 12))
    run = tmp_path / "run"
    command = ["--data", pictures, *TINY, "--epochs", "1", "--output", run]
    assert call(train.main, *command, *words) == 0
    said = dict(zip(words[::2], words[1::2], strict=True))
    chosen = {"val": float(said.get("--val", 0.1)), "fold": said.get("--fold")}
    chosen["limit"] = int(said.get("--limit", 0)) or None
    names = lenslet.data.load.load(str(pictures), ["val"], **chosen).splits["val"].names
    assert call(measure.main, "--weights", run, "--precision", "no") == 0
    rows = csv.DictReader((run / "report" / "predictions.csv").open())
    assert [row["file"] for row in rows] == list(names)
    report = json.loads((run / "report" / "metrics.json").read_text())
    validated = json.loads((run / "metrics.json").read_text())["epochs"][0]
    assert (report["split"], report["top1"]) == ("val", validated["val_accuracy"])
    assert report["loss"] == pytest.approx(validated["val_loss"], rel=1e-4)


def test_image_weights(make_folder, tmp_path, capsys):
    """A weight of 0 leaves an image out; what a file names wrongly is told with its line."""
    pictures = make_folder(tmp_path / "pictures", {"train": 6, "val": 2}, size=(12, 12))
    table = tmp_path / "weights.csv"

    def run(name, text, *words):
        table.write_text("file,weight\n" + text)
        words = ["--data", pictures, *TINY, "--epochs", "1", "--output", tmp_path / name, *words]
        return call(train.main, *words, "--image-weights", table)

    files = [f"train/{c}/{i}.png" for c in ("ants", "bees") for i in range(6)]
    weights = "".join(f"{file},{0 if 'ants' in file else 2}\n" for file in files)
    one = "--batch-size 12 --optimizer sgd --lr 0.5 --momentum 0 --schedule constant".split()
    assert run("bees", weights + "val/ants/0.png,3\n", *one) == 0
    # The gradient is that of the bees alone, each weighing as much as two images did.
    torch.manual_seed(0)
    tensors, header = lenslet.weights.read(tmp_path / "bees" / "model.safetensors")
    network = model.create_model("lenet", **header["model_args"])
    data = lenslet.data.load.load(str(pictures), ["train"])
    part = data.splits["train"]
    prepare = model.load_model(tmp_path / "bees" / "model.safetensors")[1]
    bees = part.labels.nonzero().flatten()
    loss = torch.nn.functional.cross_entropy(network(prepare(part.pixels(bees))), part.labels[bees])
    loss.backward()
    for name, p in network.named_parameters():
        stepped = p - 0.5 * (p.grad + 0.01 * p * (p.ndim > 1))
        torch.testing.assert_close(tensors[name], stepped.detach(), rtol=1e-4, atol=1e-6)
    capsys.readouterr()
    for text, said in (
        ("train/ants/9.png,1\n", "line 2: 'train/ants/9.png' is not an image"),
        ("train/ants/0.png,1\ntrain/ants/1.png,-1\n", "line 3"),
        ("train/ants/0.png,many\n", "'many' is not a weight"),
        ("".join(f"{file},0\n" for file in files), "above 0"),
    ):
        assert run("bad", text) == 2
        assert said in capsys.readouterr().err
    table.write_text("picture,weight\n")
    assert call(train.main, "--data", pictures, *TINY, "--image-weights", table) == 2
    assert "columns file and weight" in capsys.readouterr().err
    table.write_text("weight,file\n2\n")
    assert call(train.main, "--data", pictures, *TINY, "--image-weights", table) == 2
    assert "line 2: '' is not an image" in capsys.readouterr().err
    table.write_text("file,weight\n99999999,2\n")
    assert call(train.main, *DIGITS, "--image-weights", table) == 2
    assert "'99999999' is not an image of digits" in capsys.readouterr().err


def test_too_few_images_to_validate(make_folder, tmp_path, capsys):
    """What needs validation images is refused where the share of them comes to none."""
    few = make_folder(tmp_path / "few", {"train": 4})
    assert (
        call(train.main, "--data", few, *TINY, "--patience", "1", "--output", tmp_path / "r") == 2
    )
    assert (
        "--patience needs validation images, and --val 0.1 leaves none" in capsys.readouterr().err
    )
    assert not (tmp_path / "r").exists()


def test_fold_with_an_own_val_is_refused(make_folder, tmp_path, capsys):
    """Folds are of the training images: a folder's own val/ would not be one of them."""
    own = make_folder(tmp_path / "own", {"train": 6, "val": 2})
    assert call(train.main, "--data", own, *TINY, "--fold", "1/2") == 2
    assert "val/ of its own" in capsys.readouterr().err


def test_pretrained_and_teacher(plain, make_folder, tmp_path, capsys):
    """Weights of a run are where the next begins, unchanged at a rate of nothing; a network that
    learns from them alone comes to their answers.
    """
    header = {k: v for k, v in plain[1].items() if k not in ("format", "version", "sha256")}
    path = tmp_path / "weights.safetensors"
    lenslet.files.atomic_write(path, lenslet.weights.encode(plain[0], header))
    words = ["--epochs", "1", "--lr", "1e-30", "--pretrained", path, "--weight-decay", "0"]
    tensors, after, _ = fit(tmp_path / "same", *words)
    assert all(torch.equal(tensors[key], plain[0][key]) for key in plain[0])
    assert after["mean"] == plain[1]["mean"]
    assert str(path) in capsys.readouterr().out
    # Only the last layer moves while the others are frozen.
    tensors, _, _ = fit(tmp_path / "frozen", "--pretrained", path, "--freeze-epochs", "2")
    moved = {key for key in tensors if not torch.equal(tensors[key], plain[0][key])}
    assert moved == {"fc3.weight", "fc3.bias"}
    tensors, _, _ = fit(tmp_path / "released", "--pretrained", path, "--freeze-epochs", "1")
    moved = {key for key in tensors if not torch.equal(tensors[key], plain[0][key])}
    assert moved == set(tensors)
    assert call(train.main, *DIGITS, "--pretrained", path, "--model", "tutorial_cnn") == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: --pretrained {path}: ") and "are for lenet, not for " in error

    words = ["--teacher", path, "--teacher-share", "1", "--seed", "3", "--epochs", "6"]
    _, _, taught = fit(tmp_path / "taught", *words, "--temperature", "2")
    losses = [e["train_objective"] for e in taught["epochs"]]
    assert losses[-1] < 0.5 * losses[0]
    command = ["--data", make_folder(tmp_path / "two"), *TINY, "--output", tmp_path / "new"]
    capsys.readouterr()
    assert call(train.main, *command, "--teacher", path) == 2
    assert "--teacher" in capsys.readouterr().err and not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("words", "standing"),
    [
        (["--freeze-epochs", "2"], "blocks"),
        (["--freeze", "blocks.0*"], "blocks.0"),
        (["--freeze-epochs", "1"], "none"),
    ],
)
def test_statistics_of_frozen_layers_stand(fastnet, tmp_path, words, standing):
    """Batch norm's statistics move in the layers that are trained, and in no others."""
    path, before, _ = fastnet
    tensors, _, _ = fit(tmp_path / "run", *FASTNET, "--pretrained", path, *words, "--keep", "last")
    for name in before:
        if "running" in name:
            assert torch.equal(tensors[name], before[name]) == name.startswith(standing), name


def test_a_teacher_stays_as_it_is(fastnet, tmp_path, monkeypatch):
    """A teacher answers as it does in an evaluation, and learns nothing from what it is shown."""
    path, _, header = fastnet
    loaded, load_model = [], build.load_model
    monkeypatch.setattr(
        build, "load_model", lambda path: loaded.append(load_model(path)) or loaded[-1]
    )
    fit(tmp_path / "run", "--teacher", path)
    ((teacher, *_),) = loaded
    assert not any(module.training for module in teacher.modules())
    assert lenslet.weights.digest(teacher.state_dict()) == header["sha256"]


def test_the_grid_shows_what_is_trained_on(tmp_path):
    """The first batch's grid in TensorBoard is the augmented and mixed one."""
    seen = []
    for words in ([], ["--mixup", "1"], ["--augment", "trivial"]):
        run = tmp_path / str(len(seen))
        fit(run, *words, "--epochs", "1")
        events = EventAccumulator(str(run))
        events.Reload()
        seen.append(events.Images("training_images")[0].encoded_image_string)
    assert len(set(seen)) == 3


def test_two_processes_take_the_same_steps(make_folder, tmp_path):
    """Two processes train as one does, also when frozen layers are released in between, with
    weights, a penalty, an average, and a rate that falls and a run that ends by validation scores.
    """
    pictures = make_folder(tmp_path / "odd", {"train": 9, "val": 5}, size=(16, 16))
    first = ["--data", pictures, *TINY, "--batch-size", "8"]
    assert call(train.main, *first, "--epochs", "1", "--output", tmp_path / "first") == 0
    words = [*first, "--pretrained", tmp_path / "first" / "model.safetensors", "--epochs", "9"]
    words += (
        "--freeze-epochs 1 --freeze conv1 --optimizer sgd --l1 0.001 --ema 0.9 --keep last".split()
    )
    words += "--class-weights 1,3 --schedule plateau:0.5:0 --patience 3 --min-delta 0.02".split()
    words += "--augment trivial --erase 0.5 --accumulate 2 --lr 0.02 --threads 1".split()
    results = []
    for count in (1, 2):
        run = tmp_path / f"run{count}"
        together.scripts(count, tmp_path, "train", [*words, "--output", run])
        metrics = json.loads((run / "metrics.json").read_text())
        results.append((lenslet.weights.read(run / "model.safetensors")[0], metrics["epochs"]))
    (one, records), (two, others) = results
    assert 4 <= len(records) == len(others) < 9
    assert [r["lr"] for r in records] == [r["lr"] for r in others] and records[-1]["lr"] < 0.02
    for name in one:
        torch.testing.assert_close(one[name], two[name], rtol=0, atol=1e-5)
    start = lenslet.weights.read(tmp_path / "first" / "model.safetensors")[0]
    assert torch.equal(one["conv1.weight"], start["conv1.weight"])
    assert not torch.equal(one["conv2.weight"], start["conv2.weight"])


def test_folds(tmp_path, monkeypatch, capsys):
    """Every fold is trained once; the figures are the mean and deviation of what each had reached
    on its own part at its end, which that part did not choose; a fold that was interrupted goes on,
    and finished ones are not repeated.
    """
    trained = []

    def stand_in(words, processes):
        trained.append(words[words.index("--fold") + 1])
        if len(trained) == 2:
            return 143
        return call(train.main, *words)

    monkeypatch.setattr(launch, "run_training", stand_in)
    out = tmp_path / "folds"
    command = ["--folds", "3", "--output", out, *DIGITS, "--epochs", "4", "--lr", "0.03"]
    assert call(folds.main, *command) == 143
    assert call(folds.main, *command) == 0
    assert trained == ["1/3", "2/3", "2/3", "3/3"]
    said = capsys.readouterr().out
    runs = [json.loads((out / f"fold-{k}" / "metrics.json").read_text()) for k in (1, 2, 3)]
    values = [run["epochs"][-1]["val_accuracy"] for run in runs]
    assert values != [run["summary"]["val_accuracy"] for run in runs]  # of the best epoch
    mean, std = statistics.mean(values), statistics.stdev(values)
    assert f"accuracy {mean:.2%} ± {std:.2%}" in said
    table = json.loads((out / "folds.json").read_text())["val_accuracy"]
    assert table == {"folds": values, "mean": mean, "std": std}
    for words, named in ((["--fold", "1/2"], "--fold"), (["--lrr", "1"], "did you mean --lr")):
        assert call(folds.main, *command, *words) == 2
        assert named in capsys.readouterr().err
