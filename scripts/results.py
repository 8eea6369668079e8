"""Draw the README's plot and print its tables from the stored results, results/results.json.

    make results                                    status 1: the README says something else
    python scripts/results.py --check               which rows were measured with other code?
    python scripts/results.py --stamp 'a title'     a row was just measured: for --check

results.json holds, for every figure, its single runs with their seeds, dates and commits, the
command, the versions and the machine; null where it was not recorded.  After a measurement, write
the new runs into their row (and the width that --time chose) and stamp it: the stamp is the digest
of the weights after at most 20 steps of the row's settings, with seed 0 and one thread.  A row is
stale if these steps give another digest on the same processor, torch and images; --check then ends
with status 1.
"""

import hashlib
import io
import json
import re
import shlex
import statistics
import sys
import tempfile
from contextlib import redirect_stdout
from pathlib import Path

import _root  # noqa: F401
from lenslet import files
from lenslet.cli import create_parser, parse
from lenslet.errors import OutsideError, UserError, nearest, run_main
from lenslet.runs.launch import run_apart
from lenslet.training import options


def main(argv=None) -> int:
    parser = create_parser(__doc__)
    add = parser.add_mutually_exclusive_group().add_argument
    add("--check", action="store_true", help="say which rows are stale, by 20 steps of each")
    add("--stamp", metavar="TITLE", help="store the digest of a row that was just measured")
    args, path = parse(parser, argv), files.RESULTS / "results.json"
    try:
        stored = json.loads(path.read_text())
        rows, points = table_rows(stored), curves(stored)
    except (ValueError, KeyError, TypeError) as error:
        raise OutsideError(f"results/results.json: not as this reads it ({error!r})") from error
    if args.check:
        return check(stored["results"])
    if args.stamp is not None:
        titles = {row["title"]: row for row in stored["results"]}
        if args.stamp not in titles:
            raise UserError(f"--stamp {args.stamp}: no such row{nearest(args.stamp, titles)}")
        titles[args.stamp]["stamp"] = stamp(titles[args.stamp])
        files.atomic_write(path, encode(stored))
        return 0
    plot = files.RESULTS / "accuracy.svg"
    files.atomic_write(plot, draw_plot(points))
    readme = (files.ROOT / "README.md").read_text()
    print(*rows, sep="\n")
    faults = [f"README.md lacks this row: {row}" for row in rows if row not in readme]
    print(*faults or ["the README's tables are of these results"], sep="\n")
    return 1 if faults else 0


def table_rows(stored: dict) -> list[str]:
    """The rows of the README's three tables, computed from results.json."""
    rows = []
    for row in stored["results"]:
        seconds = values(row, "seconds")
        took = f"{statistics.mean(seconds):.0f} s" if seconds else ""
        averaged = per_cent(values(row, "tta_accuracy"))
        runs = f"{len(row['runs'])} runs" if len(row["runs"]) > 1 else "single run"
        accuracy = f"{per_cent(values(row, 'accuracy'))} ({runs})"
        rows.append([row["title"], accuracy, averaged, took, row["machine"], f"`{row['command']}`"])
    for row in stored["comparisons"]:
        ratio = f"{statistics.mean(values(row, 'ratio')):.2f}"
        rows.append([row["title"], ratio, row["machine"], f"`{row['command']}`"])
    for row in stored["toolbox"]:
        both = [per_cent(values(row, key)) for key in ("without", "with")]
        rows.append([row["title"], *both, row["machine"]])
    return [f"| {' | '.join(cells)} |" for cells in rows]


def values(row: dict, key: str) -> list[float]:
    """A figure of each run that has it."""
    return [run[key] for run in row["runs"] if run.get(key) is not None]


def per_cent(fractions: list[float]) -> str:
    """Fractions as the README has them, in per cent: each of one or two; of more their mean ± the
    half width of its 95 % confidence interval (Student's t).
    """
    from scipy.special import stdtrit  # scikit-learn needs scipy too

    if len(fractions) < 3:
        return ", ".join(f"{100 * value:.1f}" for value in fractions)
    error = statistics.stdev(fractions) / len(fractions) ** 0.5
    half = stdtrit(len(fractions) - 1, 0.975) * error
    return f"{100 * statistics.mean(fractions):.1f} ± {100 * half:.1f}"


def check(rows: list[dict]) -> int:
    """Print of each row whether it is stale; 1 if any is, else 0."""
    found = []
    for row in rows:
        found.append(compare(row))
        print(f"{row['title']}: {found[-1]}", flush=True)
    stale = sum(verdict.startswith("stale") for verdict in found)
    print(f"stale: {stale}, up to date: {found.count('up to date')}, of {len(found)}")
    return 1 if stale else 0


def compare(row: dict) -> str:
    """Whether a row's first steps are still those of its stamp, in words; fetches no images."""
    from lenslet.distributed.determinism import environment

    then, here, data = row["stamp"], environment("auto"), words_of(row)[1]
    if not then:
        return "not checked: it has no stamp"
    if (then["device"], then["torch"]) != (here["device"], here["versions"]["torch"]):
        return f"cannot be compared here: measured on {then['device']}, torch {then['torch']}"
    at_hand = Path(data).is_dir() or (files.DATA / data / "test.safetensors").is_file()
    if not at_hand and data != "digits":
        return "not checked: its images are not at hand"
    now = stamp(row)
    if now["data_sha256"] != then["data_sha256"]:
        return "cannot be compared here: measured with other images"
    return "up to date" if now == then else "stale: its first steps give other weights"


def words_of(row: dict) -> list[str]:
    """train.py's options for a row, from its command: --data and its value first; no --time."""
    given = dict(word.split("=", 1) for word in shlex.split(row["command"])[2:])
    words = ["--data", given["DATA"]]
    for option, value in (("--config", given.get("RECIPE")), ("--width", row.get("width"))):
        words += [option, str(value)] if value else []
    return words + shlex.split(given.get("ARGS", ""))


def stamp(row: dict) -> dict:
    """What 20 steps of a row's settings give with this code on this machine."""
    from lenslet.training.decide import choose_options
    from lenslet.weights import read_header

    words = words_of(row)
    batch = choose_options(options.parse(words)).batch_size
    words += ["--epochs", 2, "--limit", 10 * batch]  # twice ten steps, so that small sets do too
    words += ["--seed", 0, "--threads", 1, "--keep", "last", "--no-resume", "--output"]
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder, "run")
        if status := run_apart(train_aside, [*words, run]):
            raise OutsideError(f"{row['title']}: training ended with status {status}")
        header = read_header(run / "model.safetensors")
    found = {key: header[key] for key in ("data_sha256", "device")}
    step, digest = header["digests"][-1]
    return {"steps": step, "sha256": digest, "torch": header["versions"]["torch"], **found}


def train_aside(words: list) -> int:
    """train.py, without what it prints, and without a change of runs/latest."""
    import train

    files.RUNS = words[-1].parent
    with redirect_stdout(io.StringIO()):
        return train.main(words)


def encode(stored: dict) -> str:
    """results.json as text: what holds no lists or objects is on one line."""
    text = json.dumps(stored, indent=1, ensure_ascii=False)
    innermost = r"[\[{][^][{}]*[]}]"
    return re.sub(innermost, lambda part: re.sub(r"\n *", " ", part[0]), text) + "\n"


def curves(stored: dict) -> dict[str, list]:
    """The lines of the plot: {label: [(seconds, accuracy), …]}, a row of the table as its mean."""
    rows, found = {row["title"]: row for row in stored["results"]}, {}
    for curve in stored["curves"]:
        points = [(run["seconds"], run["accuracy"]) for run in curve["runs"]]
        for row in (rows[title] for title in curve.get("rows", [])):
            points.append([statistics.mean(values(row, key)) for key in ("seconds", "accuracy")])
        found[f"{curve['label']} ({curve['machine']})"] = sorted(map(tuple, points))
    return found


def fingerprint(points: dict) -> str:
    """What a plot of these lines has in it."""
    return hashlib.sha256(json.dumps(points).encode()).hexdigest()


def draw_plot(points: dict) -> bytes:
    """Test accuracy against training time as SVG, which has the lines' fingerprint in it."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutsideError("matplotlib is not installed: `make results` does it") from error

    matplotlib.rcParams.update({"svg.hashsalt": "lenslet", "font.size": 9})
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for name, line in points.items():
        seconds, accuracy = zip(*line, strict=True)
        axes.plot(seconds, [100 * a for a in accuracy], marker="o", markersize=4, label=name)
    ticks = [10, 30, 60, 120, 300, 600]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{t} s" if t < 60 else f"{t // 60} min" for t in ticks])
    axes.minorticks_off()
    axes.set(xlabel="training time", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = io.BytesIO()
    about = {"Date": None, "Description": fingerprint(points)}
    figure.savefig(drawn, format="svg", metadata=about)
    return drawn.getvalue()


if __name__ == "__main__":
    sys.exit(run_main(main))
