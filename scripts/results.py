"""Draw the README's plot, results/accuracy.svg, from the stored results: needs matplotlib.

python scripts/plot.py
"""

import hashlib
import io
import json
import sys

import _root  # noqa: F401
from lenslet import files
from lenslet.cli import create_parser, parse
from lenslet.errors import OutsideError, run_main
from lenslet.files import atomic_write


def main(argv=None):
    parse(create_parser(__doc__), argv)
    try:
        import matplotlib
        from matplotlib import pyplot
    except ImportError as error:
        raise OutsideError("matplotlib is not here: `make check` installs it") from error

    stored = (files.RESULTS / "results.json").read_bytes()
    curves = json.loads(stored)["accuracy_against_seconds"]
    matplotlib.use("svg")
    pyplot.rcParams.update({"svg.hashsalt": "lenslet", "font.size": 9})
    figure, axes = pyplot.subplots(figsize=(6.4, 3.2), layout="constrained")
    for name, points in curves.items():
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
    # The digest tells a test whether the picture is of these results.
    about = {"Date": None, "Description": hashlib.sha256(stored).hexdigest()}
    figure.savefig(drawn, format="svg", metadata=about)
    atomic_write(files.RESULTS / "accuracy.svg", drawn.getvalue())
    print(f"drawn: {files.RESULTS / 'accuracy.svg'}")


if __name__ == "__main__":
    sys.exit(run_main(main))
