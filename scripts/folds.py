"""Train once for every fold of the training images; the mean and deviation of what they reach.

    make folds K=5 DATA=digits
    python scripts/folds.py --folds 5 --data my/pictures --epochs 20

Every other option is train.py's.  Each training validates on the fold that it has not seen, and the
figures are those of its last epoch: the best one was chosen by the very fold that would judge it.
Those that are finished are not repeated: run the same command again after an interruption.
"""

import json
import statistics
import sys
from functools import partial
from pathlib import Path

import _root  # noqa: F401
from lenslet import files
from lenslet.cli import create_parser, number
from lenslet.errors import OutsideError, UserError, run_main
from lenslet.training import options

FIGURES = {
    "val_accuracy": ("accuracy", ".2%"),
    "val_f1": ("macro F1", ".2%"),
    "val_loss": ("loss", ".4f"),
}


def main(argv=None) -> int:
    parser = create_parser(__doc__)
    add = parser.add_argument
    add("--folds", metavar="K", type=number(int, 2), default=5, help="how many")
    add("--processes", metavar="N", type=number(int, 1), default=1, help="of each training")
    add("--output", metavar="DIR", help="folder of the runs (default: runs/<data>-<model>-K-folds)")
    args, words = parser.parse_known_args(sys.argv[1:] if argv is None else argv)
    given = options.parse(words)
    for option in ("fold", "overfit", "resume"):
        if given.get(option):
            raise UserError(f"--{option} is for a single training; leave it out")

    # These import torch, which takes a second.
    from lenslet.runs.folder import newest_finished
    from lenslet.runs.launch import run_training
    from lenslet.training.decide import choose_options

    wanted = choose_options(given | {"fold": f"1/{args.folds}"})
    run_name = options.run_name(wanted).rpartition("-fold-")[0]
    folder = Path(args.output or files.RUNS / f"{run_name}-{args.folds}-folds")
    last = []  # epochs
    for k in range(1, args.folds + 1):
        wanted.fold, output = f"{k}/{args.folds}", folder / f"fold-{k}"
        compare = partial(options.differences, args=wanted)
        if not newest_finished(output, compare):
            mine = ["--data", wanted.data, "--fold", wanted.fold, "--output", output]
            status = run_training([*words, *mine], args.processes)
            if status in (2, 130, 143):  # it has said why
                return status
            if status:
                rest = "once that is fixed, run the same command again"
                raise OutsideError(f"fold {k} ended with status {status}; {rest}")
        metrics = (newest_finished(output, compare) / "metrics.json").read_text()
        last.append(json.loads(metrics)["epochs"][-1])
    report(last, folder)
    if wanted.patience:
        print("each training was stopped by its own fold (--patience): the figures are too good")
    return 0


def report(last: list[dict], folder: Path) -> None:
    """Print what each fold reached, and their mean and deviation; write folder/folds.json.

    last: the record of each training's last epoch, as metrics.json has it.
    """
    table = {}
    for key in FIGURES:
        values = [record[key] for record in last]
        mean, deviation = statistics.mean(values), statistics.stdev(values)
        table[key] = {"folds": values, "mean": mean, "std": deviation}
    files.atomic_write(folder / "folds.json", json.dumps(table, indent=1))
    for k, record in enumerate(last, 1):
        found = [f"{name} {record[key]:{form}}" for key, (name, form) in FIGURES.items()]
        print(f"fold {k}/{len(last)}: last epoch, {record['epoch']}", *found, sep="  ")
    found = [
        f"{name} {table[key]['mean']:{form}} ± {table[key]['std']:{form}}"
        for key, (name, form) in FIGURES.items()
    ]
    print("mean ± deviation: " + "  ".join(found))
    print(f"folds: {folder}")


if __name__ == "__main__":
    sys.exit(run_main(main))
