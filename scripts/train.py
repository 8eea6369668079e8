"""Train an image classifier.

    make train                                      CIFAR-10, and an evaluation afterwards
    python scripts/train.py --data digits           bundled handwritten digits, in seconds
    python scripts/train.py --data my/pictures      a folder: train/<class>/*.jpg, or <class>/*.jpg
    python scripts/train.py --config tutorial       the settings of recipes/tutorial.yaml
    accelerate launch scripts/train.py              the same on what Accelerate is configured for

A data set's recipe (recipes/*.yaml) supplies the defaults; an option given replaces only itself;
--model or --config drops the recipe.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from tqdm import tqdm

import _root  # noqa: F401
import checkpoint
import dataset
import options
from dataset import on_device
from images import draw_grid
from model import create_model, network_defaults
from options import UserError, number
from transforms import AUGMENTATIONS, Prepare, augment, channel_statistics


def build_parser() -> options.Parser:
    parser = options.parser(__doc__)
    flag = argparse.BooleanOptionalAction
    share, count = number(float, 0, 1), number(int, 1)
    positive = number(float, 0, above=True)
    add = parser.add_argument
    add("--config", metavar="FILE", help="a YAML file of options, or a recipe's name")

    add = parser.add_argument_group("data").add_argument
    add("--data", help="a known set's name, or a folder (default: cifar10)")
    help = "kept of the training pictures where there is no val/; 0: train on all, keep the last"
    add("--val", metavar="SHARE", type=number(float, 0, 0.9), default=0.1, help=help)
    help = "side that the network is fed (default: small pictures' own, or the network's)"
    add("--image-size", metavar="PIXELS", type=count, help=help)
    help = "light: shifts, or random crops of photographs; standard: and mirroring"
    add("--augment", choices=list(AUGMENTATIONS), default="none", help=help)
    help = "of each channel, 0..1 scale (default: small pictures' own, or the network's)"
    add("--mean", metavar="X", type=share, nargs="+", help=help)
    add("--std", metavar="X", type=number(float, 0, 1, above=True), nargs="+", help="likewise")

    add = parser.add_argument_group("network and training").add_argument
    add("--model", help="one of `python model.py`, a timm name, or torchvision/NAME")
    add("--epochs", metavar="N", type=count, default=10, help="times through all pictures")
    help = "pictures per optimizer step, over all processes"
    add("-b", "--batch-size", metavar="N", type=count, default=64, help=help)
    help = "compute a batch in so many parts of 2 or more pictures, to save memory"
    add("--accumulate", metavar="PARTS", type=count, default=1, help=help)
    add("--optimizer", choices=["sgd", "adamw"], default="adamw", help="adamw suits most networks")
    add("--lr", metavar="X", type=positive, default=0.001, help="learning rate")
    add("--momentum", metavar="X", type=share, default=0.9, help="of sgd")
    add("--weight-decay", metavar="X", type=number(float, 0), default=0.01, help="pull to zero")
    help = "of the learning rate, in optimizer steps"
    add("--schedule", choices=["constant", "cosine"], default="cosine", help=help)
    help = "optimizer steps of linear rise to the learning rate"
    add("--warmup", metavar="STEPS", type=number(int, 0), default=0, help=help)
    add("--clip", metavar="NORM", type=positive, help="largest norm of all gradients together")
    help = "of the first weights, the order and the augmentation"
    add("--seed", metavar="N", type=number(int, 0, 2**63 - 1), default=0, help=help)

    options.add_running_options(parser)

    add = parser.add_argument_group("output").add_argument
    add("--output", metavar="DIR", help="run folder (default: runs/<data>-<model>)")
    help = "keep each epoch's weights, in epochs/"
    add("--save-every-epoch", action=flag, default=False, help=help)
    help = "steps between two points of the loss curve"
    add("--log-every", metavar="STEPS", type=count, default=50, help=help)
    return parser


def lr_factor(step: int, total: int, warmup: int, schedule: str) -> float:
    """Share of --lr at an optimizer step: a linear rise over `warmup` steps, then the schedule."""
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    return 0.5 + 0.5 * math.cos(math.pi * (step - warmup) / (total - warmup))


def run_name(args) -> str:
    """The name of a run's folder below runs/."""
    return f"{Path(args.data).resolve().name}-{args.model.replace('/', '-')}"


def describe(record: dict, epochs: int, left: float) -> str:
    """An epoch's line on the console."""
    line = f"epoch {record['epoch']}/{epochs}"
    for split in ("train", "val"):
        if f"{split}_loss" in record:
            loss, accuracy = record[f"{split}_loss"], record[f"{split}_accuracy"]
            line += f"  {split} loss {loss:.4f} accuracy {accuracy:.2%}"
    line += f"  lr {record['lr']:.2g}  {record['images_per_second']:,.0f} images/s"
    return f"{line}  {left:.0f} s left"


def choose_statistics(args, data, network) -> list[list[float]]:
    """Mean and deviation of each channel: as given, small pictures' own, or the network's."""
    train, chosen = data.splits["train"], []
    if train.in_memory and not (args.mean and args.std):
        network = channel_statistics(train.images)
    for key in ("mean", "std"):
        values = getattr(args, key) or network[key]
        if len(values) not in (1, 3, data.channels):
            raise UserError(f"--{key}: give 1 or {data.channels} numbers, one per channel")
        if len(values) > data.channels:  # a network for colour, and grey photographs
            values = [sum(values) / len(values)]
        chosen.append(values if len(values) == data.channels else values * data.channels)
    return chosen


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


def main(argv=None):
    # Options: the command line over the recipe of the data set.
    parser = build_parser()
    args = options.parse(parser, argv)
    if args.model:
        network_defaults(args.model)  # a misspelt name ends here, before any download
    # These take seconds to import, which --help and a misspelt option need not wait for.
    from torch.utils.tensorboard import SummaryWriter
    from torch.utils.tensorboard.summary import hparams

    import runtime
    from metrics import evaluate, evaluation_batch, figures

    state = runtime.launch()
    args.data = runtime.from_main(state, lambda: dataset.choose(args.data))
    typed = args
    if not args.model and not args.config:
        args = options.parse(parser, argv, recipe=dataset.recipe_for(typed.data))
        args.data = typed.data
    if not args.model:
        raise UserError(f"--config {args.config} names no model: add one there, or give --model")
    rank, world = state.process_index, state.num_processes
    if args.batch_size % world:
        near = max(world, args.batch_size // world * world)
        raise UserError(
            f"--batch-size {args.batch_size} cannot be divided among {world} processes; "
            f"{near} and {near + world} can"
        )

    # Accelerator.
    accelerator = runtime.accelerator(typed.precision, otherwise=args.precision)
    device, is_main, say = accelerator.device, accelerator.is_main_process, accelerator.print

    # Data.  The first process inspects the files of a folder; the others read what it found.
    network = network_defaults(args.model)
    workers = runtime.workers(args.workers)
    data = runtime.main_first(
        state,
        lambda: dataset.load(
            args.data,
            ["train", "val"] if args.val else ["train"],
            val=args.val,
            photo_size=args.image_size or network["image_size"],
            crop=network["crop"],
            skip_broken=args.skip_broken,
            workers=workers,
        ),
    )
    train, val = data.splits["train"], data.splits.get("val")
    if len(train) < 2 * world:
        raise UserError(f"--data {args.data}: {len(train)} training pictures are too few")
    shared = {"workers": workers, "rank": rank, "world": world}
    train_loader = data.loader(
        "train", args.batch_size, seed=args.seed, augment=args.augment, **shared
    )
    val_batch = evaluation_batch(args.batch_size, args.accumulate, world, train.in_memory)
    val_loader = data.loader("val", val_batch, **shared) if val else None

    # Model and optimizer.
    size = (args.image_size,) * 2 if args.image_size else data.image_size
    torch.manual_seed(args.seed)
    model_args = {"classes": len(data.classes), "channels": data.channels, "size": size}
    model = create_model(args.model, **model_args)
    mean, std = choose_statistics(args, data, network)
    prepare = Prepare(mean, std, model.input_size).to(device)
    model = model.to(memory_format=torch.channels_last)
    if args.optimizer == "sgd":
        optimizer = torch.optim.SGD(
            model.parameters(), args.lr, args.momentum, weight_decay=args.weight_decay
        )
    else:
        optimizer = torch.optim.AdamW(model.parameters(), args.lr, weight_decay=args.weight_decay)
    model, optimizer = accelerator.prepare(model, optimizer)  # device, casts, several processes
    plain = accelerator.unwrap_model(model)
    normalised = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in plain.modules())
    if normalised and args.batch_size < 2 * world:
        raise UserError(f"--batch-size: batch norm needs 2 pictures a process, so {2 * world}")
    torch.manual_seed(args.seed + rank)  # what dropout draws differs between processes

    # The run folder, which only the first process writes, and what is said once.
    run = runtime.from_main(
        state, lambda: checkpoint.new_run(args.output or options.RUNS / run_name(args))
    )
    if is_main:
        checkpoint.atomic_write(run / "options.yaml", options.as_yaml(args))
        writer = SummaryWriter(run)
    header = {
        "model": args.model,
        "model_args": model_args,
        "stem": plain.stem_note,
        "classes": data.classes,
        "channels": data.channels,
        "image_size": data.image_size,
        "crop": data.crop,
        "input_size": plain.input_size,
        "mean": mean,
        "std": std,
        "data": args.data,
        "data_sha256": data.sha256,
        "versions": runtime.versions(),
        "threads": torch.get_num_threads(),
        "processes": world,
        "options": vars(args),
    }
    say(introduce(args, data, plain, accelerator))

    step, total = 0, args.epochs * len(train_loader)
    best, best_score, history = None, None, []
    began = time.perf_counter()
    for epoch in range(args.epochs):
        # Train.  In a step nothing is read back from the device, but the loss every --log-every.
        model.train()
        train_loader.sampler.epoch = epoch
        epoch_began = time.perf_counter()
        sums = torch.zeros(3)  # loss, hits and pictures of the epoch, over all processes
        recent, recent_images = torch.zeros(2, device=device), 0  # since they were last summed
        batches = tqdm(
            on_device(train_loader, device),
            f"epoch {epoch + 1}/{args.epochs}",
            len(train_loader),
            leave=False,
            disable=None if is_main else True,
        )
        for i, (images, labels, index) in enumerate(batches):
            lr = args.lr * lr_factor(step, total, args.warmup, args.schedule)
            for group in optimizer.param_groups:
                group["lr"] = lr
            images = augment(images, args.augment, not train.in_memory, args.seed, epoch, index)
            if step == 0 and is_main:
                shown = prepare.undo(prepare(images[:32])).cpu()
                names = [data.classes[label] for label in labels[:32].tolist()]
                writer.add_image("training_pictures", draw_grid(shown, names), step)
            # Every picture weighs the same, in whichever part, process or short batch it is;
            # `world` undoes the mean that Accelerate takes over the processes.
            batch_images = train_loader.sampler.size(i)
            weight = world / batch_images
            parts = max(1, min(args.accumulate, len(labels) // 2))
            for k, (x, y) in enumerate(
                zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
            ):
                last = k == parts - 1
                with contextlib.nullcontext() if last else accelerator.no_sync(model):
                    logits = model(prepare(x))
                    loss = F.cross_entropy(logits, y, reduction="sum")
                    accelerator.backward(loss * weight)
                with torch.no_grad():
                    hits = (logits.argmax(1) == y).sum()
                    recent += torch.stack([loss, hits])
            if args.clip:
                accelerator.clip_grad_norm_(model.parameters(), args.clip)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            recent_images += batch_images
            if step % args.log_every == 0 or i == len(train_loader) - 1:
                loss, hits = accelerator.reduce(recent).tolist()
                if not math.isfinite(loss):
                    raise UserError(
                        f"the loss is {loss} at epoch {epoch + 1}, step {step}, lr {lr:.2g}: lower "
                        f"--lr or give --clip; the weights of earlier epochs are in {run}"
                    )
                if is_main:
                    writer.add_scalar("train_loss", loss / recent_images, step)
                    writer.add_scalar("learning_rate", lr, step)
                sums += torch.tensor([loss, hits, recent_images])
                recent, recent_images = torch.zeros_like(recent), 0
        seconds = time.perf_counter() - epoch_began
        record = {
            "epoch": epoch + 1,
            "train_loss": (sums[0] / sums[2]).item(),
            "train_accuracy": (sums[1] / sums[2]).item(),
            "lr": lr,
            "images_per_second": sums[2].item() / seconds,
            "seconds": seconds,
        }

        # Validate.
        runtime.sync_buffers(plain, accelerator)
        if val:
            result = figures(evaluate(plain, val_loader, prepare, accelerator), len(data.classes))
            record |= {"val_loss": result["loss"], "val_accuracy": result["top1"]}
        history.append(record)

        # Save and log.  Without validation pictures the last weights are kept, else the best.
        # Few validation pictures often tie in accuracy: then the smaller loss decides.
        score = (record["val_accuracy"], -record["val_loss"]) if val else (epoch,)
        if better := best is None or score > best_score:
            best, best_score = record, score
        summary = {
            "best_epoch": best["epoch"],
            "val_accuracy": best.get("val_accuracy"),
            "train_seconds": sum(r["seconds"] for r in history),
            "seconds": time.perf_counter() - began,
        }
        if is_main:
            header |= {"epoch": epoch + 1, "validation": record}
            keep = [run / "model.safetensors"] if better else []
            if args.save_every_epoch:
                keep.append(run / "epochs" / f"epoch-{epoch + 1:03d}.safetensors")
            for path in keep:
                path.parent.mkdir(exist_ok=True)
                checkpoint.save(path, plain.state_dict(), header)
            if epoch in (0, args.epochs - 1):  # and again in case another run has begun since
                checkpoint.point_latest(run)
            metrics = {"epochs": history, "summary": summary}
            checkpoint.atomic_write(run / "metrics.json", json.dumps(metrics, indent=1))
            for key, value in record.items():
                writer.add_scalar(f"epoch/{key}", value, epoch + 1)
        left = (time.perf_counter() - began) / (epoch + 1) * (args.epochs - epoch - 1)
        say(describe(record, args.epochs, left))

    # Where the weights are, and which command comes next.
    if is_main:
        results = {f"result/{k}": v for k, v in best.items() if k.startswith(("train_", "val_"))}
        flat = {k: v if isinstance(v, int | float) else str(v) for k, v in vars(args).items()}
        for part in hparams(flat, results):  # the writer's own call makes a folder of its own
            writer.file_writer.add_summary(part)
        for key, value in results.items():
            writer.add_scalar(key, value)
        writer.close()
        reached = f", validation accuracy {best['val_accuracy']:.2%}" if val else ""
        print(f"weights of epoch {best['epoch']}{reached}: {run / 'model.safetensors'}")
        print(f"training took {summary['train_seconds']:.1f} s")
        print(f"next: {options.command('test.py', '--weights', run / 'model.safetensors')}")
    accelerator.wait_for_everyone()  # without it gloo now and then aborts while shutting down
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(options.run(main))
