"""Train an image classifier.

    make train                                      CIFAR-10, and an evaluation afterwards
    python scripts/train.py --time 60s              the best that a minute gives on this machine
    python scripts/train.py --data digits           bundled handwritten digits, in seconds
    python scripts/train.py --data my/pictures      a folder: train/<class>/*.jpg, or <class>/*.jpg
    python scripts/train.py --config tutorial       the settings of recipes/tutorial.yaml
    python scripts/train.py --overfit 20            can the network learn 20 pictures by heart?
    accelerate launch scripts/train.py              the same on what Accelerate is configured for

A data set's recipe (recipes/*.yaml) supplies the defaults; an option given replaces only itself;
--model or --config drops the recipe.  A run that was interrupted goes on with the same command, to
the same weights, bit for bit.
"""

import contextlib
import math
import sys
import time
from types import SimpleNamespace

import torch
from tqdm import tqdm

import _root  # noqa: F401
from lenslet import files
from lenslet.cli import as_yaml, parse, stored
from lenslet.data.augment import Augment
from lenslet.data.batches import ImageBatches, on_device
from lenslet.data.load import choose_data, load
from lenslet.data.prepare import Prepare, channel_statistics
from lenslet.distributed.determinism import (
    compute_deterministically,
    environment,
    fix_reduction_order,
    seed_step,
)
from lenslet.distributed.interrupts import Interrupts
from lenslet.distributed.start import (
    create_accelerator,
    decoding_workers,
    device_time,
    from_main_process,
    main_process_first,
    start_processes,
)
from lenslet.errors import UserError, run_main
from lenslet.files import atomic_write
from lenslet.metrics import evaluate, evaluation_batch, figures, score
from lenslet.runs import checkpoint
from lenslet.runs import folder as run_folder
from lenslet.runs.run import Saver, capture, differences, find_run, restore
from lenslet.runs.summary import conclude, epoch_line, image_grid, introduce, metrics_json
from lenslet.runs.tensorboard import TensorBoard
from lenslet.training.clock import lay_out, measure_speed
from lenslet.training.losses import class_weights, create_objective, image_weights
from lenslet.training.meter import diverged, largest_gradient, memory_advice
from lenslet.training.net import Freezer, average_buffers, create_ema, wrap_anew
from lenslet.training.optimizers import create_optimizer, l1_penalty, second_order, seed_draws
from lenslet.training.options import build_parser, check_with_data, complete, run_name, validates
from lenslet.training.pretrained import fit, read_weights
from lenslet.training.schedules import Schedule, epochs_without_progress
from lenslet.training.watch import Watch
from lenslet.weights import digest, encode, read_header
from model import add_dropout, create_model, head_of, load_model, network_defaults


def choose_statistics(args, data, loaded, network) -> list[list[float]]:
    """Mean and deviation of each channel: as given, those that loaded weights are used to, small
    pictures' own, or the network's.
    """
    train, chosen = data.splits["train"], []
    if loaded:
        network = loaded
    elif args.pretrained != "timm" and train.in_memory and not (args.mean and args.std):
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


def main(argv=None):
    # Options: the command line over the recipe of the data set.
    parser = build_parser(__doc__)
    typed = parse(parser, argv)
    if typed.resume:
        run = run_folder.find(typed.resume)
        typed = parse(parser, argv, recipe=run / "options.yaml")

    args = complete(parser, typed, argv, typed.data or "cifar10")
    source = read_header(args.plan) if args.plan else None
    if source and not source.get("plan"):
        raise UserError(f"--plan {args.plan}: written before plans were kept")
    if source and source["model"] != args.model:
        raise UserError(f"--plan {args.plan} is of {source['model']}, not of {args.model}")
    # These take seconds to import, which --help and a misspelt option need not wait for.

    if args.resume and (different := differences(parser, run, args)):
        raise UserError(f"--resume {run}: {different}; leave that out, or --resume")
    state = start_processes(args.threads)
    name = from_main_process(state, lambda: choose_data(typed.data))
    if not typed.data and name != "cifar10":
        args = complete(parser, typed, argv, name)
    args.data = name
    rank, world = state.process_index, state.num_processes
    if args.batch_size % world:
        near = max(world, args.batch_size // world * world)
        option = "overfit" if args.batch_size == args.overfit else "batch-size"
        raise UserError(
            f"--{option} {args.batch_size} cannot be divided among {world} processes; "
            f"{near} and {near + world} can"
        )

    # Accelerator.
    if args.deterministic:
        compute_deterministically()
    accelerator = create_accelerator(typed.precision, otherwise=args.precision)
    device, is_main, say = accelerator.device, accelerator.is_main_process, accelerator.print

    # Weights to begin with, and to learn from.
    tensors, loaded, teacher = {}, {}, None
    if args.pretrained:
        tensors, loaded = main_process_first(
            state, lambda: read_weights(args.pretrained, args.model)
        )
    if args.teacher:
        teacher = load_model(args.teacher)

    # Data.  The first process inspects the files of a folder; the others read what it found.
    network = network_defaults(args.model)
    workers = decoding_workers(args.workers)
    apart = validates(args) and not args.overfit
    data = main_process_first(
        state,
        lambda: load(
            args.data,
            ["train", "val"] if apart else ["train"],
            val=args.val if apart else 0,
            fold=args.fold,
            limit=args.limit or args.overfit,
            photo_size=args.image_size or network["image_size"],
            crop=network["crop"],
            skip_broken=args.skip_broken,
            workers=workers,
        ),
    )
    if args.overfit:
        data.splits["val"] = data.splits["train"]
    train, val = data.splits["train"], data.splits.get("val")
    importance, importance_sha256 = image_weights(args.picture_weights, args.data, train)
    counts = train.labels.bincount(minlength=len(data.classes))
    importance *= class_weights(args.class_weights, counts)[train.labels]
    check_with_data(args, data, importance, teacher)
    data.to(device)
    if len(train) < 2 * world:
        raise UserError(f"--data {args.data}: {len(train)} training pictures are too few")
    shared = {"workers": workers, "rank": rank, "world": world}
    train_loader = data.loader(
        "train", args.batch_size, seed=args.seed, augment=args.augment, **shared
    )
    val_batch = evaluation_batch(args.batch_size, args.accumulate, world, train.in_memory)
    val_loader = data.loader("val", val_batch, **shared) if val else None

    # The network; one that does not fit ends here, before there is a run folder.
    mean, std = choose_statistics(args, data, loaded, network)
    model_args = {
        "classes": len(data.classes),
        "channels": data.channels,
        "size": (args.image_size,) * 2 if args.image_size else data.image_size,
    }
    if width := args.width or loaded.get("model_args", {}).get("width"):
        model_args["width"] = width

    def build() -> tuple:
        """The network with its first weights, what is said of them, optimizer and freezer."""
        torch.manual_seed(args.seed)
        model = create_model(args.model, **model_args)
        if hasattr(model, "whiten"):
            few = min(1000, len(train), max(10, 2**20 // math.prod(model.input_size)))
            spread = torch.linspace(0, len(train) - 1, few).long().tolist()
            batch = [ImageBatches(train, data)[0, spread]]
            pixels, _, _ = next(on_device(batch, "cpu"))
            model.whiten(Prepare(mean, std, model.input_size)(pixels))
        account, head = [], head_of(model)
        if tensors:
            same = loaded.get("classes", data.classes) == data.classes
            account = fit(model, tensors, head, same, args.pretrained)
        optimizer = create_optimizer(
            args.optimizer, model, args.lr, args.momentum, args.weight_decay, args.nesterov
        )
        freezer = Freezer(model, args.freeze or [], args.freeze_epochs, head)
        return model, account, optimizer, freezer

    model, account, optimizer, freezer = build()
    normalised = any(isinstance(m, torch.nn.modules.batchnorm._BatchNorm) for m in model.modules())
    if normalised and args.batch_size < 2 * world:
        raise UserError(f"--batch-size: batch norm needs 2 pictures a process, so {2 * world}")
    backward_options = second_order(optimizer, world, args.compile)

    # The run folder: of the unfinished run with these options, or a new one.
    folder = args.output or files.RUNS / run_name(args)
    run, newest, notes = from_main_process(state, lambda: find_run(parser, args, folder))
    saved = checkpoint.load_checkpoint(newest) if newest else None

    # How long to train, and by the clock how wide a network.
    started = time.perf_counter()

    def trial(width: int) -> float:
        images, labels, _ = next(on_device(train_loader, device))
        part = max(2, len(labels) // args.accumulate)
        candidate = create_model(args.model, **model_args | {"width": width})
        scaled = Prepare(mean, std, candidate.input_size).to(device)(images[:part])
        return world * measure_speed(candidate, scaled, labels[:part], accelerator)

    plan, width = from_main_process(
        state,
        lambda: lay_out(args, width, source, saved, len(train_loader), len(train), trial),
    )
    if width and width != model_args.get("width"):
        model_args["width"] = width
        model, account, optimizer, freezer = build()
    spent = time.perf_counter() - started if plan.seconds else 0.0

    # What is changed of the pictures, what is minimised, and by which steps.
    prepare = Prepare(mean, std, model.input_size).to(device)
    model = model.to(memory_format=torch.channels_last)
    add_dropout(model, args.dropout)
    if args.compile:
        model.compile()
    augment = Augment(
        args.augment, not train.in_memory, args.seed, args.erase, args.mixup, args.cutmix, mean
    )
    objective = create_objective(args, data, importance.to(device), teacher, accelerator)
    schedule = Schedule(args.schedule, args.warmup, len(train_loader), args.min_delta)
    penalty = l1_penalty(model, args.l1)
    freezer.update(saved["progress"]["epoch"] if saved else 0)
    model, optimizer = accelerator.prepare(model, optimizer)  # device, casts, several processes
    plain = accelerator.unwrap_model(model)
    averaged = create_ema(plain, args.ema)
    judged = averaged.module if averaged else plain  # the network that is validated and kept

    black = torch.zeros(2, data.channels, *data.image_size, dtype=torch.uint8, device=device)
    fix_reduction_order(model, prepare(black), accelerator)

    # Where this run is: `batch` and `step` count what is done, of the epoch and of the run; recent
    # [world, 3] are each process's loss, hits and steps with a finite loss since `logged`.
    at = SimpleNamespace(epoch=0, batch=0, step=0, seconds=spent, epoch_seconds=0.0, history=[])
    at.sums, at.recent, at.images, at.logged = torch.zeros(3), torch.zeros(world, 3), 0, 0
    at.best, at.best_score, at.train_seconds, at.ended = None, None, 0.0, ""
    at.marks, at.width = plan.marks, width
    inputs = {"pictures": data.sha256, "picture weights": importance_sha256}
    inputs |= {"teacher": teacher and teacher[2]["sha256"], "pretrained": loaded.get("sha256")}
    networks = {"model": plain} | ({"average": judged} if averaged else {})
    if newest:
        at, changes = restore(newest, saved, inputs, networks, optimizer, accelerator)
        plan.marks = at.marks
        notes += changes
    data.notes += ([] if saved else account) + notes
    recent = at.recent[rank::world].sum(0).to(device)
    scores = [score(record, args.metric) for record in at.history] if val else []
    if is_main:
        atomic_write(run / "options.yaml", as_yaml(stored(args)))
    curves = TensorBoard(run, at.step) if is_main else None
    saver = Saver(run, newest, args.save_every, curves)
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
        "options": stored(args),
        **environment(accelerator.mixed_precision),
    }
    say(introduce(args, data, plain, accelerator))
    watch = None
    if args.watch and is_main:
        batch = [ImageBatches(train, data)[0, list(range(min(32, len(train))))]]
        shown = prepare(next(on_device(batch, device))[0])
        watch = Watch(plain, curves, shown, say=tqdm.write, scaler=accelerator.scaler)

    def rate(step: int) -> float:
        return args.lr * schedule.factor(step, *plan.at(step), scores)

    def save(last: bool = False) -> None:
        at.recent, at.seconds = accelerator.gather(recent[None]), time.perf_counter() - began
        content = capture(at, inputs, networks, optimizer, accelerator)
        saver.save(at.step, content, last)

    def complain(loss: float, step: int) -> None:
        """End a run whose loss is no number since step `step`."""
        kept = run / "model.safetensors" if saver.kept else ""
        raise UserError(diverged(loss, at.epoch + 1, step, rate(step - 1), gradient, kept))

    def tally(log: bool) -> None:
        """Read back what was counted since `logged`, over all processes; log it, and begin anew."""
        loss, hits, finite = accelerator.reduce(recent).tolist()
        if not math.isfinite(loss):
            complain(loss, at.logged + int(finite / world) + 1)
        if log:
            if is_main:
                curves.add("scalar", "train_loss", loss / at.images, at.step)
                curves.add("scalar", "learning_rate", rate(at.step - 1), at.step)
            at.sums += torch.tensor([loss, hits, at.images])
            recent.zero_()
            at.images, at.logged = 0, at.step

    began, gradient = time.perf_counter() - at.seconds, None
    epochs = "" if args.time or args.plan else f"/{args.epochs}"
    with Interrupts(world) as interrupts, memory_advice(args.batch_size, args.accumulate):
        # A signal may have come between the last step and the end of its epoch.
        while (at.step < plan.total or at.batch) and not at.ended:
            if freezer.update(at.epoch):
                model = wrap_anew(model, prepare(black), accelerator)
            freezer.train()
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

            # Train.  A step reads nothing back from the device but the loss at times: every
            # --log-every, and in the first steps, where a learning rate that is too high shows.
            # (What torchvision changes of single pictures, see Augment, takes their indices.)
            for images, labels, index in batches:
                schedule.apply(optimizer, args.lr, at.step, *plan.at(at.step), scores)
                images, targets = augment(images, objective.targets(labels, index), at.epoch, index)
                if at.step == 0 and is_main:
                    grid = image_grid(prepare, images, targets, data.classes)
                    curves.add("image", "training_pictures", grid, at.step)
                seed_step(args.seed, at.step, rank, world, device)
                # Every picture counts the same, in whichever part, process or short batch it is;
                # `world` undoes the mean that Accelerate takes over the processes.
                batch_images = train_loader.sampler.size(at.batch)
                counted = train_loader.sampler.counts(at.batch)
                parts = max(1, min(args.accumulate, len(labels) // 2))
                for k, (x, y) in enumerate(
                    zip(images.tensor_split(parts), targets.tensor_split(parts), strict=True)
                ):
                    last = k == parts - 1
                    with contextlib.nullcontext() if last else accelerator.no_sync(model):
                        logits = model(prepare(x))
                        loss = objective(logits, y, x)
                        whole = loss * (counted * world / batch_images) + last * penalty()
                        accelerator.backward(whole, **backward_options)
                    with torch.no_grad():
                        hits = (logits.argmax(1) == y.argmax(1)).sum()
                        recent[:2] += torch.stack([loss, hits]) * counted
                recent[2] += recent[0].isfinite()
                if watch:
                    watch.gradients(at.step + 1, time.perf_counter() - began)
                if args.clip:
                    accelerator.clip_grad_norm_(model.parameters(), args.clip)
                look = gradient is None or at.step < args.log_every
                look |= (at.step + 1) % args.log_every == 0
                if look:
                    gradient = largest_gradient(plain, at.step + 1, gradient)
                seed_draws(optimizer, args.seed, at.step)
                optimizer.step()
                optimizer.zero_grad()
                at.batch, at.step, at.images = at.batch + 1, at.step + 1, at.images + batch_images
                if averaged:
                    averaged.update(plain, at.step)
                at.epoch_seconds = time.perf_counter() - epoch_began
                if plan.is_due(at.step):
                    plan.look(
                        at.step, from_main_process(state, lambda: device_time(device) - began)
                    )

                is_due = interrupts.agree(saver.is_late()) or saver.is_due(at.step)
                ends = at.batch == len(train_loader) or at.step == plan.total
                if look or ends or is_due or interrupts.stop:
                    tally(log=ends or at.step % args.log_every == 0)
                if ends:
                    at.train_seconds = time.perf_counter() - began
                if ends or interrupts.stop:
                    break
                if is_due:
                    save()
            batches.close()

            # Validate.
            if not interrupts.stop:
                for network in networks.values():
                    average_buffers(network, accelerator)
                if val:
                    rows = evaluate(judged, val_loader, prepare, accelerator, interrupts)
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
                "weights_sha256": digest(judged.state_dict()),
            }
            if val:
                result = figures(rows, len(data.classes))
                record |= {"val_loss": result["loss"], "val_accuracy": result["top1"]}
                record["val_f1"] = result["macro_f1"]
                if not math.isfinite(result["loss"]):  # the last step was one too many
                    complain(result["loss"], at.step)
                scores.append(score(record, args.metric))
            at.history.append(record)

            # Save and log.  Few validation pictures often tie: then the smaller loss decides.
            standing = [scores[-1], -record["val_loss"]] if val else [at.epoch]
            if args.keep == "last":
                standing = [at.epoch]
            if better := at.best is None or standing > at.best_score:
                at.best, at.best_score = record, standing
            at.epoch, at.batch, at.epoch_seconds = at.epoch + 1, 0, 0.0
            at.sums.zero_()
            if args.patience and epochs_without_progress(scores, args.min_delta) >= args.patience:
                at.ended = f"{args.patience} epochs without a better one"
            if args.overfit and record["val_accuracy"] == 1:
                at.ended = "all pictures are learned"
            if is_main:
                digests = [[r["step"], r["weights_sha256"]] for r in at.history]
                header |= {"epoch": at.epoch, "validation": record, "digests": digests}
                header["plan"] = plan.marks
                weights = encode(judged.state_dict(), header)
                if better:
                    saver.weights = weights
                if args.keep == "all":
                    saver.files[run / "epochs" / f"epoch-{at.epoch:03d}.safetensors"] = weights
                at.seconds = time.perf_counter() - began
                saver.files[run / "metrics.json"] = metrics_json(at, finished=False)
                for key, value in record.items():
                    if key not in ("step", "weights_sha256"):
                        curves.add("scalar", f"epoch/{key}", value, at.step)
            if watch:
                watch.inside(at.step, time.perf_counter() - began)
            save(last=bool(at.ended) or at.step == plan.total)
            if is_main:
                run_folder.point_latest(run)
            left = 0 if at.ended else at.seconds / at.step * (plan.total - at.step)
            say(epoch_line(record, epochs, left, args.metric))

    # Where the weights are, and which command comes next.
    status = interrupts.stop
    if is_main and not interrupts.stop:
        was_finished = run_folder.is_finished(run)
        atomic_write(run / "metrics.json", metrics_json(at, finished=True))
        results = {f"result/{k}": v for k, v in at.best.items() if k.startswith(("train_", "val_"))}
        if not was_finished:
            curves.add_hparams(stored(args), results, at.step)
        print(conclude(args, at, run))
    elif is_main:
        print(
            f"stopped in epoch {at.epoch + 1} after {at.batch} of {len(train_loader)} batches, and "
            f"saved: the same command goes on, or --resume {run}"
        )
    if is_main:
        curves.close()
    accelerator.wait_for_everyone()  # without it gloo now and then aborts while shutting down
    accelerator.end_training()
    if args.overfit and at.best and at.history[-1]["val_accuracy"] < 1:
        status = status or 1
    return status


if __name__ == "__main__":
    sys.exit(run_main(main))
