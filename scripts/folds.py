"""Train once for every fold of the training images; the mean and deviation of what they reach.

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
from lenslet.cli import Parser, create_parser, number
from lenslet.errors import OutsideError, UserError, error_context, run_main
from lenslet.training import options

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
    given = options.parse(words)
    for option in ("fold", "overfit", "resume"):
        if given.get(option):
            raise UserError(f"--{option} is for a single training; leave it out")

    # These import torch, which takes a second.
    from lenslet.data.load import RECIPES, choose_data, recipe_for
    from lenslet.files import atomic_write
    from lenslet.runs import launch
    from lenslet.runs.folder import newest_finished

    name, recipe = given.get("data"), None
    with error_context(f"--data {name}"):
        recipe = recipe_for(name or "cifar10") if options.needs_recipe(given) else None
        wanted = options.complete(given, name or "cifar10", recipe)  # mistakes end here
        data = choose_data(name)
    if not name and recipe:
        recipe = RECIPES[data]
    summaries = []
    for k in range(1, args.folds + 1):
        wanted = options.complete(given | {"fold": f"{k}/{args.folds}"}, data, recipe)
        run_name = options.run_name(wanted).rpartition("-fold-")[0]
        folder = Path(args.output or files.RUNS / f"{run_name}-{args.folds}-folds")
        fold = folder / f"fold-{k}"
        run = newest_finished(fold, partial(options.differences, args=wanted))
        if not run:
            mine = ["--data", data, "--fold", f"{k}/{args.folds}", "--output", fold]
            status = launch.run_training([*words, *mine], args.processes)
            if status in (2, 130, 143):  # it has said why
                return status
            if status:
                raise OutsideError(
                    f"fold {k} ended with status {status}; once mended, the same command goes on"
                )
            run = newest_finished(fold)
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


if __name__ == "__main__":
    sys.exit(run_main(main))
