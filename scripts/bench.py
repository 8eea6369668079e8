"""Compare this code with what people use otherwise, side by side in one run.

    make bench                                       all but `clock`, on CIFAR-10: half an hour
    python scripts/bench.py step photos              some of it
    python scripts/bench.py tutorial accuracy --data pictures/cifar10

    tutorial    the tutorials' loop, ten epochs of images in memory, and train.py's (8 minutes)
    accuracy    what train.py reaches in --times (4); with `tutorial`, how much sooner it is as good
    airbench94  the fastest published method, from its paper, and train.py with test.py --tta in the
                same time (8; with --airbench-epochs 9.9, all that it takes, 36)
    step        a step of train.py against bare loops over tensors in memory, with our network and
                with timm's ResNet-18; evaluation against the forward pass (4)
    photos      decoding, against torchvision's ImageFolder: --photos DIR, or 12 megapixels each (2)
    predict     the start of predict.py against `import torch`, and images a second (1)
    clock       which fastnet is best in how much time, see bench_clock.py: a training for each of
                --widths, --times and --seeds.  An hour and more, so it must be named

The minutes are those of two cores.  The sides take turns, because the speed of a machine drifts.
Each ratio is printed as the median, the smallest and the largest of its rounds: --rounds, or for
whole trainings --repeats, each with a seed of its own.  All figures are in runs/bench.json too.
"""

import _root  # noqa: F401, I001 (before torch)
import io
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from unittest.mock import patch

import bench_clock
import bench_others
import torch
import train
import yaml
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lenslet import files
from lenslet.cli import as_written, create_parser, number, parse, parse_duration
from lenslet.data.batches import Data, evenly_spaced
from lenslet.data.layout import find_folder
from lenslet.data.load import choose_data, load
from lenslet.data.prepare import Prepare
from lenslet.distributed.determinism import describe_processor, environment
from lenslet.distributed.precision import choose_device, choose_precision
from lenslet.distributed.start import cores, create_accelerator, device_time, start_processes
from lenslet.errors import OutsideError, UserError, error_context, run_main
from lenslet.metrics import evaluate
from lenslet.runs.folder import weights_path
from lenslet.runs.launch import run_apart
from lenslet.training.optimizers import create_optimizer
from model import create_model

STEPS = {"fastnet": (256, 10), "resnet18": (128, 4)}  # of `step`: the batch, and how many
MANY = 2000  # images of `predict`


def run_python(*words) -> None:
    """Python as a process of its own, without what it prints.  Errors: OutsideError if it fails."""
    command = [sys.executable, *map(str, words)]
    if status := subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise OutsideError(f"{shlex.join(command[1:4])} … ended with status {status}")


def train_and_test(data: str, *words, tta: bool = False) -> dict:
    """train.py and test.py as commands, a run in runs/: seconds of training, the other seconds that
    train.py took, nearly all of them to start, and test accuracy.
    """
    scripts, began = files.ROOT / "scripts", time.perf_counter()
    run_python(scripts / "train.py", "--data", data, "--no-resume", *words)
    took = time.perf_counter() - began
    run_python(scripts / "test.py", *["--tta"] * tta)
    run = weights_path(None).parent
    seconds = json.loads((run / "metrics.json").read_text())["summary"]["train_seconds"]
    report = json.loads((run / "report/metrics.json").read_text())
    found = {"train_seconds": seconds, "start_seconds": took - seconds, "accuracy": report["top1"]}
    return found | ({"tta_accuracy": report["tta"]["top1"]} if tta else {})


def take_turns(sides: dict, rounds: int) -> dict[str, list[float]]:
    """The seconds of each side in each round, after a first one that fills caches.

    sides: {name: a function}, which may return its own measurement, a float.
    """
    device = torch.accelerator.current_accelerator(True) or torch.device("cpu")
    seconds = {side: [] for side in sides}
    for _ in range(rounds + 1):
        for side, work in sides.items():
            began = device_time(device)
            found = work()
            took = device_time(device) - began
            seconds[side].append(found if isinstance(found, float) else took)
    return {side: found[1:] for side, found in seconds.items()}


def compare(above, below) -> dict:
    """How many times as large one side is as the other: median and spread over the rounds.

    above, below: a number for each round; or runs, of which their seconds of training count.
    """
    sides = [[x["train_seconds"] if isinstance(x, dict) else x for x in s] for s in (above, below)]
    ratios = [a / b for a, b in zip(*sides, strict=True)]
    spread = {"min": min(ratios), "max": max(ratios), "rounds": len(ratios)}
    return {"ratio": statistics.median(ratios), **spread}


def tutorial(args) -> dict:
    """The tutorial's loop, and train.py with its settings on the same images, in turn."""
    words, theirs, ours = ["--config", "tutorial", "--val", 0, "--epochs", args.epochs], [], []
    for seed in range(args.repeats):
        theirs.append(run_apart(bench_others.tutorial, args.data, args.epochs, seed))
        ours.append(train_and_test(args.data, *words, "--seed", seed))
    return {"tutorial": theirs, "ours": ours, "times_faster": compare(theirs, ours)}


def accuracy(args) -> dict:
    """Runs of the data set's recipe for each of --times."""
    seeds = range(args.repeats)
    run = partial(train_and_test, args.data)
    return {t: [run("--time", t, "--seed", seed) for seed in seeds] for t in args.times}


def tutorial_over_recipe(theirs: list[dict], spans: dict) -> dict | None:
    """How many times as long the tutorial trains as the shortest run that is as accurate as it.

    theirs, spans: of tutorial() and accuracy().  None where a repeat has no such run.
    """
    quickest = []
    for loop, *runs in zip(theirs, *spans.values(), strict=True):
        reached = [run for run in runs if run["accuracy"] >= loop["accuracy"]]
        if not reached:
            return None
        quickest.append(min(reached, key=lambda run: run["train_seconds"]))
    return {"recipe": quickest, **compare(theirs, quickest)}


def airbench94(args) -> dict:
    """airbench94, and the data set's recipe for as many seconds, in turn."""
    theirs, ours, given = [], [], (args.data, args.airbench_epochs)
    for seed in range(args.repeats):
        theirs.append(run_apart(bench_others.airbench94, *given, seed))
        words = "--time", f"{theirs[-1]['train_seconds']:.3f}s", "--seed", seed
        ours.append(train_and_test(args.data, *words, tta=True))
    found = {"epochs": given[1], "airbench94": theirs, "ours": ours}
    for key in ("train_seconds", "accuracy", "tta_accuracy"):
        sides = ([run[key] for run in runs] for runs in (ours, theirs))
        found[f"{key}_over_airbench94"] = compare(*sides)
    return found


def step(args) -> dict:
    """Steps of the fast network, and of ResNet-18 fitted to small images."""
    accelerator, found = create_accelerator("auto"), {}
    for name, (batch, steps) in STEPS.items():
        with error_context(f"--data {args.data}"):
            data = load(args.data, ["train"], val=0, limit=batch * steps)
            if not data.splits["train"].in_memory:
                raise UserError("`step` needs images of up to 64 pixels")
        found[name] = compare_steps(name, batch, data, args.rounds, accelerator)
    return found


def compare_steps(name: str, batch: int, data: Data, rounds: int, accelerator) -> dict:
    """An epoch by train.py and by bare loops, in turn; and what evaluation costs.

    The bare loop has the same network, optimizer, precision and batch, and no Accelerate, no data
    set, no augmentation and no logging; train.py has all of them.  ResNet-18 has a second one, as
    written with timm.
    """
    device, part = accelerator.device, data.splits["train"]
    batch = min(batch, len(part))
    steps = len(part) // batch
    size = {"classes": len(data.classes), "channels": data.channels, "size": data.image_size}
    network = create_model(name, **size).to(device, memory_format=torch.channels_last)
    prepare = Prepare([0.5] * data.channels, [0.25] * data.channels, network.input_size).to(device)
    optimizer = create_optimizer("sgd", network, 0.01, 0.9, 0.0)
    pixels, labels = part.pixels(torch.arange(len(part))).to(device), part.labels.to(device)
    images, loader = prepare(pixels[:batch]), data.loader("train", 4 * batch)
    options = f"--model {name} --optimizer sgd --lr 0.01 --momentum 0.9 --weight-decay 0 --val 0 "
    options += f"--augment standard --batch-size {batch} --epochs 2 --log-every {steps} "
    options += f"--limit {len(part)}"

    def forward():
        with accelerator.autocast():
            return network(images)

    def bare():
        network.train()
        for _ in range(steps):
            F.cross_entropy(forward().float(), labels[:batch]).backward()
            optimizer.step()
            optimizer.zero_grad()

    def ours() -> float:  # the second epoch
        with tempfile.TemporaryDirectory() as output:
            # runs/latest stays as it is: the run is gone in a moment.
            with patch.object(files, "RUNS", Path(output)), redirect_stdout(io.StringIO()):
                train.main([*options.split(), "--data", data.name, "--output", output])
            return json.loads(Path(output, "metrics.json").read_text())["epochs"][1]["seconds"]

    def evaluation():
        evaluate(network, loader, prepare, accelerator)

    sides = {f.__name__: f for f in (bare, ours, forward, evaluation)}
    if name == "resnet18":
        given = pixels, labels, batch, network, accelerator.autocast
        sides["timm"] = bench_others.resnet18_epoch(*given)
    seconds = take_turns(sides, rounds)
    found = {"batch_size": batch, "steps": steps, "seconds": seconds}
    found["step_over_bare"] = compare(seconds["ours"], seconds["bare"])
    if "timm" in seconds:
        found["images_per_second_over_timm"] = compare(seconds["timm"], seconds["ours"])
    counts = (("evaluation", len(part)), ("forward", batch))
    an_image = ([s / n for s in seconds[side]] for side, n in counts)
    return found | {"evaluation_over_forward": compare(*an_image)}


def photos(args) -> dict:
    """Passes over all photographs with torchvision's ImageFolder and with ours, in turn."""
    with tempfile.TemporaryDirectory() as temporary:
        name = args.photos or bench_others.generate_photos(Path(temporary))
        with error_context(f"--photos {name}"):
            data = load(name, ["train"], val=0)
        part = data.splits["train"]
        folder = bench_others.image_folder(find_folder(name) / "train")
        loaders = {
            "torchvision": DataLoader(folder, 8, num_workers=args.workers),
            "ours": data.loader("train", 8, workers=args.workers),
        }
        sides = {side: partial(deque, loader, 0) for side, loader in loaders.items()}
        seconds = take_turns(sides, args.rounds)
        rows = {Path(path): i for i, (path, _) in enumerate(folder.samples)}  # lacks GIF files
        differences = [
            (255 * folder[rows[path]][0] - image).abs().mean().item()
            for i in evenly_spaced(len(part), 50)
            if (path := part.file(i)) in rows
            for image in data.batch("train", [i]).images
        ]
    counts = (("torchvision", len(folder)), ("ours", len(part)))
    an_image = ([s / n for s in seconds[side]] for side, n in counts)
    found = {"images": len(part), "seconds": seconds, "times_faster": compare(*an_image)}
    return found | {"largest_mean_difference": max(differences)}  # of an image, in grey levels


def predict(args) -> dict:
    """predict.py by the newest run as a process: `import torch`, one image and many, in turn."""
    run = weights_path(None).parent
    samples = sorted(run.glob("samples/*.png"))
    if not samples:
        raise UserError(f"{run} has no samples: run `make test` first")
    many = samples * (MANY // len(samples))
    words = [files.ROOT / "scripts/predict.py", "--weights", run]
    sides = {
        "import_torch": lambda: run_python("-c", "import torch"),
        "predict": lambda: run_python(*words, samples[0]),
        "predict_many": lambda: run_python(*words, *many),
    }
    seconds = take_turns(sides, args.rounds)
    one, all_ = seconds["predict"], seconds["predict_many"]
    speeds = [len(many) / (m - o) for o, m in zip(one, all_, strict=True)]  # without the start
    over = compare(one, seconds["import_torch"])
    found = {"seconds": seconds, "over_import_torch": over}
    return found | {"images_per_second": statistics.median(speeds)}


def clock(args) -> dict:
    """Trainings of each width, for each time and seed."""
    given = args.widths, args.times, args.seeds
    return bench_clock.measure(args.data, *given, describe_machine(), args.command)


def describe_machine() -> dict:
    """What figures are measured on, and with which code (commit None: it is not in git)."""
    git = "git describe --always --dirty"  # by the shell, which says nothing if there is no git
    found = subprocess.run(git, shell=True, cwd=files.ROOT, capture_output=True, text=True)
    return {
        **describe_processor(),
        "cores": cores(),
        **environment(choose_precision("auto", choose_device().type)),
        "commit": found.stdout.strip() or None,
        "date": time.strftime("%Y-%m-%d"),
    }


PARTS = {f.__name__: f for f in (tutorial, accuracy, airbench94, step, photos, predict, clock)}


def build_parser():
    parser = create_parser(__doc__)
    add, count = parser.add_argument, number(int, 1)
    choices = [*PARTS, "all"]
    add("parts", nargs="*", metavar="PART", choices=choices, default="all", help=" ".join(PARTS))
    add("--data", help="a set or folder (default: cifar10)")
    add("--photos", metavar="DIR", help="a folder of photographs for `photos`: train/<class>/*.jpg")
    add("--rounds", type=count, default=5, help="of step, photos and predict")
    add("--repeats", type=count, default=1, help="of tutorial, accuracy and airbench94")
    add("--epochs", type=count, default=10, help="of the tutorial")
    share = number(float, 0, above=True)
    add("--airbench-epochs", type=share, default=2.0, help="of airbench94; the paper has 9.9")
    add("--workers", type=number(int, 0), default=2, help="of photos")
    times, span = ["5s", "10s", "20s", "40s", "80s"], as_written(parse_duration)
    add("--times", type=span, nargs="+", default=times, help="of accuracy and clock")
    widths, seeds = [16, 24, 32, 48, 64], [0, 1, 2]
    add("--widths", type=count, nargs="+", default=widths, help="of clock")
    add("--seeds", type=number(int, 0), nargs="+", default=seeds, help="of clock")
    return parser


def main(argv=None):
    args = parse(build_parser(), argv)
    if args.photos and not (find_folder(args.photos) / "train").is_dir():
        raise UserError(f"--photos {args.photos}: no such folder with a train/ in it")
    start_processes()
    with error_context(f"--data {args.data}"):
        args.data = choose_data(args.data)
    words = sys.argv[1:] if argv is None else argv
    args.command = shlex.join(["scripts/bench.py", *map(str, words)])
    result = {"machine": describe_machine(), "data": args.data, "command": args.command}
    show(result)
    everything = [part for part in PARTS if part != "clock"]
    for part in everything if "all" in args.parts else args.parts:
        print(f"measuring: {part}", flush=True)
        result[part] = PARTS[part](args)
        show({part: result[part]})
        if part in (both := {"tutorial", "accuracy"}) and both <= result.keys():
            found = tutorial_over_recipe(result["tutorial"]["tutorial"], result["accuracy"])
            result["tutorial_over_recipe"] = found
            show({"tutorial_over_recipe": found})
        files.RUNS.mkdir(exist_ok=True)
        files.atomic_write(files.RUNS / "bench.json", json.dumps(result, indent=1))
    print(f"all figures: {files.RUNS / 'bench.json'}")


def show(found: dict) -> None:
    """Print figures to read, with four digits; what holds no lists or objects is on one line."""
    short = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.4g}"))
    print(yaml.safe_dump(short, sort_keys=False, width=1000, default_flow_style=None), flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
