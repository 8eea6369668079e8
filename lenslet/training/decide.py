"""All options of a training: those given, its recipe's and, for photographs, what is left to the
program: the network, the size of its images, and whether they are kept in memory.

A run stores what was decided among its options, so that it goes on, and is reproduced, with that.
"""

import functools
import time
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from accelerate import Accelerator

from lenslet import cli
from lenslet.data.cache import fits
from lenslet.data.layout import find_folder
from lenslet.data.load import RECIPES, choose_data, list_images, recipe_for
from lenslet.data.sets import is_set
from lenslet.distributed import start
from lenslet.distributed.determinism import compute_deterministically
from lenslet.errors import OutsideError, counted, error_context
from lenslet.training import options
from lenslet.training.clock import choose, measure_speed
from lenslet.training.pretrained import find_pretrained
from lenslet.weights import read_header
from model import NEWEST, create_model, network_defaults


class Candidate(NamedTuple):
    """A network, and the side of the images that it is fed, in pixels."""

    model: str
    side: int
    width: int | None = None  # of fastnet


# Networks for photographs, and how many images a run must have time to see for each; they are to be
# three epochs, too.
# Measured on 1,878 flowers of five classes, others to validate on, one thread without AMX: loss and
# accuracy by the side of the images, after equal seconds of processor time (one or two seeds; a
# seed is worth 1 to 2 points of accuracy, and less of the loss).
#    60 s:  64 px x 13 epochs 0.463, 84.7 %;  96 x 7 0.458, 84.7 %;  128 x 4 0.513, 83.9 %
#   165 s:  96 x 19 0.393, 87.5 %;  112 x 15 0.374, 89.8 %;  128 x 11 0.404, 87.3 %
#   330 s:  112 x 29 0.400, 87.3 %;  128 x 22 0.356, 89.4 %;  160 x 14 0.370, 87.5 %
# Whitened 2×2 patches at 64 pixels in place of 4×4, which take 2.7 times as long: 0.417 after
# 165 s.  Width 48 in place of 32: 0.387 there, no gain at equal time.  Of 245 ants and bees, each
# of 64, 112 and 128 pixels was right on 76 to 80 % after 120 s.
SCRATCH = (
    (Candidate("fastnet", 64, 32), 0),
    (Candidate("fastnet", 96, 32), 12_000),
    (Candidate("fastnet", 128, 32), 30_000),
    (Candidate("fastnet", 160, 32), 60_000),
)
# Not measured: their weights are not at hand where the figures above come from.
PRETRAINED = (
    (Candidate("mobilenetv3_small_100", 160), 0),
    (Candidate("mobilenetv3_large_100", 192), 4_000),
    (Candidate("resnet50", 224), 100_000),
)


def choose_options(given: dict, on_main=lambda work: work()):
    """All options of a training, with its data set and recipe.

    given: as options.parse() returns it.  on_main: has the main process alone do some work.
    Errors: UserError for options that do not go together, before any download.
    """
    name, recipe = given.get("data"), None
    with error_context(f"--data {name}"):
        if options.needs_recipe(given):
            recipe = on_main(lambda: recipe_for(name or "cifar10", given.get("labels")))
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


class Decision(NamedTuple):
    """What the user should know of what was decided, a line each, and the seconds it took."""

    notes: list[str]
    seconds: float


def decide(args, accelerator: Accelerator, unfinished: list[Path]) -> Decision:
    """Give the options that were left to the program their values, the same on all processes.

    unfinished: runs that this one may go on with, the newest first: the decisions of one with the
    same options stay.  Errors: UserError for options that do not go together then.
    """
    if is_set(args.data) or not options.undecided(args):
        return Decision([], 0.0)
    began = time.perf_counter()
    decided, notes = start.from_main_process(
        accelerator, lambda: _recall(args, unfinished) or _decide(args, accelerator)
    )
    vars(args).update(decided)
    options.checked(args)
    return Decision(notes, time.perf_counter() - began)


def _recall(args, unfinished: list[Path]):
    """What the first of these runs with the same options has decided; None if there is none."""
    for run in unfinished:
        if not options.differences(run, args):
            stored = options.read(run)
            return {name: stored[name] for name in args.decided}, []
    return None


def _decide(args, accelerator: Accelerator):
    """({option: value} of what is undecided, what the user should know)."""
    splits = list_images(find_folder(args.data), args.labels).splits
    classes = splits["train"]
    count = sum(map(len, classes.values()))
    if not (any(splits["val"].values()) or args.overfit):
        count = round(count * (1 - args.val))
    count = min(count, args.limit or args.overfit or count)
    decided, notes = {}, []
    if args.pretrained == options.AUTO or args.model == options.AUTO:
        decided, notes = _choose_network(args, accelerator, count, len(classes))
    side = decided.get("image_size", args.image_size)
    side = side or network_defaults(decided.get("model", args.model))["image_size"]
    if args.in_memory is None:
        decided["in_memory"] = fits(count, side)
    return {name: decided[name] for name in args.decided}, notes


def _choose_network(args, accelerator: Accelerator, count: int, classes: int):
    """As _decide(), of all but in_memory; count: training images."""
    source = options.AUTO if "pretrained" in args.decided else args.pretrained
    if args.model != options.AUTO:  # only whether it is pretrained was left open
        found, note = find_pretrained([args.model])
        return {"pretrained": "timm" if found else None}, [note]

    @functools.cache
    def epochs(candidate: Candidate) -> float:
        if not args.time:
            return args.epochs
        images_seen = _speed(candidate, args, accelerator, classes) * cli.parse_duration(args.time)
        return images_seen / count

    notes, parser = [], options.build_parser()
    if source in (options.AUTO, "timm"):
        table = _table(PRETRAINED, args, count)
        known = {candidate.model: candidate for candidate, _ in table}
        found, note = find_pretrained(list(known))
        if found and (wanted := choose(table, epochs)).model != found:
            found, note = find_pretrained([wanted.model, found])
        if not found and source == "timm":
            raise OutsideError(note)
        candidate, source = known.get(found), found and "timm"
        notes.append(note)
    elif source:
        ((candidate, _),) = _table([(_candidate_of(source), 0)], args, count)
    if not source:
        candidate = choose(_table(SCRATCH, args, count), epochs)
    ours = candidate.model == "fastnet"
    # For fastnet the same, whatever it starts from: at half the rate, with the last layer fitted
    # first, a minute gave 73 instead of 77 % on ants and bees from a network for flowers.
    recipe = cli.read_config(parser, "photos-scratch" if ours else "photos-finetune")
    decided = vars(cli.layered(parser, recipe))
    decided |= {"model": candidate.model, "width": candidate.width, "pretrained": source}
    decided["image_size"] = candidate.side
    passes = f"about {counted(round(epochs(candidate)), 'epoch')} of {counted(count, 'image')}"
    width = f" of width {candidate.width}" if candidate.width else ""
    sides = f"{candidate.side}x{candidate.side}"
    notes.append(f"{candidate.model}{width} at {sides}, as there is time for {passes}")
    return decided, notes


def _table(candidates, args, count: int) -> list[tuple[Candidate, float]]:
    """Candidates, with the size and the width that were given, and their least epochs."""
    given = {"side": args.image_size, "width": args.width}
    given = {name: value for name, value in given.items() if value}
    return [(candidate._replace(**given), max(3, seen / count)) for candidate, seen in candidates]


def newest_arguments(model: str, size: tuple[int, int], photographs: bool) -> dict:
    """Those of a new network, where no weights say otherwise."""
    patch = {"patch": 4} if model == "fastnet" and photographs and min(size) >= 48 else {}
    return NEWEST.get(model, {}) | patch


def _candidate_of(source: str) -> Candidate:
    """The network that a weights file of ours is of.  Errors: UserError."""
    with error_context(f"--pretrained {source}"):
        header = read_header(source)
    side = max(header["input_size"])
    return Candidate(header["model"], side, header["model_args"].get("width"))


def _speed(candidate: Candidate, args, accelerator: Accelerator, classes: int) -> float:
    """Images per second that all processes together would train a candidate on."""
    size = (candidate.side, candidate.side)
    arguments = newest_arguments(candidate.model, size, photographs=True)
    arguments |= {"width": candidate.width} if candidate.width else {}
    network = create_model(candidate.model, classes, size=size, **arguments)
    count = max(2, 32 // accelerator.num_processes)
    images, labels = torch.zeros(count, 3, *network.input_size), torch.zeros(count).long()
    batch = images.to(accelerator.device), labels.to(accelerator.device)
    return accelerator.num_processes * measure_speed(network, *batch, accelerator)
