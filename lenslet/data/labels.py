"""CSV files about single images: their labels in place of class folders, or their weights."""

import csv
import hashlib
import io
import os
from pathlib import Path

from lenslet.data.layout import SPLIT_NAMES, Listing, divide_classes, name_in, natural_sort_key
from lenslet.errors import UserError, nearest


def read_table(path: str, *columns: str) -> tuple[list[tuple[int, dict[str, str]]], str]:
    """The rows of a CSV file that has at least these columns, with the number of the line that each
    ends in, and the file's SHA-256.  A cell that is missing is empty.

    Errors: UserError, without the path.
    """
    try:
        text = Path(path).read_text(encoding="utf-8-sig")  # spreadsheets put a mark in front
        reader = csv.DictReader(io.StringIO(text), restval="")
        rows = [(reader.line_num, row) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        reason = getattr(error, "strerror", None) or "not a CSV file"
        raise UserError(f"cannot be read ({reason})") from error
    if not rows or not {*columns} <= {*rows[0][1]}:
        raise UserError(f"has no rows with the columns {' and '.join(columns)}")
    return rows, hashlib.sha256(text.encode()).hexdigest()


def read_labels(path: str, root: Path) -> Listing:
    """The images that a CSV file names, with the columns file (below root, or absolute) and label,
    the class.

    A column split has one of SPLIT_NAMES, or nothing: then the hash decides, see divide_classes().
    Images with the same in a column group are kept together, and the hash is that of the group.
    Errors: UserError with the line, for what is no such row or contradicts another one.
    """
    rows, _ = read_table(path, "file", "label")
    seen, units, fixed, grouped = {}, {}, {}, False
    for line, row in rows:
        name, file = row["file"], Path(os.path.normpath(root / row["file"]))
        facts = [row.get(key, "").strip() for key in ("label", "split", "group", "weight")]
        label, given, group, _ = facts
        split = SPLIT_NAMES.get(given.lower())
        if not file.is_file():
            raise UserError(f"line {line}: no such file {name!r}")
        if not label:
            raise UserError(f"line {line}: {name!r} has no label")
        if given and not split:
            known = f"{nearest(given, SPLIT_NAMES)}; give train, val, test or nothing"
            raise UserError(f"line {line}: {given!r} is no split{known}")
        first, known = seen.setdefault(file, (line, facts))
        if known != facts:
            raise UserError(f"line {line}: {name!r} is in line {first} too, and not alike")
        units[file] = unit = group or name_in(root, file)
        grouped |= bool(group)
        if split and fixed.setdefault(unit, split) != split:
            raise UserError(f"line {line}: group {unit!r} is in {split} and in {fixed[unit]}")
    labels = {file: seen[file][1][0] for file in sorted(seen)}
    if len({*labels.values()}) < 2:
        raise UserError("has one label only; two classes or more are needed")
    classes = {label: [] for label in sorted({*labels.values()}, key=natural_sort_key)}
    for file, label in labels.items():
        classes[label].append(file)
    splits, notes = divide_classes(classes, units, fixed)
    own_val = "val split" if "val" in fixed.values() else ""
    return Listing(splits, own_val, notes, units if grouped else {})
