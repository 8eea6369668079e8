"""The Makefile hands on what it was given, refuses what it does not know, and shows runs once."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from urllib.request import urlopen

import pytest
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from lenslet import files

# What make check itself was called with is not a user's; neither is what a shell has by chance.
OURS = ("MAKE", "MFLAGS", "DATA", "MODEL", "RECIPE", "TIME", "RUN", "IMAGE", "ARGS", "VENV")
ENVIRONMENT = {k: v for k, v in os.environ.items() if not k.startswith(OURS)}
ENVIRONMENT["CUDA_VISIBLE_DEVICES"] = ""
ODD = [
    "a b.png",
    "it's.png",
    'a "b".png',
    "a$b.png",
    "$HOME",
    "a\\b;c",
    "*.png",
    "#1 (2), 3%",
    "日本",
]


@pytest.fixture
def root(tmp_path):
    """A repository whose Python only writes down, a line a word, what it is called with."""
    for name in ("lenslet", "scripts", "requirements"):
        shutil.copytree(files.ROOT / name, tmp_path / name)
    for name in ("Makefile", "requirements.txt"):
        shutil.copy(files.ROOT / name, tmp_path)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\nprintf "%s\\n" "$@"\n')
    python.chmod(0o755)
    for name in (".ready", ".ready-dev"):
        (tmp_path / ".venv" / name).touch()
    return tmp_path


def make(root, *words, status=0, **environment):
    """make's standard output, or its last line on standard error where it is to fail."""
    words = ["make", "--no-print-directory", f"PYTHON={sys.executable}", *words]
    result = subprocess.run(
        words, cwd=root, env=ENVIRONMENT | environment, capture_output=True, text=True
    )
    assert result.returncode == status, result.stdout + result.stderr
    return result.stderr if status else result.stdout


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("Data=digits", "Data: no such variable (did you mean DATA?)"),
        ("model=lenet", "model: no such variable (did you mean MODEL?)"),
        ("IMAGES=a.png", "IMAGES: no such variable (did you mean IMAGE?)"),
        ("PROCESS=2", "PROCESS: no such variable (did you mean PROCESSES?)"),
        ("EPOCHS=3", "EPOCHS: no such variable; say ARGS='--epochs 3'"),
        ("BATCH_SIZE=8", "BATCH_SIZE: no such variable; say ARGS='--batch-size 8'"),
        ("Xyz=it's", "Xyz: no such variable; there are DATA MODEL"),
    ],
)
def test_unknown_variables_are_refused(root, word, said):
    """A variable that would change nothing ends make with one line that names the right one."""
    error = make(root, "train", "DATA=digits", word, status=2)
    assert said in error and len(error.splitlines()) == 1


def test_a_hint_needs_no_python(root):
    """Without a Python to look for the nearest one, the line lists all variables."""
    error = make(root, "train", "PYTHON=gone", "Data=digits", status=2)
    assert "Data: no such variable; there are DATA MODEL" in error


def test_known_variables_are_taken(root):
    """Those that help shows, make's own, and what comes from the environment or a make above."""
    shown = set(re.findall(r"\b([A-Z]+)=", make(root)))
    assert {"DATA", "ARGS", "PROCESSES"} <= shown
    own = ["SHELL=/bin/sh", "MAKEFLAGS=", "CUDA_VISIBLE_DEVICES=", "OMP_NUM_THREADS=1"]
    make(root, "help", "PYTHON=python3", "VENV=.venv", *(f"{name}=1" for name in shown), *own)
    make(root, "help", Data="digits", EPOCHS="3")
    (root / "above.mk").write_text("all:\n\t$(MAKE) help\n")
    make(root, "-f", "above.mk", "ITS_OWN=1")


@pytest.mark.parametrize("word", ODD)
def test_a_value_is_one_word(root, word):
    """A file name with any character reaches the command as it is, spaces and quotes included."""
    assert make(root, "predict", f"IMAGE={word}").splitlines()[-1] == word
    said = make(root, "predict", "IMAGE=a", f"RUN={word}").splitlines()
    assert said == ["scripts/predict.py", "--weights", word, "a"]
    for target in ("data", "train", "test", "folds", "bench"):
        assert word in make(root, target, f"DATA={word}").splitlines()
    given = {"DATA": "--data", "MODEL": "--model", "RECIPE": "--config", "TIME": "--time"}
    said = make(root, "train", *(f"{name}={word}" for name in given)).splitlines()
    assert [said[said.index(option) + 1] for option in given.values()] == [word] * 4
    assert f"{word}/model.safetensors" in make(root, "reproduce", f"RUN={word}").splitlines()


def test_values_from_the_environment(root):
    """DATA=… make train is make train DATA=…"""
    assert make(root, "train", DATA="it's").splitlines()[2:4] == ["--data", "it's"]


def test_without_variables(root):
    """What is not given is left to the commands; predict needs a picture."""
    assert make(root, "test").splitlines()[1:] == ["scripts/test.py"]
    assert make(root, "data").splitlines()[1:] == ["scripts/download.py", "cifar10"]
    assert "make predict IMAGE=img.png" in make(root, "predict", status=2)


def test_args_are_words(root):
    """ARGS are words of the shell, which may be quoted there."""
    said = make(root, "test", "ARGS=--output 'a b' --tta").splitlines()
    assert said[-4:] == ["scripts/test.py", "--output", "a b", "--tta"]


def test_help_lists_every_target(root):
    """make alone prints every target."""
    targets = re.search(r"^\.PHONY: help (.*)", (root / "Makefile").read_text(), re.MULTILINE)
    said = make(root)
    for target in targets[1].split():
        assert target in said
    assert "make results" in said


@pytest.mark.parametrize(
    ("name", "target"), [("requirements.txt", "test"), ("requirements/dev.txt", "results")]
)
def test_the_environment_follows_the_requirements(root, name, target):
    """What is installed is brought up to date when a requirements file changes, and only then."""
    assert "pip" not in make(root, target, "--dry-run")
    newer = time.time() + 10
    os.utime(root / name, (newer, newer))
    assert f"pip install --quiet -r {name}" in make(root, target, "--dry-run")


def test_tensorboard_shows_each_run_once(root):
    """runs/latest, a link, is no second run; a run that begins later appears."""
    shutil.rmtree(root / ".venv" / "bin")
    for name in ("bin", "lib", "pyvenv.cfg"):
        if (Path(sys.prefix) / name).exists():
            (root / ".venv" / name).symlink_to(Path(sys.prefix) / name)

    def begin(name):
        writer = EventFileWriter(str(root / "runs" / name))
        writer.add_event(Event(step=1))
        writer.close()

    begin("first")
    begin("first/report")
    (root / "runs" / "latest").symlink_to("first")
    process = subprocess.Popen(
        ["make", "tensorboard", "ARGS=--port 0 --reload_interval 1"],
        cwd=root,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        url = next(filter(None, (re.search(r"http://\S+", line) for line in process.stdout)))[0]

        def shown(expected):
            for _ in range(900):
                found = sorted(json.load(urlopen(f"{url}data/runs")))
                if found == expected:
                    return
                time.sleep(0.1)
            raise AssertionError(found)

        shown(["first", "first/report"])
        begin("second")
        shown(["first", "first/report", "second"])
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=90)
