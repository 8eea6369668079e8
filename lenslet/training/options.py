"""The options of training, and which of them go together."""

import argparse
from pathlib import Path

from lenslet.cli import (
    Parser,
    add_running_options,
    create_parser,
    number,
    parse,
    steps_or_percent,
    steps_or_time,
    time_span,
)
from lenslet.data.augment import AUGMENTATIONS
from lenslet.data.load import recipe_for
from lenslet.errors import UserError
from lenslet.training.losses import LOSSES, loss_name
from lenslet.training.optimizers import OPTIMIZERS, optimizer_name
from lenslet.training.schedules import schedule_name
from model import network_defaults

METRICS = ("accuracy", "f1", "loss")
MEMORISED = 200  # epochs that --overfit takes at most, where --epochs does not say more


def build_parser(description: str = "") -> Parser:
    """train.py's parser; description is its module docstring."""
    parser = create_parser(description)
    flag = argparse.BooleanOptionalAction
    share, count = number(float, 0, 1), number(int, 1)
    positive = number(float, 0, above=True)
    add = parser.add_argument
    add("--config", metavar="FILE", help="a YAML file of options, or a recipe's name")

    add = parser.add_argument_group("data").add_argument
    add("--data", help="a known set's name, or a folder (default: cifar10)")
    help = "kept of the training pictures where there is no val/; 0: train on all, keep the last"
    add("--val", metavar="SHARE", type=number(float, 0, 0.9), default=0.1, help=help)
    help = "validate on the K-th of N parts of the training pictures instead (`make folds`)"
    add("--fold", metavar="K/N", type=fold, help=help)
    help = "for a quick try: train on so many pictures only, and validate on as many at most"
    add("--limit", metavar="N", type=number(int, 2), help=help)
    help = "a check: can so many pictures be learned by heart, without anything that hinders it?"
    add("--overfit", metavar="N", type=number(int, 2), help=help)
    help = "side that the network is fed (default: small pictures' own, or the network's)"
    add("--image-size", metavar="PIXELS", type=count, help=help)
    help = "of each channel, 0..1 scale (default: small pictures' own, or the network's)"
    add("--mean", metavar="X", type=share, nargs="+", help=help)
    add("--std", metavar="X", type=number(float, 0, 1, above=True), nargs="+", help="likewise")

    add = parser.add_argument_group("augmentation").add_argument
    help = (
        "light: shifts, or random crops of photographs; standard: and mirroring; trivial, rand: and"
        " a random change or two (TrivialAugment, RandAugment)"
    )
    add("--augment", choices=list(AUGMENTATIONS), default="none", help=help)
    help = "of the pictures that lose a rectangle (random erasing)"
    add("--erase", metavar="SHARE", type=share, default=0.0, help=help)
    help = "mix pictures in pairs, the more evenly the larger (0.2)"
    add("--mixup", metavar="ALPHA", type=alpha, default=0.0, help=help)
    help = "replace a rectangle by another picture's (1)"
    add("--cutmix", metavar="ALPHA", type=alpha, default=0.0, help=help)

    add = parser.add_argument_group("network").add_argument
    add("--model", help="one of `python model.py`, a timm name, or torchvision/NAME")
    help = "channels of fastnet's first block (default: 32, or what suits --time)"
    add("--width", metavar="N", type=number(int, 8, 1024), help=help)
    help = "zero that share of what the last layer is fed"
    add("--dropout", metavar="SHARE", type=number(float, 0, 0.99), default=0.0, help=help)
    help = "begin with the weights of a file or URL (.safetensors, .pth), or with timm's"
    add("--pretrained", metavar="PATH|URL|timm", help=help)
    help = "train only the last layer for so many epochs"
    add("--freeze-epochs", metavar="N", type=number(int, 0), default=0, help=help)
    help = "never train the layers or parameters of these names ('blocks.0*')"
    add("--freeze", metavar="PATTERN", nargs="+", help=help)

    add = parser.add_argument_group("training").add_argument
    add("--epochs", metavar="N", type=count, default=10, help="times through all pictures")
    help = "train for so long (60s, 5m, 2h) instead, all from the first step to the last counted in"
    add("--time", metavar="T", type=time_span, help=help)
    help = "weights trained with --time: repeat their steps, whatever the clock says"
    add("--plan", metavar="FILE", help=help)
    help = "pictures per optimizer step, over all processes"
    add("-b", "--batch-size", metavar="N", type=count, default=64, help=help)
    help = "compute a batch in so many parts of 2 or more pictures, to save memory"
    add("--accumulate", metavar="PARTS", type=count, default=1, help=help)
    help = f"{', '.join(OPTIMIZERS)}, or any name of timm's; adamw suits most networks"
    add("--optimizer", metavar="NAME", type=optimizer_name, default="adamw", help=help)
    add("--lr", metavar="X", type=positive, default=0.001, help="learning rate")
    add("--momentum", metavar="X", type=share, default=0.9, help="of sgd, muon and their like")
    add("--nesterov", action=flag, default=False, help="Nesterov's momentum for sgd")
    help = "pull to zero, of all but biases and norms"
    add("--weight-decay", metavar="X", type=number(float, 0), default=0.01, help=help)
    help = "added to the loss: so much of the sum of absolute weights, of all but biases and norms"
    add("--l1", metavar="X", type=number(float, 0), default=0.0, help=help)
    help = (
        "of the learning rate: constant, cosine, linear, step:30:0.1, multistep:30,60:0.1, "
        "restarts:5:2, onecycle (which moves the momentum too), plateau:0.1:3 (30, 60, 5 and 3 "
        "are epochs)"
    )
    add("--schedule", metavar="NAME", type=schedule_name, default="cosine", help=help)
    help = "optimizer steps (500), or share of them all (20%%), of linear rise to the learning rate"
    add("--warmup", metavar="N", type=steps_or_percent, default="0", help=help)
    help = "largest norm of all gradients together"
    add("--clip", metavar="NORM", type=positive, help=help)
    help = "of the first weights, the order and the augmentation"
    add("--seed", metavar="N", type=number(int, 0, 2**63 - 1), default=0, help=help)

    add = parser.add_argument_group("loss").add_argument
    help = f"{', '.join(LOSSES)}; focal:2 is focal with its gamma; mse: of probabilities"
    add("--loss", metavar="NAME", type=loss_name, default="cross-entropy", help=help)
    help = "of the true class's weight in the loss, spread over all classes"
    add("--label-smoothing", metavar="SHARE", type=number(float, 0, 0.99), default=0.0, help=help)
    help = "of the classes in the loss: balanced, for classes of unequal size, or W1,W2,…"
    add("--class-weights", metavar="WEIGHTS", type=class_weights, help=help)
    help = "of single pictures in the loss: a CSV file with the columns file and weight"
    add("--picture-weights", metavar="FILE", help=help)
    help = "learn from the answers of these weights too (distillation)"
    add("--teacher", metavar="WEIGHTS", help=help)
    help = "of the teacher in the loss (0.5)"
    add("--teacher-share", metavar="SHARE", type=share, help=help)
    help = "that softens both answers (4)"
    add("--temperature", metavar="T", type=positive, help=help)

    add = parser.add_argument_group("what is kept").add_argument
    help = "by which an epoch is the best: accuracy, macro f1 or loss on the validation pictures"
    add("--metric", choices=METRICS, help=f"{help} (default: accuracy)")
    help = "weights: best epoch's (default), last one's, or the best and all of them in epochs/"
    add("--keep", choices=["best", "last", "all"], help=help)
    help = "stop after so many epochs without a better one; 0: never"
    add("--patience", metavar="EPOCHS", type=number(int, 0), help=help)
    help = "by how much better, for --patience and plateau"
    add("--min-delta", metavar="X", type=number(float, 0), default=0.0, help=help)
    help = "keep a moving average of the weights, of about 1 / (1 - DECAY) steps (0.999)"
    add("--ema", metavar="DECAY", type=number(float, 0, 0.999999, above=True), help=help)

    add = add_running_options(parser)
    help = "let torch compile the network, which takes a minute, and did not pay on a CPU"
    add("--compile", action=flag, default=False, help=help)
    help = "have a GPU compute the same bits every time, as a CPU does: slower"
    add("--deterministic", action=flag, default=False, help=help)

    add = parser.add_argument_group("output").add_argument
    add("--output", metavar="DIR", help="run folder (default: runs/<data>-<model>)")
    help = "steps (500) or time (90s, 5m, 2h) between checkpoints; each epoch ends with one too"
    add("--save-every", metavar="N", type=steps_or_time, default="5m", help=help)
    help = "go on with this run, with its options (default: the unfinished run with these options)"
    add("--resume", metavar="RUN", help=help)
    help = "begin a new run"
    add("--no-resume", dest="resume", action="store_const", const=False, help=help)
    help = "steps between two points of the loss curve"
    add("--log-every", metavar="STEPS", type=count, default=50, help=help)
    help = "gradients, histograms, feature maps and the graph for TensorBoard; costs up to 5 %%"
    add("--watch", action=flag, default=False, help=help)
    return parser


def fold(text: str) -> str:
    """An argparse type: '2/5', as it was written."""
    part, slash, parts = text.partition("/")
    if not slash:
        raise argparse.ArgumentTypeError(f"{text!r} is no fold like 2/5")
    number(int, 1, number(int, 2)(parts))(part)
    return text


def alpha(text: str) -> float:
    """An argparse type: 0, or a parameter that a Beta distribution can be drawn with."""
    value = number(float, 0, 100)(text)
    return value and number(float, 0.01)(text)


def class_weights(text: str) -> str:
    """An argparse type: 'balanced' or 'w1,w2,…', as it was written."""
    if text != "balanced":
        weights = [number(float, 0)(word) for word in text.split(",")]
        if not any(weights):
            raise argparse.ArgumentTypeError("no weight is above 0")
    return text


def complete(parser: Parser, typed, argv: list[str] | None, data: str):
    """All options of a training on a data set: those typed, over those of the set's recipe.

    typed: argv alone, parsed.  Errors: UserError, as settle() and for a network that is unknown.
    """
    args = typed
    if not args.model and not args.config:
        args = parse(parser, argv, recipe=recipe_for(data))
    if not args.model:
        raise UserError(f"--config {args.config} names no model: add one there, or give --model")
    args.data = data
    check(args)
    network_defaults(args.model)  # a misspelt name ends here, before any download
    return args


def validates(args) -> bool:
    """Whether there is anything to judge an epoch by."""
    return bool(args.val or args.fold or args.overfit)


def run_name(args) -> str:
    """The name of a run's folder below runs/."""
    name = f"{Path(args.data).name}-{args.model.replace('/', '-')}"
    name += f"-fold-{args.fold.replace('/', '-of-')}" if args.fold else ""
    return f"{name}-overfit-{args.overfit}" if args.overfit else name


def check(args) -> None:
    """Refuse what makes no sense together, and set what follows from other options.

    Before anything is read or fetched.  Errors: UserError.
    """
    for name in ("pretrained", "teacher", "picture_weights", "plan"):
        path = getattr(args, name)
        if path and path != "timm" and Path(path).exists():  # wherever the next command is given
            setattr(args, name, str(Path(path).resolve()))
    if args.overfit:
        _for_overfitting(args)
    mixes = [f"--{name}" for name in ("mixup", "cutmix") if getattr(args, name)]
    soft = " and ".join(mixes + (["--label-smoothing"] if args.label_smoothing else []))
    by_scores = args.patience or args.schedule.startswith("plateau")
    refusals = [
        (
            args.loss.startswith("focal") and soft,
            f"--loss {args.loss} is for pictures of one class each: leave out {soft}",
        ),
        (
            args.nesterov and (args.optimizer != "sgd" or not args.momentum),
            "--nesterov is for --optimizer sgd with a --momentum",
        ),
        (
            args.width and args.model != "fastnet",
            f"--width is of fastnet, not of {args.model}",
        ),
        (
            args.freeze_epochs and not args.pretrained,
            "--freeze-epochs is for --pretrained weights: nothing is learned from random ones",
        ),
        (
            not args.teacher and (args.teacher_share is not None or args.temperature),
            "--teacher-share and --temperature are for a --teacher",
        ),
        (
            args.teacher and args.teacher_share == 0,
            "--teacher-share 0 leaves the teacher out: leave out --teacher",
        ),
        (
            args.min_delta and not by_scores,
            "--min-delta is for --patience or --schedule plateau",
        ),
        (
            args.metric and args.keep == "last" and not by_scores,
            "--metric chooses nothing with --keep last: leave one out",
        ),
        *(
            (
                not validates(args),
                f"{wish} needs validation pictures: give a --val above 0, or --fold",
            )
            for wish in needing_validation(args)
        ),
    ]
    for refused, said in refusals:
        if refused:
            raise UserError(said)


def needing_validation(args) -> list[str]:
    """The options given that need validation pictures."""
    given = {
        "--metric": args.metric,
        "--patience": args.patience,
        "--keep best": args.keep == "best",
        "--schedule plateau": args.schedule.startswith("plateau"),
    }
    return [option for option, value in given.items() if value]


def check_with_data(args, data, importance, teacher) -> None:
    """Refuse what does not go with the data, before there is a run folder.

    importance float [N]: what each training picture weighs; teacher: as checkpoint.load_model()
    gives it, or None.  Errors: UserError.
    """
    count = len(data.splits["train"])
    if "val" not in data.splits:
        for wish in needing_validation(args):
            raise UserError(f"{wish} needs validation pictures: --val {args.val} leaves none")
    if args.overfit and count < args.overfit:
        raise UserError(f"--overfit {args.overfit}: there are {count} training pictures")
    if not importance.any():
        raise UserError("--class-weights, --picture-weights: no picture is left with a weight")
    for key, ours in (("classes", data.classes), ("channels", data.channels)):
        if teacher and teacher[2][key] != ours:
            raise UserError(f"--teacher {args.teacher}: has {key} {teacher[2][key]}, not {ours}")


def _for_overfitting(args) -> None:
    """What --overfit is without; the picture weights and the network stay."""
    for other in ("fold", "limit", "time", "plan", "teacher", "freeze_epochs"):
        if getattr(args, other):
            raise UserError(f"--overfit goes without --{other.replace('_', '-')}")
    for name in ("erase", "mixup", "cutmix", "dropout", "weight_decay", "l1", "label_smoothing"):
        setattr(args, name, 0.0)
    args.augment, args.schedule, args.warmup, args.ema = "none", "constant", "0", None
    args.patience, args.min_delta, args.metric, args.keep = 0, 0.0, None, None
    args.epochs = max(args.epochs, MEMORISED)
    args.batch_size = min(args.batch_size, args.overfit)
