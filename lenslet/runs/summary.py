"""What a run says of itself: lines on the console, and metrics.json."""

import json
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from lenslet.cli import command
from lenslet.grid import draw_grid


def epoch_line(record: dict, epochs: str, left: float, metric: str | None) -> str:
    """An epoch's line on the console; metric: by which the best one is chosen."""
    line = f"epoch {record['epoch']}{epochs}"
    for split in ("train", "val"):
        if f"{split}_loss" in record:
            loss, accuracy = record[f"{split}_loss"], record[f"{split}_accuracy"]
            line += f"  {split} loss {loss:.4f} accuracy {accuracy:.2%}"
    if metric == "f1":
        line += f" f1 {record['val_f1']:.2%}"
    line += f"  lr {record['lr']:.2g}  {record['images_per_second']:,.0f} images/s"
    return f"{line}  {left:.0f} s left"


def introduce(args, data, model, accelerator) -> str:
    """What is said before the first epoch."""
    train, val = data.splits["train"], data.splits.get("val", ())
    lines = list(data.notes)
    if model.input_size != data.image_size:
        sizes = ["x".join(map(str, size)) for size in (data.image_size, model.input_size)]
        lines.append(f"pictures of {sizes[0]} pixels are resized to {sizes[1]}")
    if torch.cuda.device_count() > 1 == accelerator.num_processes:
        lines.append(f"one of {torch.cuda.device_count()} GPUs is used; `make train` uses all")
    if model.stem_note:
        lines.append(model.stem_note)
    lines.append(
        f"{args.data}: {len(train):,} pictures to train on, {len(val):,} to validate, "
        f"{len(data.classes)} classes"
    )
    lines.append(
        f"{args.model}: {sum(p.numel() for p in model.parameters()):,} parameters; "
        f"{accelerator.device.type}, precision {accelerator.mixed_precision}, "
        f"{accelerator.num_processes} x {torch.get_num_threads()} threads"
    )
    return "\n".join(lines)


def metrics_json(at: SimpleNamespace, finished: bool) -> bytes:
    """metrics.json."""
    summary = {
        "best_epoch": at.best["epoch"],
        "val_accuracy": at.best.get("val_accuracy"),
        "val_f1": at.best.get("val_f1"),
        "val_loss": at.best.get("val_loss"),
        "train_seconds": at.train_seconds,
        "seconds": at.seconds,
        "finished": finished,
    }
    return json.dumps({"epochs": at.history, "summary": summary}, indent=1).encode()


def conclude(args, at: SimpleNamespace, run: Path) -> str:
    """What was reached, where the weights are, and which command comes next."""
    weights, reached = run / "model.safetensors", ""
    if "val_accuracy" in at.best:
        reached = f", validation accuracy {at.best['val_accuracy']:.2%}"
        reached += f", f1 {at.best['val_f1']:.2%}" if args.metric == "f1" else ""
    lines = [f"stopped early: {at.ended}"] if at.ended else []
    lines.append(f"weights of epoch {at.best['epoch']}{reached}: {weights}")
    lines.append(f"training took {at.train_seconds:.1f} s")
    if args.overfit:
        hits = round(at.history[-1]["val_accuracy"] * args.overfit)
        lines.append(
            f"memorised: all {hits} pictures, after {at.epoch} epochs"
            if hits == args.overfit
            else f"not memorised: {hits} of {args.overfit} pictures after {at.epoch} epochs: look "
            "at --lr, the network and the labels"
        )
    else:
        lines.append(f"next: {command('test.py', '--weights', weights)}")
    return "\n".join(lines)


def image_grid(prepare, images: Tensor, targets: Tensor, classes: list[str]) -> Tensor:
    """The first pictures of a batch as a network is fed them, with their classes, uint8 [3, H, W].

    images uint8 [B, C, H, W], targets float [B, classes].
    """
    shown = prepare.undo(prepare(images[:32])).cpu()
    names = ["\n".join(classes[c] for c in row.nonzero()) for row in targets[:32].cpu()]
    return draw_grid(shown, names)
