"""Image files of any kind to uint8 pixels.

Training, testing and predicting decode an image with the same code: `read_image`, and
`inspect_image` for small ones that are kept as they are.
"""

import contextlib
import functools
import hashlib
import io
import math
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from lenslet.errors import OutsideError

# Named, so that a file's content can never start an interpreter (Pillow's EPS reader does).
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "WEBP", "TIFF", "PPM", "JPEG2000", "AVIF")
EXIF_ORIENTATION = 0x0112


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
    crop: float = 1.0,
    draws: list[float] | None = None,
) -> np.ndarray:
    """One image file as uint8 [H, W, C], C = channels (1 grey, 3 RGB), values 0..255.

    Upright by its EXIF orientation, transparency composited on white, 16-bit samples scaled to 8,
    the first frame of an animation.  size (height, width): the box of that shape, centred, with
    `crop` of the largest possible side, resized (bilinear, anti-aliased); None: the whole image.
    draws, four numbers in 0..1, choose a random box instead (Inception-style crop, Szegedy et al.
    2014, arXiv:1409.4842): 25 to 100 % of the area, sides 3:4 to 4:3; a box that would not fit is
    cut to fit instead of being drawn again.

    Errors: UnreadableImage.
    """
    with _open(path) as image:
        box = None
        if size is not None:
            box = _choose_box(_upright_size(image), size, crop, draws)
            box = _shrink_while_decoding(image, size, box)
        image = _to_grey_or_rgb(image)
        if channels == 1 or image.mode != "RGB":
            image = image.convert("L" if channels == 1 else "RGB")
        if box and (image.size != size[::-1] or box != (0, 0, *image.size)):
            image = image.resize(size[::-1], Image.Resampling.BILINEAR, box=box, reducing_gap=3.0)
        pixels = np.array(image)
    return pixels.reshape(*pixels.shape[:2], channels)


def inspect_image(path: str | Path, small: int) -> Inspected:
    """Decode a whole file, and keep its pixels where the longer side is at most `small`.

    A larger JPEG file is decoded at an eighth of its size, which still meets every byte of it.
    Errors: UnreadableImage.
    """
    with _readable(path):
        with open(path, "rb") as file:
            content = file.read()
        with Image.open(io.BytesIO(content), formats=FORMATS) as image:
            side = max(image.size)
            if side > small:
                image.draft(None, (max(1, image.width // 8), max(1, image.height // 8)))
            pixels = np.asarray(_to_grey_or_rgb(image))
    grey = pixels.ndim == 2 or bool((pixels == pixels[..., :1]).all())
    if grey:
        pixels = pixels.reshape(*pixels.shape[:2], -1)[..., :1]
    digest = hashlib.sha256(content).hexdigest()
    return Inspected(side, grey, digest, pixels if side <= small else None)


@contextlib.contextmanager
def _open(path: str | Path) -> Iterator[Image.Image]:
    """An image file, for as long as it is read.  Errors: UnreadableImage, here and in the block."""
    with _readable(path), Image.open(path, formats=FORMATS) as image:
        yield image


@contextlib.contextmanager
def _readable(path: str | Path) -> Iterator[None]:
    """Errors: UnreadableImage where there is no such file, and for all that goes wrong inside."""
    _ignore_pillow_warnings()
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):  # to open a pipe would wait for a writer
            raise OSError("not a regular file")
        yield
    except Exception as error:  # a damaged file makes Pillow raise almost anything
        if isinstance(error, UnidentifiedImageError):
            reason = "not a known kind of image" if Path(path).stat().st_size else "an empty file"
        else:
            reason = getattr(error, "strerror", None) or error
        if os.path.islink(path):
            reason = f"a link to {os.readlink(path)}: {reason}"
        raise UnreadableImage(f"{path}: cannot be read as an image ({reason})") from error


@functools.cache  # once: each change of the filters makes Python repeat warnings already shown
def _ignore_pillow_warnings() -> None:
    """Oversized images, odd palettes and broken EXIF blocks: read, or reported as unreadable."""
    warnings.filterwarnings("ignore", module="PIL")


def _upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height after the EXIF rotation, without decoding the image."""
    turned = image.format != "TIFF" and image.getexif().get(EXIF_ORIENTATION) in (5, 6, 7, 8)
    return image.size[::-1] if turned else image.size


def _choose_box(upright, size, crop, draws) -> tuple[float, float, float, float]:
    """The part of an image to keep: left, upper, right, lower, in its pixels."""
    width, height = upright
    if draws is None:
        # The whole pixels that torchvision's Resize and CenterCrop would cut, in one step instead.
        fit = max(size[1] / width, size[0] / height) / crop
        resized = int(width * fit + 1e-6), int(height * fit + 1e-6)
        left = round((resized[0] - size[1]) / 2) * width / resized[0]
        upper = round((resized[1] - size[0]) / 2) * height / resized[1]
        box_width, box_height = size[1] * width / resized[0], size[0] * height / resized[1]
    else:
        area, shape, across, down = draws
        area = (0.25 + 0.75 * area) * width * height
        aspect = (4 / 3) ** (2 * shape - 1) * size[1] / size[0]
        box_width = min(width, math.sqrt(area * aspect))
        box_height = min(height, math.sqrt(area / aspect))
        left, upper = across * (width - box_width), down * (height - box_height)
    return left, upper, left + box_width, upper + box_height


def _shrink_while_decoding(image, size, box) -> tuple[float, float, float, float]:
    """Let the JPEG decoder drop a factor 2, 4 or 8 that the resize would; returns the box then."""
    before = max(image.size)
    shrink = min((box[2] - box[0]) / size[1], (box[3] - box[1]) / size[0])
    if shrink >= 2:
        image.draft(None, tuple(math.ceil(side / shrink) for side in image.size))
    factor = 2 ** math.ceil(math.log2(before / max(image.size)))
    limits = _upright_size(image) * 2  # rounding must not carry the box over the edge
    return tuple(min(side / factor, limit) for side, limit in zip(box, limits, strict=True))


def _to_grey_or_rgb(image: Image.Image) -> Image.Image:
    """An upright image of any mode as mode L or RGB."""
    ImageOps.exif_transpose(image, in_place=True)
    if image.mode.startswith(("I", "F")):
        deep = np.asarray(image)
        if image.mode != "F":  # 16-bit samples, whatever the width that holds them
            deep = deep.clip(0, 65535) / 257
        return Image.fromarray(deep.clip(0, 255).round().astype(np.uint8))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        return Image.alpha_composite(white, image).convert("RGB")
    return image if image.mode == "L" else image.convert("L" if image.mode == "1" else "RGB")
