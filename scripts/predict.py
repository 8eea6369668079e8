"""Name what is in images, with probabilities, by trained weights.

    python scripts/predict.py img.png
    python scripts/predict.py holiday/ 'scans/*.tif' --top 3 --format csv > answers.csv
    python scripts/predict.py holiday/ --grid answers.png

Nothing is needed but one weights file: the newest run's, or --weights.  An image that cannot be
read is named on standard error and the others are answered; the exit status is then 1.
"""

import csv
import glob
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import _root  # noqa: F401
from lenslet.cli import add_device_options, add_weights_option, create_parser, number, parse
from lenslet.errors import UserError, counted, error_context, run_main

BATCH = 64  # images
SHEET = 64  # images on the picture of --grid


def main(argv=None) -> int:
    parser = create_parser(__doc__)
    add = parser.add_argument
    add("images", nargs="+", metavar="IMAGE", help="files, folders or patterns")
    add_weights_option(parser)
    help = "show the K most likely classes, 0: all of them"
    add("--top", type=number(int, 0), default=1, metavar="K", help=help)
    add("--format", choices=["text", "csv", "json"], default="text", help="of the answers")
    help = f"also draw the first {SHEET} images with their answers on one sheet"
    add("--grid", metavar="FILE.png", help=help)
    help = "read files of up to N pixels (default: all that take at most 1 GiB, and 10 s)"
    add("--max-pixels", type=number(int, 1), metavar="N", help=help)
    add_device_options(add)
    args = parse(parser, argv)

    # These take a second or two to import, which --help and a misspelt option need not wait for;
    # each function below imports what only it needs.
    from lenslet.distributed.precision import as_trained, choose_device, choose_precision
    from lenslet.runs.folder import weights_path
    from lenslet.weights import caution, describe
    from model import load_model

    if (sheet := args.grid) and not Path(sheet).parent.is_dir():
        raise UserError(f"--grid {sheet}: no such folder; make it first, or name another")
    if sheet and (Path(sheet).is_dir() or Path(sheet).suffix.lower() != ".png"):
        raise UserError(f"--grid {sheet}: name a .png file")
    files, weights = find(args.images), weights_path(args.weights)
    with error_context(f"--device {args.device}"):
        device = choose_device(args.device)
    model, prepare, header = load_model(weights)
    kept = as_trained(header.get("precision", "no"), device.type)
    with error_context(f"--precision {args.precision}"):
        precision = choose_precision(args.precision, device.type, otherwise=kept)
    if not args.weights:
        how = f"on {device}, precision {precision}"
        print(f"using {describe(weights, header)} {how}", file=sys.stderr)
    if note := caution(header):
        print(note, file=sys.stderr)
    top = min(args.top or len(header["classes"]), len(header["classes"]))
    network = model.to(device), prepare.to(device)
    answers = predict(*network, header, files, top, precision, args.max_pixels)
    if args.grid:
        answers = draw(answers, header["classes"], Path(args.grid), args.max_pixels)
    answered = write(answers, args.format, top)
    return 0 if answered == len(files) else 1


def find(words: list[str]) -> list[str]:
    """The image files that the command line means, in its order.

    Errors: UserError for a folder or a pattern with no image in it, or as of find_images().
    """
    from lenslet.data.layout import find_images

    found = []
    for word in words:
        files = [word]
        if Path(word).is_dir():
            files = [str(path) for path in find_images(word)[0]]
        elif not Path(word).exists() and glob.has_magic(word):
            files = [f for f in sorted(glob.glob(word, recursive=True)) if not os.path.isdir(f)]
        if not files:
            raise UserError(f"{word}: no images there")
        found += files
    return found


def predict(
    model, prepare, header: dict, files: list[str], top: int, precision: str, most: int | None
) -> Iterator[tuple[str, list]]:
    """(file, its `top` likeliest classes as (name, probability)), in order, a batch at a time.

    An image that cannot be read is named on standard error and left out.  most: see read_image().
    """
    import torch

    from lenslet.data.decode import UnreadableImage, read_image
    from lenslet.distributed.precision import autocast

    reading = header["channels"], tuple(header["image_size"]), header["crop"], None, most
    for start in range(0, len(files), BATCH):
        names, images = [], []  # images: uint8 [C, H, W] each
        for file in files[start : start + BATCH]:
            try:
                images.append(torch.from_numpy(read_image(file, *reading)).permute(2, 0, 1))
                names.append(file)
            except UnreadableImage as error:
                print(f"error: {error}", file=sys.stderr)
        if not names:
            continue
        device = prepare.mean.device
        with torch.inference_mode(), autocast(device, precision):
            logits = model(prepare(torch.stack(images).to(device))).float()  # [B, classes]
        # As metrics.evaluate() does it: of classes that are equally likely, the first one.
        best = logits.log_softmax(1).sort(descending=True, stable=True)
        columns = best.indices[:, :top].tolist(), best.values[:, :top].exp().tolist()
        for file, *ranked in zip(names, *columns, strict=True):
            yield file, [(header["classes"][k], p) for k, p in zip(*ranked, strict=True)]


def draw(
    answers: Iterable[tuple[str, list]], classes: list[str], path: Path, most: int | None
) -> Iterator[tuple[str, list]]:
    """Pass predict()'s answers on, and then draw the first SHEET images with theirs on one sheet.

    From which image on they are left out is said on standard error, and which names cannot be
    drawn.  most: see read_image().
    """
    import torch

    from lenslet.data.decode import UnreadableImage, read_image
    from lenslet.files import atomic_write
    from lenslet.fonts import drawable
    from lenslet.grid import draw_grid, encode_png

    def whole(file):
        try:
            return torch.from_numpy(read_image(file, 3, most=most)).permute(2, 0, 1)
        except UnreadableImage as error:  # it was read at a smaller size
            print(f"{path}: without a picture: {error}", file=sys.stderr)
            return torch.full((3, 1, 1), 255, dtype=torch.uint8)

    files, captions, (names, notes) = [], [], drawable(classes)
    shown = dict(zip(classes, names, strict=True))
    sys.stderr.writelines(f"{note}\n" for note in notes)
    for file, ranked in answers:
        yield file, ranked
        files.append(file)
        captions.append(f"{shown[ranked[0][0]]}\n{ranked[0][1]:.2%}")
    if files:  # whole images, read again one by one: all at once may not fit into memory
        sheet = draw_grid(map(whole, files[:SHEET]), captions[:SHEET])
        atomic_write(path, encode_png(sheet))
    if len(files) > SHEET:
        some = f"{SHEET} of {counted(len(files), 'image')}"
        print(f"{path}: the first {some}; left out from {files[SHEET]} on", file=sys.stderr)


def write(answers: Iterable[tuple[str, list]], form: str, top: int) -> int:
    """Print predict()'s answers as text, csv or json; how many there were."""
    rows, count, whole = csv.writer(sys.stdout, lineterminator="\n"), 0, []
    if form == "csv":
        extra = [f"{key}_{k}" for k in range(2, top + 1) for key in ("class", "probability")]
        rows.writerow(["file", "class", "probability", *extra])
    for file, ranked in answers:
        count += 1
        if form == "csv":
            rows.writerow([file, *(x for name, p in ranked for x in (name, f"{p:.6f}"))])
        elif form == "json":
            # Numbers that are none, of a network that overflowed, JSON does not know.
            predictions = [
                {"class": name, "probability": p if math.isfinite(p) else None}
                for name, p in ranked
            ]
            whole.append({"file": file, "predictions": predictions})
        else:
            print(f"{file}: " + ", ".join(f"{name} {p:.2%}" for name, p in ranked))
    if form == "json":
        text = json.dumps(whole, indent=1, ensure_ascii=False)
        # Bytes of a name that are not UTF-8 as escapes, so that all of the output is.
        print(text.encode(errors="backslashreplace").decode())
    return count


if __name__ == "__main__":
    sys.exit(run_main(main))
