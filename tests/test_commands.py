"""The commands as users type them, in a copy of the repository: make, launchers, the README."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import bench
import psutil
import pytest
import together
import torch
import train
from safetensors.torch import save_file

import lenslet.errors
from lenslet import files, weights

README = (files.ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository with this environment as .venv, and three tiny sets on disk.

    Recipes that would take long are cut to an epoch, and that of the digits to two of few steps.
    """
    root = tmp_path_factory.mktemp("clone")
    for name in ("lenslet", "recipes", "requirements", "results", "scripts"):
        shutil.copytree(files.ROOT / name, root / name)
    for name in ("*.py", "requirements.txt", "Makefile", "README.md"):
        for path in files.ROOT.glob(name):
            shutil.copy(path, root)
    for name, epochs in (("digits", 2), ("cifar10", 1), ("mnist", 1), ("tutorial", 1)):
        recipe = root / "recipes" / f"{name}.yaml"
        text = re.sub("epochs: .*", f"epochs: {epochs}", recipe.read_text())
        recipe.write_text(re.sub("batch-size: 32$", "batch-size: 256", text, flags=re.MULTILINE))
    (root / ".venv").mkdir()
    for name in ("bin", "lib", "pyvenv.cfg"):
        if (Path(sys.prefix) / name).exists():
            (root / ".venv" / name).symlink_to(Path(sys.prefix) / name)
    for name in (".ready", ".ready-dev"):
        (root / ".venv" / name).touch()
    for name, shape in (("cifar10", (3, 32, 32)), ("mnist", (1, 28, 28))):
        (root / "data" / name).mkdir(parents=True)
        for split, count in (("train", 40), ("test", 20)):
            images = torch.randint(0, 256, (count, *shape), dtype=torch.uint8)
            labels = torch.arange(count) % 10
            path = root / "data" / name / f"{split}.safetensors"
            classes = '["0","1","2","3","4","5","6","7","8","9"]'
            header = {"classes": classes, "source_sha256": "{}"}
            save_file({"images": images, "labels": labels}, path, header)
    return root


def shell(command, cwd, status=0, threads="1"):
    """Run a command without a network; threads: None for as many as a user gets."""
    ours = ("OMP_", "ACCELERATE_", "MAKE", "VENV")  # make check's own settings are not a user's
    env = {k: v for k, v in os.environ.items() if not k.startswith(ours)}
    env |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    if threads:
        env["OMP_NUM_THREADS"] = threads
    result = subprocess.run(command, shell=True, cwd=cwd, env=env, capture_output=True, text=True)
    said = f"{command}\n{result.stdout}\n{result.stderr}"
    assert result.returncode == status, said
    assert "Traceback" not in said, said
    return result.stdout


def train_here(*words):
    """train.py in this process, for tests of what comes after it."""
    assert lenslet.errors.run_main(train.main, ["--model", "lenet", *map(str, words)]) == 0


def readme_blocks():
    """The commands of each of the README's shell blocks, without their comments."""
    blocks = re.findall(r"^```sh\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    return [re.findall(r"^(\S.*?)(?:  +#.*)?$", block, re.MULTILINE) for block in blocks]


def test_the_readme_is_read():
    """There are commands in the README, and test_the_readme_runs finds them."""
    assert len(readme_blocks()) > 3 and sum(map(len, readme_blocks())) > 12


@pytest.mark.parametrize("commands", readme_blocks(), ids=lambda commands: commands[0])
def test_the_readme_runs(clone, make_folder, commands):
    """Every command of a block works when pasted, in the README's order, without a network."""
    make_folder(clone / "my" / "pictures", {"train": 6, "test": 3}, size=(32, 32))
    make_folder(clone / "my" / "photos", {"": 20}, size=(90, 70), suffix=".jpg")
    for command in commands:
        command = re.sub("TIME=[0-9]+[smh]", "TIME=1s", command)
        if command in ("make check", "make bench"):  # too long: only their parts are looked up
            assert re.search("pytest|bench.py", shell(f"{command} --dry-run", clone))
        elif command == "make tensorboard":
            serve(command, clone)
        else:
            said = shell(command, clone)
        if command == "make train DATA=digits":
            assert f"    {said.splitlines()[-1]}\n" in README
        if "--export" in command:
            assert (clone / "pictures" / "mnist" / "test" / "7").is_dir()


def python(word):
    """The README's lines of Python that have a word in them."""
    blocks = re.findall(r"^```python\n(.*?)^```", README, re.DOTALL | re.MULTILINE)
    (found,) = [block for block in blocks if word in block]
    return found


def test_the_readmes_own_network_and_images(clone):
    """A class pasted into model.py, and images written to a folder, are all that training needs."""
    make = "import numpy as np\npixels = np.zeros((9, 9, 3), np.uint8)\n"
    make += "mine = [(pixels, name) for name in ('ants', 'bees') for _ in range(20)]\n"
    (clone / "program.py").write_text(make + python("Image.fromarray"))
    shell(".venv/bin/python program.py", clone)
    before = (clone / "model.py").read_text()
    after = before.replace("\n\ndef create_model", f"\n{python('NETWORKS')}\n\ndef create_model", 1)
    (clone / "model.py").write_text(after)
    words = "--data my/pictures --model small --epochs 1"
    assert "small: " in shell(f".venv/bin/python scripts/train.py {words}", clone)
    shell(".venv/bin/python scripts/test.py", clone)
    (clone / "model.py").write_text(before)


def test_the_readme_is_true_of_python(clone):
    """The lines for use from Python answer images as they come, from a run folder."""
    shell(".venv/bin/python scripts/train.py --data digits --epochs 1", clone)
    block = python("load_model")
    program = "import torch\nimages = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)\n" + block
    (clone / "program.py").write_text(program + "assert logits.shape == (2, 10), logits.shape\n")
    shell(".venv/bin/python program.py", clone)


def serve(command, cwd):
    """Start a server, wait until it says where it serves, and stop it."""
    process = subprocess.Popen(
        f"exec {command} ARGS='--port 0'",
        shell=True,
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said = []
        for line in process.stdout:
            said.append(line)
            if "http://" in line:
                return
        raise AssertionError("".join(said))
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        process.wait(timeout=90)


def test_processes_count_and_train_like_one(clone, make_folder):
    """Two and three CPU processes evaluate every image once and take the same steps as one.

    37 training images, 9 validation images and 11 to test: nothing divides evenly.
    """
    folder = make_folder(clone / "odd", {"train": 1}, classes=("a", "b"), size=(16, 16))
    for split, count in (("train", 37), ("val", 9), ("test", 11)):
        make_folder(folder, {split: count // 2}, classes=("a",), size=(16, 16))
        make_folder(folder, {split: count - count // 2}, classes=("b",), size=(16, 16))
    trained = f"--data {folder} --model lenet --epochs 2 --batch-size 8 --accumulate 2 "
    trained += "--precision no --optimizer sgd --lr 0.05 --output"
    launch = {
        "one": ".venv/bin/python",
        "launched": ".venv/bin/accelerate launch --num_processes 1 --cpu",
        "two": 2,
        "three": 3,
    }
    tensors, metrics = {}, {}
    for name, launcher in launch.items():
        run = clone / "runs" / name
        said = []
        for script, words in (
            ("train", f"{trained} {run}"),
            ("test", f"--weights {run}/model.safetensors"),
        ):
            if isinstance(launcher, int):
                said.append(together.scripts(launcher, clone, script, words.split()))
            else:  # on all cores
                said.append(shell(f"{launcher} scripts/{script}.py {words}", clone, threads=None))
        assert "37 training images, 9 validation images" in said[0]
        assert "11 images" in said[1]
        tensors[name] = weights.read(run / "model.safetensors")[0]
        metrics[name] = json.loads((run / "report" / "metrics.json").read_text())
    assert metrics["one"]["confusion"] == metrics["two"]["confusion"]
    assert metrics["one"]["confusion"] == metrics["three"]["confusion"]
    for name, tensor in tensors["one"].items():
        torch.testing.assert_close(tensor, tensors["two"][name], rtol=0, atol=1e-5)
        torch.testing.assert_close(tensor, tensors["three"][name], rtol=0, atol=1e-5)
        assert torch.equal(tensor, tensors["launched"][name])  # and on all cores: same bits


@pytest.mark.slow
@pytest.mark.parametrize("batch", [30, 64])
def test_a_step_on_any_number_of_processes(clone, batch):
    """One to eight processes end a step with one process's weights, whether they divide the batch
    or not.
    """
    tensors = {}
    for world in range(1, 9):
        run = clone / "runs" / f"step-{batch}-{world}"
        words = f"--data digits --limit {batch} --batch-size {batch} --epochs 1 --val 0"
        words += f" --precision no --optimizer sgd --lr 0.5 --output {run}"
        together.scripts(world, clone, "train", words.split())
        tensors[world] = weights.read(run / "model.safetensors")[0]
        assert json.loads((run / "metrics.json").read_text())["epochs"][0]["step"] == 1
        for name, tensor in tensors[1].items():
            torch.testing.assert_close(tensors[world][name], tensor, rtol=0, atol=1e-5)


def test_from_any_folder(clone, tmp_path):
    """The scripts find the repository's runs and data wherever they are called from."""
    python = clone / ".venv" / "bin" / "python"
    said = shell(f"{python} {clone}/scripts/train.py --data digits --epochs 1", tmp_path)
    command = said.splitlines()[-1].removeprefix("next: ")
    command = shell(command, tmp_path).splitlines()[-1].removeprefix("next: ")
    assert re.search(r"\d-\d.png: \d [\d.]+%", shell(command, tmp_path))
    assert not list(tmp_path.iterdir())


def test_predict_imports_little(clone, make_folder):
    """Weights of a built-in network answer without the libraries that take seconds to import."""
    make_folder(clone / "light", {"train": 5})
    train_here("--data", clone / "light", "--epochs", "1", "--output", clone / "runs" / "light")
    code = (
        "import sys; sys.path.insert(0, 'scripts'); import predict; predict.main(["
        "'light', '--weights', 'runs/light/model.safetensors']); "
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torchvision', 'timm', "
        "'accelerate', 'sklearn', 'tensorboard', 'yaml'}))"
    )
    said = shell(f'.venv/bin/python -c "{code}"', clone).splitlines()
    assert len(said) == 11
    assert said[-1] == "[]"


def test_two_processes_stop_together(clone, make_folder):
    """What ends one process ends the other too, with one line of ours and no traceback of ours."""
    folder = make_folder(clone / "torn", {"train": 6, "val": 3})
    (folder / "val" / "bees" / "torn.png").write_bytes(b"")
    (clone / "file").touch()
    for words, named in (
        (["--data", "cifar11"], "did you mean cifar10"),
        (
            ["--data", "digits", "--epochs", "1", "--output", clone / "file"],
            f"error: --output: {clone / 'file'} is a file",
        ),
    ):
        said = together.scripts(2, clone, "train", words, status=2)
        assert said.count("error: ") == 1 and named in said and "Traceback" not in said
    result = subprocess.run(
        "OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node 2 scripts/train.py --data torn "
        "--model lenet",
        shell=True,
        cwd=clone,
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1  # torchrun's own
    before_its_report = result.stderr.split("torch/distributed/elastic")[0]
    assert before_its_report.count("error: ") == 1, result.stderr
    assert "torn.png" in before_its_report
    assert "Traceback" not in before_its_report


def test_machines_with_other_images(clone, make_folder):
    """Processes that find other images at one path do not train together; one line says where."""
    make_folder(clone / "here", {"train": 6})
    make_folder(clone / "there", {"train": 6}, size=(12, 11))
    broken = make_folder(clone / "broken", {"train": 6}) / "train" / "bees" / "0.png"
    broken.write_bytes(b"")
    for folder, named in (
        ("there", "other images on host-1 than on the first machine"),
        ("broken", "on host-1: 1 of 12 images cannot be read"),
    ):
        program = f"""
import os, platform, sys
from pathlib import Path
import _root
import train
from lenslet import errors
from lenslet.data import load

rank = int(os.environ["RANK"])
platform.node = lambda: f"host-{{rank}}"
folder = Path({str(clone)!r}, ["here", "{folder}"][rank])
load.find_folder = lambda name: folder
words = ["--data", "here/", "--model", "lenet", "--workers", "0"]
sys.exit(errors.run_main(train.main, words))
"""
        said = together.programs(2, clone, program, status=2)
        assert said.count("error: ") == 1 and named in said and "Traceback" not in said
        assert not list((clone / "runs").glob("here*"))


def test_broken_test_images_are_skipped_to_the_end(clone, make_folder):
    """ARGS=--skip-broken holds for the whole of make train; a name with a space is no obstacle."""
    folder = make_folder(clone / "with space", {"train": 6, "test": 3}, size=(16, 16))
    (folder / "test" / "bees" / "torn.png").write_bytes(b"")
    shell("make train DATA='with space' MODEL=lenet", clone, status=2)
    words = "--skip-broken --epochs 1 --no-watch"
    said = shell(f"make train DATA='with space' MODEL=lenet ARGS='{words}'", clone)
    assert "1 image that cannot be read" in said
    assert "6 images" in said


def test_mistakes_reach_the_shell(clone):
    """Exit status 2 for a mistake, from a process of one's own and through make."""
    shell(".venv/bin/python scripts/train.py --data cifar11", clone, status=2)
    shell(
        ".venv/bin/python scripts/predict.py gone.png --weights gone.safetensors", clone, status=2
    )
    shell("make predict", clone, status=2)


def test_reproduce(clone):
    """make reproduce trains again from the header alone: identical bits, or where they part."""
    run = clone / "runs" / "first"
    words = "--data digits --limit 96 --epochs 2 --val 0 --seed 7 --threads 2"
    train_here(*words.split(), "--output", run)
    for path in [*run.iterdir()]:  # the weights are enough
        if path.name not in ("model.safetensors", ".lock"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    assert "identical bits: " in shell("make reproduce RUN=runs/first", clone).splitlines()[-1]
    assert (clone / "runs" / "first-reproduced" / "model.safetensors").exists()

    # Weights that claim another second epoch, from another version of torch and more threads.
    tensors, header = weights.read(run / "model.safetensors")
    header["digests"][1][1] = "0" * 64
    header["versions"]["torch"] = "0.1"
    header["threads"] = 3
    (run / "model.safetensors").write_bytes(weights.encode(tensors, header))
    said = shell("make reproduce RUN=runs/first", clone, status=2)  # make's own
    assert "'torch': '0.1'" in said.split("training images")[0]
    assert "3 threads, as then" in said.split("training images")[0] or os.cpu_count() > 2
    assert "2 x 3 threads" in said or "1 x 3 threads" in said
    steps = [step for step, _ in header["digests"]]
    assert f"at step {steps[0]}" in said or f"after step {steps[0]}" in said


@pytest.mark.parametrize(
    ("name", "times", "status"), [("TERM", 1, 143), ("INT", 1, 130), ("INT", 2, 130)]
)
def test_a_signal_to_all_processes(clone, make_folder, name, times, status):
    """A signal to those that decode photographs too, as a terminal and schedulers send it: the run
    still saves, and all of them end; at the second Ctrl-C at once.
    """
    make_folder(clone / "photos", {"train": 9, "val": 2}, size=(90, 70), suffix=".jpg")
    words = "--data photos --model lenet --image-size 64 --batch-size 8 --epochs 999 --workers 2"
    command = f".venv/bin/python scripts/train.py {words} --output runs/group-{name}{times}"
    process = subprocess.Popen(
        command.split(),
        cwd=clone,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    while not list((clone / f"runs/group-{name}{times}/checkpoint").glob("*-step-*")):
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    for _ in range(times):
        os.killpg(process.pid, getattr(signal, f"SIG{name}"))
        time.sleep(0.002)
    said, _ = process.communicate(timeout=90)
    saved = bool(said) and "run the same command to resume" in said.splitlines()[-1]
    if times == 2 and saved:
        return  # the second came when the first had been answered: Python may have been leaving
    assert process.returncode == status
    assert "Traceback" not in said
    assert times == 2 or saved


def processes_of(clone, run, count):
    """torchrun with so many processes that train into runs/<run>, once they have saved."""
    command = f".venv/bin/torchrun --nproc-per-node {count} --max-restarts 1 scripts/train.py"
    command += f" --data digits --epochs 8 --batch-size 32 --save-every 10 --output runs/{run}"
    env = {k: v for k, v in os.environ.items() if not k.startswith("ACCELERATE_")}
    launcher = subprocess.Popen(
        command.split(),
        cwd=clone,
        env={**env, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not list((clone / "runs" / run / "checkpoint").glob("*-step-*")):
        assert launcher.poll() is None, launcher.communicate()
        time.sleep(0.02)
    workers = psutil.Process(launcher.pid).children(recursive=True)
    return launcher, [w for w in workers if "scripts/train.py" in w.cmdline()]


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 4])
def test_a_process_dies_and_is_restarted(clone, count):
    """The others end too, with a line that says which died; torchrun --max-restarts goes on, and
    ends with the weights of an undisturbed run.
    """
    digests = []
    for run, dies in ((f"whole-{count}", False), (f"restarted-{count}", True)):
        launcher, workers = processes_of(clone, run, count)
        if dies:
            workers[1].kill()
        said, errors = launcher.communicate(timeout=120)
        assert launcher.returncode == 0, errors
        digests.append(weights.read(clone / "runs" / run / "model.safetensors")[1]["sha256"])
    assert f"process 1 (pid {workers[1].pid})" in errors
    assert f"of {count} ended" in errors
    assert "resuming" in said
    assert digests[0] == digests[1]


@pytest.mark.slow
def test_batch_norm_on_two_processes(clone, make_folder):
    """Averaged statistics are in the weights: one process and two measure the same with them."""
    make_folder(clone / "norm", {"train": 21, "val": 9, "test": 11}, size=(16, 16))
    words = "--data norm --model resnet10t --epochs 2 --batch-size 8 --output runs/norm"
    words += " --precision no"
    launch = "OMP_NUM_THREADS=1 .venv/bin/torchrun --nproc-per-node 2"
    assert "18 validation images" in shell(f"{launch} scripts/train.py {words}", clone)
    found = []
    for launcher in (launch, ".venv/bin/python"):
        shell(f"{launcher} scripts/test.py --weights runs/norm/model.safetensors", clone)
        found.append(json.loads((clone / "runs/norm/report/metrics.json").read_text()))
    assert found[0]["images"] == found[1]["images"] == 22
    assert found[0]["loss"] == pytest.approx(found[1]["loss"], 1e-5)


@pytest.mark.slow
def test_two_processes_end_well_ten_times(clone):
    """Exit status 0 ten times in ten on two processes, from start-up to shut-down."""
    for i in range(10):
        shell(f"make train DATA=digits PROCESSES=2 ARGS='--epochs 1 --seed {i}'", clone)


@pytest.mark.slow
def test_bench(clone, make_folder):
    """Every part runs in real processes, which test_bench.py does without; so does `clock`."""
    small = make_folder(clone / "small", {"train": 20, "test": 5}, size=(32, 32))
    photos = make_folder(clone / "photos", {"train": 5}, size=(300, 400), suffix=".jpg")
    words = f"--data {small} --photos {photos} --epochs 1 --rounds 1 --times 1s --airbench-epochs 1"
    said = shell(f"make bench ARGS='{words}'", clone)
    found = json.loads((clone / "runs" / "bench.json").read_text())
    parts = {*bench.PARTS} - {"clock"}
    assert set(found) == {"machine", "data", "command", "tutorial_over_recipe"} | parts
    assert found["command"].startswith(f"scripts/bench.py --data {small}")
    assert found["tutorial"]["times_faster"]["ratio"] > 0
    assert "step_over_bare: {ratio: " in said and found["machine"]["processor"] in said
    latest = (clone / "runs" / "latest").resolve()
    words = f"clock --data {small} --widths 8 --times 1s --seeds 0"
    shell(f".venv/bin/python scripts/bench.py {words}", clone)
    assert len(json.loads((clone / "results" / "clock.json").read_text())["runs"]) == 1
    assert (clone / "runs" / "latest").resolve() == latest


@pytest.mark.slow
def test_results_are_checked(clone):
    """A row of results.json is stamped, and checked, in a process of its own; runs/latest stays."""
    script, latest = ".venv/bin/python scripts/results.py", clone / "runs" / "latest"
    before = latest.resolve()
    assert shell(f"{script} --stamp 'handwritten digits, 8×8'", clone) == ""
    assert "handwritten digits, 8×8: up to date\n" in shell(f"{script} --check", clone)
    assert latest.resolve() == before
