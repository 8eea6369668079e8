"""From train.py's options to what its loop works with: data, network, plan and objective."""

import math
import time
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate import Accelerator
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from lenslet.cli import parse_duration, stored
from lenslet.data.augment import Augment
from lenslet.data.batches import Data, evenly_spaced, on_device
from lenslet.data.load import RECIPES, choose_data, load, recipe_for
from lenslet.data.prepare import Prepare, channel_statistics
from lenslet.distributed import start
from lenslet.distributed.determinism import compute_deterministically
from lenslet.errors import UserError, error_context
from lenslet.metrics import evaluation_batch
from lenslet.training import checks, losses, options, pretrained
from lenslet.training.clock import Plan, choose_width, measure_speed
from lenslet.training.net import Freezer, Net, fit_batch_norm
from lenslet.training.optimizers import create_optimizer
from lenslet.weights import read_header
from model import NEWEST, create_model, find_network, head_of, load_model, network_defaults


@dataclass
class Inputs:
    """What a training starts from."""

    accelerator: Accelerator
    data: Data
    train_loader: DataLoader
    val_loader: DataLoader | None
    image_weights: Tensor  # float [N], of the training images in the loss
    mean: list[float]  # of each channel, 0..1 scale
    std: list[float]
    pretrained: dict[str, Tensor]  # {} without --pretrained
    pretrained_header: dict  # {} where train.py did not write them
    teacher: tuple | None  # as load_model() gives it
    planned: dict | None  # header of the weights whose steps --plan repeats
    sha256: dict[str, str | None]  # of all these: a run does not go on with others
    notes: list[str] = field(default_factory=list)  # what pretrained weights fitted, a line each


def choose_options(given: dict, on_main=lambda work: work()):
    """All options of a training, with its data set and recipe.

    given: as options.parse() returns it.  on_main: has the main process alone do some work.
    Errors: UserError for options that do not go together, before any download.
    """
    name, recipe = given.get("data"), None
    with error_context(f"--data {name}"):
        if options.needs_recipe(given):
            recipe = on_main(lambda: recipe_for(name or "cifar10"))
    args = options.complete(given, name or "cifar10", recipe)
    with error_context(f"--data {name}"):
        args.data = on_main(lambda: choose_data(name))
    if not name and args.data != "cifar10":
        args = options.complete(given, args.data, recipe and RECIPES[args.data])
    return args


def begin(given: dict):
    """Join the other processes; all options, and the Accelerator.  Errors: as choose_options()."""
    with error_context(f"--device {given.get('device')}"):
        start.use_device(given.get("device", "auto"))
    state = start.start_processes(given.get("threads"))
    args = choose_options(given, partial(start.from_main_process, state))
    if args.deterministic:
        compute_deterministically()
    with error_context("--precision"):
        accelerator = start.create_accelerator(given.get("precision", "auto"), args.precision)
    return args, accelerator


def read_inputs(args, accelerator: Accelerator) -> Inputs:
    """The data and the weights that a training starts from.

    The main process inspects the files of a folder first; the others read what it found.
    Errors: UserError, OutsideError, naming the option.
    """
    tensors, header, teacher = {}, {}, None
    if args.pretrained:
        with error_context(f"--pretrained {args.pretrained}"):
            tensors, header = start.main_process_first(
                accelerator, lambda: pretrained.read_weights(args.pretrained, args.model)
            )
    if args.teacher:
        with error_context("--teacher"):
            teacher = load_model(args.teacher)
    data = _load_data(args, accelerator)
    train = data.splits["train"]
    counts = {split: len(part) for split, part in data.splits.items()}
    known = {"classes": data.classes, "numbers of images": counts, "images": data.sha256}
    if different := start.first_difference(known):
        what, host = different
        raise UserError(f"--data {args.data}: other {what} on {host} than on the first machine")
    with error_context(f"--image-weights {args.image_weights}"):
        weights, weights_sha256 = losses.image_weights(args.image_weights, args.data, train)
    counts = train.labels.bincount(minlength=len(data.classes))
    with error_context("--class-weights"):
        weights *= losses.class_weights(args.class_weights, counts)[train.labels]
    world = accelerator.num_processes
    checks.check_with_data(args, data, weights, teacher and teacher[2])
    statistics = choose_statistics(args, data, header)
    planned = _read_planned(args) if args.plan else None
    data.to(accelerator.device)
    shared = {"workers": start.decoding_workers(args.workers), "world": world}
    shared["rank"] = accelerator.process_index
    val_batch = evaluation_batch(args.batch_size, args.accumulate, world, train.in_memory)
    loader = data.loader("train", args.batch_size, seed=args.seed, augment=args.augment, **shared)
    data.notes += checks.cautions(args, counts, len(loader) * args.epochs)
    val_loader = data.loader("val", val_batch, **shared) if "val" in data.splits else None
    sha256 = {"images": data.sha256, "image weights": weights_sha256}
    sha256["teacher"] = teacher and teacher[2]["sha256"]
    sha256["pretrained weights"] = header.get("sha256")
    begin = tensors, header, teacher, planned
    return Inputs(accelerator, data, loader, val_loader, weights, *statistics, *begin, sha256)


def _load_data(args, accelerator: Accelerator) -> Data:
    """The training and validation images; with --overfit, both are the same."""
    defaults = network_defaults(args.model)
    validates = checks.validates(args) and not args.overfit
    with error_context(f"--data {args.data}" + (f" --limit {args.limit}" if args.limit else "")):
        data = start.main_process_first(
            accelerator,
            lambda: load(
                args.data,
                ["train", "val"] if validates else ["train"],
                val=args.val if validates else 0,
                fold=args.fold,
                limit=args.limit or args.overfit,
                photo_size=args.image_size or defaults["image_size"],
                crop=defaults["crop"],
                skip_broken=args.skip_broken,
                workers=start.decoding_workers(args.workers),
            ),
        )
    if args.overfit:
        data.splits["val"] = data.splits["train"]
    return data


def choose_statistics(args, data: Data, known: dict) -> list[list[float]]:
    """Mean and deviation of each channel, 0..1 scale: as given or in the recipe; else as pretrained
    weights are used to; else small images' own; else the network's.

    Pretrained weights of ours have theirs in their header (known).  Others, from timm, a file or a
    URL, are used to those of their network (known is {}).  The network's are network_defaults():
    timm's configuration or, where there is none, as for our own networks, ImageNet's.
    Errors: UserError for a wrong number of values.
    """
    train, statistics, chosen = data.splits["train"], known, []
    if not known:
        statistics = network_defaults(args.model)
        if not args.pretrained and train.in_memory and not (args.mean and args.std):
            parts = torch.arange(len(train)).split(256)
            statistics = channel_statistics(train.pixels(part) for part in parts)
    for key in ("mean", "std"):
        values = getattr(args, key) or statistics[key]
        if len(values) not in (1, 3, data.channels):
            needed = f"{data.channels} channels: give one per channel"
            raise UserError(f"--{key}: {len(values)} numbers for {needed}")
        if len(values) > data.channels:  # a network for colour, and grey photographs
            values = [sum(values) / len(values)]
        chosen.append(values if len(values) == data.channels else values * data.channels)
    return chosen


def _network_arguments(args, inputs: Inputs, width: int | None = None) -> dict:
    """What create_model() is given beside the name: as in the weights to repeat or to start from,
    so that they fit, else NEWEST; the width as create_net() says.
    """
    data, known = inputs.data, inputs.planned or inputs.pretrained_header
    if known.get("model") == args.model:
        arguments = known["model_args"]
    else:
        arguments = NEWEST.get(args.model, {})
    arguments = arguments | {
        "classes": len(data.classes),
        "channels": data.channels,
        "size": (args.image_size,) * 2 if args.image_size else data.image_size,
    }
    if width := width or args.width:
        arguments["width"] = width
    return arguments


def create_net(args, inputs: Inputs, width: int | None = None) -> Net:
    """The network with its first weights, and its optimizer.

    width: of fastnet; None: as --width or the weights to repeat or to start from say.
    Errors: UserError where the network, the weights or the frozen layers do not fit.
    """
    data, arguments = inputs.data, _network_arguments(args, inputs, width)
    torch.manual_seed(args.seed)
    network = create_model(args.model, **arguments)
    network.arguments = arguments
    prepare = Prepare(inputs.mean, inputs.std, network.input_size)
    if hasattr(network, "whiten"):
        few = min(1000, max(10, 2**20 // math.prod(network.input_size)))
        images = data.batch("train", evenly_spaced(len(data.splits["train"]), few)).images.cpu()
        network.whiten(prepare(images))
    with error_context(f"--batch-size {args.batch_size}"):
        inputs.notes = fit_batch_norm(
            network, inputs.train_loader.sampler, inputs.accelerator, args.accumulate
        )
    head = head_of(network)
    if inputs.pretrained:
        same = inputs.pretrained_header.get("classes", data.classes) == data.classes
        with error_context(f"--pretrained {args.pretrained}"):
            fitted = pretrained.fit(network, inputs.pretrained, head, keep_head=same)
        inputs.notes += [f"{args.pretrained}: {fitted[0]}", *fitted[1:]]
    with error_context(f"--optimizer {args.optimizer}"):
        optimizer = create_optimizer(
            args.optimizer, network, args.lr, args.momentum, args.weight_decay, args.nesterov
        )
    with error_context("--freeze" if args.freeze else "--freeze-epochs"):
        freezer = Freezer(network, args.freeze or [], args.freeze_epochs, head)
    return Net(network, optimizer, freezer, prepare)


def create_plan(args, inputs: Inputs, net: Net, saved: dict | None) -> tuple[Plan, Net]:
    """How long to train, and the network for it: --time chooses fastnet's width.

    saved: the checkpoint that the run goes on from, whose width stays.  A few steps of each width
    are timed; Plan.spent is what that took.
    """
    accelerator, began = inputs.accelerator, time.perf_counter()
    width = net.bare.arguments.get("width")
    if planned := inputs.planned:  # a timed run's steps, whatever the clock says now
        plan = Plan(planned["plan"])
    elif args.time:
        plan = Plan.by_clock(parse_duration(args.time))
    else:
        plan = Plan([[0, 0.0, args.epochs * len(inputs.train_loader)]])
    if saved:
        width = saved["progress"]["width"]
        plan.marks = saved["progress"]["marks"]
    elif args.time and args.model == "fastnet" and not width:
        batch = next(on_device(inputs.train_loader, accelerator.device))
        part = max(2, len(batch.labels) // args.accumulate)
        images = net.prepare.to(accelerator.device)(batch.images[:part])

        def images_per_second(width: int) -> float:
            network = create_model(args.model, **net.bare.arguments | {"width": width})
            speed = measure_speed(network, images, batch.labels[:part], accelerator)
            return accelerator.num_processes * speed

        count = len(inputs.data.splits["train"])
        width = start.from_main_process(
            accelerator, lambda: choose_width(images_per_second, plan.seconds, count)
        )
    if width and width != net.bare.arguments.get("width"):
        net = create_net(args, inputs, width)
    plan.spent = time.perf_counter() - began if args.time else 0.0
    return plan, net


def _read_planned(args) -> dict:
    """The header of the weights whose steps --plan repeats.  Errors: UserError."""
    with error_context(f"--plan {args.plan}"):
        header = read_header(args.plan)
        if not header.get("plan"):
            raise UserError("written before plans were kept")
        if find_network(header["model"]) != args.model:
            raise UserError(f"is of {header['model']}, not of {args.model}")
    return header


def create_augment(args, inputs: Inputs) -> Augment:
    """The random changes that the options ask for; what they uncover shows the mean colour."""
    decoded = not inputs.data.splits["train"].in_memory
    changes = args.erase, args.mixup, args.cutmix
    return Augment(args.augment, decoded, args.seed, *changes, fill=inputs.mean)


def create_objective(args, inputs: Inputs) -> losses.Objective:
    """What the options say is minimized."""
    accelerator, teacher = inputs.accelerator, None
    if inputs.teacher:
        network, prepare, _ = inputs.teacher
        network.to(accelerator.device).requires_grad_(False)
        prepare.to(accelerator.device)

        def teacher(images):
            with torch.no_grad(), accelerator.autocast():
                return network(prepare(images)).float()

    return losses.Objective(
        args.loss,
        len(inputs.data.classes),
        inputs.image_weights.to(accelerator.device),
        args.label_smoothing,
        teacher,
        0.5 if args.teacher_share is None else args.teacher_share,
        args.temperature or 4.0,
    )


def create_watch(args, inputs: Inputs, net: Net, board):
    """What --watch logs to a TensorBoard, on the main process; None without."""
    if not args.watch or not inputs.accelerator.is_main_process:
        return None
    from lenslet.training.watch import Watch

    accelerator, count = inputs.accelerator, len(inputs.data.splits["train"])
    batch = inputs.data.batch("train", range(min(32, count)))
    images = net.prepare(batch.images.to(accelerator.device))
    shown = net.bare, board, images, options.REMEDIES
    return Watch(*shown, say=tqdm.write, scaler=accelerator.scaler)


def create_header(args, inputs: Inputs, net: Net) -> dict:
    """What weights.read_header() will find that is known before training."""
    data, network = inputs.data, net.bare
    reading = {key: getattr(data, key) for key in ("classes", "channels", "image_size", "crop")}
    return {
        "model": args.model,
        "model_args": network.arguments,
        "stem": network.stem_note,
        **reading,
        "input_size": network.input_size,
        "mean": inputs.mean,
        "std": inputs.std,
        "data": args.data,
        "data_sha256": data.sha256,
        "options": stored(args),
    }
