"""Which font draws a class name: Pillow's own if it can, else one of this system's."""

import functools
import os
import re
import subprocess
import time
import unicodedata
from collections.abc import Iterator

from PIL import ImageFont, features

SECONDS = 0.5  # at most, to look for fonts
ADDED = "-> …"  # what captions, and cutting them, add to a name
SHAPES = features.check("raqm")  # else letters that join or run to the left come out wrong
FOLDERS = "/usr/share/fonts /usr/local/share/fonts ~/.local/share/fonts ~/.fonts "
FOLDERS += "/System/Library/Fonts /Library/Fonts ~/Library/Fonts C:/Windows/Fonts"
_used = [("", 0)]  # (file, index) of each font of this process's pictures; "": Pillow's own


def drawable(names: list[str]) -> tuple[list[str], list[str]]:
    """Class names as pictures can show them, and notes for the user, a line each.

    A name that no font of this system can draw becomes its index: "class 3".
    """
    names = [unicodedata.normalize("NFC", name) for name in names]  # macOS takes é apart
    _search(frozenset(names))
    shown = [name if _find(name, _used) else f"class {k}" for k, name in enumerate(names)]
    lost = [pair for pair in zip(shown, names, strict=True) if pair[0] != pair[1]]
    few = f"{len(lost)} of {len(names)} class names: no font here can draw them"
    remedy = "install one, such as Noto" + ("" if SHAPES else ", and libraqm for joined letters")
    notes = [f"pictures have numbers for {few} ({k} is {name!r}); {remedy}" for k, name in lost[:1]]
    return shown, notes


def font_for(text: str, size: int) -> ImageFont.FreeTypeFont:
    """The font of so many pixels for a line with a name that drawable() returned."""
    return _load(*(_find(text, _used) or _used[0]), size, None)


def _find(text: str, faces: list[tuple[str, int]]) -> tuple[str, int] | None:
    """The first of these fonts that covers a text."""
    return next((face for face in faces if all(_has(*face, c) for c in text + ADDED)), None)


@functools.cache
def _search(names: frozenset[str]) -> None:
    """Take fonts of the system into use until they cover all of these names, or time is up."""
    left, end = {name for name in names if not _find(name, _used)}, time.monotonic() + SECONDS
    for face in candidates("".join(left)) if left else ():
        if drawn := {name for name in left if _find(name, [face])}:
            _used.append(face)
            left -= drawn
        if not left or time.monotonic() > end:
            break


def candidates(text: str) -> Iterator[tuple[str, int]]:
    """(file, index) of fonts: those that fontconfig prefers for a text, then all in FOLDERS."""
    charset = " ".join(f"{ord(c):x}" for c in sorted(set(text))[:2000])  # fits into an argument
    command = ["fc-match", "-s", "-f", "%{file}\t%{index}\n", f":scalable=true:charset={charset}"]
    try:
        listed = subprocess.run(command, capture_output=True, timeout=SECONDS / 2).stdout
    except (OSError, subprocess.SubprocessError):
        listed = b""  # it is not installed, or has thousands of fonts to read for the first time
    for file, index in re.findall(r"(.+)\t(\d+)", os.fsdecode(listed)):
        yield file, int(index)
    shared = os.environ.get("XDG_DATA_DIRS", "").split(":")
    for folder in [*FOLDERS.split(), *(f"{path}/fonts" for path in shared if path)]:
        for place, _, files in os.walk(os.path.expanduser(folder)):
            # Some-Regular.ttf before Some-Bold.ttf, and Some.ttf before SomeBold.ttf.
            for file in sorted(files, key=lambda file: ("Regular" not in file, len(file))):
                if re.search(r"(?i)^(?!lastresort).*\.(ttf|otf|ttc|otc)$", file):
                    yield os.path.join(place, file), 0


@functools.lru_cache(64)  # files that stay open
def _load(file: str, index: int, size: int, layout: int | None) -> ImageFont.FreeTypeFont:
    if not file:
        return ImageFont.load_default(size)
    return ImageFont.truetype(file, size, index, layout_engine=layout)


@functools.cache
def _has(file: str, index: int, character: str) -> bool:
    """Whether a font draws a character: neither nothing, nor what it draws for missing ones."""
    kind = unicodedata.category(character)
    joins = kind in ("Mn", "Mc", "Me", "Cf") or unicodedata.bidirectional(character) in ("R", "AL")
    if joins and not (file and SHAPES):
        return False
    try:
        font = _load(file, index, 11, ImageFont.Layout.BASIC)
        drawn, missing = (bytes(font.getmask(c)) for c in (character, "\uffff"))
    except Exception:  # a broken file, which says so in many ways
        return False
    if kind in ("Zs", "Cf"):
        return kind == "Cf" or not any(drawn)
    return character.isprintable() and any(drawn) and drawn != missing
