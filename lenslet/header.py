"""What the header of a weights file must hold: types, ranges and sizes.

weights.read_header() says what the entries mean.
"""

import json
import re
import reprlib

from lenslet.errors import UserError

DEEPEST = 8  # lists and objects inside each other


def parse_json(text: str):
    """What a JSON text holds.

    Errors: ValueError where it is not JSON, is nested too deeply, or has a key twice.
    """
    try:
        tree = json.loads(text, object_pairs_hook=_once)
    except RecursionError:
        raise ValueError("nested too deeply") from None
    inner = [tree]
    for _ in range(DEEPEST + 1):
        lists = [list(v.values()) if type(v) is dict else v for v in inner]
        inner = [entry for entries in lists if type(entries) is list for entry in entries]
    if inner:
        raise ValueError("nested too deeply")
    return tree


def _once(pairs: list) -> dict:
    if len(entries := dict(pairs)) < len(pairs):
        raise ValueError("a key is there twice")
    return entries


# Each returns a function that says whether a value is one.
def _text(most: int):
    return lambda v: type(v) is str and 0 < len(v) <= most


def _whole(least: int, most: int = 2**53):
    return lambda v: type(v) is int and least <= v <= most  # True is an int, too


def _real(least: float, most: float):
    return lambda v: type(v) in (int, float) and least <= v <= most  # NaN is not


def _list(entry, least: int = 0, most: int = 2**53):
    return lambda v: type(v) is list and least <= len(v) <= most and all(map(entry, v))


def _dict(**known):  # any of these, and others
    return lambda v: type(v) is dict and all(known[key](v[key]) for key in known.keys() & v)


def _or_none(entry):
    return lambda v: v is None or entry(v)


SIZE = _list(_whole(1, 8192), 2, 2)  # pixels
OPTIONS = {  # those that test.py reads, where they are there
    "val": _real(0, 1),
    "fold": _or_none(lambda v: type(v) is str and re.fullmatch(r"\d{1,9}/[1-9]\d{,8}", v)),
    "limit": _or_none(_whole(1)),
    "batch_size": _whole(1),
    "accumulate": _whole(1),
    "workers": _or_none(_whole(0, 10**4)),
    "skip_broken": lambda v: type(v) is bool,
    "augment": _text(100),
}
NEEDED = {
    "model": _text(100),
    "model_args": _dict(
        classes=_whole(1),
        channels=_whole(1),
        size=SIZE,
        width=_whole(1, 4096),
        activation=lambda v: v in ("relu", "silu"),
        patch=lambda v: v in (2, 4),
    ),
    "classes": lambda v: _list(_text(1000), 1)(v) and len(set(v)) == len(v),
    "channels": lambda v: type(v) is int and v in (1, 3),
    "image_size": SIZE,
    "crop": _real(0.01, 1),
    "mean": _list(_real(0, 1)),
    "std": _list(_real(1e-9, 1)),
    "data": _text(4096),
    "epoch": _whole(0),
    "options": _dict(**OPTIONS),
}
ENVIRONMENT = {  # needed beside digests, to train again
    "versions": _dict(),
    "device": _text(1000),
    "precision": lambda v: v in ("no", "fp16", "bf16", "fp8"),
    "threads": _whole(1, 10**4),
    "processes": _whole(1, 10**5),
}
KNOWN = NEEDED | ENVIRONMENT
KNOWN |= {"input_size": SIZE, "digests": _list(lambda v: type(v) is list and len(v) == 2)}
KNOWN |= {"plan": _list(_list(_real(0, 2**53), 3, 3))}


def check_header(header: dict) -> None:
    """Refuse a header that does not hold what it must.  Errors: UserError."""
    needed = NEEDED | (ENVIRONMENT if "digests" in header else {})
    if missing := [key for key in needed if key not in header]:
        raise UserError(f"its header lacks {', '.join(missing)}")
    wrong = [key for key in KNOWN if key in header and not KNOWN[key](header[key])]
    if not wrong:
        channels, arguments = header["channels"], header["model_args"]
        wrong = [key for key in ("mean", "std") if len(header[key]) != channels]
        fitting = {"classes": len(header["classes"]), "channels": channels}
        if {"channels": 3, **arguments} != {**arguments, **fitting}:
            wrong = ["model_args"]
    if wrong:
        shown = reprlib.repr(header[wrong[0]])
        raise UserError(f"its header is damaged: {wrong[0]} is {shown}")
