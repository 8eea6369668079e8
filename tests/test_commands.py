"""The commands as users type them, in a copy of the repository: make, launchers, the README."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import checkpoint
import options

README = (options.ROOT / "README.md").read_text()


@pytest.fixture(scope="module")
def clone(tmp_path_factory):
    """A copy of the repository with this environment as .venv, and three tiny sets on disk.

    The digits are trained for two epochs only.
    """
    root = tmp_path_factory.mktemp("clone")
    for name in ("recipes", "scripts"):
        shutil.copytree(options.ROOT / name, root / name)
    for path in [*options.ROOT.glob("*.py"), *options.ROOT.glob("requirements*.txt")]:
        shutil.copy(path, root)
    shutil.copy(options.ROOT / "Makefile", root)
    recipe = root / "recipes" / "digits.yaml"
    recipe.write_text(re.sub("epochs: .*", "epochs: 2", recipe.read_text()))
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


def shell(command, cwd, status=0, **extra):
    """Run a command without a network and with this Python first on the path."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(("OMP_", "ACCELERATE_"))}
    env |= {"http_proxy": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9", **extra}
    result = subprocess.run(command, shell=True, cwd=cwd, env=env, capture_output=True, text=True)
    said = f"{command}\n{result.stdout}\n{result.stderr}"
    assert result.returncode == status, said
    assert "Traceback" not in said, said
    return result.stdout


def readme_commands():
    """Every line of the README's shell blocks."""
    blocks = re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    lines = "".join(blocks).splitlines()
    return [line.split("  #")[0].strip() for line in lines if line and not line.startswith("#")]


# What the README's commands need besides the repository, and how long each server may run.
SERVERS = {"make tensorboard": 8}  # seconds
NOT_HERE = {
    "git clone",  # the address of a network
    "make check",  # would run this test inside itself
}
'''
'''
