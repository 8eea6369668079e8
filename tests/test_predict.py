"""test.py and predict.py say whose weights and data they use, and answer mistakes at once."""

import csv
import importlib
import json
import os
import subprocess
import sys
import time

import numpy as np
import predict
import pytest
import torch

from lenslet import files, weights
from lenslet.data.decode import read_image
from lenslet.errors import run_main
from model import create_model, load_model

measure = importlib.import_module("test")  # scripts/test.py, not the standard library's
OPTIONS = {"precision": "no", "workers": 0, "val": 0.1, "skip_broken": False, "augment": "light"}
OPTIONS |= {"batch_size": 4, "accumulate": 1}


@pytest.fixture
def pictures(make_folder, tmp_path):
    return make_folder(tmp_path / "pictures", {"train": 4, "test": 3})


@pytest.fixture
def run(pictures, tmp_path):
    """A run folder with weights of a network for these pictures, that runs/latest names."""
    torch.manual_seed(0)
    header = {
        "model": "lenet",
        "model_args": {"classes": 2, "channels": 3},
        "classes": ["ants", "bees"],
        "channels": 3,
        "image_size": (12, 10),
        "crop": 1.0,
        "mean": [0.5] * 3,
        "std": [0.25] * 3,
        "data": str(pictures),
        "epoch": 1,
        "options": OPTIONS,
    }
    folder = files.RUNS / "pictures-lenet"
    folder.mkdir(parents=True)
    network = create_model("lenet", classes=2, channels=3)
    (folder / "model.safetensors").write_bytes(weights.encode(network.state_dict(), header))
    (files.RUNS / "latest").symlink_to("pictures-lenet")
    return folder


def refused(capsys, main, *words):
    """What main says on standard error, a line, where it is to end with status 2."""
    assert run_main(main, words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def test_weights_by_run_folder(run, pictures, capsys):
    """A run folder, its file, and no --weights at all mean the same weights."""
    answers = set()
    for words in ([], ["--weights", run], ["--weights", run / "model.safetensors"]):
        assert run_main(predict.main, [pictures, "--top", "2", *words]) == 0
        answers.add(capsys.readouterr().out)
        assert run_main(measure.main, words) == 0
        assert "6 images" in capsys.readouterr().out
    assert len(answers) == 1
    for main, word in ((predict.main, [pictures]), (measure.main, [])):
        said = refused(capsys, main, *word, "--weights", pictures)
        assert (
            said == f"error: {pictures}: no model.safetensors in this folder; name a run or a file"
        )


@pytest.mark.parametrize(
    ("age", "ago"),
    [
        (0.2, "0 seconds"),
        (1.5, "1 second"),
        (59, "59 seconds"),
        (61, "1 minute"),
        (3 * 3600 + 5, "3 hours"),
        (86400, "1 day"),
        (40 * 86400, "40 days"),
        (-100, "0 seconds"),
    ],
)
def test_describe(run, monkeypatch, age, ago):
    """Data set, network and age in a line, the path as it can be pasted; no link in it."""
    monkeypatch.chdir(files.RUNS.parent)
    monkeypatch.setattr(time, "time", lambda: 1e9)
    os.utime(run / "model.safetensors", (1e9 - age, 1e9 - age))
    said = weights.describe(
        files.RUNS / "latest" / "model.safetensors", {"data": "/a/b", "model": "m"}
    )
    assert said == f"runs/pictures-lenet/model.safetensors (b, m, trained {ago} ago)"


def test_predict_says_which_weights_it_chose(run, pictures, capsys):
    """On standard error, and only where none were named: the answers stay as they are."""
    assert run_main(predict.main, [pictures, "--format", "csv"]) == 0
    said = capsys.readouterr()
    assert said.err.startswith("using ") and len(said.err.splitlines()) == 1
    assert f"{run.name}/model.safetensors (pictures, lenet, trained " in said.err
    assert len(list(csv.DictReader(said.out.splitlines()))) == 14
    assert run_main(predict.main, [pictures, "--weights", run]) == 0
    assert capsys.readouterr().err == ""


def test_test_says_which_weights_it_chose(run, capsys):
    """First of all, in predict.py's words, and only where none were named."""
    assert run_main(measure.main, []) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith("using ")
    assert f"{run.name}/model.safetensors (pictures, lenet, trained " in first
    assert run_main(measure.main, ["--weights", run]) == 0
    assert "using" not in capsys.readouterr().out


def test_what_test_says_and_writes(run, capsys, monkeypatch):
    """The most confused classes come right before the report; its CSV has the probability of each
    class, and of more than LEGIBLE only that of the answer.
    """
    tables = {}
    for legible in (2, 1):
        monkeypatch.setattr("lenslet.analysis.report.LEGIBLE", legible)
        assert run_main(measure.main, []) == 0
        with open(run / "report" / "predictions.csv") as file:
            tables[legible] = list(csv.DictReader(file))
    answer = ["file", "label", "prediction", "probability"]
    assert list(tables[1][0]) == answer and list(tables[2][0]) == [*answer, "ants", "bees"]
    for row, short in zip(tables[2], tables[1], strict=True):
        assert {key: row[key] for key in answer} == short
        assert row[row["prediction"]] == row["probability"]
        assert float(row["ants"]) + float(row["bees"]) == pytest.approx(1, abs=2e-6)
    said = capsys.readouterr().out.splitlines()
    assert said[-3].startswith("most confused: ") and said[-2].startswith("report: ")
    assert said[-4].startswith("test accuracy ") and "top-5" not in said[-4]


def test_a_file_that_is_named_twice_is_answered_twice(run, pictures, capsys):
    """The answers are in the order given, over several batches, repetitions included."""
    names = [str(pictures / "test" / "ants" / f"{i}.png") for i in (2, 0, 2)] * 30
    assert run_main(predict.main, [*names, "--weights", run]) == 0
    assert [line.split(": ")[0] for line in capsys.readouterr().out.splitlines()] == names


def test_all_classes(run, pictures, capsys):
    """--top 0 gives the probability of every class; together they are 1."""
    words = [pictures / "test", "--weights", run, "--format", "json", "--top"]
    said = []
    for top in ("0", "2"):
        assert run_main(predict.main, [*words, top]) == 0
        said.append(json.loads(capsys.readouterr().out))
    assert said[0] == said[1]
    for answer in said[0]:
        assert {p["class"] for p in answer["predictions"]} == {"ants", "bees"}
        assert sum(p["probability"] for p in answer["predictions"]) == pytest.approx(1, abs=1e-5)


def test_grid(run, pictures, tmp_path, capsys, monkeypatch):
    """--grid draws the whole images that were answered, in order, with the answers that are
    printed; of more than SHEET the first ones.
    """
    drawn = []

    def record(images, captions):
        drawn.append(([image.shape for image in images], captions))
        return torch.full((3, 5, 7), 9, dtype=torch.uint8)

    monkeypatch.setattr("lenslet.grid.draw_grid", record)
    (pictures / "test" / "ants" / "1.png").write_bytes(b"")
    sheet = tmp_path / "sheet.png"
    words = [pictures / "test", "--weights", run, "--grid", sheet]
    assert run_main(predict.main, words) == 1
    said = capsys.readouterr()
    answers = [line.split(": ")[1].rsplit(" ", 1) for line in said.out.splitlines()]
    assert drawn == [([(3, 12, 10)] * 5, ["\n".join(answer) for answer in answers])]
    assert read_image(sheet, 3).shape == (5, 7, 3) and "sheet" not in said.err
    monkeypatch.setattr(predict, "SHEET", 2)
    assert run_main(predict.main, words) == 1
    assert capsys.readouterr().out == said.out
    assert drawn[1] == tuple(part[:2] for part in drawn[0])


def test_grid_leaves_out_what_has_no_room(run, pictures, tmp_path, capsys, monkeypatch):
    """From which image on they are left out is said, the answers are all printed."""
    sheet, test = tmp_path / "sheet.png", pictures / "test"
    for most, said in (
        (6, ""),
        (4, f"{sheet}: the first 4 of 6 images; left out from {test}/bees/1.png on\n"),
    ):
        monkeypatch.setattr(predict, "SHEET", most)
        assert run_main(predict.main, [test, "--weights", run, "--grid", sheet]) == 0
        result = capsys.readouterr()
        assert (len(result.out.splitlines()), result.err) == (6, said)
        assert read_image(sheet, 3).shape[1] == most * 120 + 8
    assert sorted(os.listdir(tmp_path)) == ["pictures", "runs", "sheet.png"]


def test_grid_that_cannot_be_written(run, pictures, tmp_path, capsys, monkeypatch):
    """What can be no sheet is refused before the work; a sheet of nothing is not made."""
    sheet = tmp_path / "sheet.png"
    (pictures / "test" / "ants" / "1.png").write_bytes(b"")
    broken = [pictures / "test" / "ants" / "1.png", "--weights", run]
    assert run_main(predict.main, [*broken, "--grid", sheet]) == 1
    assert len(capsys.readouterr().err.splitlines()) == 1 and not sheet.exists()
    monkeypatch.setattr(predict, "predict", None)
    for wrong in (tmp_path, tmp_path / "sheet.jpg"):
        said = refused(capsys, predict.main, pictures, "--grid", wrong)
        assert said == f"error: --grid {wrong}: name a .png file"
    said = refused(capsys, predict.main, pictures, "--grid", tmp_path / "gone" / "sheet.png")
    assert said.startswith(f"error: --grid {tmp_path}/gone/sheet.png: no such folder; ")


@pytest.mark.parametrize("word", ["{}", "{}/*/*.png"])
def test_images_that_are_no_files_are_named(run, pictures, capsys, word):
    """Of a folder or a pattern, a link to nothing and a pipe are errors; the rest is answered."""
    ants = pictures / "test" / "ants"
    (ants / "0.png").rename(pictures / "0.png")
    (ants / "0.png").symlink_to(ants / "gone.png")
    os.mkfifo(ants / "pipe.png")
    (ants / "folder.png").mkdir()
    (pictures / "0.png").rename(ants / "folder.png" / "0.png")
    assert predict.find([str(ants.parent / "bees")]) == [
        str(ants.parent / "bees" / f"{i}.png") for i in range(3)
    ]
    assert run_main(predict.main, [word.format(ants.parent), "--weights", run]) == 1
    said = capsys.readouterr()
    answered = [line.split(": ")[0] for line in said.out.splitlines()]
    assert len(answered) == (6 if word == "{}" else 5)
    broken = [line.split(": ")[1] for line in said.err.splitlines()]
    assert broken == [str(ants / "0.png"), str(ants / "pipe.png")]


def test_a_name_that_begins_with_a_dash(run, pictures, capsys, monkeypatch):
    """Taken for an option, it gets a hint at --, which works."""
    monkeypatch.chdir(pictures / "test" / "ants")
    os.rename("0.png", "-x.png")
    monkeypatch.setattr("sys.argv", ["predict.py"])
    said = refused(capsys, predict.main, "-x.png")
    assert said.endswith("required: IMAGE; for the file of that name: predict.py -- -x.png")
    said = refused(capsys, predict.main, "1.png", "-x.png")
    assert said.startswith("error: unknown option -x.png; for the file of that name: ")
    assert "file" not in refused(capsys, predict.main, "1.png", "-y.png")
    assert run_main(predict.main, ["--", "-x.png"]) == 0
    assert capsys.readouterr().out.startswith("-x.png: ")


def test_json_for_any_name_and_number(run, pictures, capsys, monkeypatch):
    """A name that is not UTF-8 can be had back from the JSON, and NaN is null in it."""
    path = os.fsencode(pictures) + b"/Gr\xfc\xdfe \xc3\xa4\n.png"
    os.rename(pictures / "test" / "ants" / "0.png", path)
    assert run_main(predict.main, [os.fsdecode(path), "--format", "json"]) == 0
    out = capsys.readouterr().out
    (answer,) = json.loads(out.encode())  # which lone surrogates could not be
    assert os.fsencode(answer["file"]) == path and "ä" in out
    predict.write([("a", [("ants", float("nan")), ("bees", 0.5)])], "json", 2)
    (answer,) = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert [guess["probability"] for guess in answer["predictions"]] == [None, 0.5]


def test_max_pixels(run, pictures, capsys):
    """--max-pixels says how large a file may be; what is larger is named, the rest answered."""
    assert run_main(predict.main, [pictures, "--max-pixels", "120", "--weights", run]) == 0
    assert run_main(predict.main, [pictures, "--max-pixels", "119", "--weights", run]) == 1
    assert "(10×12 pixels, more than 119)" in capsys.readouterr().err


def test_no_regular_files(run, pictures, capsys):
    """A pipe, a device and standard input that is one of them are named at once, and not opened."""
    os.mkfifo(pictures / "pipe.png")
    for path in (pictures / "pipe.png", "/dev/zero"):
        assert run_main(predict.main, [path, "--weights", run]) == 1
        (line,) = capsys.readouterr().err.splitlines()
        assert line == f"error: {path}: cannot be read as an image (not a regular file)"


def test_a_folder_that_cannot_be_read_is_an_error(run, pictures, capsys):
    """No image of a folder is left out because a part of it cannot be read."""
    link = pictures / "test" / "more"
    link.symlink_to(pictures / "gone")
    said = refused(capsys, predict.main, pictures, "--weights", run)
    assert said.startswith(f"error: {link}: cannot be read (No such file or directory); ")
    said = refused(capsys, measure.main, "--weights", run)
    assert f": {link}: cannot be read (No such file or directory); " in said


def test_errors_blame_what_the_user_knows(run, pictures, tmp_path, capsys):
    """--data where it was given; else the weights whose data is gone or other than it was."""
    words = ["--weights", run]
    gone = tmp_path / "gone"
    said = refused(capsys, measure.main, *words, "--data", gone)
    assert said == f"error: --data {gone}: no such folder"
    file = run / "model.safetensors"
    pictures.rename(gone)
    said = refused(capsys, measure.main, *words)
    assert said == f"error: the data of {file}, {pictures}: no such folder; give --data"
    assert run_main(measure.main, [*words, "--data", gone]) == 0
    capsys.readouterr()
    gone.rename(pictures)
    (pictures / "train" / "ants").rename(pictures / "train" / "wasps")
    (pictures / "test" / "ants").rename(pictures / "test" / "wasps")
    said = refused(capsys, measure.main, *words)
    assert said.startswith(f"error: the data of {file}, {pictures}: class wasps is not among")


def test_test_py_refuses_before_the_work(run, tmp_path, capsys, monkeypatch):
    """An output that cannot be written, and a --tta that adds nothing, end before the pass."""
    monkeypatch.setattr("lenslet.metrics.evaluate", None)
    (tmp_path / "file").touch()
    said = refused(capsys, measure.main, "--output", tmp_path / "file")
    assert said.startswith(f"error: --output {tmp_path / 'file'}: cannot be written (")
    assert "a CPU" in refused(capsys, measure.main, "--precision", "fp16")
    monkeypatch.setitem(OPTIONS, "augment", "none")
    (run / "model.safetensors").write_bytes(_with_options(run / "model.safetensors"))
    assert "--augment none" in refused(capsys, measure.main, "--tta")


def _with_options(path):
    tensors, header = weights.read(path)
    for key in ("format", "version", "sha256"):
        del header[key]
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return weights.encode(tensors, header | {"options": OPTIONS})


@pytest.mark.parametrize("script", ["test", "predict", "download", "results"])
def test_mistakes_wait_for_no_import(script):
    """--help and a misspelt option need neither torch nor what else takes long to import."""
    code = (
        "import importlib, sys; sys.path[:0] = ['scripts', '.']\n"
        f"main = importlib.import_module({script!r}).main\n"
        "from lenslet.errors import run_main\n"
        "print(run_main(main, ['--mispelt', 'x']))\n"
        "try:\n    main(['--help'])\nexcept SystemExit as exit:\n    print(exit.code)\n"
        "print({'torch', 'numpy', 'PIL', 'accelerate', 'matplotlib', 'yaml'} & set(sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=files.ROOT, capture_output=True, text=True, check=True
    )
    lines = result.stdout.splitlines()
    assert (lines[0], lines[-2:]) == ("2", ["0", "set()"])
    assert result.stderr.startswith("error: unknown option --mispelt")


def make_ambiguous(path, images):
    """Rewrite a weights file so that both classes are about as likely, whatever the image."""
    model, prepare, header = load_model(path)
    read = [read_image(image, 3, header["image_size"], 1.0) for image in images]
    with torch.no_grad():
        logits = model(prepare(torch.from_numpy(np.stack(read)).permute(0, 3, 1, 2)))
    tensors = weights.read(path)[0]
    tensors["fc3.bias"] -= logits.mean(0)
    path.write_bytes(weights.encode(tensors, header))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_test_and_predict_give_the_same_labels(run, pictures, capsys, precision):
    """Both compute in the same precision, and break ties alike: no label differs."""
    make_ambiguous(run / "model.safetensors", sorted(pictures.glob("test/*/*.png")))
    words = ["--weights", run, "--precision", precision, "--device", "cpu"]
    assert run_main(measure.main, [*words, "--data", pictures]) == 0
    with open(run / "report" / "predictions.csv") as file:
        measured = {row["file"]: row["prediction"] for row in csv.DictReader(file)}
    capsys.readouterr()
    assert run_main(predict.main, [pictures / "test", "--format", "csv", *words]) == 0
    rows = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    answers = {os.path.relpath(row["file"], pictures): row["class"] for row in rows}
    assert answers == measured and len(answers) == 6
    assert len(set(answers.values())) == 2


@pytest.mark.parametrize("trained", ["no", "bf16"])
def test_the_precision_of_training(run, pictures, capsys, monkeypatch, trained):
    """Without --precision both take that of training, where the CPU has it, and say so."""
    monkeypatch.setattr("lenslet.distributed.precision.cpu_has_bf16", lambda: True)
    tensors, header = weights.read(run / "model.safetensors")
    content = weights.encode(tensors, header | {"precision": trained})
    (run / "model.safetensors").write_bytes(content)
    assert run_main(measure.main, ["--device", "cpu"]) == 0
    assert json.loads((run / "report" / "metrics.json").read_text())["precision"] == trained
    assert run_main(predict.main, [pictures, "--device", "cpu"]) == 0
    assert f"on cpu, precision {trained}\n" in capsys.readouterr().err


def test_a_device_that_is_not_there(run, pictures, capsys):
    """Both refuse it in one line."""
    for main, words in ((predict.main, [pictures]), (measure.main, [])):
        said = refused(capsys, main, *words, "--device", "abacus")
        assert said.startswith("error: --device abacus: no such device here, only cpu")


def test_weights_without_a_checksum_of_their_header(pictures, capsys):
    """One line says that a file is of format 1; the answer is given."""
    old = files.ROOT / "tests" / "weights-1.safetensors"
    assert run_main(predict.main, [pictures, "--weights", old]) == 0
    assert capsys.readouterr().err == "weights of format 1: their header has no checksum\n"
