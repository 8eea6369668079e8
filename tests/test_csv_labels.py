"""--labels: a file of labels in place of class folders, from training to the report."""

import csv
import importlib
import json

import folds
import pytest
import train
from accelerate.state import AcceleratorState, GradientState

import lenslet.weights
from lenslet import errors
from lenslet.runs import launch

measure = importlib.import_module("test")  # scripts/test.py, not the standard library's
TINY = ["--model", "lenet", "--precision", "no", "--workers", "0", "--epochs", "1"]


def call(main, *words):
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    return errors.run_main(main, [str(word) for word in words])


@pytest.fixture
def labelled(make_folder, tmp_path):
    """24 images in one folder, their labels, and the words that name both."""
    make_folder(tmp_path, {"": 24}, classes=("flat",))
    rows = [f"{i}.png,{'ab'[i % 2]},{i // 4},{1 + i % 3}\n" for i in range(24)]
    path = tmp_path / "labels.csv"
    path.write_text("file,label,group,weight\n" + "".join(rows))
    return path, ["--data", tmp_path / "flat", "--labels", path]


def answered(run):
    """file → label of the images in a run's report."""
    rows = csv.DictReader((run / "report" / "predictions.csv").open())
    return {row["file"]: row["label"] for row in rows}


def test_labels_from_training_to_the_report(labelled, tmp_path, capsys):
    """train.py takes labels, groups and weights from the file; test.py finds it in the weights,
    for the same data only, or is given another.
    """
    path, words = labelled
    run = tmp_path / "run"
    assert call(train.main, *words, *TINY, "--output", run) == 0
    header = lenslet.weights.read_header(run / "model.safetensors")
    assert header["classes"] == ["a", "b"] and header["options"]["labels"] == str(path)
    assert "weighted" in capsys.readouterr().out
    for again in ([], ["--data", tmp_path / "flat"]):
        assert call(measure.main, "--weights", run, *again) == 0
        found = answered(run)
        assert found and all("ab"[int(name[:-4]) % 2] == label for name, label in found.items())
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "0.png").write_bytes((tmp_path / "flat" / "0.png").read_bytes())
    capsys.readouterr()
    assert call(measure.main, "--weights", run, "--data", copy) == 2
    assert "no class folder" in capsys.readouterr().err
    other = tmp_path / "other.csv"
    other.write_text("file,label,split\n0.png,a,test\n../flat/1.png,b,train\n")
    assert call(measure.main, "--weights", run, "--data", copy, "--labels", other) == 0
    assert answered(run) == {"0.png": "a"}


def test_refused_labels(labelled, tmp_path, capsys):
    """Two files of weights, a wrong weight and a gone file end in a line that names the option."""
    path, words = labelled
    for more, text, said in (
        (["--image-weights", path], None, "--image-weights cannot be used with --labels"),
        ([], "file,label,weight\n0.png,a,1\n1.png,b,-1\n", f"--labels {path}: line 3: '-1' is not"),
        ([], "file,label\n0.png,a\nx.png,b\n", f"{path}: line 3: no such file 'x.png'"),
    ):
        path.write_text(text or path.read_text())
        assert call(train.main, *words, *TINY, *more) == 2
        error = capsys.readouterr().err
        assert said in error and len(error.splitlines()) == 1


def test_folds_of_labels(labelled, tmp_path, monkeypatch):
    """folds.py hands the labels on to each training."""
    _, words = labelled
    monkeypatch.setattr(launch, "run_training", lambda words, _: call(train.main, *words))
    output = tmp_path / "folds"
    assert call(folds.main, "--folds", "2", "--output", output, *words, *TINY) == 0
    assert len(json.loads((output / "folds.json").read_text())["val_accuracy"]["folds"]) == 2
