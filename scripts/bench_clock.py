"""The part `clock` of bench.py: which width of fastnet is best in how much time.

    python scripts/bench.py clock --widths 16 24 --times 60s --seeds 0 1

WIDTHS in lenslet/training/clock.py rests on this.  What counts is how many images a width sees in
a time, so the figures of one machine serve others too.  results/clock.json has a row per training,
with its seed, date and commit, and is written after each.
"""

import _root  # noqa: F401, I001 (before torch)
import itertools
import json
import statistics
import tempfile
from pathlib import Path

from results import encode, train_aside

from lenslet import files
from lenslet.cli import parse_duration
from lenslet.data.load import load
from lenslet.errors import OutsideError, UserError, error_context
from lenslet.runs.launch import run_apart
from lenslet.training import options
from lenslet.training.decide import choose_options


def measure(
    data, widths: list[int], times: list[str], seeds: list[int], machine: dict, command: str
):
    """Train for each width, time and seed that is not stored yet; the table() of all that are.

    machine: as bench.describe_machine() gives it.
    Errors: UserError where what is stored is of another machine, versions or images.
    """
    path, runs = files.RESULTS / "clock.json", []
    when = {key: machine.pop(key) for key in ("date", "commit")}
    about = {"machine": machine, "data": data}
    if path.exists():
        with error_context(f"{files.shown(path)}: move it away to begin anew"):
            try:
                stored = json.loads(path.read_text())
            except ValueError as error:
                raise UserError(f"not JSON ({error})") from error
            if any(stored.get(key) != value for key, value in about.items()):
                raise UserError("it is of another machine, versions or images")
        runs = stored["runs"]
    val = choose_options(options.parse(["--data", data])).val
    count = len(load(data, ["train"], val=val).splits["train"])
    for seed, span, width in itertools.product(seeds, times, widths):
        key = {"width": width, "time": span, "seed": seed}
        if not any(key.items() <= run.items() for run in runs):
            runs.append(key | train(data, count, **key) | when)
            print(json.dumps(runs[-1]), flush=True)
            stored = about | {"command": command, "runs": runs}
            files.atomic_write(path, encode(stored))
    return table(runs)


def train(data: str, count: int, **given) -> dict:
    """What a training reaches and sees, of `count` training images; runs/ stays as it is.

    given: options of train.py.  Errors: OutsideError where it fails.
    """
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        if status := run_apart(train_aside, ["--data", data, *words, "--output", run]):
            raise OutsideError(f"training ended with status {status}")
        epochs = json.loads((run / "metrics.json").read_text())["epochs"]
    seconds = sum(epoch["seconds"] for epoch in epochs)
    images = round(sum(epoch["seconds"] * epoch["images_per_second"] for epoch in epochs))
    seen = {"images": images, "epochs": images / count, "images_per_second": images / seconds}
    return {"val_accuracy": epochs[-1]["val_accuracy"], **seen}


def table(runs: list[dict]) -> dict:
    """Of each time: the images that each width saw and what it reached, and the best width."""
    found = {}
    for run in sorted(runs, key=lambda run: (parse_duration(run["time"]), run["width"])):
        found.setdefault(run["time"], {}).setdefault(run["width"], []).append(run)
    for widths in found.values():
        for width, same in widths.items():
            reached = [run["val_accuracy"] for run in same]
            row = {k: statistics.median(run[k] for run in same) for k in ("images", "epochs")}
            row |= {"val_accuracy": statistics.median(reached), "min": min(reached)}
            widths[width] = row | {"max": max(reached), "seeds": len(same)}
        widths["best"] = max(widths, key=lambda width: widths[width]["val_accuracy"])
    return found
