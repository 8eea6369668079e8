"""Compare the speed of this code with what people use otherwise, side by side in one run.

    python scripts/bench.py tutorial --data pictures/cifar10   ten epochs of the tutorial, both ways
    python scripts/bench.py photos --data pictures/hymenoptera   decoding, against torchvision
    python scripts/bench.py photos                   the same on generated 12-megapixel photographs
    python scripts/bench.py predict                  the start of predict.py, against `import torch`

The two sides take turns, because the speed of a machine drifts; ratios and medians are what counts.
"""

import json
import multiprocessing
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
from PIL import Image

import _root  # noqa: F401
import dataset
import options
import run_folder
import runtime
from options import ROOT, UserError, number


class PerPicture(torch.utils.data.Dataset):
    """Pictures in memory as torchvision's CIFAR10 gives them: one by one, by PIL and ToTensor."""

    def __init__(self, split: dataset.Split):
        from torchvision.transforms import ToTensor

        self.arrays = split.images.permute(0, 2, 3, 1).contiguous().numpy()
        self.labels, self.transform = split.labels.tolist(), ToTensor()

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, i):
        return self.transform(Image.fromarray(self.arrays[i])), self.labels[i]


def tutorial_loop(name: str, epochs: int) -> tuple[float, float]:
    """The loop as the CIFAR-10 tutorials write it: seconds of training, and test accuracy.

    A folder is read by torchvision's ImageFolder, whose pictures are sorted by class: they are
    shuffled, which the official set does not need.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import ToTensor

    from model import TutorialCNN

    torch.manual_seed(0)
    if dataset.is_set(name):
        splits = dataset.load(name, ["train", "test"], val=0).splits
        train, test = PerPicture(splits["train"]), PerPicture(splits["test"])
    else:
        folder = dataset.find_folder(name)
        train, test = (ImageFolder(folder / split, ToTensor()) for split in ("train", "test"))
    train_loader = torch.utils.data.DataLoader(train, 64, shuffle=True)
    test_loader = torch.utils.data.DataLoader(test, 64)
    network = TutorialCNN(classes=10)
    loss_fn = torch.nn.CrossEntropyLoss()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    seconds = 0
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
    return seconds, hits / len(test)


def ours(args) -> tuple[float, float]:
    """train.py and test.py as commands, a run in runs/: seconds of training, and test accuracy."""
    words = ["--data", args.data, "--config", "tutorial", "--no-resume"]
    words += ["--epochs", str(args.epochs)]
    for script, rest in (("train.py", words), ("test.py", [])):
        command = [sys.executable, str(ROOT / "scripts" / script), *rest]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    run = run_folder.latest_weights().parent
    summary = json.loads((run / "metrics.json").read_text())["summary"]
    return summary["train_seconds"], json.loads((run / "report/metrics.json").read_text())["top1"]


def spawned() -> ProcessPoolExecutor:
    """A fresh process for the other side, which nothing of ours has tuned."""
    return ProcessPoolExecutor(1, multiprocessing.get_context("spawn"))


def bench_tutorial(args) -> dict:
    """Ours, the tutorial's loop, ours again."""
    with spawned() as process:
        first = ours(args)
        theirs = process.submit(tutorial_loop, args.data, args.epochs).result()
        second = ours(args)
    seconds = (first[0] + second[0]) / 2
    return {
        "epochs": args.epochs,
        "tutorial_seconds": theirs[0],
        "tutorial_accuracy": theirs[1],
        "our_seconds": [first[0], second[0]],
        "our_accuracy": [first[1], second[1]],
        "times_faster": theirs[0] / seconds,
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
        name = args.data or generate_photos(Path(temporary))
        resize = Compose([Resize(256), CenterCrop(224), ToTensor()])
        folder = ImageFolder(Path(name) / "train", resize)
        data = dataset.load(name, ["train"], val=0)
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
                mine = dataset.Pictures(part, data)[0, [i]][0][0].float()
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
    """Whole processes, in turn: predict.py on one picture of the newest run, and `import torch`."""
    run = run_folder.latest_weights().parent
    samples = sorted((run / "samples").glob("*.png"))
    if not samples:
        raise UserError(f"{run} has no samples: run `make test` first")
    sides = {
        "predict": [sys.executable, ROOT / "scripts" / "predict.py", samples[0]],
        "import_torch": [sys.executable, "-c", "import torch"],
    }
    seconds = {side: [] for side in sides}
    for i in range(args.rounds + 1):
        for side, command in sides.items():
            began = time.perf_counter()
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
            if i:  # the first round fills the file cache
                seconds[side].append(time.perf_counter() - began)
    medians = {f"{side}_seconds": statistics.median(all_) for side, all_ in seconds.items()}
    return {**medians, "ratio": medians["predict_seconds"] / medians["import_torch_seconds"]}


def main(argv=None):
    parser = options.parser(__doc__)
    parser.add_argument("what", choices=["tutorial", "photos", "predict"])
    parser.add_argument("--data", help="a set or folder")
    parser.add_argument("--epochs", type=number(int, 1), default=10, help="of the tutorial")
    parser.add_argument("--rounds", type=number(int, 1), default=10, help="of photos and predict")
    parser.add_argument("--workers", type=number(int, 0), default=2, help="of photos")
    args = options.parse(parser, argv)
    if args.what == "tutorial" and not args.data:
        args.data = "cifar10"
    runtime.launch()
    found = {"tutorial": bench_tutorial, "photos": bench_photos, "predict": bench_predict}
    result = found[args.what](args)
    machine = {"threads": torch.get_num_threads(), "processor": platform.machine()}
    print(json.dumps({**machine, "torch": torch.__version__, **result}, indent=1))


if __name__ == "__main__":
    sys.exit(options.run(main))
