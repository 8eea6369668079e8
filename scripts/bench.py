"""Compare the speed of this code with what people use otherwise, side by side in one run.

    make bench                                       everything, on CIFAR-10: about half an hour
    python scripts/bench.py step photos              some of it
    python scripts/bench.py tutorial --data pictures/cifar10

    tutorial   ten epochs as the tutorials write them, in a process of its own, and by train.py
    step       a step of train.py against a bare loop over tensors that are ready in memory, and
               its arithmetic against a matrix product
    accuracy   what train.py reaches in given times, and the time to given accuracies
    photos     decoding, against torchvision's ImageFolder: --photos DIR, or 12 megapixels each
    predict    the start of predict.py against `import torch`, and pictures a second

The sides take turns, because the speed of a machine drifts: ratios and medians are what counts.  A
table goes to the console, and all figures to runs/bench.json.
"""

import contextlib
import io
import json
import multiprocessing
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import train
from PIL import Image
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import _root  # noqa: F401
from lenslet import files
from lenslet.cli import as_written, create_parser, number, parse, parse_duration
from lenslet.data import sets
from lenslet.data.augment import augment
from lenslet.data.batches import Data, Split, evenly_spaced
from lenslet.data.layout import find_folder
from lenslet.data.load import choose_data, load
from lenslet.data.prepare import Prepare
from lenslet.distributed.start import create_accelerator, device_time, start_processes
from lenslet.errors import UserError, error_context, nearest, run_main
from lenslet.files import atomic_write
from lenslet.grid import encode_png
from lenslet.metrics import evaluate
from lenslet.runs.folder import weights_path
from lenslet.training.optimizers import create_optimizer
from lenslet.weights import read_header
from model import TutorialCNN, create_model


class PerPicture(torch.utils.data.Dataset):
    """Pictures in memory as torchvision's CIFAR10 gives them: one by one, by PIL and ToTensor."""

    def __init__(self, split: Split):
        from torchvision.transforms import ToTensor

        self.arrays = split.pixels(torch.arange(len(split))).permute(0, 2, 3, 1).numpy()
        self.labels, self.transform = split.labels.tolist(), ToTensor()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.arrays[i])), self.labels[i]


def tutorial_loop(name: str, epochs: int) -> list[tuple[float, float]]:
    """The loop as the CIFAR-10 tutorials write it: (seconds so far, test accuracy) of each epoch.

    A folder is read by torchvision's ImageFolder, whose pictures are sorted by class: they are
    shuffled, which the official set does not need.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

    torch.manual_seed(0)
    if sets.is_set(name):
        splits = load(name, ["train", "test"], val=0).splits
        train, test = PerPicture(splits["train"]), PerPicture(splits["test"])
    else:
        folder = find_folder(name)
        train, test = (ImageFolder(folder / split, ToTensor()) for split in ("train", "test"))
    train_loader = torch.utils.data.DataLoader(train, 64, shuffle=True)
    test_loader = torch.utils.data.DataLoader(test, 64)
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
        hits = 0
        with torch.no_grad():
            for images, labels in test_loader:
                hits += (network(images).argmax(1) == labels).sum().item()
        curve.append((seconds, hits / len(test)))
    return curve


def run_command(script: str, *words) -> None:
    """A command of scripts/, without what it prints."""
    command = [sys.executable, str(files.ROOT / "scripts" / script), *map(str, words)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def trained(args, *words) -> dict:
    """train.py and test.py as commands, a run in runs/: seconds and test accuracies."""
    began = time.perf_counter()
    run_command("train.py", "--data", args.data, "--no-resume", *words)
    seconds = time.perf_counter() - began
    run = weights_path(None).parent
    header = read_header(run / "model.safetensors")
    run_command("test.py", *(["--tta"] if header["options"]["augment"] != "none" else []))
    report = json.loads((run / "report/metrics.json").read_text())
    return {
        "train_seconds": json.loads((run / "metrics.json").read_text())["summary"]["train_seconds"],
        "command_seconds": seconds,
        "accuracy": report["top1"],
        "tta_accuracy": report.get("tta", report)["top1"],
        "network": [header["model"], header["model_args"].get("width")],
    }


def bench_tutorial(args) -> dict:
    """Ours, the tutorial's loop, ours again."""
    words = ["--config", "tutorial", "--epochs", str(args.epochs)]
    # The other side gets a fresh process, which nothing of ours has tuned.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        first = trained(args, *words)
        theirs = process.submit(tutorial_loop, args.data, args.epochs).result()
        second = trained(args, *words)
    ours = [first["train_seconds"], second["train_seconds"]]
    return {
        "epochs": args.epochs,
        "tutorial_seconds": theirs[-1][0],
        "tutorial_accuracy": theirs[-1][1],
        "tutorial_curve": theirs,
        "our_seconds": ours,
        "our_accuracy": [first["accuracy"], second["accuracy"]],
        "times_faster": theirs[-1][0] / statistics.mean(ours),
    }


def bench_accuracy(args) -> dict:
    """One run of the data set's recipe for each of --times, and the shortest to --targets."""
    runs = [{"time": t, **trained(args, "--time", t)} for t in args.times]
    seconds_to = {
        f"{target:.0%}": min(
            (r["train_seconds"] for r in runs if r["accuracy"] >= target), default=None
        )
        for target in args.targets
    }
    return {"runs": runs, "seconds_to": seconds_to}


def sample(args, folder: Path, count: int) -> Data:
    """A few of the data set's training pictures, those of all classes in turn, as a folder."""
    data = load(args.data, ["train"], val=0)
    part = data.splits["train"]
    if not part.in_memory:
        raise UserError(f"--data {args.data}: `step` needs images of up to 64 pixels")
    chosen = evenly_spaced(len(part), count)
    for i, image in zip(chosen, data.batch("train", chosen).images, strict=True):
        path = folder / "train" / data.classes[part.labels[i]] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encode_png(image))
    return load(str(folder), ["train"], val=0)


def product_speed(device, precision: str) -> float:
    """FLOP/s of a square matrix product, the most that a network can hope for."""
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    a = torch.randn(4096, 4096, device=device, dtype=kind)
    a @ a
    began = device_time(device)
    for _ in range(5):
        a @ a
    return 5 * 2 * 4096**3 / (device_time(device) - began)


def bench_step(args, batch=256, steps=10) -> dict:
    """Steps of the fast network, and of ResNet-18 fitted to small pictures."""
    accelerator = create_accelerator("auto")
    device, precision = accelerator.device, accelerator.mixed_precision
    products, result = [product_speed(device, precision)], {}
    with tempfile.TemporaryDirectory() as folder:
        data = sample(args, Path(folder) / "pictures", batch * steps)
        for name in ("fastnet", "resnet18"):
            result[name] = compare_steps(name, data, batch, args.rounds, Path(folder), accelerator)
            products.append(product_speed(device, precision))
    peak = statistics.median(products)
    for row in result.values():
        row["share_of_product"] = row["flops_per_second"] / peak
    return {"precision": precision, "product_flops_per_second": peak, **result}


def compare_steps(name, data, batch, count, folder, accelerator) -> dict:
    """An epoch by train.py and by a bare loop, in turn; and what data and evaluation cost.

    The bare loop has the same network, optimizer, precision and batch, and no Accelerate, no data
    set, no augmentation and no logging; train.py has all of them.
    """
    device, part = accelerator.device, data.splits["train"]
    steps = len(part) // batch
    size = {"classes": len(data.classes), "channels": data.channels, "size": data.image_size}
    network = create_model(name, **size).to(device, memory_format=torch.channels_last)
    prepare = Prepare([0.5] * data.channels, [0.25] * data.channels, network.input_size).to(device)
    optimizer = create_optimizer("sgd", network, 0.01, 0.9, 0.0)
    images = prepare(part.pixels(torch.arange(batch)).to(device))
    labels, index = part.labels[:batch].to(device), torch.arange(batch, device=device)
    loader = data.loader("train", 4 * batch)

    def seconds(work) -> float:
        began = device_time(device)
        work()
        return device_time(device) - began

    def forward():
        with accelerator.autocast():
            return network(images)

    def bare():
        network.train()
        for _ in range(steps):
            F.cross_entropy(forward().float(), labels).backward()
            optimizer.step()
            optimizer.zero_grad()

    words = ["--data", data.name, "--model", name, "--optimizer", "sgd", "--lr", 0.01]
    words += ["--momentum", 0.9, "--weight-decay", 0, "--augment", "standard", "--val", 0]
    words += ["--batch-size", batch, "--epochs", 2, "--log-every", steps]

    def ours() -> float:
        output = Path(tempfile.mkdtemp(dir=folder))
        with contextlib.redirect_stdout(io.StringIO()):
            train.main([*words, "--output", output])
        return json.loads((output / "metrics.json").read_text())["epochs"][-1]["seconds"]

    def prepare_data():
        picked = data.batch("train", list(range(batch))).images.to(device)
        prepare(augment(picked, "standard", False, 0, 0, index))

    def evaluation():
        evaluate(network, loader, prepare, accelerator)

    bare()
    rounds = []
    for _ in range(count):
        before, mine, after = seconds(bare), ours(), seconds(bare)
        rounds.append((mine / steps, (before + after) / 2 / steps))
    others = [
        [seconds(work) for work in (forward, prepare_data, evaluation)] for _ in range(count + 1)
    ]
    forward_, data_, evaluate_ = map(statistics.median, zip(*others[1:], strict=True))
    network.train()
    with FlopCounterMode(display=False) as counter:
        forward().sum().backward()
    step = statistics.median(mine for mine, _ in rounds)
    return {
        "batch_size": batch,
        "step_seconds": step,
        "images_per_second": batch / step,
        "bare_step_seconds": statistics.median(other for _, other in rounds),
        "step_over_bare": statistics.median(mine / other for mine, other in rounds),
        "data_share_of_step": data_ / step,
        "evaluation_over_forward": evaluate_ / len(part) / (forward_ / batch),
        "flops_per_second": counter.get_total_flops() / step,
    }


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


def bench_photos(args) -> dict:
    """Passes over all pictures with torchvision's ImageFolder and with ours, in turn."""
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import CenterCrop, Compose, Resize, ToTensor

    with tempfile.TemporaryDirectory() as temporary:
        name = args.photos or generate_photos(Path(temporary))
        resize = Compose([Resize(256), CenterCrop(224), ToTensor()])
        with error_context(f"--photos {name}"):
            data = load(name, ["train"], val=0)
        folder = ImageFolder(find_folder(name) / "train", resize)
        loaders = {
            "torchvision": torch.utils.data.DataLoader(folder, 8, num_workers=args.workers),
            "ours": data.loader("train", 8, workers=args.workers),
        }
        speeds = {side: [] for side in loaders}
        for _ in range(args.rounds):
            for side, loader in loaders.items():
                began = time.perf_counter()
                count = sum(len(batch[0]) for batch in loader)
                speeds[side].append(count / (time.perf_counter() - began))
        part = data.splits["train"]
        rows = {Path(path): i for i, (path, _) in enumerate(folder.samples)}
        differences = []
        for i in range(0, len(part), max(1, len(part) // 50)):
            if part.images[i] in rows:  # torchvision leaves out GIF files
                mine = data.batch("train", [i]).images[0].float()
                theirs = folder[rows[part.images[i]]][0] * 255
                differences.append((mine - theirs).abs().mean().item())
    ratios = [b / a for a, b in zip(*speeds.values(), strict=True)]
    return {
        "pictures": len(part),
        "workers": args.workers,
        **{f"{side}_per_second": statistics.median(all_) for side, all_ in speeds.items()},
        "times_faster": statistics.median(ratios),
        "mean_difference_in_grey_levels": statistics.mean(differences),
        "largest_mean_difference": max(differences),
    }


def bench_predict(args) -> dict:
    """predict.py by the newest run as a process: `import torch`, one picture and many, in turn."""
    run = weights_path(None).parent
    samples = sorted((run / "samples").glob("*.png"))
    if not samples:
        raise UserError(f"{run} has no samples: run `make test` first")
    predict, many = [sys.executable, files.ROOT / "scripts/predict.py", "--weights", run], 2000
    sides = {
        "predict": [*predict, samples[0]],
        "import_torch": [sys.executable, "-c", "import torch"],
        "predict_many": [*predict, *samples * (many // len(samples))],
    }
    seconds = {side: [] for side in sides}
    for i in range(args.rounds + 1):
        for side, command in sides.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if i:  # the first round fills the file cache
                seconds[side].append(time.perf_counter() - began)
    medians = {f"{side}_seconds": statistics.median(all_) for side, all_ in seconds.items()}
    one, torch_, rest = medians.values()
    return {**medians, "over_import_torch": one / torch_, "images_per_second": many / (rest - one)}


def describe_machine() -> dict:
    """What the figures were measured on."""
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "amx": torch.cpu._is_amx_tile_supported(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
    }


def table(found: dict, indent: str = "") -> str:
    """Nested figures as aligned lines to read."""
    lines = []
    for key, value in found.items():
        label = f"{indent}{str(key).replace('_', ' ')}"
        if isinstance(value, list) and value and isinstance(value[0], dict):
            value = dict(enumerate(value, 1))
        if isinstance(value, dict):
            lines += [label, table(value, indent + "  ")]
        else:
            lines.append(f"{label:40}{short(value)}")
    return "\n".join(lines)


def short(value) -> str:
    """A figure with four digits, or a list of them."""
    if isinstance(value, list | tuple):
        return " ".join(short(v) for v in value)
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


PARTS = {
    "tutorial": bench_tutorial,
    "step": bench_step,
    "accuracy": bench_accuracy,
    "photos": bench_photos,
    "predict": bench_predict,
}


def main(argv=None):
    parser = create_parser(__doc__)
    add, count = parser.add_argument, number(int, 1)
    add("parts", nargs="*", metavar="PART", help=f"of {' '.join(PARTS)} (all)")
    add("--data", help="a set or folder (default: cifar10)")
    add("--photos", metavar="DIR", help="a folder of photographs for `photos`")
    add("--epochs", type=count, default=10, help="of the tutorial")
    add("--rounds", type=count, default=5, help="of each comparison")
    add("--workers", type=number(int, 0), default=2, help="of photos")
    times, targets = ["10s", "20s", "40s", "80s"], [0.6, 0.7, 0.8]
    span = as_written(parse_duration)
    add("--times", type=span, nargs="+", default=times, help="what `accuracy` trains for")
    help = "accuracies, 0..1, whose training time `accuracy` looks for"
    add("--targets", type=number(float, 0, 1), nargs="+", default=targets, help=help)
    args = parse(parser, argv)
    for part in args.parts:
        if part not in PARTS:
            raise UserError(f"{part}: no such part{nearest(part, PARTS)} (see --help)")
    start_processes()
    with error_context(f"--data {args.data}"):
        args.data = choose_data(args.data)
    result = {"machine": describe_machine(), "data": args.data}
    for part in args.parts or PARTS:
        print(f"measuring: {part}", flush=True)
        result[part] = PARTS[part](args)
        print(table({part: result[part]}), flush=True)
        files.RUNS.mkdir(exist_ok=True)
        atomic_write(files.RUNS / "bench.json", json.dumps(result, indent=1))
    print(table({"machine": result["machine"]}))
    print(f"all figures: {files.RUNS / 'bench.json'}")


if __name__ == "__main__":
    sys.exit(run_main(main))
