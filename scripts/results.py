"""Draw the README's plot and print its tables from the stored results, results/results.json.

    make results
    python scripts/results.py --check      write nothing: is the README what results/ says?

The exit status is 1 where a row of the README, or its plot, is not of these results.
"""

import hashlib
import io
import json
import statistics
import sys

import _root  # noqa: F401
from lenslet import files
from lenslet.cli import create_parser, parse
from lenslet.errors import OutsideError, run_main


def main(argv=None) -> int:
    parser = create_parser(__doc__)
    parser.add_argument("--check", action="store_true", help="draw no plot: needs no matplotlib")
    args = parse(parser, argv)
    stored = (files.RESULTS / "results.json").read_bytes()
    plot = files.RESULTS / "accuracy.svg"
    try:
        rows = table_rows(json.loads(stored))
    except (ValueError, KeyError, TypeError) as error:
        raise OutsideError(f"results/results.json: not as this reads it ({error!r})") from error
    if not args.check:
        files.atomic_write(plot, draw_plot(stored))
    readme = (files.ROOT / "README.md").read_text()
    print(*rows, sep="\n")
    faults = [f"README.md lacks this row: {row}" for row in rows if row not in readme]
    if not is_drawn_from(plot.read_text(), stored):
        faults.append(f"{plot} is of other results: `make results` draws it again")
    print(*faults or ["the README's tables and its plot are of these results"], sep="\n")
    return 1 if faults else 0


def table_rows(stored: dict) -> list[str]:
    """The rows of the README's three tables, computed from results.json."""
    rows = []
    for result in stored["results"]:
        accuracy = f"{per_cent(result['accuracy'])} ({len(result['accuracy'])})"
        averaged = per_cent(result["tta_accuracy"]) if "tta_accuracy" in result else ""
        seconds = f"{statistics.mean(result['train_seconds']):.0f} s"
        rows.append([result["title"], accuracy, averaged, seconds, f"`{result['command']}`"])
    for figure in stored["comparisons"]:
        rows.append([figure["title"], f"{figure['times']:.2f}", f"`{figure['command']}`"])
    for figure in stored["toolbox"]:
        rows.append([figure["title"], per_cent(figure["without"]), per_cent(figure["with"])])
    return [f"| {' | '.join(cells)} |" for cells in rows]


def per_cent(values: list[float]) -> str:
    """Fractions as the README has them: mean ± deviation, in per cent."""
    mean = f"{100 * statistics.mean(values):.1f}"
    return mean if len(values) == 1 else f"{mean} ± {100 * statistics.stdev(values):.1f}"


def is_drawn_from(plot: str, stored: bytes) -> bool:
    """Whether draw_plot() drew this SVG from these results."""
    return hashlib.sha256(stored).hexdigest() in plot


def draw_plot(stored: bytes) -> bytes:
    """Test accuracy against training time as SVG, which has the results' digest in it."""
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise OutsideError("matplotlib is not installed: `make results` does it") from error

    matplotlib.rcParams.update({"svg.hashsalt": "lenslet", "font.size": 9})
    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for name, points in json.loads(stored)["accuracy_against_seconds"].items():
        seconds, accuracy = zip(*points, strict=True)
        axes.plot(seconds, [100 * a for a in accuracy], marker="o", markersize=4, label=name)
    ticks = [10, 30, 60, 120, 300, 600]
    axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{t} s" if t < 60 else f"{t // 60} min" for t in ticks])
    axes.minorticks_off()
    axes.set(xlabel="training time", ylabel="test accuracy, %")
    axes.grid(alpha=0.3)
    axes.legend()
    drawn = io.BytesIO()
    about = {"Date": None, "Description": hashlib.sha256(stored).hexdigest()}
    figure.savefig(drawn, format="svg", metadata=about)
    return drawn.getvalue()


if __name__ == "__main__":
    sys.exit(run_main(main))
