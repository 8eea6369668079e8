"""What the tests share: nothing of theirs outlives them, and folders of tiny images."""

import ast
import inspect
import os
import signal
import textwrap
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState
from PIL import Image

from lenslet import files

# Small steps on several threads wait for each other wherever something else runs too: five times
# as long, and two processes test at a time.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)
# A shell's background jobs ignore Ctrl-C, and would hand that down to the commands under test.
signal.signal(signal.SIGINT, signal.default_int_handler)


# A header that weights may have: of lenet, for three classes.
HEADER = {
    "model": "lenet",
    "model_args": {"classes": 3, "channels": 3},
    "stem": "",
    "classes": ["Öl", "日本", "T-shirt/top"],
    "channels": 3,
    "image_size": [32, 32],
    "crop": 1.0,
    "input_size": [32, 32],
    "mean": [0.1, 0.2, 1 / 3],
    "std": [0.5, 0.5, 0.5],
    "data": "photos",
    "data_sha256": "0" * 64,
    "epoch": 7,
    "validation": {"val_accuracy": 0.5},
    "versions": {"torch": torch.__version__},
    "options": {"lr": 1e-3, "model": None},
}


@pytest.fixture(autouse=True)
def isolated(tmp_path, monkeypatch):
    """Runs and data of its own for every test; process-wide state as it was before."""
    monkeypatch.setattr(files, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(files, "DATA", tmp_path / "data")
    monkeypatch.setattr(os, "fsync", os.fstat)  # a busy disk takes its time, and no test cuts power
    environment, threads = dict(os.environ), torch.get_num_threads()
    yield
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    torch.set_num_threads(threads)
    os.environ.clear()
    os.environ.update(environment)


def _make_folder(
    root: Path,
    splits: dict[str, int] | None = None,
    classes: tuple[str, ...] = ("ants", "bees"),
    size: tuple[int, int] = (12, 10),
    mode: str = "RGB",
    suffix: str = ".png",
) -> Path:
    """root/<split>/<class>/<number><suffix>: noisy images, each class of a colour of its own.

    splits: images per class (default: 8 in train, 4 in test); {"": 8} makes a folder of classes
    only.  size: height and width.
    """
    generator = np.random.default_rng(0)
    for split, count in (splits or {"train": 8, "test": 4}).items():
        for k, name in enumerate(classes):
            folder = Path(root) / split / name
            folder.mkdir(parents=True, exist_ok=True)
            colour = np.roll([220, 120, 40], k) if mode == "RGB" else [40 + 160 * k // len(classes)]
            for i in range(count):
                noise = generator.integers(-30, 31, (*size, len(colour)))
                pixels = (colour + noise).clip(0, 255).astype(np.uint8)
                image = Image.fromarray(pixels if mode == "RGB" else pixels[..., 0])
                image.convert(mode).save(folder / f"{i}{suffix}")
    return Path(root)


@pytest.fixture(scope="session")
def make_folder():
    """The function that makes a folder of images."""
    return _make_folder


def public_names(kind: type) -> set[str]:
    """The methods and properties of a class, and the attributes that any of its methods sets."""
    found = set(vars(kind))
    for node in ast.walk(ast.parse(textwrap.dedent(inspect.getsource(kind)))):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            found |= {node.attr} if getattr(node.value, "id", "") == "self" else set()
    return {name for name in found if not name.startswith("_")}


def pytest_addoption(parser):
    parser.addoption("--kills", type=int, default=12, help="of tests/test_kills.py")
