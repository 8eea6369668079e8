"""Train once for every fold of the training pictures; the mean and deviation of what they reach.

    make folds K=5 DATA=digits
    python scripts/folds.py --folds 5 --data my/pictures --epochs 20

Every other option is train.py's.  Each training validates on the fold that it has not seen.  Those
that are finished are not repeated: the same command goes on after an interruption.
"""

import json
import statistics
import sys
from functools import partial
from pathlib import Path

import _root  # noqa: F401
from lenslet import files
from lenslet.cli import Parser, create_parser, number, parse
from lenslet.data.load import choose_data
from lenslet.errors import OutsideError, UserError, run_main
from lenslet.files import atomic_write
from lenslet.runs import folder as run_folder
from lenslet.runs import launch
from lenslet.runs.run import differences
from lenslet.training import options
from lenslet.training.options import complete, run_name

FIGURES = ("val_accuracy", "val_f1", "val_loss")


def build_parser() -> Parser:
    parser = create_parser(__doc__)
    add = parser.add_argument
    add("--folds", metavar="K", type=number(int, 2), default=5, help="how many")
    help = "of each training"
    add("--processes", metavar="N", type=number(int, 1), default=1, help=help)
    add("--output", metavar="DIR", help="folder of the runs (default: runs/<data>-<model>-K-folds)")
    return parser


def main(argv=None) -> int:
    args, words = build_parser().parse_known_args(sys.argv[1:] if argv is None else argv)
    parser = options.build_parser()
    typed = parse(parser, words)
    for option in ("fold", "overfit", "resume"):
        if getattr(typed, option):
            raise UserError(f"--{option} is of one training; leave it out for folds")
    # Mistakes end here, before the first training.
    complete(parser, typed, words, typed.data or "cifar10")

    words += ["--data", choose_data(typed.data)]
    summaries = []
    for k in range(1, args.folds + 1):
        mine = [*words, "--fold", f"{k}/{args.folds}"]
        wanted = complete(parser, parse(parser, mine), mine, words[-1])
        name = run_name(wanted).rpartition("-fold-")[0]
        folder = Path(args.output or files.RUNS / f"{name}-{args.folds}-folds")
        fold = folder / f"fold-{k}"
        run = finished(fold, partial(differences, parser, args=wanted))
        if not run:
            status = launch.run_training([*mine, "--output", fold], args.processes)
            if status in (2, 130, 143):  # which it has told about
                return status
            if status:
                raise OutsideError(
                    f"fold {k} ended with status {status}; mended, the same command goes on"
                )
            run = finished(fold)
        summaries.append(json.loads((run / "metrics.json").read_text())["summary"])

    table = {
        key: {"folds": values, "mean": statistics.mean(values), "std": statistics.stdev(values)}
        for key in FIGURES
        for values in [[summary[key] for summary in summaries]]
    }
    atomic_write(folder / "folds.json", json.dumps(table, indent=1))
    for k, summary in enumerate(summaries, 1):
        print(
            f"fold {k}/{args.folds}: epoch {summary['best_epoch']}  "
            f"accuracy {summary['val_accuracy']:.2%}  macro F1 {summary['val_f1']:.2%}  "
            f"loss {summary['val_loss']:.4f}"
        )
    accuracy, f1, loss = (table[key] for key in FIGURES)
    print(
        f"mean ± deviation: accuracy {accuracy['mean']:.2%} ± {accuracy['std']:.2%}  "
        f"macro F1 {f1['mean']:.2%} ± {f1['std']:.2%}  loss {loss['mean']:.4f} ± {loss['std']:.4f}"
    )
    print(f"folds: {folder}")
    return 0


def finished(folder: Path, compare=lambda run: "") -> Path | None:
    """The newest finished run of a name whose options compare() finds no difference in, if any."""
    runs = [run for run in run_folder.numbered(folder) if run_folder.is_finished(run)]
    runs = [run for run in runs if not compare(run)]
    return max(runs, key=lambda run: (run / "metrics.json").stat().st_mtime, default=None)


if __name__ == "__main__":
    sys.exit(run_main(main))
