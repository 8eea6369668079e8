"""Measure trained weights on the test images.

    python scripts/test.py                                  the newest run, on its own test images
    python scripts/test.py --weights runs/digits-lenet      that run; or a model.safetensors

A table goes to the console; report/metrics.json, report/predictions.csv (a row per image),
report/predictions.png and TensorBoard's pages, with the confusion matrix, go beside the weights,
and ten test images to samples/.
"""

import sys
from functools import partial
from pathlib import Path

import _root  # noqa: F401
from lenslet import cli, files
from lenslet.errors import UserError, error_context, run_main

# --tta averages where the answer's probability is below this.  fastnet after a minute, 2,500
# validation images of CIFAR-10: 83.1 % plain, 84.3 % averaged, and 84.3 % with these 38 % of them
# averaged, which takes 3.3 passes in place of 7.  Of the others' answers one would have changed.
UNSURE = 0.6


def build_parser() -> cli.Parser:
    parser = cli.create_parser(__doc__)
    cli.add_weights_option(parser)
    add = parser.add_argument
    add("--data", help="a set or folder with the same classes (default: trained on)")
    help = "images at a time, over all processes (default: four times what was trained with)"
    add("-b", "--batch-size", metavar="N", type=cli.number(int, 1), help=help)
    add("--output", metavar="DIR", help="folder of report/ and samples/ (default: the weights')")
    help = "also average unsure answers over shifted and mirrored copies, if training made such"
    add("--tta", action="store_true", help=help)
    cli.add_running_options(parser, cli.add_device_options)
    return parser


def main(argv=None):
    args = cli.parse(build_parser(), argv)

    # These take seconds to import, which --help and a misspelt option need not wait for.
    from lenslet.analysis.report import LEGIBLE, write_report, write_samples
    from lenslet.data.augment import tta_views
    from lenslet.distributed import start
    from lenslet.metrics import evaluate, evaluation_batch, figures
    from lenslet.runs.folder import weights_path
    from lenslet.training import options
    from lenslet.weights import caution, describe
    from model import load_model

    # The network, on its device.
    weights = weights_path(args.weights)
    model, prepare, header = load_model(weights)
    trained = vars(cli.layered(options.build_parser(), header["options"]))
    accelerator = create_accelerator(args, header)
    model, prepare = model.to(accelerator.device), prepare.to(accelerator.device)
    using = "" if args.weights else f"using {describe(weights, header)}"

    # The images: the first process inspects the files of a folder, the others read what it found.
    workers = start.decoding_workers(trained["workers"] if args.workers is None else args.workers)
    opened = partial(open_split, args, weights, header, trained, workers)
    data, split = start.main_process_first(accelerator, opened)
    part = data.splits[split]
    for note in filter(None, [using, caution(header), *data.notes]):
        accelerator.print(note)
    if args.tta:
        check_tta(trained["augment"], part.in_memory)
    output = Path(args.output) if args.output else weights.parent
    start.from_main_process(accelerator, partial(make_folders, output))

    # One pass over them, and with --tta another over those with unsure answers.
    rank, world = accelerator.process_index, accelerator.num_processes
    batch_size = args.batch_size or evaluation_batch(
        trained["batch_size"], trained["accumulate"], world, part.in_memory
    )
    loader = data.loader(split, batch_size, workers=workers, rank=rank, world=world)
    each = len(data.classes) if len(data.classes) <= LEGIBLE else 0
    rows = evaluate(model, loader, prepare, accelerator, probabilities=each)
    result = figures(rows, len(data.classes))
    if args.tta:
        views = partial(tta_views, kind=trained["augment"], decoded=not part.in_memory)
        again = partial(evaluate, model, loader, prepare, accelerator, views=views)
        result["tta"] = average_unsure(rows, again, len(data.classes))

    # The report.
    if accelerator.is_main_process:
        facts = {"weights": str(weights), "epoch": header["epoch"]}
        facts["precision"] = accelerator.mixed_precision
        write_report(output / "report", facts, data, split, rows, result)
        samples = write_samples(output / "samples", data, split)
        print(tell(result, data.classes, split))
        print(f"report: {files.shown(output / 'report')}")
        named = ["--weights", weights] if args.weights else []
        if samples:
            print(f"next: {cli.command('predict.py', *named, samples[-1])}")
    accelerator.wait_for_everyone()  # without it gloo now and then aborts while shutting down
    accelerator.end_training()


def create_accelerator(args, header: dict):
    """The Accelerator for the device and the precision asked for, else for those of training."""
    from lenslet.distributed import start
    from lenslet.distributed.precision import as_trained

    with error_context(f"--device {args.device}"):
        start.use_device(args.device)
    state = start.start_processes(args.threads)
    with error_context(f"--precision {args.precision}"):
        trained = as_trained(header.get("precision", "no"), state.device.type)
        return start.create_accelerator(args.precision, otherwise=trained)


def open_split(args, weights: Path, header: dict, trained: dict, workers: int) -> tuple:
    """The data to measure on, and the split: test, or val where there is none.

    What was said for training (trained) holds here too, unless it is said anew.
    """
    from lenslet.data.layout import find_folder
    from lenslet.data.load import load
    from lenslet.data.sets import is_set

    name = args.data or header["data"]
    how = {"val": trained["val"], "like": header, "workers": workers}
    how["skip_broken"] = args.skip_broken or trained["skip_broken"]
    if not args.data:
        how |= {key: trained[key] for key in ("fold", "limit")}
    with error_context(f"--data {name}" if args.data else f"the data of {weights}, {name}"):
        if not (args.data or is_set(name) or find_folder(name).is_dir()):
            raise UserError("no such folder; give --data")
        for split in ("test", "val"):
            data = load(name, [split], **how)
            if data.splits:
                break
        else:
            raise UserError("no test/ and no val/ images; add a test/ folder")
    if split == "val":
        validated = (trained["val"] or trained["fold"]) and trained["keep"] != "last"
        why = ", by which the weights were chosen" if validated else ""
        data.notes.append(f"{name} has no test images: these are the validation images{why}")
    return data, split


def average_unsure(rows, evaluate_again, classes: int) -> dict:
    """The figures with unsure answers averaged over views, by evaluate_again(only=…)."""
    from lenslet.metrics import COLUMNS, figures

    averaged = rows[:, : len(COLUMNS)].clone()
    unsure = averaged[:, COLUMNS.index("probability")] < UNSURE
    averaged[unsure] = evaluate_again(only=unsure)
    return figures(averaged, classes) | {"averaged": unsure.sum().item()}


def tell(result: dict, classes: list[str], split: str) -> str:
    """What was measured, to read."""
    from lenslet.analysis.report import figures_table, most_confused, summary

    lines = [figures_table(result, classes), summary(result, split)]
    if "tta" in result:
        copies = f"{result['tta']['averaged']} unsure answers averaged over copies (--tta):"
        lines.append(summary(result["tta"], copies))
    return "\n".join(filter(None, [*lines, most_confused(result, classes)]))


def check_tta(augment: str, in_memory: bool) -> None:
    """Refuse --tta for a network that training showed no shifted or mirrored images."""
    from lenslet.data.augment import AUGMENTATIONS

    move, flip = AUGMENTATIONS.get(augment, (False, False))
    if not (flip or (move and in_memory)):  # photographs are cropped by their decoder, not shifted
        raise UserError(f"--tta: training (--augment {augment}) did not shift or mirror images")


def make_folders(output: Path) -> None:
    """Where the report goes, before the work that leads to it."""
    try:
        for name in ("report", "samples"):
            (output / name).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"cannot be written ({error.strerror}); name another folder"
        raise UserError(f"--output {output}: {reason}") from error


if __name__ == "__main__":
    sys.exit(run_main(main))
