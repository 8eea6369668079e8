"""What test.py reports of an evaluation: its table, report/, samples/ and TensorBoard's pages."""

import csv
import io
import json
import unicodedata
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from lenslet.data.batches import Data, evenly_spaced
from lenslet.data.decode import UnreadableImage, read_image
from lenslet.errors import counted
from lenslet.files import atomic_write
from lenslet.fonts import drawable, font_for
from lenslet.grid import draw_grid, encode_png, shorten
from lenslet.metrics import COLUMNS

LEGIBLE = 20  # classes: more have no names and counts in a picture, and no columns in a table
SHOWN = 32  # images on predictions.png


def write_report(
    folder: Path, facts: dict, data: Data, split: str, rows: Tensor, result: dict
) -> None:
    """Write metrics.json, predictions.csv, predictions.png and TensorBoard's events into a folder.

    facts: the weights' file and epoch, and the precision.  rows [N, 6 or more] from evaluate();
    result: figures(rows).
    """
    from torch.utils.tensorboard import SummaryWriter

    classes = data.classes
    metrics = {**facts, "data": data.name, "split": split, "classes": classes, **result}
    atomic_write(folder / "metrics.json", json.dumps(metrics, indent=1, ensure_ascii=False))
    names = data.splits[split].names
    atomic_write(folder / "predictions.csv", predictions_csv(rows, names, classes))

    grid = draw_predictions(data, split, rows)
    atomic_write(folder / "predictions.png", encode_png(grid))

    epoch, confusion = facts["epoch"], draw_confusion(torch.tensor(result["confusion"]), classes)
    with SummaryWriter(folder) as writer:
        writer.add_image(f"{split}/confusion", confusion, epoch)
        writer.add_image(f"{split}/predictions", grid, epoch)
        for key in ("loss", "top1", "top5", "macro_precision", "macro_recall", "macro_f1"):
            writer.add_scalar(f"{split}/{key}", result[key], epoch)


def write_samples(folder: Path, data: Data, split: str) -> list[Path]:
    """Write ten images of a split in full size as folder/<k>-<class>.png, for predict.py."""
    part, written = data.splits[split], []
    for old in folder.glob("*.png"):
        old.unlink()
    for k, i in enumerate(evenly_spaced(len(part), 10)):
        if part.in_memory:
            image = part.pixels(torch.tensor([i]))[0]
        else:
            try:
                image = torch.from_numpy(read_image(part.file(i), data.channels)).permute(2, 0, 1)
            except UnreadableImage:  # it was read, smaller: whole it takes too much memory
                continue
        name = data.classes[part.labels[i]].replace("/", "-")
        written.append(folder / f"{k}-{name}.png")
        atomic_write(written[-1], encode_png(image))
    return written


def draw_predictions(data: Data, split: str, rows: Tensor) -> Tensor:
    """Images of a split with their true and predicted classes on one sheet, uint8 [3, H, W].

    Mistakes come first, in red, the most confident one at the front; then right answers from the
    whole split, as far as there is room.
    """
    classes, mistaken = drawable(data.classes)[0], rows[:, 1] != rows[:, 2]
    mistakes, right = (kind.nonzero()[:, 0] for kind in (mistaken, ~mistaken))
    mistakes = mistakes[rows[mistakes, 4].argsort(descending=True, stable=True)]
    room = max(0, SHOWN - len(mistakes))
    shown = [*mistakes[:SHOWN].tolist(), *right[evenly_spaced(len(right), room)].tolist()]
    captions = [
        f"{classes[int(label)]}\n-> {classes[int(guess)]}\n{probability:.2%}"
        for _, label, guess, _, probability, *_ in rows[shown].tolist()
    ]
    heading = f"{split} images: no mistakes in {len(rows):,}"
    if count := len(mistakes):
        are = "is a mistake" if count == 1 else "are mistakes, the most confident first"
        heading = f"{split} images: {count:,} of {len(rows):,} {are}"
    images = data.batch(split, shown).images
    return draw_grid(images, captions, mistaken[shown].tolist(), heading)


def predictions_csv(rows: Tensor, names: list[str], classes: list[str]) -> str:
    """A line per image: its file or index, its label, the prediction and its probability.

    rows [N, 6 + classes] have a column for the probability of each class too, rows [N, 6] none.
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    each = classes[: rows.shape[1] - len(COLUMNS)]
    writer.writerow(["file", "label", "prediction", "probability", *each])
    for i, label, predicted, _, probability, _, *others in rows.tolist():
        shares = (f"{p:.6f}" for p in (probability, *others))
        writer.writerow([names[int(i)], classes[int(label)], classes[int(predicted)], *shares])
    return text.getvalue()


def figures_table(result: dict, classes: list[str]) -> str:
    """The figures of every class and of all, to read."""
    width = max(8, *map(columns, classes))
    means = {key: result[f"macro_{key}"] for key in ("precision", "recall", "f1")}
    whole = {"images": result["images"], "accuracy": result["top1"], **means}
    lines = [f"{'class':{width}}  images  accuracy  precision  recall      F1"]
    for name, row in zip([*classes, "all"], [*result["per_class"], whole], strict=True):
        line = f"{name}{' ' * (width - columns(name))}  {row['images']:6,}"
        for key, room in (("accuracy", 8), ("precision", 9), ("recall", 6), ("f1", 6)):
            share = "–" if row[key] is None else f"{row[key]:.2%}"
            line += f"  {share:>{room}}"
        lines.append(line)
    met = sum(row["images"] > 0 for row in result["per_class"])
    some = f" of the {counted(met, 'class', 'classes')} with images" if met < len(classes) else ""
    return "\n".join(lines) + f"   (macro means{some})"


def columns(text: str) -> int:
    """Columns of a terminal: two for a Chinese character, none for an accent on another one."""
    seen = [c for c in text if unicodedata.category(c) not in ("Mn", "Me", "Cf")]
    return sum(1 + (unicodedata.east_asian_width(c) in "WF") for c in seen)


def summary(result: dict, name: str) -> str:
    """A line with the figures of all images together; name: what they are of."""
    top5 = f"top-5 {result['top5']:.2%}, " if len(result["per_class"]) > 5 else ""
    return (
        f"{name} accuracy {result['top1']:.2%}, {top5}"
        f"loss {result['loss']:.4f}, {counted(result['images'], 'image')}"
    )


def most_confused(result: dict, classes: list[str]) -> str:
    """A line with the two most frequent mistakes; '' where there are none."""
    mistakes = torch.tensor(result["confusion"]).fill_diagonal_(0)
    ranked = mistakes.flatten().sort(descending=True, stable=True)
    pairs = []
    for count, cell in zip(ranked.values[:2].tolist(), ranked.indices[:2].tolist(), strict=True):
        if count:
            times = f"{count:,}" if pairs else counted(count, "time")
            true, taken = (classes[k] for k in divmod(cell, len(classes)))
            pairs.append(f"{true} taken for {taken} ({times})")
    return f"most confused: {', '.join(pairs)}" if pairs else ""


def draw_confusion(counts: Tensor, classes: list[str]) -> Tensor:
    """The confusion matrix as a picture, uint8 [3, H, W]: hits blue, mistakes red.

    counts int64 [classes, classes]: images by true class (rows) and predicted class (columns).  A
    cell is the darker the larger its share of the row, by its square root, so that one mistake in a
    hundred shows.  Up to LEGIBLE classes have their names, and their counts in the cells.
    """
    count = len(classes)
    share = (counts / counts.sum(1, keepdim=True).clamp(min=1)).sqrt().numpy()[..., None]
    full = np.where(np.eye(count, dtype=bool)[..., None], (8, 69, 148), (165, 15, 21))
    cells = Image.fromarray((255 + share * (full - 255)).round().astype(np.uint8))
    side = 48 if count <= LEGIBLE else max(1, 800 // count)
    font, line = font_for("", 12), 18
    names = drawable(classes)[0] if count <= LEGIBLE else []
    names = [shorten(name, font_for(name, 12), 140) for name in names]
    widths = [round(font_for(name, 12).getlength(name)) for name in names]
    margin = 2 * line + max(widths, default=0)
    sheet = Image.new("RGB", (margin + count * side + line,) * 2, "white")
    sheet.paste(cells.resize((count * side,) * 2, Image.Resampling.NEAREST), (margin, margin))

    # Pillow writes from left to right only, so the sheet is turned for the names of the columns.
    outline = (margin - 1, margin - 1, *(margin + count * side,) * 2)
    ImageDraw.Draw(sheet).rectangle(outline, outline="silver")
    for title, anchor in (("predicted class", "rm"), ("true class", "lm")):
        draw, edge, middle = ImageDraw.Draw(sheet), margin - 6, margin + count * side / 2
        if anchor == "lm":
            edge, middle = sheet.width - edge, sheet.width - middle
        draw.text((middle, line / 2), title, "black", font, anchor="mm")
        for i, name in enumerate(names):
            at, own = (edge, margin + (i + 0.5) * side), font_for(name, 12)
            draw.text(at, name, "black", own, anchor=anchor)
        sheet = sheet.rotate(-90)
    sheet = sheet.rotate(180)
    draw = ImageDraw.Draw(sheet)
    for i, j in counts.nonzero().tolist() if names else []:
        colour = "white" if share[i, j] > 0.6 else "black"
        at = margin + (j + 0.5) * side, margin + (i + 0.5) * side
        draw.text(at, f"{counts[i, j]}", colour, font, anchor="mm")
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)
