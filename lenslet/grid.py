"""Images with captions on one sheet, and PNG files."""

import io

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def draw_grid(images: Tensor, captions: list[str], wrong: list[bool] | None = None) -> Tensor:
    """A grid of images with a caption below each, uint8 [3, H', W'].

    images uint8 [N, 1 or 3, H, W]; wrong: whose captions are red.
    """
    tile, line, font = 112, 30, ImageFont.load_default(11)
    across = min(8, len(images))
    down = -(-len(images) // across)
    sheet = Image.new("RGB", (across * (tile + 8) + 8, down * (tile + line) + 8), "white")
    draw = ImageDraw.Draw(sheet)
    for i, (image, caption) in enumerate(zip(images, captions, strict=True)):
        left, upper = 8 + i % across * (tile + 8), 8 + i // across * (tile + line)
        pixels = image.permute(1, 2, 0).expand(-1, -1, 3).contiguous().numpy()
        scale = tile / max(pixels.shape[:2])
        shape = (round(pixels.shape[1] * scale), round(pixels.shape[0] * scale))
        method = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.BILINEAR
        sheet.paste(Image.fromarray(pixels).resize(shape, method), (left, upper))
        colour = "#c00000" if wrong and wrong[i] else "black"
        draw.multiline_text((left, upper + tile), caption, colour, font, spacing=0)
    return torch.from_numpy(np.array(sheet)).permute(2, 0, 1)


def encode_png(image: Tensor) -> bytes:
    """uint8 [1 or 3, H, W] as the bytes of a PNG file."""
    pixels = image.permute(1, 2, 0).contiguous().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()
