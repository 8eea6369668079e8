"""Name what is in pictures, with probabilities, by trained weights.

    python scripts/predict.py img.png
    python scripts/predict.py holiday/ 'scans/*.tif' --top 3 --format csv > answers.csv

Nothing is needed but one weights file: the newest run's, or --weights.  A picture that cannot be
read is named on standard error and the others are answered; the exit status is then 1.
"""

import csv
import glob
import json
import sys
from pathlib import Path

import torch

import _root  # noqa: F401
from lenslet.cli import Parser, add_weights_option, create_parser, number, parse
from lenslet.data.decode import UnreadableImage, read_image
from lenslet.data.layout import find_images
from lenslet.errors import UserError, run_main
from lenslet.runs import folder as run_folder
from model import load_model

BATCH = 64  # pictures


def build_parser() -> Parser:
    parser = create_parser(__doc__)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="files, folders or patterns")
    add_weights_option(parser)
    parser.add_argument(
        "--top", type=number(int, 1), default=1, metavar="K", help="likeliest classes (default: 1)"
    )
    parser.add_argument("--format", choices=["text", "csv", "json"], default="text")
    return parser


def find(words: list[str]) -> list[str]:
    """The picture files that the command line means, in its order.

    Errors: UserError for a folder or a pattern with no picture in it.
    """
    found = []
    for word in words:
        if Path(word).is_dir():
            files = [str(path) for path in find_images(word)[0]]
        elif not Path(word).exists() and glob.has_magic(word):
            files = [f for f in sorted(glob.glob(word, recursive=True)) if Path(f).is_file()]
        else:
            files = [word]
        if not files:
            raise UserError(f"{word}: no pictures there")
        found += files
    return found


@torch.inference_mode()
def predict(model, prepare, header: dict, files: list[str]):
    """(file, probabilities [classes] or None where it cannot be read), in order, a batch a time."""
    for start in range(0, len(files), BATCH):
        read, batch = [], files[start : start + BATCH]
        for file in batch:
            try:
                pixels = read_image(
                    file, header["channels"], tuple(header["image_size"]), header["crop"]
                )
                read.append(torch.from_numpy(pixels).permute(2, 0, 1))
            except UnreadableImage as error:
                print(f"error: {error}", file=sys.stderr)
                read.append(None)
        seen = [image for image in read if image is not None]
        answers = iter(model(prepare(torch.stack(seen))).softmax(1) if seen else [])
        for file, image in zip(batch, read, strict=True):
            yield file, None if image is None else next(answers)


def main(argv=None) -> int:
    args = parse(build_parser(), argv)
    files = find(args.images)
    model, prepare, header = load_model(run_folder.weights_path(args.weights))
    classes = header["classes"]
    top = min(args.top, len(classes))
    rows = csv.writer(sys.stdout, lineterminator="\n")
    if args.format == "csv":
        extra = [f"{key}_{k}" for k in range(2, top + 1) for key in ("class", "probability")]
        rows.writerow(["file", "class", "probability", *extra])
    unread, answers = 0, []
    for file, probabilities in predict(model, prepare, header, files):
        if probabilities is None:
            unread += 1
            continue
        best = probabilities.topk(top)
        ranked = [
            (classes[i], p)
            for p, i in zip(best.values.tolist(), best.indices.tolist(), strict=True)
        ]
        if args.format == "csv":
            rows.writerow([file, *(x for name, p in ranked for x in (name, f"{p:.6f}"))])
        elif args.format == "json":
            answers.append(
                {"file": file, "predictions": [{"class": c, "probability": p} for c, p in ranked]}
            )
        else:
            print(f"{file}: " + ", ".join(f"{name} {p:.2%}" for name, p in ranked))
    if args.format == "json":
        print(json.dumps(answers, indent=1, ensure_ascii=False))
    return 1 if unread else 0


if __name__ == "__main__":
    sys.exit(run_main(main))
