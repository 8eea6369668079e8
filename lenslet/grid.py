"""Images with captions on one sheet, and PNG files."""

import io
from collections.abc import Iterable

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from lenslet.fonts import font_for


def draw_grid(
    images: Iterable[Tensor],
    captions: list[str],
    wrong: list[bool] | None = None,
    heading: str = "",
) -> Tensor:
    """A grid of images with a caption below each, uint8 [3, H', W'].

    images: uint8 [1 or 3, H, W] each, a caption for each, whose lines are cut to the width of an
    image, with class names from fonts.drawable(); wrong: whose captions are red.
    """
    tile, line, font = 112, 14, ImageFont.load_default(11)
    across, count = min(8, len(captions)), len(captions)
    high = tile + line * max(caption.count("\n") + 1 for caption in captions) + 8
    top = 8 + 2 * line * bool(heading)
    width = max(across * (tile + 8) + 8, round(font.getlength(heading)) + 16)
    sheet = Image.new("RGB", (width, top + -(-count // across) * high), "white")
    draw = ImageDraw.Draw(sheet)
    draw.text((8, 8), heading, "black", font)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, upper = 8 + i % across * (tile + 8), top + i // across * high
        pixels = image.permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()
        scale = tile / max(pixels.shape[:2])
        shape = [max(1, round(side * scale)) for side in pixels.shape[1::-1]]
        method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
        sheet.paste(Image.fromarray(pixels).resize(shape, method), (left, upper + tile - shape[1]))
        colour = "#c00000" if wrong and wrong[i] else "black"
        for k, text in enumerate(caption.split("\n")):
            own, base = font_for(text, 11), upper + tile + k * line + font.getmetrics()[0]
            draw.text((left, base), shorten(text, own, tile), colour, own, anchor="ls")
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)


def shorten(text: str, font: ImageFont.FreeTypeFont, width: int) -> str:
    """Text cut to so many pixels."""
    while font.getlength(text) > width:
        text = text[:-2] + "…"
    return text


def encode_png(image: Tensor) -> bytes:
    """uint8 [1 or 3, H, W] as the bytes of a PNG file."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()
