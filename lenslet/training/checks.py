"""Which of train.py's options do not go together, with each other or with the data."""

from lenslet.errors import UserError, counted

MEMORIZED_AFTER = 200  # epochs that --overfit takes at most, unless --epochs says more


def turn_off_regularization(args) -> None:
    """What --overfit trains without; image weights and the network stay."""
    for other in ("fold", "limit", "time", "plan", "teacher", "freeze_epochs"):
        if getattr(args, other):
            raise UserError(f"--overfit cannot be used with --{other.replace('_', '-')}")
    for name in ("erase", "mixup", "cutmix", "dropout", "weight_decay", "l1", "label_smoothing"):
        setattr(args, name, 0.0)
    args.augment, args.schedule, args.warmup, args.ema = "none", "constant", "0", None
    args.patience, args.min_delta, args.metric, args.keep = 0, 0.0, None, None
    args.epochs = max(args.epochs, MEMORIZED_AFTER)
    args.batch_size = min(args.batch_size, args.overfit)


def check(args) -> None:
    """Refuse options that do not go together, before anything is read or fetched.

    Errors: UserError naming them.
    """
    mixes = ("mixup", "cutmix", "label_smoothing")
    soft = " and ".join(f"--{m.replace('_', '-')}" for m in mixes if getattr(args, m))
    uses_scores = args.patience or args.schedule.startswith("plateau")
    refusals = {
        f"--loss {args.loss} cannot be used with {soft}, which mixes classes": (
            args.loss.startswith("focal") and soft
        ),
        "--nesterov needs --optimizer sgd and a --momentum": (
            args.nesterov and (args.optimizer != "sgd" or not args.momentum)
        ),
        f"--width is an option of fastnet, not of {args.model}": (
            args.width and args.model != "fastnet"
        ),
        "--freeze-epochs needs --pretrained: there is no point in freezing random weights": (
            args.freeze_epochs and not args.pretrained
        ),
        "--fit-head needs --pretrained: random weights make nothing of an image": (
            args.fit_head and not args.pretrained
        ),
        "--teacher-share and --temperature need a --teacher": (
            not args.teacher and (args.teacher_share is not None or args.temperature)
        ),
        "--teacher-share 0 leaves the teacher out: leave out --teacher": (
            args.teacher and args.teacher_share == 0
        ),
        "--image-weights cannot be used with --labels, which has a column weight for that": (
            args.labels and args.image_weights
        ),
        "--min-delta needs --patience or --schedule plateau": args.min_delta and not uses_scores,
        "--metric chooses nothing with --keep last: leave one out": (
            args.metric and args.keep == "last" and not uses_scores
        ),
    }
    for message, refused in refusals.items():
        if refused:
            raise UserError(message)
    if not validates(args):
        for option in needing_validation(args):
            raise UserError(f"{option} needs validation images: set --val above 0, or --fold")


def check_with_data(args, data, weights, teacher: dict | None) -> None:
    """Refuse what does not go with the data, before there is a run folder.

    weights float [N]: of the training images; teacher: its header.  Errors: UserError.
    """
    count = len(data.splits["train"])
    if count < 2:
        raise UserError(f"--data {args.data}: {counted(count, 'training image')}, not 2 at least")
    if "val" not in data.splits:
        for option in needing_validation(args):
            raise UserError(f"{option} needs validation images, and --val {args.val} leaves none")
    if args.overfit and count < args.overfit:
        raise UserError(f"--overfit {args.overfit}: there are only {count} training images")
    if not weights.any():
        raise UserError("--class-weights, --image-weights: no image has a weight above 0")
    for key, ours in (("classes", data.classes), ("channels", data.channels)):
        if teacher and teacher[key] != ours:
            raise UserError(f"--teacher {args.teacher}: has {key} {teacher[key]}, not {ours}")


def cautions(args, counts, steps: int) -> list[str]:
    """What is worth knowing of options that are allowed, a line each.

    counts int64 [classes]: training images of each; steps: of the run, unless it is by the clock.
    """
    least, most = counts.min().item(), counts.max().item()
    timed, warmup = args.time or args.plan, args.warmup
    found = {
        f"classes have from {least:,} to {most:,} training images: --class-weights balanced gives "
        "each class the same weight": most > 3 * least
        and not (args.class_weights or args.image_weights),
        f"--warmup {warmup} is as long as the run of {steps:,} steps: it takes half of them": (
            not timed and "%" not in warmup and int(warmup) >= steps
        ),
    }
    return [text for text, applies in found.items() if applies]


def needing_validation(args) -> list[str]:
    """The options given that need validation images."""
    needing = {
        "--metric": args.metric,
        "--patience": args.patience,
        "--keep best": args.keep == "best",
        "--schedule plateau": args.schedule.startswith("plateau"),
    }
    return [option for option, given in needing.items() if given]


def validates(args) -> bool:
    """Whether there are images to validate an epoch on."""
    return bool(args.val or args.fold or args.overfit)
