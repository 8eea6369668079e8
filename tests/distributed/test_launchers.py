"""What a launcher asks for is honoured, or refused in one line that names it and our option."""

import os

import pytest

from lenslet.distributed.launchers import check_launcher
from lenslet.errors import UserError


@pytest.fixture(autouse=True)
def unlaunched(monkeypatch):
    """The environment of a shell, with nothing of a launcher's in it."""
    for name in list(os.environ):
        if name.startswith(
            ("ACCELERATE_", "SLURM_", "OMPI_", "PMI_", "MV2_", "WORLD_SIZE", "RANK")
        ):
            monkeypatch.delenv(name)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("ACCELERATE_USE_FSDP", "true", "FSDP"),
        ("ACCELERATE_USE_DEEPSPEED", "True", "DEEPSPEED"),
        ("ACCELERATE_USE_MEGATRON_LM", "true", "MEGATRON_LM"),
        ("ACCELERATE_USE_PARALLELISM_CONFIG", "true", "PARALLELISM_CONFIG"),
        ("ACCELERATE_USE_SOMETHING_NEW", "1", "SOMETHING_NEW"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4", "--accumulate"),
        ("ACCELERATE_DYNAMO_BACKEND", "INDUCTOR", "--compile"),
        ("SLURM_STEP_NUM_TASKS", "2", "srun"),
        ("OMPI_COMM_WORLD_SIZE", "2", "mpirun"),
        ("PMI_SIZE", "2", "mpirun"),
        ("MV2_COMM_WORLD_SIZE", "2", "mpirun"),
    ],
)
def test_refused(monkeypatch, name, value, said):
    """Each setting that would be ignored or change results ends in a line naming it."""
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError) as caught:
        check_launcher()
    text = str(caught.value)
    assert name in text and value in text and said in text and "\n" not in text


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("ACCELERATE_USE_CPU", "true"),
        ("ACCELERATE_USE_FSDP", "false"),
        ("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "1"),
        ("ACCELERATE_DYNAMO_BACKEND", "NO"),
        ("ACCELERATE_DYNAMO_MODE", "default"),
        ("ACCELERATE_MIXED_PRECISION", "bf16"),
        ("SLURM_STEP_NUM_TASKS", "1"),
        ("SLURM_NTASKS", "2"),  # of a batch script, whose commands run once
    ],
)
def test_honoured(monkeypatch, name, value):
    """What means the same here as in Accelerate, or nothing, is no error."""
    monkeypatch.setenv(name, value)
    check_launcher()


def test_torchrun_within_another_launcher(monkeypatch):
    """srun may start a torchrun on each machine: its processes find each other."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    check_launcher()


def test_the_first_speaks(monkeypatch):
    """Of the processes that srun started, the first one prints the error."""
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    monkeypatch.setenv("SLURM_PROCID", "1")
    with pytest.raises(UserError):
        check_launcher()
    assert os.environ["RANK"] == "1"
