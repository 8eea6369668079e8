"""What a run prints, and metrics.json."""

import json
from pathlib import Path

import torch
from torch import Tensor

from lenslet.cli import command
from lenslet.data.batches import Data
from lenslet.errors import counted
from lenslet.files import shown
from lenslet.fonts import drawable
from lenslet.grid import draw_grid


def epoch_line(record: dict, epochs: str, left: str, metric: str | None, objective="") -> str:
    """An epoch's line on the console; metric: by which the best one is chosen; objective: the name
    of what was minimized, where that is not the loss.
    """
    line = f"epoch {record['epoch']}{epochs}"
    for split in ("train", "val"):
        if f"{split}_loss" in record:
            line += f"  {split} loss {record[f'{split}_loss']:.4f}"
            if objective and split == "train":
                line += f" ({objective} {record['train_objective']:.4f})"
            line += f" accuracy {record[f'{split}_accuracy']:.2%}"
    if metric == "f1":
        line += f" f1 {record['val_f1']:.2%}"
    speed = record["images_per_second"]
    line += f"  lr {record['lr']:.2g}  {speed:{',.0f' if speed >= 10 else '.2g'}} images/s"
    return f"{line}  {left}"


def time_left(progress, total: int) -> str:
    """How long a run of so many steps still takes, at its speed so far: '12 min left'."""
    steps = 0 if progress.ended else total - progress.step
    return f"{span(steps * progress.seconds / progress.step)} left"


def span(seconds: float) -> str:
    """A time to read: '45 s', '12 min', '3 h 20 min'."""
    minutes = round(seconds / 60)
    if seconds < 100:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"


def is_told(record: dict, steps: int) -> bool:
    """Whether an epoch of a run of so many steps has a line on the console: where there are more
    than 30 epochs, the first ones and each tenth.
    """
    epochs = steps * record["epoch"] / record["step"]
    return epochs < 31 or record["epoch"] <= 3 or record["epoch"] % 10 == 0


def introduce(model: str, data: Data, network, accelerator, notes: list[str], frozen=False) -> str:
    """What is printed before the first epoch; frozen: whether layers were asked to be."""
    train, val = data.splits["train"], data.splits.get("val", ())
    lines = list(notes)
    if network.input_size != data.image_size:
        before, after = ("x".join(map(str, s)) for s in (data.image_size, network.input_size))
        lines.append(f"images of {before} pixels are resized to {after}")
    if torch.cuda.device_count() > 1 == accelerator.num_processes:
        lines.append(f"one of {torch.cuda.device_count()} GPUs is used; `make train` uses all")
    if network.stem_note:
        lines.append(network.stem_note)
    lines.append(
        f"{data.name}: {counted(len(train), 'training image')}, "
        f"{counted(len(val), 'validation image')}, {len(data.classes)} classes"
    )
    count = sum(p.numel() for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    some = f", {trained:,} of them trained at first" if frozen else ""
    lines.append(
        f"{model}: {count:,} parameters{some}; "
        f"{accelerator.device.type}, precision {accelerator.mixed_precision}, "
        f"{accelerator.num_processes} x {torch.get_num_threads()} threads"
    )
    return "\n".join(lines)


def metrics_json(progress, finished: bool) -> bytes:
    """metrics.json: the record of every epoch, and what was reached."""
    summary = {
        "best_epoch": progress.best["epoch"],
        "val_accuracy": progress.best.get("val_accuracy"),
        "val_f1": progress.best.get("val_f1"),
        "val_loss": progress.best.get("val_loss"),
        "train_seconds": progress.train_seconds,
        "seconds": progress.seconds,
        "finished": finished,
    }
    return json.dumps({"epochs": progress.history, "summary": summary}, indent=1).encode()


def stopped(progress, batches: int, folder: Path) -> str:
    """Where a signal stopped the run; batches: of an epoch."""
    where = f"stopped in epoch {progress.epoch + 1} after {progress.batch} of {batches} batches"
    return f"{where}, and saved: run the same command to resume, or --resume {shown(Path(folder))}"


def conclude(progress, folder: Path, metric: str | None, overfit: int | None) -> str:
    """What was reached, where the weights are, and which command comes next.

    overfit: how many images were to be memorized, if any were.
    """
    best, weights, reached = progress.best, folder / "model.safetensors", ""
    if "val_accuracy" in best:
        reached = f", validation accuracy {best['val_accuracy']:.2%}"
        reached += f", f1 {best['val_f1']:.2%}" if metric == "f1" else ""
    lines = [f"stopped early: {progress.ended}"] if progress.ended else []
    lines.append(f"weights of epoch {best['epoch']}{reached}: {shown(weights)}")
    lines.append(f"training took {progress.train_seconds:.1f} s")
    if not overfit:
        return "\n".join([*lines, f"next: {command('test.py', '--weights', weights)}"])
    hits = round(progress.history[-1]["val_accuracy"] * overfit)
    if hits == overfit:
        return "\n".join([*lines, f"memorized all {hits} images after {progress.epoch} epochs"])
    lines.append(
        f"memorized only {hits} of {overfit} images in {progress.epoch} epochs: check --lr, the "
        "network and the labels"
    )
    return "\n".join(lines)


def image_grid(prepare, images: Tensor, targets: Tensor, classes: list[str]) -> Tensor:
    """The first images of a batch as a network is fed them, with their classes, uint8 [3, H, W].

    images uint8 [B, C, H, W], targets float [B, classes].
    """
    shown, classes = prepare.undo(prepare(images[:32])).cpu(), drawable(classes)[0]
    names = ["\n".join(classes[c] for c in row.nonzero()) for row in targets[:32].cpu()]
    return draw_grid(shown, names)
