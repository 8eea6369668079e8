"""How an interrupted run goes on where it was, and ends with the same bits.

A checkpoint holds what the next step depends on: the weights and the optimizer, how far the run is,
and on several processes each one's batch-norm statistics.  All that is random follows from the seed
and the step, and the learning rate from the step.
"""

import os
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import gather_object

from lenslet.cli import Parser, parse, parse_duration, stored
from lenslet.distributed.determinism import environment
from lenslet.distributed.start import from_main_process
from lenslet.errors import UserError
from lenslet.files import atomic_write
from lenslet.runs import checkpoint
from lenslet.runs import folder as run_folder
from lenslet.runs.tensorboard import TensorBoard
from lenslet.training.optimizers import innermost

# Options that change no bit of the weights: an interrupted run may go on with others.
FREE = {"output", "workers", "log_every", "save_every", "watch"}


def differences(parser: Parser, run: Path, args) -> str:
    """How the options of a run differ from these in what its weights depend on, in words."""
    try:
        before = stored(parse(parser, ["--config", run / "options.yaml"]))
    except UserError:
        return "its options.yaml cannot be read"
    changed = [k for k, v in stored(args).items() if k not in FREE and before[k] != v]
    return ", ".join(
        f"--{k.replace('_', '-')} was {before[k]}, now {getattr(args, k)}" for k in changed
    )


def find_run(parser: Parser, args, folder: Path) -> tuple[Path, Path | None, list[str]]:
    """The run to train, its newest whole checkpoint, and notes; see run_folder.claim()."""
    if args.resume:
        return run_folder.resume(run_folder.find(args.resume))
    # Processes that torchrun has started again go on in any case.
    wanted = args.resume is None or os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
    return run_folder.claim(folder, lambda run: differences(parser, run, args), wanted)


def capture(at: SimpleNamespace, inputs: dict, networks: dict, optimizer, accelerator) -> dict:
    """All that the next step depends on, for save_checkpoint().  Every process calls this.

    inputs: SHA-256 of what is trained on; networks: the trained one, and its moving average if
    there is one, unwrapped.
    """
    buffers = {k: {name: b.cpu() for name, b in n.named_buffers()} for k, n in networks.items()}
    return {
        "progress": vars(at),
        "inputs": inputs,
        "networks": {key: network.state_dict() for key, network in networks.items()},
        "buffers": gather_object([buffers]) if accelerator.num_processes > 1 else [buffers],
        "optimizer": optimizer.state_dict(),
        "scaler": accelerator.scaler.state_dict() if accelerator.scaler else None,
        "circumstances": environment(accelerator.mixed_precision),
    }


def restore(
    path: Path, saved: dict, inputs: dict, networks: dict, optimizer, accelerator: Accelerator
) -> tuple:
    """Put a checkpoint into prepared networks and optimizer; how far it is, and what has changed.

    The number of threads, which has a say in the last bits, is set to that of the checkpoint.
    Errors: UserError where it was trained on other inputs, or does not fit.
    """
    notes, run = [], path.parents[1]
    for name, sha256 in inputs.items():
        if saved["inputs"][name] != sha256:
            raise UserError(f"{run}: the {name} changed since; begin anew with --no-resume")
    torch.set_num_threads(saved["circumstances"]["threads"])
    for key, now in environment(accelerator.mixed_precision).items():
        if now != (before := saved["circumstances"][key]):
            notes.append(f"{key} was {before}, is {now}: the last bits may differ")
    own = saved["buffers"][accelerator.process_index % len(saved["buffers"])]
    try:
        for key, network in networks.items():
            network.load_state_dict(saved["networks"][key])
            for name, buffer in network.named_buffers():
                buffer.copy_(own[key][name])
        saved["optimizer"].pop("rng_state", None)  # kron's: see choices.seed_draws()
        optimizer.load_state_dict(saved["optimizer"])
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"{path}: is not of this network ({str(error).splitlines()[-1].strip()}); begin anew "
            "with --no-resume"
        ) from error
    for p, state in innermost(optimizer).state.items():
        for key, value in state.items():
            if (
                torch.is_tensor(value) and p.ndim and value.shape == p.shape
            ):  # channels_last, as p is
                state[key] = torch.empty_like(p, dtype=value.dtype).copy_(value)
    if accelerator.scaler:
        accelerator.scaler.load_state_dict(saved["scaler"])
    at = SimpleNamespace(**saved["progress"])
    notes.append(f"{run} goes on in epoch {at.epoch + 1} after {at.batch} batches")
    return at, notes


class Saver:
    """Writes the checkpoints of a run, and the files that are to be as new; on the first process.

    every: steps, or a duration, between checkpoints (see options.interval).
    newest: the checkpoint that the run goes on from, if it does.
    files: path -> content of what is to be written with the next checkpoint; what a full disk kept
        from being written stays there.
    weights: the best weights so far as a file, kept with every checkpoint.
    """

    def __init__(self, run: Path, newest: Path | None, every: str, curves: TensorBoard | None):
        self.run, self.newest, self.curves = run, newest, curves
        self.steps = int(every) if every.isdecimal() else 0
        self.seconds = 0 if self.steps else parse_duration(every)
        self.when = time.perf_counter()
        self.files, self.weights = {}, None
        if curves and newest and (newest / "model.safetensors").exists():
            self.weights = (newest / "model.safetensors").read_bytes()
            atomic_write(run / "model.safetensors", self.weights)
        self.kept = self.weights

    def is_late(self) -> bool:
        """Whether the time has come, by the clock of the first process."""
        return bool(self.curves and self.seconds) and time.perf_counter() - self.when > self.seconds

    def is_due(self, step: int) -> bool:
        """Whether the number of steps says so, on any process."""
        return self.steps > 0 and step % self.steps == 0

    def save(self, step: int, content: dict, last: bool = False) -> None:
        """Write files, a checkpoint and, if they are new, the best weights, in this order.

        Where that fails training goes on, says so, and has the checkpoint before; OSError if this
        was the last chance.  Every process calls this.
        """
        from_main_process(PartialState(), lambda: self._write(step, content, last))
        self.when = time.perf_counter()

    def _write(self, step: int, content: dict, last: bool) -> None:
        self.curves.flush(step)
        try:
            for path in list(self.files):
                path.parent.mkdir(exist_ok=True)
                atomic_write(path, self.files[path])
                del self.files[path]
            self.newest = checkpoint.save_checkpoint(
                self.run / "checkpoint", step, content, self.weights, self.newest
            )
            if self.weights is not self.kept:
                atomic_write(self.run / "model.safetensors", self.weights)
                self.kept = self.weights
        except OSError as error:
            if last:
                raise
            print(f"step {step} is not saved ({error.strerror}); training goes on")
