"""Measure trained weights on the test pictures.

    python scripts/test.py                              the newest run on its own test pictures
    python scripts/test.py --weights runs/digits-lenet/model.safetensors

A table goes to the console; report/metrics.json, report/predictions.csv (a row per picture) and
report/predictions.png go beside the weights, and ten test pictures to samples/.
"""

import csv
import io
import json
import sys
from pathlib import Path

import torch

import _root  # noqa: F401
from lenslet.cli import (
    Parser,
    add_running_options,
    add_weights_option,
    command,
    create_parser,
    number,
    parse,
)
from lenslet.data.augment import tta_views
from lenslet.data.batches import Data, ImageBatches
from lenslet.data.decode import read_image
from lenslet.data.load import load
from lenslet.distributed.start import (
    create_accelerator,
    decoding_workers,
    main_process_first,
    start_processes,
)
from lenslet.errors import UserError, run_main
from lenslet.files import atomic_write
from lenslet.grid import draw_grid, encode_png
from lenslet.metrics import evaluate, evaluation_batch, figures
from lenslet.runs import folder as run_folder
from model import load_model


def build_parser() -> Parser:
    parser = create_parser(__doc__)
    add_weights_option(parser)
    parser.add_argument(
        "--data", help="a set or folder with the same classes (default: trained on)"
    )
    help = "pictures at a time, over all processes (default: four times what was trained with)"
    parser.add_argument("-b", "--batch-size", metavar="N", type=number(int, 1), help=help)
    parser.add_argument(
        "--output", metavar="DIR", help="folder of report/ and samples/ (default: the weights')"
    )
    help = "also average over shifted and mirrored copies, as far as training made such"
    parser.add_argument("--tta", action="store_true", help=help)
    add_running_options(parser)
    return parser


def table(result: dict, classes: list[str]) -> str:
    """The figures of every class and of all, to read."""
    width = max(8, *(len(name) for name in classes))
    lines = [f"{'class':{width}}  images  accuracy  precision  recall      F1"]
    for name, row in zip(classes, result["per_class"], strict=True):
        lines.append(
            f"{name:{width}}  {row['images']:6,}  {row['accuracy']:8.2%}  {row['precision']:9.2%}  "
            f"{row['recall']:6.2%}  {row['f1']:6.2%}"
        )
    lines.append(
        f"{'all':{width}}  {result['images']:6,}  {result['top1']:8.2%}  "
        f"{result['macro_precision']:9.2%}  {result['macro_recall']:6.2%}  "
        f"{result['macro_f1']:6.2%}   (macro means)"
    )
    return "\n".join(lines)


def predictions_csv(rows: torch.Tensor, names: list[str], classes: list[str]) -> str:
    """A line per picture: its file or index, its label, the prediction and its probability."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(["file", "label", "prediction", "probability"])
    for index, label, predicted, _, probability, _ in rows.tolist():
        writer.writerow(
            [names[int(index)], classes[int(label)], classes[int(predicted)], f"{probability:.6f}"]
        )
    return text.getvalue()


def report(args, weights: Path, header: dict, data: Data, split: str, rows, averaged):
    """Print the figures of an evaluation and write report/, samples/ and the TensorBoard pages.

    rows: from evaluate(); averaged: likewise with --tta, or None.
    """
    from torch.utils.tensorboard import SummaryWriter

    classes, part, epoch = data.classes, data.splits[split], header["epoch"]
    result = figures(rows, len(classes))
    if averaged is not None:
        result["tta"] = figures(averaged, len(classes))
    output = Path(args.output) if args.output else weights.parent
    try:
        (output / "report").mkdir(parents=True, exist_ok=True)
        (output / "samples").mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); give --output") from error

    facts = {"weights": str(weights), "epoch": epoch, "data": data.name, "split": split}
    text = json.dumps({**facts, "classes": classes, **result}, indent=1, ensure_ascii=False)
    atomic_write(output / "report" / "metrics.json", text)
    atomic_write(output / "report" / "predictions.csv", predictions_csv(rows, part.names, classes))

    # A look at pictures spread over the whole split, the wrong ones in red.
    shown = torch.linspace(0, len(part) - 1, min(32, len(part))).round().long()
    images, labels, _ = ImageBatches(part, data)[0, shown.tolist()]
    predicted = rows[shown, 2].long()
    names = zip(labels.tolist(), predicted.tolist(), strict=True)
    captions = [f"{classes[true]}\n-> {classes[guess]}" for true, guess in names]
    grid = draw_grid(images, captions, (labels != predicted).tolist())
    atomic_write(output / "report" / "predictions.png", encode_png(grid))
    with SummaryWriter(output / "report") as writer:
        writer.add_image(f"{split}_predictions", grid, epoch)
        for key in ("loss", "top1", "top5", "macro_precision", "macro_recall", "macro_f1"):
            writer.add_scalar(f"{split}/{key}", result[key], epoch)

    # Ten pictures in full size for predict.py to answer.
    chosen = torch.linspace(0, len(part) - 1, min(10, len(part))).round().long().tolist()
    for old in (output / "samples").glob("*.png"):
        old.unlink()
    for k, i in enumerate(chosen):
        if part.in_memory:
            image = part.pixels(torch.tensor([i]))[0]
        else:
            pixels = read_image(part.images[i], data.channels)
            image = torch.from_numpy(pixels).permute(2, 0, 1)
        name = classes[part.labels[i]].replace("/", "-")
        sample = output / "samples" / f"{k}-{name}.png"
        atomic_write(sample, encode_png(image))

    print(table(result, classes))
    print(
        f"{split} accuracy {result['top1']:.2%}, top-5 {result['top5']:.2%}, loss "
        f"{result['loss']:.4f}, {result['images']:,} pictures"
    )
    if averaged is not None:
        same = result["tta"]
        print(
            f"averaged over shifted and mirrored copies (--tta): accuracy {same['top1']:.2%}, "
            f"top-5 {same['top5']:.2%}, loss {same['loss']:.4f}"
        )
    print(f"report: {output / 'report'}")
    print(f"next: {command('predict.py', sample)}")


def main(argv=None):
    args = parse(build_parser(), argv)
    weights = run_folder.weights_path(args.weights)
    model, prepare, header = load_model(weights)
    # These take seconds to import, which mistakes need not wait for.

    # Data: the test pictures, or the validation ones where there are none.  What was said for
    # training holds here too, unless it is said anew.
    trained = header["options"]
    state = start_processes()
    kept = "no" if trained["precision"] == "no" else "auto"  # the device may be another one
    accelerator = create_accelerator(args.precision, otherwise=kept)
    device, say = accelerator.device, accelerator.print
    workers = decoding_workers(trained["workers"] if args.workers is None else args.workers)
    reading = {
        "val": trained["val"],
        "fold": None if args.data else trained.get("fold"),
        "limit": None if args.data else trained.get("limit"),
        "like": header,
        "skip_broken": args.skip_broken or trained["skip_broken"],
        "workers": workers,
    }
    for split in ("test", "val"):
        data = main_process_first(
            state, lambda split=split: load(args.data or header["data"], [split], **reading)
        )
        if data.splits:
            break
    else:
        raise UserError(f"--data {data.name}: no test/ and no val/ pictures; add a test/ folder")
    for note in data.notes:
        say(note)
    if split == "val":
        say(
            f"{data.name} has no test pictures: these are the validation pictures"
            + (
                ", by which the weights were chosen"
                if trained["val"] or trained.get("fold")
                else ""
            )
        )

    def shown(images):
        return tta_views(images, trained["augment"], not data.splits[split].in_memory)

    if args.tta and len(shown(torch.zeros(1, data.channels, 4, 4, dtype=torch.uint8))) == 1:
        raise UserError(
            f"--tta: training (--augment {trained['augment']}) did not shift or mirror pictures"
        )

    # Evaluate.
    rank, world = state.process_index, state.num_processes
    batch = args.batch_size or evaluation_batch(
        trained["batch_size"], trained["accumulate"], world, data.splits[split].in_memory
    )
    loader = data.loader(split, batch, workers=workers, rank=rank, world=world)
    evaluated = model.to(device), loader, prepare.to(device), accelerator
    rows, averaged = evaluate(*evaluated), None
    if args.tta:
        averaged = evaluate(*evaluated, views=shown)
    if accelerator.is_main_process:
        report(args, weights, header, data, split, rows, averaged)
    accelerator.wait_for_everyone()  # without it gloo now and then aborts while shutting down
    accelerator.end_training()


if __name__ == "__main__":
    sys.exit(run_main(main))
