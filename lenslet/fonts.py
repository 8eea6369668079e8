"""Fonts for class names in any script: Pillow's own for ASCII, else one that the system has."""

import functools
import itertools
import os
import subprocess
import time
import unicodedata
from pathlib import Path

from PIL import ImageFont, features

PATIENCE = 0.5  # seconds to look through the fonts of a system without fontconfig
FOLDERS = (
    *("/usr/share/fonts", "/usr/local/share/fonts", "~/.local/share/fonts", "~/.fonts"),
    *("/System/Library/Fonts", "/Library/Fonts", "~/Library/Fonts", "C:/Windows/Fonts"),
)
WIDE = ("cjk", "noto", "unicode", "hei", "gothic", "ming", "song", "dejavu")  # cover the most
# From Devanagari to Myanmar, and Khmer: letters that are joined and moved around.
SHAPED = (*range(0x900, 0x10A0), *range(0x1780, 0x1800))


@functools.cache
def font_for(text: str, size: int) -> ImageFont.FreeTypeFont | None:
    """A font that has all letters of a text, of so many pixels; None if the system has none."""
    default = ImageFont.load_default(size)
    if _covers(default, text):
        return default
    if not features.check("raqm") and any(map(_is_shaped, text)):
        return None
    for path in _candidates("".join(sorted(set(text)))):
        try:
            font = ImageFont.truetype(path, size)
        except OSError:  # a damaged file, or a kind that FreeType does not read
            continue
        if _covers(font, text):
            return font
    return None


def legible(classes: list[str]) -> tuple[list[str], str]:
    """Class names as they can be drawn, and a line for the user, '' if all of them can.

    A name that no font has all letters of becomes the number of its class, from 0.
    """
    drawable = [font_for(name, 11) is not None for name in classes]
    names = [
        n if has else f"class {i}" for i, (n, has) in enumerate(zip(classes, drawable, strict=True))
    ]
    if all(drawable):
        return names, ""
    name = classes[drawable.index(False)]
    return names, f"no font here has all letters of {name}: such classes are drawn as numbers"


def _covers(font: ImageFont.FreeTypeFont, text: str) -> bool:
    """Whether a font has a glyph of its own for each letter, and not the one for missing ones."""
    missing = bytes(font.getmask("\U0010ffff"))
    letters = [letter for letter in set(text) if letter.isprintable() and not letter.isspace()]
    return all(bytes(font.getmask(letter)) != missing for letter in letters)


def _is_shaped(letter: str) -> bool:
    return unicodedata.bidirectional(letter) in ("R", "AL") or ord(letter) in SHAPED


def _candidates(letters: str):
    """Font files that may have these letters: fontconfig's answer, else all there is."""
    charset = " ".join(f"{ord(letter):x}" for letter in letters)
    try:
        command = ["fc-list", f":charset={charset}", "-f", "%{file}\n"]
        return subprocess.run(command, capture_output=True, text=True, timeout=5).stdout.split("\n")
    except (OSError, subprocess.SubprocessError):
        return _all_fonts()


def _all_fonts():
    """The system's font files, those that cover the most scripts first, for a short while."""
    began, found = time.perf_counter(), []
    walks = (os.walk(Path(folder).expanduser()) for folder in FOLDERS)
    for top, _, names in itertools.chain.from_iterable(walks):
        found += [
            os.path.join(top, n) for n in names if n.lower().endswith((".ttf", ".ttc", ".otf"))
        ]
    found.sort(key=lambda path: not any(word in path.lower() for word in WIDE))
    return itertools.takewhile(lambda _: time.perf_counter() - began < PATIENCE, found)
