"""Image files of any kind to uint8 pixels.

Training, testing and predicting decode an image with the same code: `read_image`, and
`inspect_image` for small ones that are kept as they are.
"""

import contextlib
import functools
import hashlib
import math
import operator
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torch import Tensor

from lenslet.data.crop import random_boxes
from lenslet.errors import CONTROLS, OutsideError

# Named, so that a file's content can never start an interpreter (Pillow's EPS reader does).
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
HEIF = (".heic", ".heif")  # suffixes of what only the package pillow-heif reads
EXIF_ORIENTATION = 0x0112

GIB = 2**30  # bytes that decoding an image may take
# Bytes of a pixel by mode, 4 in all others; and those that a decoder needs beside the image.
STORED = {"1": 1, "L": 1, "P": 1, "I;16": 2, "I;16B": 2, "I;16L": 2, "I;16N": 2}
DECODING = {"GIF": 1, "WEBP": 16, "AVIF": 16, "HEIF": 16, "JPEG2000": 21}
DECODING |= {"bmp_rle": 2, "ppm": 8, "ppm_plain": 8}  # where Pillow's decoder is in Python
SLOW = {"JPEG2000": 2 * 10**7}  # pixels that take 10 s to decode at worst
STRIP = 2**20  # pixels that are converted at a time
# Pillow refuses twice as many: more than any image of a GiB has, so that _check_memory() decides.
Image.MAX_IMAGE_PIXELS = GIB // 2
ONE_LINE = CONTROLS | {ord(c): f"\\x{ord(c):02x}" for c in "\t\n\r"}


class UnreadableImage(OutsideError):
    """An image file that cannot be decoded; the message names it and says why."""


class Inspected(NamedTuple):
    """What is known of an image file that was decoded."""

    side: int  # the longer one, in pixels
    grey: bool  # whether all its pixels are, in a file of colours too
    sha256: str  # of the file's bytes
    pixels: np.ndarray | None  # uint8 [H, W, 1 or 3] if it is small


def longer_side(path: Path) -> int:
    """The longer side of an image by the head of its file, in pixels; 0 if it cannot be told."""
    try:
        with _open(path) as image:
            return max(image.size)
    except UnreadableImage:  # whoever decodes the whole file reports what is wrong with it
        return 0


def read_image(
    path: str | Path,
    channels: int,
    size: tuple[int, int] | None = None,
    crop: float | None = 1.0,
    draws: Tensor | None = None,
    most: int | None = None,
) -> np.ndarray:
    """One image file as uint8 [H, W, C], C = channels (1 grey, 3 RGB), values 0..255.

    Upright by its EXIF orientation, transparency composited on white, 16-bit samples scaled to 8,
    the first frame of an animation.  size (height, width): the box of that shape, centred, with
    `crop` of the largest possible side, resized (bilinear, anti-aliased); crop None: the whole
    image, squeezed to the size.  size None: the whole image as it is.
    draws, float [4] in 0..1, choose a random box instead, see crop.random_boxes().
    most: pixels of a file to be read, however much memory they take; None: those that take 1 GiB.

    Errors: UnreadableImage.
    """
    with _open(path) as image:
        return _read(image, channels, size, crop, draws, most)


def read_squeezed(path: str | Path, channels: int, size: tuple[int, int]):
    """read_image() without a crop: the whole image, squeezed to size; and its width / height."""
    with _open(path) as image:
        pixels = _read(image, channels, size, None)
        return pixels, image.width / image.height  # upright by now


def _read(image: Image.Image, channels, size, crop, draws=None, most=None) -> np.ndarray:
    """read_image() of a file that was opened."""
    full, box = image.size, None
    if image.format == "PNG":  # to ask it for its EXIF block may decode it
        _check_memory(image, full, most, whole=size is None)
    if size is not None:
        box = _choose_box(_upright_size(image), size, crop, draws)
        box = _shrink_while_decoding(image, size, box)
    _check_memory(image, full, most, _is_turned(image), whole=size is None)
    ImageOps.exif_transpose(image, in_place=True)
    image = _convert(image, "L" if channels == 1 else "RGB")
    if box and (image.size != size[::-1] or box != (0, 0, *image.size)):
        image = image.resize(size[::-1], Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
    pixels = np.array(image)

    return pixels.reshape(*pixels.shape[:2], channels)


def inspect_image(path: str | Path, small: int) -> Inspected:
    """Decode a whole file, and keep its pixels where the longer side is at most `small`.

    A larger JPEG file is decoded at an eighth of its size, which still meets every byte of it.
    Errors: UnreadableImage.
    """
    with _readable(path), open(path, "rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        with Image.open(file, formats=_formats(path)) as image:
            full = image.size
            if image.format == "PNG":
                _check_memory(image, full)
            if max(full) > small and image.format != "HEIF":  # that would read a thumbnail instead
                image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
            _check_memory(image, full, None, _is_turned(image))
            ImageOps.exif_transpose(image, in_place=True)
            if max(full) > small:
                return Inspected(max(full), all(map(_is_grey, _strips(image))), digest, None)
            image = _flatten(image)
            grey, pixels = _is_grey(image), np.asarray(image)
    if grey:
        pixels = pixels.reshape(*pixels.shape[:2], -1)[..., :1]
    return Inspected(max(full), grey, digest, pixels)


@contextlib.contextmanager
def _open(path: str | Path) -> Iterator[Image.Image]:
    """An image file, for as long as it is read.  Errors: UnreadableImage, here and in the block."""
    with _readable(path), Image.open(path, formats=_formats(path)) as image:
        yield image


def _formats(path: str | Path) -> tuple[str, ...]:
    """The formats that a file may have.  Errors: OSError for a HEIC file without pillow-heif."""
    if os.path.splitext(path)[1].lower() not in HEIF:
        return FORMATS
    if not _reads_heif():
        raise OSError("HEIC needs another package: pip install pillow-heif")
    return *FORMATS, "HEIF"


@functools.cache
def _reads_heif() -> bool:
    """Whether Pillow can read HEIC files, after having been taught it."""
    with contextlib.suppress(ImportError):
        import pillow_heif

        pillow_heif.register_heif_opener()
        return True
    return False


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Errors: UnreadableImage where there is no such file, and for all that goes wrong inside."""
    _ignore_pillow_warnings()
    try:
        state = os.stat(path)
        if not stat.S_ISREG(state.st_mode):  # to open a pipe would wait for a writer
            raise OSError("not a regular file")
        yield
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        if isinstance(error, UnidentifiedImageError):
            reason = "not a known kind of image" if state.st_size else "an empty file"
        else:
            reason = getattr(error, "strerror", None) or str(error)[:200] or type(error).__name__
        if os.path.islink(path):
            reason = f"a link to {os.readlink(path)}: {reason}"
        text = f"{path}: cannot be read as an image ({reason})"
        raise UnreadableImage(text.translate(ONE_LINE)) from error


@functools.cache  # once: each change of the filters makes Python repeat warnings already shown
def _ignore_pillow_warnings() -> None:
    """Oversized images, odd palettes and broken EXIF blocks: read, or reported as unreadable."""
    warnings.filterwarnings("ignore", module="PIL")


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after the EXIF rotation, without decoding the image."""
    turned = image.format != "TIFF" and image.getexif().get(EXIF_ORIENTATION) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def _is_turned(image: Image.Image) -> bool:
    """Whether EXIF says that an image is to be turned or mirrored, which takes a copy of it."""
    return image.getexif().get(EXIF_ORIENTATION, 1) != 1


def _check_memory(image, full, most=None, turned=False, whole=False) -> None:
    """Refuse an image that takes more than 1 GiB or 10 s to read, or has more than `most` pixels.

    It is not decoded yet.  full: width and height before any reduced decoding.  turned: see
    _is_turned().  whole: the result is not a resized part of it.
    """
    shape, pixels = f"{full[0]}×{full[1]} pixels", image.width * image.height
    if most is not None:
        if full[0] * full[1] > most:
            raise ValueError(f"{shape}, more than {most}")
        return
    if pixels > SLOW.get(image.format, pixels):
        raise ValueError(f"{shape}; takes more than 10 s to decode")
    stored = STORED.get(image.mode, 4)
    decoding = max(DECODING.get(key, 0) for key in (image.format, *(t[0] for t in image.tile)))
    converted = (1 if image.mode == "RGB" else 4) + whole * 6  # as Pillow hands it to NumPy: twice
    need = pixels * (stored + max(decoding, turned * stored, converted))
    if image.info.get("progressive"):  # the coefficients of the whole image, 2 bytes each
        _, across, down, _ = zip(*image.layer, strict=True)
        share = sum(map(operator.mul, across, down)) / (max(across) * max(down))
        need += 2 * share * full[0] * full[1]
    if any(tile[0] == "libtiff" for tile in image.tile):  # a strip, or a tile, at a time
        tags = image.tag_v2
        width, height = tags.get(322, full[0]), tags.get(323, min(full[1], tags.get(278, full[1])))
        need += width * height * max(32, sum(tags.get(258, ()))) / 8
    if need > GIB:
        need = math.ceil(need / GIB * 10) / 10
        raise ValueError(f"{shape}; needs {need} GiB when decoded, more than 1")


def _choose_box(upright, size, crop, draws) -> tuple[float, float, float, float]:
    """The part of an image to keep: left, upper, right, lower, in its pixels."""
    width, height = upright
    if crop is None:
        return 0.0, 0.0, width, height
    if draws is None:
        # The whole pixels that torchvision's Resize and CenterCrop would cut, in one step instead.
        fit = max(size[1] / width, size[0] / height) / crop
        resized = int(width * fit + 1e-6), int(height * fit + 1e-6)
        left = round((resized[0] - size[1]) / 2) * width / resized[0]
        upper = round((resized[1] - size[0]) / 2) * height / resized[1]
        box_width, box_height = size[1] * width / resized[0], size[0] * height / resized[1]
    else:
        box = random_boxes(torch.tensor([width / height]), draws[None], size[1] / size[0])[0]
        left, upper, box_width, box_height = (box * torch.tensor([width, height] * 2)).tolist()
    return left, upper, left + box_width, upper + box_height


def _shrink_while_decoding(image, size, box) -> tuple[float, float, float, float]:
    """Let the JPEG decoder drop a factor 2, 4 or 8 that the resize would; returns the box then."""
    before = max(image.size)
    shrink = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0])
    if shrink >= 2 and image.format != "HEIF":
        image.draft(None, tuple(math.ceil(side / shrink) for side in image.size))
    factor = 2 ** math.ceil(math.log2(before / max(image.size)))
    limits = _upright_size(image) * 2  # rounding must not carry the box over the edge
    return tuple(min(side / factor, limit) for side, limit in zip(box, limits, strict=True))


def _convert(image: Image.Image, mode: str) -> Image.Image:
    """An upright image of any mode as mode L or RGB.

    In strips: transparency takes five copies, and deep samples take 20 bytes a pixel.
    """
    if image.mode == mode and not image.has_transparency_data:
        return image
    if image.width * image.height <= STRIP:
        return _flatten(image).convert(mode)
    converted, top = Image.new(mode, image.size), 0
    for strip in _strips(image):
        converted.paste(strip.convert(mode), (0, top))
        top += strip.height
    return converted


def _strips(image: Image.Image) -> Iterator[Image.Image]:
    """An image of any mode in strips of mode L or RGB, from the top down."""
    rows = max(1, STRIP // image.width)
    for top in range(0, image.height, rows):
        bottom = min(top + rows, image.height)
        yield _flatten(image.crop((0, top, image.width, bottom)))


def _is_grey(image: Image.Image) -> bool:
    """Whether all pixels of an image of mode L or RGB are grey."""
    pixels = np.asarray(image)
    return pixels.ndim == 2 or bool((pixels == pixels[..., :1]).all())


def _flatten(image: Image.Image) -> Image.Image:
    """An image of any mode as mode L or RGB, of the mode that loses nothing."""
    if image.mode.startswith(("I", "F")):
        deep = np.asarray(image)
        if image.mode == "F":
            deep = np.nan_to_num(deep).clip(0, 255).round()
        else:  # 16-bit samples, whatever the width that holds them: divided by 257, and rounded
            deep = (deep.clip(0, 65535).astype(np.int32) + 128) // 257
        return Image.fromarray(deep.astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    if image.mode in ("L", "RGB"):
        return image
    return image.convert("L" if image.mode == "1" else "RGB")
