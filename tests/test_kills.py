"""Real processes, killed at random moments: each run ends with the weights of one left alone.

pytest -m slow tests/test_kills.py --kills 100
"""

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lenslet import files, weights
from lenslet.runs.folder import is_finished

TRAIN = [files.ROOT / "scripts" / "train.py", "--precision", "no", "--save-every", "3"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
WAYS = ["terminate", "kill one", "kill all", "kill all while saving"]


def start(setting, run):
    """One of the four settings, as a process of its own."""
    data, processes = setting
    words = ["--data", data, "--model", "lenet", "--epochs", "12"]
    if data != "digits":  # batch norm, whose statistics differ between the processes
        words = ["--data", data, "--model", "resnet10t", "--epochs", "3", "--augment", "standard"]
    command = [sys.executable, *(TORCHRUN if processes == 2 else []), *TRAIN, *words]
    return subprocess.Popen(
        [str(word) for word in [*command, "--output", run]],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def digest(run):
    return weights.read(run / "model.safetensors")[1]["sha256"]


def end(process, way, run):
    """Take a process and those that it started away, in one of the ways."""
    tree = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
    if way == "terminate":
        process.send_signal(signal.SIGTERM)
    elif way == "kill one":
        with contextlib.suppress(psutil.NoSuchProcess):
            tree[-1].kill()  # of two: the other one has to notice
    else:
        deadline = time.monotonic() + 5
        while "saving" in way and not list((run / "checkpoint").glob(".*")):
            if time.monotonic() > deadline or process.poll() is not None:
                break
        for one in tree:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.communicate(timeout=60)  # nobody hangs


@pytest.fixture(scope="module")
def settings(tmp_path_factory, request):
    """(data, processes) of each setting -> the digest of an undisturbed run, and its seconds.

    The images are a cut of CIFAR-10 where it lies unpacked, and noise elsewhere.
    """
    from conftest import _make_folder

    cut, found = tmp_path_factory.mktemp("cut"), files.ROOT / "pictures" / "cifar10" / "train"
    if found.is_dir():
        for file in found.glob("*/000?.jpg"):
            target = cut / "train" / file.parent.name / file.name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(file, target)
    else:
        _make_folder(cut, {"train": 50}, size=(32, 32))
    known = {}
    for setting in [(data, processes) for data in ("digits", str(cut)) for processes in (1, 2)]:
        run = tmp_path_factory.mktemp("undisturbed")
        for _ in range(2):  # the first time may be a slow one
            began = time.monotonic()
            shutil.rmtree(run)
            process = start(setting, run)
            assert process.wait(timeout=300) == 0, process.stderr.read()
            known[setting] = digest(run), time.monotonic() - began
    return known


@pytest.mark.slow
def test_kills(settings, tmp_path, request):
    """As many kills as --kills says, and as many ends with the same bits."""
    kills, seed = request.config.getoption("--kills"), random.randrange(10**6)
    generator, hits = random.Random(seed), {}
    for number in range(kills):
        setting = list(settings)[number % 4]
        expected, seconds = settings[setting]
        way = WAYS[number // 4 % 4]
        run = tmp_path / str(number)
        while True:
            shutil.rmtree(run, ignore_errors=True)
            process = start(setting, run)
            time.sleep(generator.uniform(0.4, 0.98) * seconds)
            if process.poll() is None:
                end(process, way, run)
                if not is_finished(run):
                    break
            process.communicate()
        saved = "a checkpoint" if list((run / "checkpoint").glob("[0-9]*")) else "nothing saved"
        torn = "a torn one" if list((run / "checkpoint").glob(".*")) else "none torn"
        hits[way, saved, torn] = hits.get((way, saved, torn), 0) + 1
        process = start(setting, run)
        _, said = process.communicate(timeout=300)
        where = f"seed {seed}, kill {number}, {setting}, {way}"
        assert process.returncode == 0, f"{where}: {said}"
        assert digest(run) == expected, where
        assert not Path(f"{run}-2").exists(), where
        shutil.rmtree(run)
    print(f"{kills} kills, {kills} equal ends: {hits}")
