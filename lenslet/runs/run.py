"""A training run: how far it is, what it saves, and how it resumes after a crash.

A checkpoint holds everything that the next step depends on: Progress, the meter's sums, the weights
and the optimizer, and on several processes each one's batch-norm statistics.  Everything random
follows from the seed and the step, and the learning rate from the step, so a resumed run ends with
the same bits.
"""

import dataclasses
import math
import os
import time
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor
from tqdm import tqdm

from lenslet import files
from lenslet.cli import as_yaml, steps_or_time, stored
from lenslet.data.batches import on_device
from lenslet.distributed.determinism import environment, environment_changes
from lenslet.distributed.interrupts import Interrupts
from lenslet.distributed.start import device_time, from_main_process
from lenslet.errors import UserError, error_context
from lenslet.metrics import figures, score
from lenslet.runs import checkpoint, summary
from lenslet.runs.folder import Found, claim, is_finished, point_latest, resume
from lenslet.runs.saving import RunFiles
from lenslet.runs.tensorboard import TensorBoard
from lenslet.training import options
from lenslet.training.clock import Plan
from lenslet.training.meter import Meter, diverged
from lenslet.training.net import Net
from lenslet.training.schedules import epochs_without_progress
from lenslet.weights import digest, encode


@dataclass
class Progress:
    """How far a run is: all that a checkpoint holds besides tensors."""

    step: int = 0  # optimizer steps done
    epoch: int = 0  # epochs done
    batch: int = 0  # batches done of the current epoch
    images: int = 0  # trained on since the loss was last logged
    logged: int = 0  # the step of that log
    lr: float = 0.0  # learning rate of the last step
    seconds: float = 0.0  # of the whole run so far, with validation and saving
    epoch_seconds: float = 0.0  # of the current epoch's steps
    train_seconds: float = 0.0  # from the first step to the last so far
    history: list[dict] = field(default_factory=list)  # a record per epoch, as in metrics.json
    best: dict | None = None  # the record of the epoch whose weights are kept
    best_score: list[float] | None = None  # what made it the best: larger is better
    ended: str = ""  # why the run ended before its plan did, if it did
    marks: list = field(default_factory=list)  # of the plan, see clock.Plan
    width: int | None = None  # of fastnet


def find_run(args, accelerator: Accelerator) -> Found:
    """The unfinished run with these options, or a new folder; the main process decides.

    Errors: UserError for a run that is being trained, or a folder that cannot be made.
    """

    def find() -> tuple[Path, Path | None, list[str]]:
        folder = args.output or files.RUNS / options.run_name(args)
        compare = partial(options.differences, args=args)
        # Processes that torchrun has restarted always resume.
        restarted = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") != "0"
        try:
            with error_context("--resume" if args.resume else "--output"):
                if args.resume:
                    return resume(options.named_run(args.resume), compare)
                return claim(folder, compare, restarted or args.resume is None)
        except files.Locked as locked:
            remedy = "wait for it, or start another run with --no-resume"
            raise UserError(f"{locked}: {remedy}") from None

    folder, newest, notes = from_main_process(accelerator, find)
    if newest and (said := options.differences(folder, args, options.SAID)):
        notes.append(f"{said}: the last bits may differ, and with batch norm more")
    return Found(folder, newest, checkpoint.load_checkpoint(newest) if newest else None, notes)


class Run:
    """The run that train.py's loop drives.

    folder: where it is.  progress: how far it is.  scores: of the validated epochs, larger is
    better.  board: its TensorBoard log, which does nothing but on the main process.
    """

    def __init__(self, args, found, header: dict, inputs, net: Net, meter: Meter, plan: Plan):
        """See find_run() and build.Inputs; header: of the weights.  Restores net and meter."""
        self._args, self._inputs, self._plan = args, inputs, plan
        self._accelerator = accelerator = inputs.accelerator
        self._main = accelerator.is_main_process
        self.folder, notes = found.folder, list(found.notes)
        if self._main:  # first of all: with it, the folder is a run
            files.atomic_write(self.folder / "options.yaml", as_yaml(stored(args)))
        width = net.bare.arguments.get("width")
        self.progress = Progress(seconds=plan.spent, marks=plan.marks, width=width)
        if found.saved:
            self.progress = Progress(**found.saved["progress"])
            notes += self._restore(found.saved, net, meter)
        plan.marks = self.progress.marks  # one list, which every mark is added to
        self._header = header | environment(accelerator.mixed_precision)
        validated = self.progress.history if inputs.val_loader else []
        self.scores = [score(record, args.metric) for record in validated]
        self.board = TensorBoard(self.folder if self._main else None, self.progress.step)
        self._files = RunFiles(self.folder, found.checkpoint) if self._main else None
        self._save_every, self._saved_at = steps_or_time(args.save_every), time.perf_counter()
        self._of_epochs = "" if args.time or args.plan else f"/{args.epochs}"  # else by the clock
        notes = [*inputs.data.notes, *([] if found.saved else inputs.notes), *notes]
        about = inputs.data, net.bare, accelerator, notes, args.freeze or args.freeze_epochs
        accelerator.print(summary.introduce(args.model, *about))
        self._began = time.perf_counter() - self.progress.seconds

    def epochs(self):
        """The number of each epoch, from 0, as long as there is something to do."""
        # All steps may be done, and the epoch not yet validated: a signal came in between.
        progress = self.progress
        while (progress.step < self._plan.total or progress.batch) and not progress.ended:
            yield progress.epoch

    def batches(self):
        """The Batches of the current epoch that are left, on the device, with a progress bar."""
        loader, progress = self._inputs.train_loader, self.progress
        loader.sampler.epoch = progress.epoch
        # No batches if all steps are done, and only the validation is left: see epochs().
        loader.sampler.start = progress.batch if progress.step < self._plan.total else len(loader)
        self._epoch_began = time.perf_counter() - progress.epoch_seconds
        bar = tqdm(
            on_device(loader, self._accelerator.device),
            f"epoch {progress.epoch + 1}{self._of_epochs}",
            len(loader),
            leave=False,
            initial=progress.batch,
            disable=None if self._main else True,  # None: only on a terminal
        )
        self._bar, self._said = bar, time.perf_counter()
        with bar:
            yield from bar

    def advance(self, images: int, lr: float) -> bool:
        """Count a step on so many images over all processes; whether the epoch ends with it.

        With --time, follows the clock now and then, on all processes at the same steps.
        """
        progress, now = self.progress, time.perf_counter()
        progress.step, progress.batch = progress.step + 1, progress.batch + 1
        progress.images, progress.lr = progress.images + images, lr
        progress.epoch_seconds, progress.seconds = now - self._epoch_began, now - self._began
        if self._plan.is_due(progress.step):
            device, began = self._accelerator.device, self._began
            spent = from_main_process(self._accelerator, lambda: device_time(device) - began)
            self._plan.note_time(progress.step, spent)
            self._bar.set_postfix_str(summary.time_left(progress, self._plan.total), False)
        return progress.batch == len(self._inputs.train_loader) or progress.step == self._plan.total

    def agree(self, interrupts: Interrupts) -> bool:
        """Whether to save now; also sets interrupts.stop if any process has had a signal.

        All processes call this after every step.  None waits: each is told what all of them wanted
        at the step before.
        """
        every = self._save_every
        if isinstance(every, int):  # steps, which all processes count alike; else seconds
            return interrupts.agree() or self.progress.step % every == 0
        return interrupts.agree(self._main and time.perf_counter() - self._saved_at > every)

    def log(self, meter: Meter, epoch_ends: bool) -> None:
        """Check the objective; at the end of an epoch and every --log-every steps, log the means.

        Here the CPU waits for the GPU.  Errors: UserError if the objective is not finite.
        """
        progress, (objective, loss, hits, finite) = self.progress, meter.read()
        if not math.isfinite(objective):
            self._give_up(objective, progress.logged + finite + 1, meter)
        if epoch_ends or progress.step % self._args.log_every == 0:
            mean, add = loss / progress.images, partial(self.board.add, "scalar")
            add("lr", progress.lr, progress.step)
            add("loss/train", mean, progress.step)
            if meter.objective:
                add("loss/objective", objective / progress.images, progress.step)
            meter.add_to_epoch(objective, loss, hits, progress.images)
            progress.images, progress.logged = 0, progress.step
            self._show(mean, epoch_ends)
        if epoch_ends:
            progress.train_seconds = time.perf_counter() - self._began

    def _show(self, loss: float, epoch_ends: bool) -> None:
        """The running loss: in the bar or, off a terminal, in a line every half minute."""
        left = summary.time_left(self.progress, self._plan.total)
        self._bar.set_postfix_str(f"loss {loss:.4f}, {left}", refresh=False)
        now = time.perf_counter()
        if self._main and self._bar.disable and not epoch_ends and now - self._said > 30:
            self._said, at = now, f"epoch {self.progress.epoch + 1}{self._of_epochs}"
            done = f"{self.progress.batch} of {len(self._inputs.train_loader)} batches"
            print(f"{at}: {done}, loss {loss:.4f}, {left}")

    def _give_up(self, loss: float, step: int, meter: Meter) -> None:
        """End a run whose loss is not finite since step `step`."""
        where = f"epoch {self.progress.epoch + 1} at step {step}, lr {self.progress.lr:.2g}"
        good = self.folder / "model.safetensors"
        saved = self._main and self._files.kept
        kept = f"the last good weights are in {good}" if saved else "no weights were saved"
        remedy = options.REMEDIES["exploding"]
        raise UserError(f"{diverged(loss, where, meter.gradient)}: {remedy}; {kept}")

    def end_epoch(self, net: Net, meter: Meter, validated: Tensor | None) -> None:
        """Log an epoch, keep its weights if they are the best so far, save, and print a line.

        validated: of Net.evaluate(), a row per image; None without validation images.
        """
        progress, args, record = self.progress, self._args, self._record(net, meter, validated)
        progress.history.append(record)
        if validated is not None:
            self.scores.append(score(record, args.metric))
        standing = self._standing(record)
        better = progress.best is None or standing > progress.best_score
        if better:
            progress.best, progress.best_score = record, standing
        progress.epoch, progress.batch, progress.epoch_seconds = progress.epoch + 1, 0, 0.0
        meter.sums.zero_()
        if args.patience and epochs_without_progress(self.scores, args.min_delta) >= args.patience:
            progress.ended = f"{args.patience} epochs without a better one"
        if args.overfit and record["val_accuracy"] == 1:
            progress.ended = "all images are memorized"
        progress.seconds = time.perf_counter() - self._began
        if self._main:
            self._keep(net, record, better)
        self.save(net, meter, last := bool(progress.ended) or progress.step == self._plan.total)
        if self._main:
            point_latest(self.folder)
        left = summary.time_left(progress, self._plan.total)
        line = summary.epoch_line(record, self._of_epochs, left, args.metric, meter.objective)
        best = "  best" if better and validated is not None and args.keep != "last" else ""
        if best or last or summary.is_told(record, self._plan.total):
            self._accelerator.print(line + best)

    def _record(self, net: Net, meter: Meter, validated: Tensor | None) -> dict:
        """The figures of the epoch, as metrics.json has them."""
        progress = self.progress
        record = {
            "epoch": progress.epoch + 1,
            "step": progress.step,
            **meter.figures(),
            "lr": progress.lr,
            "images_per_second": meter.sums[-1].item() / progress.epoch_seconds,
            "seconds": progress.epoch_seconds,
            "weights_sha256": digest(net.evaluated.state_dict()),
        }
        if validated is not None:
            result = figures(validated, len(self._inputs.data.classes))
            record |= {"val_loss": result["loss"], "val_accuracy": result["top1"]}
            record["val_f1"] = result["macro_f1"]
            if not math.isfinite(result["loss"]):  # the last step was one too many
                self._give_up(result["loss"], progress.step, meter)
        return record

    def _standing(self, record: dict) -> list[float]:
        """What makes an epoch the best one: few images often tie, and then the loss decides."""
        if "val_loss" in record and self._args.keep != "last":
            return [self.scores[-1], -record["val_loss"]]
        return [record["epoch"]]

    def _keep(self, net: Net, record: dict, better: bool) -> None:
        """Have the weights and the figures of an epoch written with the next save."""
        progress = self.progress
        digests = [[r["step"], r["weights_sha256"]] for r in progress.history]
        epoch = {"epoch": progress.epoch, "validation": record, "digests": digests}
        header = self._header | epoch | {"plan": progress.marks}
        weights = encode(net.evaluated.state_dict(), header)
        if better:
            self._files.weights = weights
        pending = self._files.pending
        if self._args.keep == "all":
            reached = f"-{record['val_accuracy']:.4f}" if "val_accuracy" in record else ""
            name = f"epoch-{progress.epoch:03d}{reached}.safetensors"
            pending[self.folder / "epochs" / name] = weights
        pending[self.folder / "metrics.json"] = summary.metrics_json(progress, finished=False)
        self.board.add_epoch(record, progress.step)

    def save(self, net: Net, meter: Meter, last: bool = False) -> None:
        """Write a checkpoint and what is pending, see RunFiles.write().  Every process calls this.

        last: there is no later chance, so that a full disk ends the run.  Errors: OutsideError.
        """
        self.progress.seconds = time.perf_counter() - self._began
        content = {
            "progress": dataclasses.asdict(self.progress),
            "meter": meter.state(),
            "inputs": self._inputs.sha256,
            "environment": environment(self._accelerator.mixed_precision),
            **net.state(),
        }

        def write():
            self.board.flush(self.progress.step)
            self._files.write(self.progress.step, content, last)

        from_main_process(self._accelerator, write)
        self._saved_at = time.perf_counter()

    def _restore(self, saved: dict, net: Net, meter: Meter) -> list[str]:
        """Put a checkpoint into net and meter; what the user should know of it.

        The number of threads, which affects the last bits, is set to that of the checkpoint.
        Errors: UserError where it was trained on other inputs, or does not fit.
        """
        for name, sha256 in self._inputs.sha256.items():
            if saved["inputs"][name] != sha256:
                raise UserError(
                    f"{self.folder}: not the same {name} as before; start anew with --no-resume"
                )
        torch.set_num_threads(saved["environment"]["threads"])
        changes = environment_changes(saved["environment"], self._accelerator.mixed_precision)
        try:
            net.load_state(saved)
        except UserError as error:
            raise UserError(f"{self.folder} {error}; start anew with --no-resume") from error
        meter.load_state(saved["meter"])
        epoch, batch = self.progress.epoch + 1, self.progress.batch
        return [*changes, f"resuming {self.folder} in epoch {epoch} after {batch} batches"]

    def finish(self, interrupts: Interrupts) -> int:
        """Say what was reached, and the next command; returns the exit status.

        That is 0, a signal's (interrupts.stop), or 1 if --overfit's images were not memorized.
        """
        progress, args, status = self.progress, self._args, interrupts.stop
        if self._main and not interrupts.stop:
            was_finished = is_finished(self.folder)
            metrics = summary.metrics_json(progress, finished=True)
            files.atomic_write(self.folder / "metrics.json", metrics)
            if not was_finished:  # only now: a run killed before the write comes here again
                self.board.add_hparams(stored(args), progress.best, progress.step)
            print(summary.conclude(progress, self.folder, args.metric, args.overfit))
        elif self._main:
            print(summary.stopped(progress, len(self._inputs.train_loader), self.folder))
        self.board.close()
        self._accelerator.wait_for_everyone()  # without it gloo now and then aborts on shutdown
        self._accelerator.end_training()
        if args.overfit and progress.best and progress.history[-1]["val_accuracy"] < 1:
            status = status or 1
        return status
