"""Compare the speed of this code with what people use otherwise, side by side in one run.

    make bench                                       everything, on CIFAR-10: about half an hour
    python scripts/bench.py step photos              some of it
    python scripts/bench.py tutorial --data pictures/cifar10

    tutorial   ten epochs as the tutorials write them (a folder is decoded in each), and by train.py
    step       a step of train.py against a bare loop over tensors that are ready in memory, and
               evaluation against the forward pass of that loop
    accuracy   what train.py reaches in given times; with `tutorial`, how much sooner it is as good
    photos     decoding, against torchvision's ImageFolder: --photos DIR, or 12 megapixels each
    predict    the start of predict.py against `import torch`, and images a second

The sides take turns, because the speed of a machine drifts: ratios and medians are what counts.
The figures go to the console and to runs/bench.json.
"""

import _root  # noqa: F401, I001 (before torch)
import io
import json
import multiprocessing
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections import deque
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch
import train
import yaml
from PIL import Image
from torch.nn import functional as F
from torch.utils.data import DataLoader

from lenslet import files
from lenslet.cli import as_written, create_parser, number, parse, parse_duration
from lenslet.data import sets
from lenslet.data.batches import Data, Split, evenly_spaced
from lenslet.data.layout import find_folder
from lenslet.data.load import choose_data, load
from lenslet.data.prepare import Prepare
from lenslet.distributed.determinism import describe_processor, environment
from lenslet.distributed.precision import choose_device, choose_precision
from lenslet.distributed.start import cores, create_accelerator, device_time, start_processes
from lenslet.errors import UserError, error_context, run_main
from lenslet.metrics import evaluate
from lenslet.runs.folder import weights_path
from lenslet.training.optimizers import create_optimizer
from model import TutorialCNN, create_model

BATCH, STEPS = 256, 10  # of `step`


class Images(torch.utils.data.Dataset):
    """Images in memory as torchvision's CIFAR10 gives them: one by one, by PIL and ToTensor."""

    def __init__(self, split: Split, transform):
        self.arrays = split.pixels(torch.arange(len(split))).permute(0, 2, 3, 1).numpy()
        self.labels, self.transform = split.labels.tolist(), transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.arrays[i])), self.labels[i]


def tutorial_loop(name: str, epochs: int) -> list[dict]:
    """The loop as the CIFAR-10 tutorials write it: seconds so far and accuracy of each epoch.

    A folder is read by torchvision's ImageFolder, whose images are sorted by class: they are
    shuffled, which the official set does not need.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

    torch.manual_seed(0)
    if sets.is_set(name):
        splits = load(name, ["train", "test"], val=0).splits
        train, test = (Images(splits[split], ToTensor()) for split in ("train", "test"))
    else:
        folder = find_folder(name)
        train, test = (ImageFolder(folder / split, ToTensor()) for split in ("train", "test"))
    train_loader, test_loader = DataLoader(train, 64, shuffle=True), DataLoader(test, 64)
    network = TutorialCNN(classes=10)
    loss_fn = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    seconds, curve = 0.0, []
    for _ in range(epochs):
        began = time.perf_counter()
        network.train()
        for images, labels in train_loader:
            loss = loss_fn(network(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        seconds += time.perf_counter() - began
        network.eval()
        with torch.no_grad():
            hits = sum((network(x).argmax(1) == y).sum().item() for x, y in test_loader)
        curve.append({"train_seconds": seconds, "accuracy": hits / len(test)})
    return curve


def run_python(*words) -> None:
    """Python as a process of its own, without what it prints."""
    subprocess.run([sys.executable, *map(str, words)], check=True, stdout=subprocess.DEVNULL)


def train_and_test(data: str, *words) -> dict:
    """train.py and test.py as commands, a run in runs/: seconds of training and test accuracy."""
    scripts = files.ROOT / "scripts"
    run_python(scripts / "train.py", "--data", data, "--no-resume", *words)
    run_python(scripts / "test.py")
    run = weights_path(None).parent
    summary = json.loads((run / "metrics.json").read_text())["summary"]
    report = json.loads((run / "report/metrics.json").read_text())
    return {"train_seconds": summary["train_seconds"], "accuracy": report["top1"]}


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


def summarize(seconds: dict[str, list[float]]) -> dict:
    """What take_turns() measured, as it is stored: each side's median, and the seconds of each."""
    return {"rounds": seconds} | {f"{k}_seconds": statistics.median(s) for k, s in seconds.items()}


def median_ratio(above: list[float], below: list[float]) -> float:
    """The median of the ratios in each round."""
    return statistics.median(a / b for a, b in zip(above, below, strict=True))


def tutorial(args) -> dict:
    """Ours, the tutorial's loop, ours again."""
    words = [args.data, "--config", "tutorial", "--epochs", args.epochs]
    # The other side gets a fresh process, which nothing of ours has tuned.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        first = train_and_test(*words)
        theirs = process.submit(tutorial_loop, args.data, args.epochs).result()
        ours = [first, train_and_test(*words)]
    seconds = statistics.mean(run["train_seconds"] for run in ours)
    faster = theirs[-1]["train_seconds"] / seconds
    return {"tutorial": theirs, "ours": ours, "times_faster": faster}


def accuracy(args) -> dict:
    """One run of the data set's recipe for each of --times."""
    return {span: train_and_test(args.data, "--time", span) for span in args.times}


def step(args) -> dict:
    """Steps of the fast network, and of ResNet-18 fitted to small images."""
    accelerator = create_accelerator("auto")
    with error_context(f"--data {args.data}"):
        data = load(args.data, ["train"], val=0, limit=BATCH * STEPS)
        if not data.splits["train"].in_memory:
            raise UserError("`step` needs images of up to 64 pixels")
    compare = partial(compare_steps, data=data, rounds=args.rounds, accelerator=accelerator)
    return {name: compare(name) for name in ("fastnet", "resnet18")}


def compare_steps(name: str, data: Data, rounds: int, accelerator) -> dict:
    """An epoch by train.py and by a bare loop, in turn; and what evaluation costs.

    The bare loop has the same network, optimizer, precision and batch, and no Accelerate, no data
    set, no augmentation and no logging; train.py has all of them.
    """
    device, part = accelerator.device, data.splits["train"]
    steps = len(part) // BATCH
    size = {"classes": len(data.classes), "channels": data.channels, "size": data.image_size}
    network = create_model(name, **size).to(device, memory_format=torch.channels_last)
    prepare = Prepare([0.5] * data.channels, [0.25] * data.channels, network.input_size).to(device)
    optimizer = create_optimizer("sgd", network, 0.01, 0.9, 0.0)
    images = prepare(part.pixels(torch.arange(BATCH)).to(device))
    labels, loader = part.labels[:BATCH].to(device), data.loader("train", 4 * BATCH)
    options = f"--model {name} --optimizer sgd --lr 0.01 --momentum 0.9 --weight-decay 0 --val 0 "
    options += f"--augment standard --batch-size {BATCH} --epochs 2 --log-every {steps} "
    options += f"--limit {len(part)}"

    def forward():
        with accelerator.autocast():
            return network(images)

    def bare():
        network.train()
        for _ in range(steps):
            F.cross_entropy(forward().float(), labels).backward()
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
    seconds = take_turns(sides, rounds)
    times, over_bare = summarize(seconds), median_ratio(seconds["ours"], seconds["bare"])
    an_image = times["evaluation_seconds"] / len(part), times["forward_seconds"] / BATCH
    figures = {"step_over_bare": over_bare, "evaluation_over_forward": an_image[0] / an_image[1]}
    return {"batch_size": BATCH, "steps": steps, **times, **figures}


def generate_photos(folder: Path, count: int = 24) -> str:
    """12-megapixel JPEG files with the detail of photographs, in two classes."""
    generator = np.random.default_rng(0)
    for i in range(count):
        coarse = Image.fromarray(generator.integers(0, 256, (60, 80, 3), np.uint8))
        large = np.asarray(coarse.resize((4000, 3000), Image.Resampling.BICUBIC), np.int16)
        grain = generator.normal(0, 6, large.shape).astype(np.int16)
        path = folder / "train" / "ab"[i % 2] / f"{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray((large + grain).clip(0, 255).astype(np.uint8)).save(path, quality=90)
    return str(folder)


def photos(args) -> dict:
    """Passes over all photographs with torchvision's ImageFolder and with ours, in turn."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

    with tempfile.TemporaryDirectory() as temporary:
        name = args.photos or generate_photos(Path(temporary))
        with error_context(f"--photos {name}"):
            data = load(name, ["train"], val=0)
        resize = Compose([Resize(256), CenterCrop(224), ToTensor()])
        folder, part = ImageFolder(find_folder(name) / "train", resize), data.splits["train"]
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
            if (path := part.images[i]) in rows
            for image in data.batch("train", [i]).images
        ]
    faster = median_ratio(seconds["torchvision"], seconds["ours"]) * len(part) / len(folder)
    differ = {"largest_mean_difference": max(differences)}  # of an image, in grey levels
    return {"images": len(part), **summarize(seconds), "times_faster": faster, **differ}


def predict(args) -> dict:
    """predict.py by the newest run as a process: `import torch`, one image and many, in turn."""
    run = weights_path(None).parent
    samples = sorted(run.glob("samples/*.png"))
    if not samples:
        raise UserError(f"{run} has no samples: run `make test` first")
    many = samples * (2000 // len(samples))
    words = [files.ROOT / "scripts/predict.py", "--weights", run]
    sides = {
        "import_torch": lambda: run_python("-c", "import torch"),
        "predict": lambda: run_python(*words, samples[0]),
        "predict_many": lambda: run_python(*words, *many),
    }
    seconds = take_turns(sides, args.rounds)
    torch_, one, all_ = map(statistics.median, seconds.values())
    speed = len(many) / (all_ - one)  # without the start
    return {**summarize(seconds), "over_import_torch": one / torch_, "images_per_second": speed}


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


PARTS = {part.__name__: part for part in (tutorial, step, accuracy, photos, predict)}


def main(argv=None):
    parser = create_parser(__doc__)
    add, count = parser.add_argument, number(int, 1)
    choices = [*PARTS, "all"]
    add("parts", nargs="*", metavar="PART", choices=choices, default="all", help=" ".join(PARTS))
    add("--data", help="a set or folder (default: cifar10)")
    add("--photos", metavar="DIR", help="a folder of photographs for `photos`")
    add("--epochs", type=count, default=10, help="of the tutorial")
    add("--rounds", type=count, default=5, help="of each comparison")
    add("--workers", type=number(int, 0), default=2, help="of photos")
    times, span = ["10s", "20s", "40s", "80s"], as_written(parse_duration)
    add("--times", type=span, nargs="+", default=times, help="what `accuracy` trains for")
    args = parse(parser, argv)
    start_processes()
    with error_context(f"--data {args.data}"):
        args.data = choose_data(args.data)
    result, path = {"machine": describe_machine(), "data": args.data}, files.RUNS / "bench.json"
    result["command"] = shlex.join(["scripts/bench.py", *(sys.argv[1:] if argv is None else argv)])
    both = {"tutorial", "accuracy"}
    show(result)
    for part in PARTS if "all" in args.parts else args.parts:
        print(f"measuring: {part}", flush=True)
        result[part] = PARTS[part](args)
        show({part: result[part]})
        if part in both <= result.keys():  # seconds until they are equally accurate
            theirs, ours = result["tutorial"]["tutorial"][-1], result["accuracy"].values()
            reached = [r["train_seconds"] for r in ours if r["accuracy"] >= theirs["accuracy"]]
            ratio = theirs["train_seconds"] / min(reached) if reached else None
            result["tutorial_over_recipe"] = ratio
            show({"tutorial_over_recipe": ratio})
        files.RUNS.mkdir(exist_ok=True)
        files.atomic_write(path, json.dumps(result, indent=1))
    print(f"all figures: {path}")


def show(found: dict) -> None:
    """Print figures to read, with four digits."""
    short = json.loads(json.dumps(found), parse_float=lambda text: float(f"{float(text):.4g}"))
    print(yaml.safe_dump(short, sort_keys=False, width=1000), flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main))
