"""train.py, test.py and predict.py on letters that are learned in part: their figures and answers
are those that an independent computation comes to.
"""

import contextlib
import csv
import importlib
import io
import json
import os
from types import SimpleNamespace

import numpy as np
import predict
import pytest
import sklearn.metrics
import torch
import train
from accelerate.state import AcceleratorState, GradientState
from PIL import Image
from shapes import CLASSES, make_shapes, photograph, small
from torch.nn import functional as F

from lenslet import errors, files, weights
from model import load_model

measure = importlib.import_module("test")  # scripts/test.py, not the standard library's
TINY = ["--model", "lenet", "--precision", "no", "--workers", "0"]


def call(main, *words):
    """A command as a process of its own would meet Accelerate; what it said."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    with contextlib.redirect_stdout(io.StringIO()) as said:
        assert errors.run_main(main, [str(word) for word in words]) == 0
    return said.getvalue()


def chain(folder, images, words):
    """Train, test and predict; what they left behind and said."""
    run = folder / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(files, "RUNS", folder / "runs")
        patch.setattr(files, "DATA", folder / "data")
        patch.setattr(os, "fsync", os.fstat)
        call(train.main, "--data", images, "--output", run, *TINY, *words)
        call(measure.main, "--weights", run, "--precision", "no")
        answers = call(
            predict.main, images / "test", "--weights", run, "--top", "3", "--format", "csv"
        )
    return SimpleNamespace(
        images=images,
        run=run,
        files=sorted((images / "test").rglob("*.png")),
        metrics=json.loads((run / "metrics.json").read_text()),
        report=json.loads((run / "report" / "metrics.json").read_text()),
        rows=list(csv.DictReader((run / "report" / "predictions.csv").open())),
        answers=list(csv.DictReader(answers.splitlines())),
    )


@pytest.fixture(scope="session")
def letters(tmp_path_factory):
    """Small images, all of one size.  The learning rate rises until it ruins the network, so that
    the best epoch is not the last.
    """
    folder = tmp_path_factory.mktemp("letters")
    images = make_shapes(folder / "images", small, {"train": 100, "val": 30, "test": 40})
    words = "--epochs 14 --batch-size 32 --lr 0.04 --warmup 100% --schedule constant --seed 4"
    return chain(folder, images, [*words.split(), "--augment", "light", "--keep", "all"])


@pytest.fixture(scope="session")
def photographs(tmp_path_factory):
    """Larger images, of which a crop is read."""
    folder = tmp_path_factory.mktemp("photographs")
    images = make_shapes(folder / "images", photograph, {"train": 60, "val": 10, "test": 30})
    words = "--epochs 4 --batch-size 16 --lr 0.004 --image-size 32 --label-smoothing 0.1"
    return chain(folder, images, words.split())


@pytest.fixture(params=["letters", "photographs"])
def done(request):
    return request.getfixturevalue(request.param)


def probabilities(run, images):
    """Of each class, float [N, 3], without the code that prepares images; uint8 [N, H, W, 3]."""
    network, _, header = load_model(run)
    mean, std = (torch.tensor(header[key]) for key in ("mean", "std"))
    pixels = (torch.from_numpy(np.stack(images)) / 255 - mean) / std
    pixels = F.interpolate(pixels.permute(0, 3, 1, 2), (32, 32), mode="bilinear", antialias=True)
    with torch.no_grad():
        return network(pixels).softmax(1)


def pixels_of(done):
    """The test images as they are in their files, uint8 [N, 24, 20, 3]."""
    return np.stack([np.asarray(Image.open(file)) for file in done.files])


def labels_of(done):
    """The classes of the test images by their folders, int64 [N]."""
    return torch.tensor([CLASSES.index(file.parent.name) for file in done.files])


def cropped(file, share):
    """The middle of an image, 32 x 32 pixels, resized so that they show that share of its shorter
    side: as torchvision's Resize and CenterCrop.
    """
    image = Image.open(file)
    scale = 32 / share / min(image.size)
    width, height = (int(side * scale + 1e-6) for side in image.size)
    left, top = round((width - 32) / 2), round((height - 32) / 2)
    image = image.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(image.crop((left, top, left + 32, top + 32)))


def check_answers(expected, names, given, error):
    """Names and their probabilities are those of expected [N, 3], where it does not waver."""
    sure = expected.topk(2).values.diff().abs()[:, 0] > 2 * error
    assert sure.float().mean() > 0.9
    guesses = [CLASSES[k] for k in expected.argmax(1)]
    assert [n for n, s in zip(names, sure, strict=True) if s] == [
        n for n, s in zip(guesses, sure, strict=True) if s
    ]
    assert [float(p) for p in given] == pytest.approx(expected.amax(1).tolist(), abs=error)


def test_there_are_mistakes(done):
    """The images are neither too easy nor too hard to tell a right answer from a wrong one."""
    hits = [row["prediction"] == row["file"].split("/")[1] for row in done.rows]
    assert 0.5 < sum(hits) / len(hits) < 0.95
    assert len({row["prediction"] for row in done.rows}) == 3


def test_rows_of_the_report(done):
    """A row per test image, whose label is the folder that the file lies in."""
    names = [file.relative_to(done.images).as_posix() for file in done.files]
    assert [row["file"] for row in done.rows] == names
    assert [row["label"] for row in done.rows] == [file.parent.name for file in done.files]


def test_wrong_folders_are_found(done):
    """What shows another letter than its folder says is mostly told to be the letter it shows."""
    found = {True: [], False: []}
    for file, row in zip(done.files, done.rows, strict=True):
        wrong = int(file.stem) % 5 == 0
        shown = CLASSES[(CLASSES.index(file.parent.name) + wrong) % 3]
        found[wrong].append(row["prediction"] == shown)
    assert all(sum(hits) / len(hits) > 0.6 for hits in found.values())


def test_predict_gives_the_answers_of_the_report(done):
    """The same classes and probabilities for the same files; all classes together have 1."""
    assert [answer["file"] for answer in done.answers] == list(map(str, done.files))
    for answer, row in zip(done.answers, done.rows, strict=True):
        shares = [float(answer[f"probability{k}"]) for k in ("", "_2", "_3")]
        assert sum(shares) == pytest.approx(1, abs=1e-5) and sorted(shares)[::-1] == shares
        assert shares[0] == pytest.approx(float(row["probability"]), abs=1e-3)
        assert answer["class"] == row["prediction"] or shares[0] - shares[1] < 1e-3


def test_answers_about_small_images(letters):
    """They are those of the network that was kept, fed with the scaled pixels."""
    expected = probabilities(letters.run, pixels_of(letters))
    names, given = ([row[key] for row in letters.rows] for key in ("prediction", "probability"))
    check_answers(expected, names, given, 1e-3)
    loss = F.nll_loss(expected.log(), labels_of(letters)).item()
    assert letters.report["loss"] == pytest.approx(loss, abs=1e-3)


def test_answers_about_photographs(photographs):
    """They are about the middle of the photograph, and about the whole they would be others."""
    expected = probabilities(photographs.run, [cropped(f, 0.875) for f in photographs.files])
    for rows, name in ((photographs.rows, "prediction"), (photographs.answers, "class")):
        names, given = ([row[key] for row in rows] for key in (name, "probability"))
        check_answers(expected, names, given, 0.01)
    whole = probabilities(photographs.run, [cropped(f, 1.0) for f in photographs.files])
    assert (whole - expected).abs().amax(1).topk(10).values.min() > 0.05


def test_figures_follow_from_the_rows(done):
    """The report's figures are those that scikit-learn finds in predictions.csv."""
    labels, predicted = ([row[key] for row in done.rows] for key in ("label", "prediction"))
    report = done.report
    assert (report["images"], report["split"]) == (len(labels), "test")
    assert report["classes"] == list(CLASSES)
    assert report["top1"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    confusion = sklearn.metrics.confusion_matrix(labels, predicted, labels=CLASSES)
    assert report["confusion"] == confusion.tolist() != confusion.T.tolist()
    each = sklearn.metrics.precision_recall_fscore_support(labels, predicted, labels=CLASSES)
    for key, values in zip(("precision", "recall", "f1"), each, strict=False):
        assert report[f"macro_{key}"] == pytest.approx(values.mean())
        assert [row[key] for row in report["per_class"]] == pytest.approx(values)


def test_tta(letters, tmp_path):
    """--tta averages unsure answers: to the image, shifted up and down, and to all three mirrored.

    The network was not shown mirrored images, and answers otherwise to them: it is only said to be.
    """
    tensors, header = weights.read(letters.run / "model.safetensors")
    header = {k: v for k, v in header.items() if k not in ("format", "version", "sha256")}
    header["options"]["augment"] = "standard"
    copy = tmp_path / "model.safetensors"
    copy.write_bytes(weights.encode({k: v.clone() for k, v in tensors.items()}, header))
    call(measure.main, "--weights", copy, "--precision", "no", "--tta")
    found = json.loads((tmp_path / "report" / "metrics.json").read_text())["tta"]
    images, labels = pixels_of(letters), labels_of(letters)
    padded = np.pad(images, ((0, 0), (1, 1), (1, 1), (0, 0)), mode="reflect")
    shown = ((0.5, images), (0.25, padded[:, :-2, :-2]), (0.25, padded[:, 2:, 2:]))
    plain, mirrored = (
        sum(w * probabilities(letters.run, x[:, :, ::way].copy()) for w, x in shown)
        for way in (1, -1)
    )
    mean, alone = (plain + mirrored) / 2, probabilities(letters.run, images)
    unsure = alone.amax(1, keepdim=True) < measure.UNSURE
    assert 0 < unsure.sum() == found["averaged"] < len(labels)
    mean = torch.where(unsure, mean, alone)
    assert found["loss"] == pytest.approx(F.nll_loss(mean.log(), labels).item(), abs=1e-4)

    def apart(answers):
        """How many images are counted elsewhere than in the report."""
        counted = sklearn.metrics.confusion_matrix(labels, answers.argmax(1))
        return abs(counted - found["confusion"]).sum() / 2

    assert apart(mean) <= 1  # an answer may waver
    assert min(apart(plain), apart(probabilities(letters.run, images))) >= 5


def test_the_best_epoch_is_summed_up_and_kept(letters):
    """It is not the last one; its figures are the summary, its weights model.safetensors, and what
    was measured is the network of that epoch.
    """
    epochs, summary = letters.metrics["epochs"], letters.metrics["summary"]
    best = max(epochs, key=lambda e: (e["val_accuracy"], -e["val_loss"]))
    assert best["epoch"] < 14 and best["val_accuracy"] > epochs[-1]["val_accuracy"] + 0.1
    assert summary["best_epoch"] == letters.report["epoch"] == best["epoch"]
    for key in ("val_accuracy", "val_f1", "val_loss"):
        assert summary[key] == best[key]
    tensors, header = weights.read(letters.run / "model.safetensors")
    assert weights.digest(tensors) == header["sha256"] == best["weights_sha256"]
    name = f"epoch-{best['epoch']:03d}-{best['val_accuracy']:.4f}.safetensors"
    kept, _ = weights.read(letters.run / "epochs" / name)
    assert weights.digest(kept) == header["sha256"]
    assert header["epoch"] == header["validation"]["epoch"] == best["epoch"]
    files = sorted((letters.images / "val").rglob("*.png"))
    guesses = probabilities(letters.run, [np.asarray(Image.open(file)) for file in files]).argmax(1)
    hits = [CLASSES[k] == file.parent.name for k, file in zip(guesses, files, strict=True)]
    assert summary["val_accuracy"] == pytest.approx(sum(hits) / len(hits), abs=0.02)
