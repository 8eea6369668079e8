"""What a launcher asks for: it is honoured, or refused in one line before any work.

`accelerate launch` hands its settings over in the environment, and Accelerate follows them without
a word: some would divide every gradient, or train weights under names that nothing can load.
"""

import os
import re

from lenslet.errors import UserError

# Settings of Accelerate's that mean something else than our option does, and that option.
REPLACED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "--accumulate, which cuts each batch into parts",
    "ACCELERATE_DYNAMO_BACKEND": "--compile",
}
UNSET = {"", "1", "no", "none"}  # of those above
# Launchers that start processes without saying where they meet: what holds their number, and rank.
STRANGERS = {
    "srun": ("SLURM_STEP_NUM_TASKS", "SLURM_PROCID"),
    "mpirun": ("OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_RANK"),
    "mpirun (MPICH)": ("PMI_SIZE", "PMI_RANK"),
    "mpirun (MVAPICH)": ("MV2_COMM_WORLD_SIZE", "MV2_COMM_WORLD_RANK"),
}


def check_launcher() -> None:
    """Errors: UserError for a way of launching that training here does not follow."""
    environment = os.environ
    for name, value in sorted(environment.items()):
        kind = re.fullmatch("ACCELERATE_USE_(?!CPU$|XPU$)(.+)", name)  # those say which device
        if kind and value.lower() in ("true", "1", "yes", "on"):
            raise UserError(
                f"{kind[1]} of `accelerate config` ({name}={value}): only data parallelism is "
                "supported; choose multi-GPU or multi-CPU there, or start with "
                "`make train PROCESSES=N`"
            )
    for name, option in REPLACED.items():
        value = environment.get(name, "")
        if value.lower() not in UNSET:
            setting = name.removeprefix("ACCELERATE_").lower()
            raise UserError(
                f"{setting} of `accelerate config` ({name}={value}): leave it out there, and use "
                f"{option}"
            )
    for launcher, (count, rank) in STRANGERS.items():
        if environment.get(count, "1") != "1" and "WORLD_SIZE" not in environment:
            # The first of them speaks for all, see errors.run_main().
            environment["RANK"] = environment.get(rank, "0")
            raise UserError(
                f"{launcher} started {environment[count]} processes ({count}) that cannot find "
                "each other: have it start one torchrun a machine instead, or "
                "`make train PROCESSES=N`"
            )
