"""train.py, test.py and predict.py, called in this process on tiny data."""

import csv
import importlib
import json
import math
import os
import subprocess
import sys

import predict
import pytest
import torch
import train
from accelerate.state import AcceleratorState, GradientState
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch.nn import functional as F

import lenslet.files
import lenslet.weights
import model
from lenslet import errors
from lenslet.data import sets
from lenslet.data.decode import read_image
from lenslet.errors import OutsideError
from lenslet.runs import folder as run_folder
from lenslet.training import losses
from model import create_model

measure = importlib.import_module("test")  # scripts/test.py, not the standard library's

TINY = ["--model", "lenet", "--epochs", "2", "--workers", "0", "--precision", "no"]


@pytest.fixture
def pictures(make_folder, tmp_path):
    """A folder of small images with all three splits; 26 to train on: batches are ragged."""
    return make_folder(tmp_path / "pictures", {"train": 13, "val": 5, "test": 7}, size=(12, 12))


def call(main, *words):
    """A command as a process of its own would meet Accelerate: not yet set up."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return errors.run_main(main, [str(word) for word in words])


def fit(data, run, *words):
    """Train with the TINY options into a folder; its tensors, header and metrics."""
    assert call(train.main, "--data", data, "--output", run, *TINY, *words) == 0
    tensors, header = lenslet.weights.read(run / "model.safetensors")
    return tensors, header, json.loads((run / "metrics.json").read_text())


def difference(one, other):
    return max((one[name] - other[name]).abs().max().item() for name in one)


def test_same_options_same_bits(pictures, tmp_path):
    """A run is repeated to the last bit, also from the options.yaml that it left behind."""
    tensors, header, _ = fit(pictures, tmp_path / "a", "--augment", "standard")
    again, other, _ = fit(pictures, tmp_path / "b", "--augment", "standard")
    assert header["sha256"] == other["sha256"] == lenslet.weights.digest(again)
    words = ["--config", tmp_path / "a" / "options.yaml", "--output", tmp_path / "c"]
    assert call(train.main, *words) == 0
    assert (
        lenslet.weights.read(tmp_path / "c" / "model.safetensors")[1]["sha256"] == header["sha256"]
    )
    seeded, _, _ = fit(pictures, tmp_path / "d", "--augment", "standard", "--seed", "1")
    assert difference(tensors, seeded) > 1e-3


def test_workers_do_not_matter(make_folder, tmp_path):
    """Photographs decoded in the training process or by two others give the same bits."""
    photos = make_folder(tmp_path / "photos", {"train": 6, "val": 2}, size=(90, 70), suffix=".jpg")
    words = ["--augment", "standard", "--image-size", "32", "--epochs", "1"]
    _, alone, _ = fit(photos, tmp_path / "a", *words)
    _, helped, _ = fit(photos, tmp_path / "b", *words, "--workers", "2")
    assert alone["sha256"] == helped["sha256"]


def test_each_epoch_has_an_order_of_its_own(pictures, tmp_path, monkeypatch):
    """An epoch trains on every image once, in an order that no other epoch has, and augmented in
    another way.
    """
    seen, shown, (targets, loss) = [], [], (losses.Objective.targets, losses.Objective.__call__)

    def note_index(objective, labels, index):
        seen.extend(index.tolist())
        return targets(objective, labels, index)

    def note_images(objective, logits, targets, images):
        shown.extend(image.numpy().tobytes() for image in images)
        return loss(objective, logits, targets, images)

    monkeypatch.setattr(losses.Objective, "targets", note_index)
    monkeypatch.setattr(losses.Objective, "__call__", note_images)
    words = ["--epochs", "4", "--batch-size", "8", "--augment", "standard"]
    fit(pictures, tmp_path / "run", *words)
    orders = [tuple(seen[start : start + 26]) for start in range(0, len(seen), 26)]
    assert [sorted(order) for order in orders] == [list(range(26))] * 4
    assert len(set(orders)) == 4
    for image in range(26):
        assert len({x for x, i in zip(shown, seen, strict=True) if i == image}) > 1


def test_dropout_draws_anew_in_each_step(pictures, tmp_path, monkeypatch):
    """What it draws from differs from step to step, and no other random choice has a say in it."""
    drawn, real = [], F.dropout

    def dropout(x, share, training):
        if training:
            drawn.append(torch.get_rng_state().numpy().tobytes())
        return real(x, share, training)

    monkeypatch.setattr(F, "dropout", dropout)
    words = ["--dropout", "0.3", "--batch-size", "8", "--epochs", "2"]  # eight steps
    for name, more in (("a", []), ("b", ["--augment", "trivial", "--mixup", "0.2"])):
        fit(pictures, tmp_path / name, *words, *more)
    assert drawn[:8] == drawn[8:]
    assert len(set(drawn)) == 8


def test_fastnet_is_whitened(pictures, tmp_path):
    """Training begins with a first layer that whitens the training images as it is fed them."""
    words = ["--model", "fastnet", "--width", "8", "--epochs", "1"]
    fit(pictures, tmp_path / "run", *words)
    network, prepare, _ = model.load_model(tmp_path / "run")
    files = sorted((pictures / "train").rglob("*.png"))
    images = torch.stack([torch.from_numpy(read_image(f, 3)).permute(2, 0, 1) for f in files])
    with torch.no_grad():
        maps = F.conv2d(prepare(images), network.whitening.weight).transpose(0, 1).flatten(1)
    half = maps[:12].double()
    assert torch.allclose(maps[12:], -maps[:12])
    product = half @ half.T / half.shape[1]
    variances = product.diagonal()
    assert torch.allclose(product, variances.diag(), atol=1e-3)
    assert variances.min() > 0.5 and variances.max() < 1.001  # 1, where there is hardly any noise


@pytest.mark.parametrize("parts", [2, 3, 8])
def test_accumulation_is_the_whole_batch(pictures, tmp_path, parts):
    """A batch computed in parts gives the step of the whole batch, a short last one too."""
    sgd = ["--optimizer", "sgd", "--lr", "0.1", "--batch-size", "8", "--clip", "1"]
    whole, _, one = fit(pictures, tmp_path / "a", *sgd)
    cut, _, other = fit(pictures, tmp_path / "b", *sgd, "--accumulate", parts)
    assert difference(whole, cut) < 1e-5
    assert one["epochs"][1]["train_loss"] == pytest.approx(other["epochs"][1]["train_loss"], 1e-4)


def test_one_step_by_hand(pictures, tmp_path):
    """An SGD step with momentum and weight decay is the textbook's, biases not decayed."""
    words = ["--optimizer", "sgd", "--lr", "0.05", "--weight-decay", "0.01", "--epochs", "1"]
    words += ["--batch-size", "64", "--schedule", "constant", "--mean", "0.5", "--std", "0.25"]
    tensors, header, metrics = fit(pictures, tmp_path / "run", *words)

    torch.manual_seed(0)
    network = create_model("lenet", **header["model_args"])
    files = sorted((pictures / "train").rglob("*.png"))
    labels = torch.tensor([header["classes"].index(f.parent.name) for f in files])
    pixels = [torch.from_numpy(read_image(f, 3)).permute(2, 0, 1) for f in files]
    images = (torch.stack(pixels) / 255 - 0.5) / 0.25
    images = F.interpolate(images, (32, 32), mode="bilinear", antialias=True)
    loss = F.cross_entropy(network(images), labels)
    loss.backward()
    assert metrics["epochs"][0]["train_loss"] == pytest.approx(loss.item(), 1e-5)
    for name, p in network.named_parameters():
        stepped = p - 0.05 * (p.grad + 0.01 * p * (p.ndim > 1))
        torch.testing.assert_close(tensors[name], stepped.detach(), rtol=1e-4, atol=1e-6)


def test_gradients_are_clipped(pictures, tmp_path):
    """--clip bounds the length of a step: with plain SGD it is at most lr times the norm."""
    torch.manual_seed(0)
    start = create_model("lenet", 2, 3, (12, 12)).state_dict()
    words = ["--optimizer", "sgd", "--momentum", "0", "--weight-decay", "0", "--lr", "1"]
    words += ["--schedule", "constant", "--batch-size", "64", "--epochs", "1"]
    for clip in (1e-3, 1e-2):
        tensors, _, _ = fit(pictures, tmp_path / str(clip), *words, "--clip", clip)
        squares = sum((tensors[name] - start[name]).square().sum() for name in start)
        assert squares.sqrt().item() == pytest.approx(clip, 1e-2)


def test_the_best_epoch_is_kept(pictures, tmp_path):
    """model.safetensors is the epoch with the best validation accuracy; epochs/ has them all."""
    # A learning rate that soon ruins the network makes the last epoch a bad one.
    words = ["--epochs", "6", "--lr", "0.003", "--schedule", "constant", "--keep", "all"]
    _, header, metrics = fit(pictures, tmp_path / "run", *words, "--batch-size", "4")
    scores = [(r["val_accuracy"], -r["val_loss"]) for r in metrics["epochs"]]
    best = max(range(6), key=lambda i: (scores[i], -i)) + 1
    assert best < 6
    assert header["epoch"] == metrics["summary"]["best_epoch"] == best
    kept = sorted((tmp_path / "run" / "epochs").iterdir())
    names = [f"epoch-{r['epoch']:03d}-{r['val_accuracy']:.4f}" for r in metrics["epochs"]]
    assert [path.stem for path in kept] == names
    digests = [lenslet.weights.read(path)[1]["sha256"] for path in kept]
    assert len(set(digests)) == 6 and digests[best - 1] == header["sha256"]


def test_parts_are_as_many_on_every_process():
    """A batch is cut by what the process with the fewest images can: synchronized batch norm would
    wait for ever where another one has one part more.
    """
    for size, world, accumulate in ((15, 2, 4), (30, 8, 4), (9, 4, 8), (3, 2, 2), (64, 1, 5)):
        shares = [torch.zeros(len(range(rank, size, world))) for rank in range(world)]
        cut = [list(train.parts(x, x, accumulate, size // world)) for x in shares]
        assert len({len(parts) for parts in cut}) == 1
        assert all(
            last == (k == len(parts) - 1) for parts in cut for k, (*_, last) in enumerate(parts)
        )
        assert all(len(x) > 1 or size < 2 * world for parts in cut for x, *_ in parts)


def test_what_is_measured_without_test_images(tmp_path, make_folder, capsys):
    """Validation images are named as such, and as what the weights were chosen by only if so."""
    folder = make_folder(tmp_path / "pictures", {"train": 8, "val": 4})
    for keep, chosen in (("best", True), ("last", False)):
        fit(folder, tmp_path / keep, "--keep", keep)
        capsys.readouterr()
        assert call(measure.main, "--weights", tmp_path / keep, "--workers", "0") == 0
        said = capsys.readouterr().out
        assert "these are the validation images" in said
        assert ("by which the weights were chosen" in said) == chosen


def test_without_validation_the_last_weights_are_kept(pictures, tmp_path):
    """--val 0 trains to the end and keeps what the last epoch left."""
    _, header, metrics = fit(pictures, tmp_path / "run", "--val", "0", "--epochs", "3")
    assert header["epoch"] == 3 and "val_loss" not in metrics["epochs"][0]


def test_a_finished_run_is_never_overwritten(pictures, tmp_path):
    """The same command again makes run-2, then run-3, and runs/latest follows."""
    for name in ("run", "run-2", "run-3"):
        words = ["--data", pictures, "--output", tmp_path / "run", *TINY, "--epochs", "1"]
        assert call(train.main, *words) == 0
        assert (lenslet.files.RUNS / "latest").resolve() == tmp_path / name
        assert run_folder.weights_path(None).resolve().parent == tmp_path / name


def test_what_tensorboard_shows(pictures, tmp_path):
    """Losses, accuracies, learning rate, speed, a grid of images and the options are logged."""
    fit(pictures, tmp_path / "run", "--log-every", "2", "--batch-size", "5")
    events = EventAccumulator(str(tmp_path / "run"))
    events.Reload()
    for tag in ("loss/train", "lr"):
        steps = [event.step for event in events.Scalars(tag)]
        assert steps == [2, 4, 6, 8, 10, 12]  # 26 images in fives: the last batch has one
    epochs = {"accuracy/train", "accuracy/val", "loss/val", "metrics/val_f1"}
    epochs.add("speed/images_per_second")
    for tag in epochs:
        assert [event.step for event in events.Scalars(tag)] == [6, 12]
    tags = {tag for tag in events.Tags()["scalars"] if not tag.startswith("result/")}
    assert tags == epochs | {"loss/train", "lr"}
    assert events.Images("training_images")[0].width > 100
    assert [image.step for image in events.Images("training_images")] == [0]
    assert "_hparams_/session_start_info" in events.summary_metadata


def test_tta_is_reported_beside_the_plain_figure(pictures, tmp_path, capsys):
    """--tta changes no plain figure, and averages unsure answers, as by hand."""
    run = tmp_path / "run"
    fit(pictures, run, "--augment", "standard")
    words = ["--weights", run / "model.safetensors", "--workers", "0", "--precision", "no"]
    assert call(measure.main, *words) == 0
    plain = json.loads((run / "report" / "metrics.json").read_text())
    assert call(measure.main, *words, "--tta") == 0
    both = json.loads((run / "report" / "metrics.json").read_text())
    tta = both.pop("tta")
    assert both == plain
    network, prepare, header = model.load_model(run / "model.safetensors")
    files = sorted((pictures / "test").rglob("*.png"))
    images = torch.stack([torch.from_numpy(read_image(f, 3)).permute(2, 0, 1) for f in files])
    labels = torch.tensor([header["classes"].index(f.parent.name) for f in files])
    padded = F.pad(images.float(), [1] * 4, mode="reflect").to(torch.uint8)
    shown = [(0.5, images), (0.25, padded[..., :-2, :-2]), (0.25, padded[..., 2:, 2:])]
    with torch.no_grad():
        mean = sum(
            share / 2 * network(prepare(view)).softmax(1)
            for share, whole in shown
            for view in (whole, whole.flip(3))
        )
        alone = network(prepare(images)).softmax(1)
    unsure = alone.amax(1, keepdim=True) < measure.UNSURE
    mean = torch.where(unsure, mean, alone)
    assert tta["averaged"] == unsure.sum()
    assert tta["loss"] == pytest.approx(F.nll_loss(mean.log(), labels).item(), rel=1e-4)
    assert tta["top1"] == pytest.approx((mean.argmax(1) == labels).double().mean().item())
    assert "--tta" in capsys.readouterr().out

    fit(pictures, tmp_path / "plain", "--augment", "none")
    assert call(measure.main, "--weights", tmp_path / "plain" / "model.safetensors", "--tta") == 2
    assert "--augment" in capsys.readouterr().err


def test_test_py_measures_every_image(pictures, tmp_path, capsys):
    """The report's figures follow from its own CSV, which has one row for every test image."""
    fit(pictures, tmp_path / "run")
    assert (
        call(measure.main, "--weights", tmp_path / "run" / "model.safetensors", "--workers", "0")
        == 0
    )
    report = tmp_path / "run" / "report"
    metrics = json.loads((report / "metrics.json").read_text())
    rows = list(csv.DictReader((report / "predictions.csv").open()))
    files = sorted(f"test/{p.parent.name}/{p.name}" for p in (pictures / "test").rglob("*.png"))
    assert sorted(row["file"] for row in rows) == files
    hits = [row["label"] == row["prediction"] for row in rows]
    assert metrics["top1"] == sum(hits) / len(rows) and metrics["images"] == 14
    assert all(row["file"].split("/")[1] == row["label"] for row in rows)
    said = capsys.readouterr().out
    assert f"test accuracy {metrics['top1']:.2%}" in said and "ants" in said
    assert read_image(report / "predictions.png", 3).shape[2] == 3
    assert len(list((tmp_path / "run" / "samples").iterdir())) == 10


def test_predict_agrees_with_test(pictures, tmp_path, capsys):
    """predict.py gives test.py's answer and probability for the same file."""
    fit(pictures, tmp_path / "run")
    weights = tmp_path / "run" / "model.safetensors"
    assert call(measure.main, "--weights", weights, "--precision", "no", "--workers", "0") == 0
    capsys.readouterr()
    words = [pictures / "test", "--format", "csv", "--weights", weights]
    assert call(predict.main, *words) == 0
    answers = {row["file"]: row for row in csv.DictReader(capsys.readouterr().out.splitlines())}
    rows = list(csv.DictReader((tmp_path / "run" / "report" / "predictions.csv").open()))
    assert len(rows) == len(answers)
    for row in rows:
        answer = answers[str(pictures / row["file"])]
        assert answer["class"] == row["prediction"]
        assert math.isclose(float(answer["probability"]), float(row["probability"]), abs_tol=2e-5)


def test_predict_formats(pictures, tmp_path, capsys):
    """Text, CSV and JSON give the same ranking; K is cut to the number of classes."""
    fit(pictures, tmp_path / "run")
    files = [str(path) for path in sorted((pictures / "test" / "bees").iterdir())][:2]
    capsys.readouterr()
    outputs = {}
    for form in ("text", "csv", "json"):
        assert call(predict.main, *files, "--top", "9", "--format", form) == 0
        outputs[form] = capsys.readouterr().out
    table = list(csv.reader(outputs["csv"].splitlines()))
    assert table[0] == ["file", "class", "probability", "class_2", "probability_2"]
    answers = json.loads(outputs["json"])
    for row, answer, line in zip(table[1:], answers, outputs["text"].splitlines(), strict=True):
        ranked = answer["predictions"]
        assert row[0] == answer["file"] and row[1::2] == [p["class"] for p in ranked]
        assert sum(p["probability"] for p in ranked) == pytest.approx(1)
        assert line == f"{row[0]}: " + ", ".join(
            f"{p['class']} {p['probability']:.2%}" for p in ranked
        )


def test_predict_answers_what_it_can(pictures, tmp_path, capsys):
    """An unreadable image is named on standard error, the others are answered, status 1."""
    fit(pictures, tmp_path / "run")
    good = next((pictures / "test" / "ants").iterdir())
    bad = tmp_path / "bad.png"
    bad.write_bytes(good.read_bytes()[:40])
    capsys.readouterr()
    words = [bad, good, tmp_path / "gone.png", "--format", "csv", "--weights", tmp_path / "run"]
    assert call(predict.main, *words) == 1
    said = capsys.readouterr()
    assert [line.split(",")[0] for line in said.out.splitlines()] == ["file", str(good)]
    assert "bad.png" in said.err and "gone.png" in said.err and len(said.err.splitlines()) == 2


def test_greyscale_weights_answer_colour_images(make_folder, tmp_path, capsys):
    """Weights trained on one channel take a colour photograph of any size, and the reverse."""
    grey = make_folder(tmp_path / "grey", {"train": 4, "val": 2}, size=(8, 8), mode="L")
    colour = make_folder(tmp_path / "colour", {"train": 4}, size=(90, 40))
    _, header, _ = fit(grey, tmp_path / "run")
    assert header["channels"] == 1
    assert fit(colour, tmp_path / "other", "--image-size", "32")[1]["channels"] == 3
    for run, pictures in (("run", colour), ("other", grey)):
        weights = tmp_path / run / "model.safetensors"
        capsys.readouterr()
        assert call(predict.main, pictures, "--format", "csv", "--weights", weights) == 0
        rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
        assert [row["file"] for row in rows] == [str(p) for p in sorted(pictures.rglob("*.png"))]


def test_without_network_the_digits_are_used(tmp_path, monkeypatch, capsys):
    """train.py without --data needs no network: it says so and takes the bundled digits."""
    real = sets.ensure

    def offline(name, *args, **settings):
        if name == "cifar10":
            raise OutsideError(f"no source in {settings.get('patience')} s")
        return real(name, *args, **settings)

    monkeypatch.setattr(sets, "ensure", offline)
    assert call(train.main, "--epochs", "1", "--output", tmp_path / "run") == 0
    assert "no source in 15 s" in capsys.readouterr().out
    assert lenslet.weights.read(tmp_path / "run" / "model.safetensors")[1]["data"] == "digits"
    assert call(train.main, "--data", "cifar10") == 1


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--data", "cifar11"], "did you mean cifar10"),
        (["--model", "resnet81"], "resnet"),
        (["--model", "hf-hub:timm/resnet18"], "hub"),
        (["--epoch", "3"], "did you mean --epochs"),
        (["--lr", "fast"], "--lr"),
        (["--epochs", "0"], "at least 1"),
        (["--config", "tutorail"], "did you mean tutorial"),
        (["--data", "no/such/folder"], "no such folder"),
        (["--mean", "0.1", "0.2"], "one per channel"),
        (["--width", "32"], "--width is an option of fastnet, not of lenet"),
        (["--data", "digits", "--width", "32"], "of fastnet, not of lenet"),
        (["--time", "60"], "not a time like"),
        (["--warmup", "20.5"], "not a whole number"),
        (["--plan", "no/such/file"], "no such weights file"),
        (["--precision", "fp16"], "--precision: fp16 does not run on a CPU"),
    ],
)
def test_mistakes_end_in_one_line(pictures, words, named, capsys):
    """What the user did wrong: one line with the remedy, status 2, no traceback, no run folder."""
    base = [] if "--data" in words else ["--data", str(pictures)]
    base += [] if "--model" in words or "--config" in words else ["--model", "lenet"]
    assert call(train.main, *base, *words) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and len(said.err.splitlines()) == 1
    assert named in said.err
    assert not lenslet.files.RUNS.exists() or not list(lenslet.files.RUNS.iterdir())


@pytest.mark.parametrize("words", [["--help"], ["--epoch", "3"]])
def test_mistakes_wait_for_no_import(words):
    """--help and a misspelt option are answered at once: nothing is imported before but what is
    Python's, or ours.
    """
    script = lenslet.files.ROOT / "scripts" / "train.py"
    code = (
        "import runpy, sys\nbefore = set(sys.modules)\n"
        "try:\n    del sys.argv[0]; runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "finally:\n"
        "    new = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "    print(new - sys.stdlib_module_names - {'_root', 'lenslet'})\n"
    )
    command = [sys.executable, "-c", code, script, *words]
    env = {**os.environ, "PYTHONPATH": str(script.parent)}
    result = subprocess.run(command, env=env, capture_output=True, text=True)
    assert result.stdout.splitlines()[-1] == "set()"
    if words == ["--help"]:
        assert result.returncode == 0 and "--epochs N" in result.stdout and not result.stderr
    else:
        assert result.returncode == 2 and "did you mean --epochs" in result.stderr


def test_a_network_named_by_no_recipe_must_be_named(pictures, tmp_path, capsys):
    """A --config without a model is refused with the remedy."""
    config = tmp_path / "mine.yaml"
    config.write_text("epochs: 3\n")
    assert call(train.main, "--data", pictures, "--config", config) == 2
    assert "--model" in capsys.readouterr().err


def test_unwritable_output(pictures, tmp_path, capsys):
    """An output that is a file, or lies below one, is refused with status 2."""
    (tmp_path / "file").write_text("")
    for output in (tmp_path / "file", tmp_path / "file" / "below"):
        words = ["--data", str(pictures), *TINY, "--output", str(output)]
        assert call(train.main, *words) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"error: --output: {output}") and "; name a" in error


def test_other_data_for_the_weights(make_folder, pictures, tmp_path, capsys):
    """Data with a class that the weights never saw is refused; fewer classes keep their places."""
    fit(pictures, tmp_path / "run")
    strange = make_folder(tmp_path / "strange", {"train": 2, "test": 2}, classes=("ants", "wasps"))
    assert call(measure.main, "--data", strange, "--workers", "0") == 2
    assert "wasps" in capsys.readouterr().err
    assert call(measure.main, "--data", "digits") == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
