"""train.py's options: the table, where their values come from, and how two runs' differ.

A value comes from the command line, else from --config (or the resumed run's options.yaml), else
from the recipe of the data set, else from the table's default.  Nothing here imports torch before
the options are parsed, so that --help and a misspelt option answer at once.
"""

import argparse
import sys
from pathlib import Path

from lenslet import cli
from lenslet.cli import as_written, number, parse_duration
from lenslet.errors import OutsideError, UserError, error_context, nearest
from lenslet.training.checks import check, turn_off_regularization
from lenslet.training.schedules import canonical, parse_schedule

LOSSES = ("cross-entropy", "focal", "bce", "mse")
AUGMENTATIONS = ("none", "light", "standard", "trivial", "rand")
OPTIMIZERS = ("sgd", "adam", "adamw", "adabelief", "ranger", "muon")  # the tested ones
# Options that change no bit of the weights: an interrupted run may go on with other values.
FREE = {"output", "workers", "log_every", "save_every", "watch", "decided"}
NONE = "none"  # pretrained: random weights
AUTO = "auto"  # the model that decide.py chooses, with all of these that are not given
DECIDED = {
    *("model", "pretrained", "image_size", "width", "in_memory", "fit_head", "freeze_epochs"),
    *("optimizer", "lr", "momentum", "weight_decay", "schedule", "warmup", "clip", "batch_size"),
    *("label_smoothing", "augment", "keep"),
}
SAID = {"accumulate"}  # may change too, as memory may be short: last bits, or batch norm's images
# What to try when gradients go wrong, by the kinds of watch.judge().
REMEDIES = {
    "infinite": "lower --lr, or set --clip",
    "exploding": "lower --lr, or set --clip or --warmup",
    "vanishing": "batch norm, residual connections, or ReLU instead of sigmoid may help",
}


def build_parser(description: str = "") -> cli.Parser:
    """train.py's parser; description is its module docstring."""
    parser = cli.create_parser(description)
    flag = argparse.BooleanOptionalAction
    share, count = number(float, 0, 1), number(int, 1, 10**9)
    positive = number(float, 0, above=True)
    add = parser.add_argument
    add("--config", metavar="FILE", help="a YAML file of options, or a recipe's name")

    add = parser.add_argument_group("data").add_argument
    help = "a known set's name, or a folder of images, in a folder per class (default: cifar10)"
    add("--data", help=help)
    add("--labels", metavar="FILE", help=cli.LABELS)
    help = "share of the training images kept for validation where there is no val/; 0: none"
    add("--val", metavar="SHARE", type=number(float, 0, 0.9), default=0.1, help=help)
    help = "validate on the K-th of N parts of the training images instead (see `make folds`)"
    add("--fold", metavar="K/N", type=as_written(cli.fold), help=help)
    help = "for a quick try: use only N training images, and at most N validation images"
    add("--limit", metavar="N", type=number(int, 2), help=help)
    help = "sanity check: can the network memorize N images, with all regularization off?"
    add("--overfit", metavar="N", type=number(int, 2), help=help)
    help = "side of the images that the network is fed (default: that of small images, or its own)"
    add("--image-size", metavar="PIXELS", type=count, help=help)
    help = "mean of each channel, 0..1 scale (default: pretrained weights', images', or network's)"
    add("--mean", metavar="X", type=share, nargs="+", help=help)
    add("--std", metavar="X", type=number(float, 0, 1, above=True), nargs="+", help="deviation")
    help = "decode photographs once, into memory (default: if they take a quarter of it at most)"
    add("--in-memory", action=flag, help=help)

    add = parser.add_argument_group("augmentation").add_argument
    help = (
        "light: shifts, or random crops of photographs; standard: mirroring too; trivial, rand: "
        "one or two random operations more (TrivialAugment, RandAugment)"
    )
    add("--augment", choices=AUGMENTATIONS, default="none", help=help)
    help = "share of the images that lose a rectangle (random erasing)"
    add("--erase", metavar="SHARE", type=share, default=0.0, help=help)
    help = "mix images in pairs; a larger ALPHA mixes more evenly (try 0.2)"
    add("--mixup", metavar="ALPHA", type=cli.alpha, default=0.0, help=help)
    help = "replace a rectangle by another image's (try 1)"
    add("--cutmix", metavar="ALPHA", type=cli.alpha, default=0.0, help=help)

    add = parser.add_argument_group("network").add_argument
    help = (
        "one of `python model.py`, a timm name, or torchvision/NAME; auto: what suits photographs"
    )
    add("--model", help=help)
    help = "channels of fastnet's first block (default: 32, or what suits --time)"
    add("--width", metavar="N", type=number(int, 8, 1024), help=help)
    help = "dropout before the last layer"
    add("--dropout", metavar="P", type=number(float, 0, 0.99), default=0.0, help=help)
    help = (
        "start from the weights of a file or URL (.safetensors, .pth), or from timm's; auto: from "
        "timm's if they can be had; none: from random weights"
    )
    add("--pretrained", metavar="PATH|URL|timm|auto|none", help=help)
    help = "first of all, fit the last layer to what the others make of N views of each image"
    add("--fit-head", metavar="N", type=number(int, 0), default=0, help=help)
    help = "train only the last layer for the first N epochs"
    add("--freeze-epochs", metavar="N", type=number(int, 0), default=0, help=help)
    help = "never train the layers or parameters of these names ('blocks.0*')"
    add("--freeze", metavar="PATTERN", nargs="+", help=help)

    add = parser.add_argument_group("training").add_argument
    add("--epochs", metavar="N", type=count, default=10, help="passes over all training images")
    help = "train for this long instead (60s, 5m, 2h), from the first step to the last"
    add("--time", metavar="T", type=as_written(parse_duration), help=help)
    add("--plan", metavar="FILE", help=argparse.SUPPRESS)  # reproduce.py's: a timed run's steps
    # In options.yaml: the options that were not given, and that decide.py has chosen.
    add("--decided", nargs="*", default=[], help=argparse.SUPPRESS)
    help = "images per optimizer step, over all processes"
    add("-b", "--batch-size", metavar="N", type=count, default=64, help=help)
    help = (
        "compute a batch in N parts, to save memory; same result, but batch norm sees a part only"
    )
    add("--accumulate", metavar="N", type=count, default=1, help=help)
    help = f"{', '.join(OPTIMIZERS)}, or any of timm's; adamw suits most networks"
    add("--optimizer", metavar="NAME", type=str.lower, default="adamw", help=help)
    add("--lr", metavar="X", type=positive, default=0.001, help="learning rate")
    add("--momentum", metavar="X", type=share, default=0.9, help="momentum of sgd, muon etc.")
    add("--nesterov", action=flag, default=False, help="Nesterov momentum for sgd")
    help = "weight decay, of all parameters but biases and norms"
    add("--weight-decay", metavar="X", type=number(float, 0), default=0.01, help=help)
    help = "L1 penalty: this times the sum of absolute weights, of all but biases and norms"
    add("--l1", metavar="X", type=number(float, 0), default=0.0, help=help)
    help = (
        "learning rate: constant, cosine, linear, step:30:0.1, multistep:30,60:0.1, "
        "restarts:5:2, onecycle (moves the momentum too), plateau:0.1:3; 30, 60, 5 and 3 are epochs"
    )
    add("--schedule", metavar="NAME", type=schedule, default="cosine", help=help)
    help = "optimizer steps (500), or share of them all (20%%), of linear rise to the learning rate"
    add("--warmup", metavar="N", type=as_written(cli.steps_or_percent), default="0", help=help)
    add("--clip", metavar="NORM", type=positive, help="clip the norm of all gradients together")
    help = "seed of the initial weights, the order of the images, and the augmentation"
    add("--seed", metavar="N", type=number(int, 0, 2**63 - 1), default=0, help=help)

    add = parser.add_argument_group("loss").add_argument
    help = f"{', '.join(LOSSES)}; focal:2 sets focal's gamma; mse is of the probabilities"
    add("--loss", metavar="NAME", type=loss, default="cross-entropy", help=help)
    help = "share of the true class's weight that is spread over all classes"
    add("--label-smoothing", metavar="SHARE", type=number(float, 0, 0.99), default=0.0, help=help)
    help = "weights of the classes in the loss: balanced, for unequal sizes, or W1,W2,…"
    add("--class-weights", metavar="WEIGHTS", type=as_written(cli.class_weights), help=help)
    help = "weights of single images in the loss: a CSV file with columns file and weight"
    add("--image-weights", metavar="FILE", help=help)
    add("--teacher", metavar="WEIGHTS", help="distillation: learn from these weights' answers too")
    help = "share of the teacher in the loss (default with --teacher: 0.5)"
    add("--teacher-share", metavar="SHARE", type=share, help=help)
    help = "softens the answers of both (default with --teacher: 4)"
    add("--temperature", metavar="T", type=positive, help=help)

    add = parser.add_argument_group("what is kept").add_argument
    help = "validation figure that makes an epoch the best (default: accuracy; f1 is the macro F1)"
    add("--metric", choices=["accuracy", "f1", "loss"], help=help)
    help = "weights of the best epoch (default), of the last, or the best and all in epochs/"
    add("--keep", choices=["best", "last", "all"], help=help)
    help = "stop after N epochs without a better one; 0: never"
    add("--patience", metavar="N", type=number(int, 0), help=help)
    help = "what counts as better, for --patience and plateau"
    add("--min-delta", metavar="X", type=number(float, 0), default=0.0, help=help)
    help = "keep a moving average of the weights over about 1 / (1 - DECAY) steps (0.999)"
    add("--ema", metavar="DECAY", type=number(float, 0, 0.999999, above=True), help=help)

    add = cli.add_running_options(parser)
    add("--device", default="auto", help=cli.DEVICE)
    help = "torch.compile the network: takes a minute, and has not paid off on a CPU"
    add("--compile", action=flag, default=False, help=help)
    help = "make a GPU compute the same bits every time, as a CPU does; slower"
    add("--deterministic", action=flag, default=False, help=help)

    add = parser.add_argument_group("output").add_argument
    add("--output", metavar="DIR", help="run folder (default: runs/<data>-<model>)")
    help = "steps (500) or time (90s, 5m, 2h) between checkpoints; each epoch ends with one too"
    add("--save-every", metavar="N", type=as_written(cli.steps_or_time), default="5m", help=help)
    help = "resume this run, with its options (default: the unfinished run with the same options)"
    add("--resume", metavar="RUN", help=help)
    add("--no-resume", dest="resume", action="store_const", const=False, help="start a new run")
    help = "steps between two points of the loss curve"
    add("--log-every", metavar="N", type=count, default=50, help=help)
    help = "log gradients, histograms, feature maps and the graph; costs up to 5 %% of the time"
    add("--watch", action=flag, default=False, help=help)
    return parser


def schedule(text: str) -> str:
    """An argparse type: a schedule of SCHEDULES, as it is stored."""
    parse_schedule(text)
    return canonical(text)


def loss(text: str) -> str:
    """An argparse type: a name of LOSSES; focal may have its gamma ('focal:2'), CE is usual."""
    name, colon, gamma = text.lower().replace("_", "-").partition(":")
    name = {"ce": "cross-entropy"}.get(name, name)
    if name not in LOSSES or (colon and name != "focal"):
        known = f"{nearest(name, LOSSES)}: {', '.join(LOSSES)}"
        raise argparse.ArgumentTypeError(f"no loss {text!r}{known}")
    if colon:
        number(float, 0)(gamma)
    return name + colon + gamma


def parse(argv: list[str] | None, description: str = "") -> dict:
    """The options given on the command line, in --config and by the resumed run: {name: value}.

    Errors: UserError naming the option and, if it comes from one, the file; OutsideError on
    Windows.
    """
    if sys.platform == "win32":
        raise OutsideError("training needs Linux or macOS (WSL will do); predict.py works here")
    given = cli.explicit(parser := build_parser(description), argv)
    layers = [cli.read_config(parser, given["config"])] if given.get("config") else []
    if given.get("resume"):
        with error_context("--resume"):
            run = named_run(given["resume"])
        layers.insert(0, cli.read_config(parser, run / "options.yaml"))
    return {name: value for layer in [*layers, given] for name, value in layer.items()}


def named_run(path: str) -> Path:
    """The run folder that --resume names, itself or by something in it.  Errors: UserError."""
    here = Path(path).resolve()
    for run in (here, *here.parents):
        if (run / "options.yaml").is_file():
            return run
    raise UserError(f"{path}: not in a run folder (one with options.yaml)")


def needs_recipe(given: dict) -> bool:
    """Whether the recipe of the data set supplies the defaults: it was made for its own network."""
    return not (given.get("model") or given.get("config") or given.get("resume"))


def complete(given: dict, data: str, recipe: str | None) -> argparse.Namespace:
    """All options of a training on a data set: those given, over those of its recipe.

    With the model AUTO, those of DECIDED that were not given are still to be decided, and are not
    checked.  Errors: UserError for a name that is not known, and as check().
    """
    parser = build_parser()
    layers = [cli.read_config(parser, recipe)] if recipe else []
    args = cli.layered(parser, *layers, given)
    args.data = data
    if args.time and "time" not in given and {"epochs", "overfit", "plan"} & given.keys():
        args.time = None  # only the recipe's
    if not args.model:
        raise UserError(f"--config {args.config} names no model: add one there, or give --model")
    for name in ("pretrained", "teacher", "image_weights", "labels", "plan"):
        path = getattr(args, name)
        if path and path != "timm" and Path(path).exists():  # the run may go on from elsewhere
            setattr(args, name, str(Path(path).resolve()))
    if names := undecided(args):
        args.decided = sorted(names | (DECIDED - given.keys() if args.model == AUTO else set()))
    args.pretrained = None if args.pretrained == NONE else args.pretrained
    return args if {"model", "pretrained"} & names else checked(args)


def undecided(args) -> set[str]:
    """The options that decide.py is still to give a value; others may follow from the model's."""
    names = {name for name in ("model", "pretrained") if getattr(args, name) == AUTO}
    return names | ({"in_memory"} if args.in_memory is None else set())


def checked(args) -> argparse.Namespace:
    """The options, if they go together.  Errors: UserError."""
    from lenslet.training.optimizers import check_optimizer  # these import torch
    from model import find_network

    if args.overfit:
        turn_off_regularization(args)
    check(args)
    with error_context("--optimizer"):
        check_optimizer(args.optimizer)
    with error_context("--model"):
        args.model = find_network(args.model)
    return args


def read(run: Path) -> dict:
    """All options of a run, by its options.yaml.  Errors: UserError."""
    parser = build_parser()
    return vars(cli.layered(parser, cli.read_config(parser, run / "options.yaml")))


def run_name(args) -> str:
    """The name of a run's folder below runs/; "dataset" alone would name many."""
    data = Path(args.data)
    common = data.name.lower() in ("data", "dataset", "datasets", "images", "pictures", "photos")
    name = f"{data.parent.name}-{data.name}" if common and data.parent.name else data.name
    name += f"-{args.model.replace('/', '-')}"
    name += f"-fold-{args.fold.replace('/', '-of-')}" if args.fold else ""
    return f"{name}-overfit-{args.overfit}" if args.overfit else name


def advice(args) -> tuple[str, str, str]:
    """What meter.explain_errors() says if GPU memory is short, if an operation is not
    deterministic, and if a process that decodes images was killed.
    """
    now = f"--batch-size {args.batch_size} --accumulate {args.accumulate}"
    same, less = 2 * args.accumulate, max(1, args.batch_size // 2)
    return (
        f"with {now}; try --accumulate {same}, the same but for batch norm, or --batch-size {less}",
        "leave out --deterministic",
        "If memory was short, try fewer --workers; run the same command to resume",
    )


def differences(run: Path, args, among: set[str] | None = None) -> str:
    """How a run's options differ from these in what its weights depend on; '' if they do not.

    among: only these names, instead of all but those that an interrupted run may go on without.
    """
    try:
        before = read(run)
    except UserError:
        return "its options.yaml cannot be read"
    now = cli.stored(args)
    names = among or now.keys() - FREE - SAID
    if undecided(args):  # a run of these options may have decided anything
        names = names - (set(before["decided"]) & set(args.decided))
    return ", ".join(
        f"--{name.replace('_', '-')} was {before[name]}, now {now[name]}"
        for name in now
        if name in names and before[name] != now[name]
    )
