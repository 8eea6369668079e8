"""Train an image classifier.

    make train                                      CIFAR-10, and an evaluation afterwards
    python scripts/train.py --time 60s              the best that a minute gives on this machine
    python scripts/train.py --data digits           bundled handwritten digits, in seconds
    python scripts/train.py --data my/pictures      a folder: train/<class>/*.jpg, or <class>/*.jpg
    python scripts/train.py --config tutorial       the settings of recipes/tutorial.yaml
    accelerate launch scripts/train.py              the same on what Accelerate is configured for

A data set's recipe (recipes/*.yaml) supplies the defaults; an option given replaces only itself;
--model or --config drops the recipe.  A run that was interrupted goes on with the same command, to
the same weights, bit for bit.
"""

import argparse
import contextlib
import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import torch
from torch.nn import functional as F
from tqdm import tqdm

import _root  # noqa: F401
import checkpoint
import choices
import clock
import dataset
import options
import run_folder
from dataset import on_device
from diagnosis import advice, explosion, largest_gradient
from images import draw_grid
from model import create_model, network_defaults
from options import UserError, interval, number
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
    help = "channels of fastnet's first block (default: 32, or what suits --time)"
    add("--width", metavar="N", type=number(int, 8, 1024), help=help)
    add("--epochs", metavar="N", type=count, default=10, help="times through all pictures")
    help = "train for so long (60s, 5m, 2h) instead, all from the first step to the last counted in"
    add("--time", metavar="T", type=options.span, help=help)
    help = "weights trained with --time: repeat their steps, whatever the clock says"
    add("--plan", metavar="FILE", help=help)
    help = "pictures per optimizer step, over all processes"
    add("-b", "--batch-size", metavar="N", type=count, default=64, help=help)
    help = "compute a batch in so many parts of 2 or more pictures, to save memory"
    add("--accumulate", metavar="PARTS", type=count, default=1, help=help)
    help = "adamw suits most networks"
    add("--optimizer", choices=choices.OPTIMIZERS, default="adamw", help=help)
    add("--lr", metavar="X", type=positive, default=0.001, help="learning rate")
    add("--momentum", metavar="X", type=share, default=0.9, help="of sgd and muon")
    add("--weight-decay", metavar="X", type=number(float, 0), default=0.01, help="pull to zero")
    help = "of the learning rate, in optimizer steps"
    add("--schedule", choices=choices.SCHEDULES, default="cosine", help=help)
    help = "optimizer steps (500), or share of them all (20%%), of linear rise to the learning rate"
    add("--warmup", metavar="N", type=options.portion, default="0", help=help)
    help = "of the true class's weight in the loss, spread over all classes"
    add("--label-smoothing", metavar="SHARE", type=share, default=0.0, help=help)
    add("--clip", metavar="NORM", type=positive, help="largest norm of all gradients together")
    help = "of the first weights, the order and the augmentation"
    add("--seed", metavar="N", type=number(int, 0, 2**63 - 1), default=0, help=help)

    options.add_running_options(parser)
    help = "let torch compile the network, which takes a minute, and did not pay on a CPU"
    add("--compile", action=flag, default=False, help=help)
    help = "have a GPU compute the same bits every time, as a CPU does: slower"
    add("--deterministic", action=flag, default=False, help=help)

    add = parser.add_argument_group("output").add_argument
    add("--output", metavar="DIR", help="run folder (default: runs/<data>-<model>)")
    help = "keep each epoch's weights, in epochs/"
    add("--save-every-epoch", action=flag, default=False, help=help)
    help = "steps (500) or time (90s, 5m, 2h) between checkpoints; each epoch ends with one too"
    add("--save-every", metavar="N", type=interval, default="5m", help=help)
    help = "go on with this run, with its options (default: the unfinished run with these options)"
    add("--resume", metavar="RUN", help=help)
    help = "begin a new run"
    add("--no-resume", dest="resume", action="store_const", const=False, help=help)
    help = "steps between two points of the loss curve"
    add("--log-every", metavar="STEPS", type=count, default=50, help=help)
    return parser


def run_name(args) -> str:
    """The name of a run's folder below runs/."""
    return f"{Path(args.data).resolve().name}-{args.model.replace('/', '-')}"


def describe(record: dict, epochs: str, left: float) -> str:
    """An epoch's line on the console."""
    line = f"epoch {record['epoch']}{epochs}"
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
        parts = torch.arange(len(train)).split(256)
        network = channel_statistics(train.pixels(part) for part in parts)
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


def summarise(at: SimpleNamespace, finished: bool) -> bytes:
    """metrics.json."""
    summary = {
        "best_epoch": at.best["epoch"],
        "val_accuracy": at.best.get("val_accuracy"),
        "train_seconds": at.train_seconds,
        "seconds": at.seconds,
        "finished": finished,
    }
    return json.dumps({"epochs": at.history, "summary": summary}, indent=1).encode()


def main(argv=None):
    # Options: the command line over the recipe of the data set.
    parser = build_parser()
    args = options.parse(parser, argv)
    if args.resume:
        run = run_folder.find(args.resume)
        args = options.parse(parser, argv, recipe=run / "options.yaml")
    if args.model:
        network_defaults(args.model)  # a misspelt name ends here, before any download
    source = checkpoint.read_header(args.plan) if args.plan else None
    if source and not source.get("plan"):
        raise UserError(f"--plan {args.plan}: written before plans were kept")
    # These take seconds to import, which --help and a misspelt option need not wait for.
    import recovery
    import runtime
    from curves import Curves
    from interrupts import Interrupts
    from metrics import evaluate, evaluation_batch, figures

    if args.resume and (different := recovery.differences(parser, run, args)):
        raise UserError(f"--resume {run}: {different}; leave that out, or --resume")
    state = runtime.launch(args.threads)
    args.data = runtime.from_main(state, lambda: dataset.choose(args.data))
    typed = args
    if not args.model and not args.config:
        args = options.parse(parser, argv, recipe=dataset.recipe_for(typed.data))
        args.data = typed.data
    if not args.model:
        raise UserError(f"--config {args.config} names no model: add one there, or give --model")
    if args.width and args.model != "fastnet":
        raise UserError(f"--width is of fastnet, not of {args.model}")
    if source and source["model"] != args.model:
        raise UserError(f"--plan {args.plan} is of {source['model']}, not of {args.model}")
    rank, world = state.process_index, state.num_processes
    if args.batch_size % world:
        near = max(world, args.batch_size // world * world)
        raise UserError(
            f"--batch-size {args.batch_size} cannot be divided among {world} processes; "
            f"{near} and {near + world} can"
        )

    # Accelerator.
    if args.deterministic:
        runtime.compute_deterministically()
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
    data.to(device)
    train, val = data.splits["train"], data.splits.get("val")
    if len(train) < 2 * world:
        raise UserError(f"--data {args.data}: {len(train)} training pictures are too few")
    shared = {"workers": workers, "rank": rank, "world": world}
    train_loader = data.loader(
        "train", args.batch_size, seed=args.seed, augment=args.augment, **shared
    )
    val_batch = evaluation_batch(args.batch_size, args.accumulate, world, train.in_memory)
    val_loader = data.loader("val", val_batch, **shared) if val else None

    # The network; one that does not fit ends here, before there is a run folder.
    mean, std = choose_statistics(args, data, network)
    model_args = {
        "classes": len(data.classes),
        "channels": data.channels,
        "size": (args.image_size,) * 2 if args.image_size else data.image_size,
    }
    torch.manual_seed(args.seed)
    model = create_model(args.model, **model_args)
    normalised = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if normalised and args.batch_size < 2 * world:
        raise UserError(f"--batch-size: batch norm needs 2 pictures a process, so {2 * world}")

    # The run folder: of the unfinished run with these options, or a new one.
    folder = args.output or options.RUNS / run_name(args)
    run, newest, notes = runtime.from_main(state, lambda: recovery.find_run(parser, args, folder))
    saved = checkpoint.load_checkpoint(newest) if newest else None

    # How long to train, and by the clock how wide a network.
    started = time.perf_counter()

    def trial(width: int) -> float:
        images, labels, _ = next(on_device(train_loader, device))
        part = max(2, len(labels) // args.accumulate)
        candidate = create_model(args.model, **model_args, width=width)
        scaled = Prepare(mean, std, candidate.input_size).to(device)(images[:part])
        return world * runtime.speed(candidate, scaled, labels[:part], accelerator)

    plan, width = runtime.from_main(
        state, lambda: clock.lay_out(args, source, saved, len(train_loader), len(train), trial)
    )
    if width:
        model_args["width"] = width
        torch.manual_seed(args.seed)
        model = create_model(args.model, **model_args)
    spent = time.perf_counter() - started if plan.seconds else 0.0

    # Preparation of the pictures, and the optimizer.
    prepare = Prepare(mean, std, model.input_size)
    if not saved and hasattr(model, "whiten"):
        few = min(1000, len(train), max(10, 2**20 // math.prod(model.input_size)))
        spread = torch.linspace(0, len(train) - 1, few).long()
        pixels, _, _ = next(on_device([dataset.Pictures(train, data)[0, spread.tolist()]], "cpu"))
        model.whiten(prepare(pixels))
    prepare.to(device)
    model = model.to(memory_format=torch.channels_last)
    if args.compile:
        model.compile()
    optimizer = choices.create_optimizer(
        args.optimizer, model, args.lr, args.momentum, args.weight_decay
    )
    model, optimizer = accelerator.prepare(model, optimizer)  # device, casts, several processes
    plain = accelerator.unwrap_model(model)

    black = torch.zeros(2, data.channels, *data.image_size, dtype=torch.uint8, device=device)
    runtime.settle_order(model, prepare(black), accelerator)

    def rate(step: int) -> float:
        progress, total = plan.at(step)
        return args.lr * choices.lr_factor(progress, args.warmup, total, args.schedule)

    # Where this run is: `batch` and `step` count what is done, of the epoch and of the run; losses
    # [world, 3] are each process's loss, hits and steps with a finite loss since `logged`.
    at = SimpleNamespace(epoch=0, batch=0, step=0, seconds=spent, epoch_seconds=0.0, history=[])
    at.sums, at.losses, at.images, at.logged = torch.zeros(3), torch.zeros(world, 3), 0, 0
    at.best, at.best_score, at.train_seconds = None, None, 0.0
    at.marks, at.width = plan.marks, width
    if newest:
        at, changes = recovery.restore(newest, saved, data.sha256, model, optimizer, accelerator)
        plan.marks = at.marks
        notes += changes
    data.notes += notes
    losses = at.losses[rank::world].sum(0).to(device)
    if is_main:
        checkpoint.atomic_write(run / "options.yaml", options.as_yaml(options.stored(args)))
    curves = Curves(run, at.step) if is_main else None
    saver = recovery.Saver(run, newest, args.save_every, curves)
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
        "options": options.stored(args),
        **runtime.circumstances(accelerator.mixed_precision),
    }
    say(introduce(args, data, plain, accelerator))

    def save(last: bool = False) -> None:
        at.losses, at.seconds = accelerator.gather(losses[None]), time.perf_counter() - began
        content = recovery.capture(at, data.sha256, model, optimizer, accelerator)
        saver.save(at.step, content, last)

    began, gradient = time.perf_counter() - at.seconds, None
    epochs = "" if args.time or args.plan else f"/{args.epochs}"
    with Interrupts(world) as interrupts, advice(args.batch_size, args.accumulate):
        while at.step < plan.total or at.batch:  # a signal may have come between steps and end
            # Train.  In a step nothing is read back from the device, but the loss at times: every
            # --log-every, and in the first steps, where a learning rate that is too high shows.
            model.train()
            start = at.batch if at.step < plan.total else len(train_loader)
            train_loader.sampler.epoch, train_loader.sampler.start = at.epoch, start
            epoch_began = time.perf_counter() - at.epoch_seconds
            batches = tqdm(
                on_device(train_loader, device),
                f"epoch {at.epoch + 1}{epochs}",
                len(train_loader),
                leave=False,
                initial=at.batch,
                disable=None if is_main else True,
            )
            for images, labels, index in batches:
                runtime.seed_step(args.seed, at.step, rank, world, device)
                for group in optimizer.param_groups:
                    group["lr"] = rate(at.step)
                images = augment(
                    images, args.augment, not train.in_memory, args.seed, at.epoch, index
                )
                if at.step == 0 and is_main:
                    shown = prepare.undo(prepare(images[:32])).cpu()
                    names = [data.classes[label] for label in labels[:32].tolist()]
                    curves.add("image", "training_pictures", draw_grid(shown, names), at.step)
                # Every picture weighs the same, in whichever part, process or short batch it is;
                # `world` undoes the mean that Accelerate takes over the processes.
                batch_images = train_loader.sampler.size(at.batch)
                counted = train_loader.sampler.counts(at.batch)
                weight = counted * world / batch_images
                parts = max(1, min(args.accumulate, len(labels) // 2))
                for k, (x, y) in enumerate(
                    zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True)
                ):
                    last = k == parts - 1
                    with contextlib.nullcontext() if last else accelerator.no_sync(model):
                        logits = model(prepare(x))
                        loss = F.cross_entropy(
                            logits, y, reduction="sum", label_smoothing=args.label_smoothing
                        )
                        accelerator.backward(loss * weight)
                    with torch.no_grad():
                        hits = (logits.argmax(1) == y).sum()
                        losses[:2] += torch.stack([loss, hits]) * counted
                losses[2] += losses[0].isfinite()
                if args.clip:
                    accelerator.clip_grad_norm_(model.parameters(), args.clip)
                look = (
                    gradient is None
                    or at.step < args.log_every
                    or (at.step + 1) % args.log_every == 0
                )
                if look:
                    gradient = largest_gradient(plain, at.step + 1, gradient)
                optimizer.step()
                optimizer.zero_grad()
                at.batch, at.step, at.images = at.batch + 1, at.step + 1, at.images + batch_images
                at.epoch_seconds = time.perf_counter() - epoch_began
                if plan.is_due(at.step):
                    plan.look(
                        at.step, runtime.from_main(state, lambda: runtime.now(device) - began)
                    )

                is_due = interrupts.agree(saver.is_late()) or saver.is_due(at.step)
                ends = at.batch == len(train_loader) or at.step == plan.total
                if look or ends or is_due or interrupts.stop:
                    loss, hits, finite = accelerator.reduce(losses).tolist()
                    if not math.isfinite(loss):
                        step = at.logged + int(finite / world) + 1  # the first one that was not
                        lr = rate(step - 1)
                        kept = run / "model.safetensors" if at.best else ""
                        raise UserError(explosion(loss, at.epoch + 1, step, lr, gradient, kept))
                if at.step % args.log_every == 0 or ends:
                    if is_main:
                        curves.add("scalar", "train_loss", loss / at.images, at.step)
                        curves.add("scalar", "learning_rate", rate(at.step - 1), at.step)
                    at.sums += torch.tensor([loss, hits, at.images])
                    losses.zero_()
                    at.images, at.logged = 0, at.step
                if ends:
                    at.train_seconds = time.perf_counter() - began
                if ends or interrupts.stop:
                    break
                if is_due:
                    save()
            batches.close()

            # Validate.
            if not interrupts.stop:
                runtime.sync_buffers(plain, accelerator)
                if val:
                    rows = evaluate(plain, val_loader, prepare, accelerator, interrupts)
            if interrupts.stop:
                save(last=True)
                break
            record = {
                "epoch": at.epoch + 1,
                "step": at.step,
                "train_loss": (at.sums[0] / at.sums[2]).item(),
                "train_accuracy": (at.sums[1] / at.sums[2]).item(),
                "lr": rate(at.step - 1),
                "images_per_second": at.sums[2].item() / at.epoch_seconds,
                "seconds": at.epoch_seconds,
                "weights_sha256": checkpoint.digest(plain.state_dict()),
            }
            if val:
                result = figures(rows, len(data.classes))
                record |= {"val_loss": result["loss"], "val_accuracy": result["top1"]}
                if not math.isfinite(result["loss"]):  # the last step was one too many
                    kept = saver.kept and run / "model.safetensors"
                    lr = record["lr"]
                    raise UserError(
                        explosion(result["loss"], at.epoch + 1, at.step, lr, gradient, kept)
                    )
            at.history.append(record)

            # Save and log.  Without validation pictures the last weights are kept, else the best.
            # Few validation pictures often tie in accuracy: then the smaller loss decides.
            score = [record["val_accuracy"], -record["val_loss"]] if val else [at.epoch]
            if better := at.best is None or score > at.best_score:
                at.best, at.best_score = record, score
            at.epoch, at.batch, at.epoch_seconds = at.epoch + 1, 0, 0.0
            at.sums.zero_()
            if is_main:
                digests = [[r["step"], r["weights_sha256"]] for r in at.history]
                header |= {"epoch": at.epoch, "validation": record, "digests": digests}
                header["plan"] = plan.marks
                weights = checkpoint.encode(plain.state_dict(), header)
                if better:
                    saver.weights = weights
                if args.save_every_epoch:
                    saver.files[run / "epochs" / f"epoch-{at.epoch:03d}.safetensors"] = weights
                at.seconds = time.perf_counter() - began
                saver.files[run / "metrics.json"] = summarise(at, finished=False)
                for key, value in record.items():
                    if key not in ("step", "weights_sha256"):
                        curves.add("scalar", f"epoch/{key}", value, at.step)
            save(last=at.step == plan.total)
            if is_main:
                run_folder.point_latest(run)
            left = at.seconds / at.step * (plan.total - at.step)
            say(describe(record, epochs, left))

    # Where the weights are, and which command comes next.
    if is_main and not interrupts.stop:
        was_finished = run_folder.is_finished(run)
        checkpoint.atomic_write(run / "metrics.json", summarise(at, finished=True))
        results = {f"result/{k}": v for k, v in at.best.items() if k.startswith(("train_", "val_"))}
        if not was_finished:
            curves.add_hparams(options.stored(args), results, at.step)
        reached = f", validation accuracy {at.best['val_accuracy']:.2%}" if val else ""
        weights = run / "model.safetensors"
        print(f"weights of epoch {at.best['epoch']}{reached}: {weights}")
        print(f"training took {at.train_seconds:.1f} s")
        print(f"next: {options.command('test.py', '--weights', weights)}")
    elif is_main:
        print(
            f"stopped in epoch {at.epoch + 1} after {at.batch} of {len(train_loader)} batches, and "
            f"saved: the same command goes on, or --resume {run}"
        )
    if is_main:
        curves.close()
    accelerator.wait_for_everyone()  # without it gloo now and then aborts while shutting down
    accelerator.end_training()
    return interrupts.stop


if __name__ == "__main__":
    sys.exit(options.run(main))
