"""Hundreds of hostile image files, made here: each is a picture, or one line that says why not."""

import functools
import io
import os
import struct
import subprocess
import sys
import time
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from lenslet import files
from lenslet.data.decode import UnreadableImage, inspect_image, read_image

KINDS = {
    "jpg": ("JPEG", "RGB", {"quality": 90}),
    "png": ("PNG", "RGB", {}),
    "gif": ("GIF", "P", {}),
    "bmp": ("BMP", "RGB", {}),
    "webp": ("WEBP", "RGB", {}),
    "tif": ("TIFF", "RGB", {"compression": "tiff_lzw"}),
    "ppm": ("PPM", "RGB", {}),
    "jp2": ("JPEG2000", "RGB", {}),
    "avif": ("AVIF", "RGB", {"speed": 10}),
}
# Width and height: of one of these that is 1, the other is what a format can store at most.
BOMBS = [(13000, 13000), (30000, 30000), (65535, 65535), (60000, 1), (1, 60000)]


def smooth(height=90, width=120):
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 17) * np.cos(y / 13), np.cos(x / 21), np.sin((x + y) / 31)]
    return Image.fromarray((127 + 120 * np.stack(waves, -1)).astype(np.uint8))


def encoded(image, kind, **settings):
    form, mode, usual = KINDS[kind]
    buffer = io.BytesIO()
    image = image.convert(mode) if image.mode == "RGB" else image
    image.save(buffer, form, **(usual | settings))
    return buffer.getvalue()


def truncated(kind):
    whole = encoded(smooth(), kind)
    for tenth in range(1, 10):
        yield f"{kind} cut at {tenth}0 %", whole[: len(whole) * tenth // 10]


def flipped(kind):
    """A file with one, ten and a hundred bits turned over, in its head and anywhere."""
    whole, generator = encoded(smooth(), kind), np.random.default_rng(list(kind.encode()))
    for count in (1, 10, 100):
        for reach in (64, 64, len(whole), len(whole)):
            content = bytearray(whole)
            for place in generator.integers(0, reach, count):
                content[place] ^= 1 << int(generator.integers(8))
            yield f"{kind} with {count} bits of {reach} bytes", bytes(content)


def chunk(name, content):
    body = name + content
    return struct.pack(">I", len(content)) + body + struct.pack(">I", zlib.crc32(body))


def png(width, height, depth, colour, packed):
    head = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    chunks = [chunk(b"IHDR", head)]
    if colour == 3:
        chunks.append(chunk(b"PLTE", bytes(range(3))))
    return b"\x89PNG\r\n\x1a\n" + b"".join([*chunks, chunk(b"IDAT", packed), chunk(b"IEND", b"")])


@functools.cache
def zeros(count):
    """`count` zeros or more, deflated."""
    packer = zlib.compressobj(9)
    block = bytes(1 << 24)
    return b"".join([packer.compress(block) for _ in range(-(-count // len(block)))]) + (
        packer.flush()
    )


def bombs():
    """Files whose headers ask for much more than they hold; and PNGs that hold it, deflated."""
    tiny = zlib.compress(bytes(1000))
    for width, height in BOMBS:
        size = f"{width}×{height}"
        for depth, colour in ((8, 0), (8, 2), (8, 3), (8, 6), (16, 0), (16, 2), (1, 0), (16, 4)):
            yield f"png {size}, {depth} bits of {colour}", png(width, height, depth, colour, tiny)
        for kind, place, form in [
            ("gif", 6, "<HH"),
            ("bmp", 18, "<ii"),
            ("jpg", None, ">HH"),
            ("jp2", None, ">II"),
            ("avif", None, ">II"),
        ]:
            content = bytearray(encoded(smooth(), kind))
            if kind == "jpg":
                place, sides = content.index(b"\xff\xc0") + 5, (height, width)
            else:
                sides = (width, height)
            places = {"jp2": [(b"ihdr", 4, True), (b"\xff\x51", 6, False)], "avif": []}
            if kind == "avif":
                places["avif"] = [(b"ispe", 8, False)]
            for mark, offset, swapped in places.get(kind, [(None, place, False)]):
                at = offset if mark is None else content.index(mark) + offset
                struct.pack_into(form, content, at, *(sides[::-1] if swapped else sides))
            yield f"{kind} {size}", bytes(content)
        if max(width, height) < 2**14:
            head = b"\x2f" + struct.pack("<I", (width - 1) | (height - 1) << 14)
            body = b"WEBPVP8L" + struct.pack("<I", len(head) + 9) + head + bytes(9)
            yield f"webp {size}", b"RIFF" + struct.pack("<I", len(body)) + body
        canvas = struct.pack("<I", width - 1)[:3] + struct.pack("<I", height - 1)[:3]
        body = b"WEBPVP8X" + struct.pack("<II", 10, 2) + canvas
        yield f"webp canvas {size}", b"RIFF" + struct.pack("<I", len(body)) + body
        for magic in (b"P1", b"P2", b"P3", b"P4", b"P5", b"P6"):
            deep = b"" if magic in (b"P1", b"P4") else b"255\n"
            yield f"ppm {magic!r} {size}", magic + b"\n%d %d\n" % (width, height) + deep + b"1 0 1"
        yield f"ppm of 1000 levels {size}", b"P6\n%d %d\n1000\n" % (width, height) + bytes(9)
        for compression in (1, 5, 7, 8):
            yield f"tif {size}, {compression}", tiff(width, height, compression)
        yield f"tif {size}, one tile", tiff(90, 90, 5, {322: width, 323: height, 324: 8, 325: 99})


def tiff(width, height, compression, more=()):
    """A TIFF whose one strip of any height is 99 bytes long."""
    tags = {256: width, 257: height, 258: 8, 259: compression, 262: 1, 277: 1}
    tags |= {273: 8, 278: height, 279: 99} if not more else dict(more)
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, n) for tag, n in sorted(tags.items()))
    place = 8 + 99 + 1
    content = b"II*\0" + struct.pack("<I", place) + bytes(100)
    return content + struct.pack("<H", len(tags)) + entries + bytes(4)


def full_bombs():
    """PNGs that hold what their headers say: gigabytes, deflated to some hundred kilobytes."""
    for depth, colour, bands in ((8, 0, 1), (8, 2, 3), (8, 3, 1), (8, 6, 4), (16, 0, 2), (1, 0, 1)):
        packed = zeros(13000 * (13000 * bands + 1))
        yield f"full png, {depth} bits of {colour}", png(13000, 13000, depth, colour, packed)
    yield "wide png", png(178_000_000, 1, 8, 2, zeros(178_000_000 * 3 + 1))


def odd():
    """Kinds of image that are rare, or none."""
    image = smooth()
    for shape in ((1, 30000), (30000, 1), (1, 1), (1, 16000), (16000, 1)):
        for kind in KINDS:
            if kind not in ("webp", "avif") or 30000 not in shape:
                yield f"{kind} {shape}", encoded(Image.new("RGB", shape, "red"), kind)
    for kind, mode in [
        *[("jpg", mode) for mode in ("CMYK", "L")],
        *[("png", mode) for mode in ("1", "L", "LA", "RGBA", "I;16", "P")],
        *[("tif", mode) for mode in ("1", "L", "LA", "CMYK", "RGBA", "I;16", "I", "F", "LAB")],
        *[("webp", "RGBA"), ("avif", "RGBA"), ("jp2", "L"), ("jp2", "LA"), ("jp2", "RGBA")],
        *[("ppm", mode) for mode in ("1", "L", "I;16")],
    ]:
        turned = Image.new(mode, (50, 40)) if mode in ("LAB", "I;16") else image.convert(mode)
        settings = {"compression": None} if kind == "tif" else {}
        yield f"{kind} of {mode}", encoded(turned, kind, **settings)
    deep = np.array([[np.nan, np.inf, -np.inf, 1e30, -5]], np.float32)
    yield "tif of no numbers", encoded(Image.fromarray(deep), "tif", compression=None)
    frames = [Image.new("RGB", (50, 40), colour) for colour in ("red", "blue")]
    for kind in ("gif", "webp", "png", "tif"):
        more = {"save_all": True, "append_images": frames[1:]}
        yield f"{kind} of two frames", encoded(frames[0], kind, **more)
    palette = image.quantize(8)
    yield "gif with transparency", encoded(palette, "gif", transparency=0)
    yield "png with transparency", encoded(palette, "png", transparency=bytes([0, 99, 255]))
    yield "progressive jpg", encoded(image, "jpg", progressive=True)
    zero = struct.pack("<II", 0, 0)
    for kind, place in (("bmp", 18), ("gif", 6)):
        content = encoded(image, kind)
        yield (
            f"{kind} of no size",
            content[:place]
            + zero[: 8 if kind == "bmp" else 4]
            + content[place + (8 if kind == "bmp" else 4) :],
        )
    yield "png of no size", png(0, 0, 8, 2, zlib.compress(b""))
    yield "ppm of no size", b"P6\n0 0\n255\n"
    yield "tif of no size", tiff(0, 0, 1)
    for name, content in (("text", b"no image\n" * 9), ("empty", b""), ("zeros", bytes(999))):
        yield name, content
    for kind in KINDS:
        yield f"the head of a {kind}", encoded(image, kind)[:12]


def many():
    """(name, content) of all of them."""
    for kind in KINDS:
        yield from truncated(kind)
        yield from flipped(kind)
    yield from bombs()
    yield from odd()


def calls(path):
    """The ways in which an image is read, by name."""
    yield "inspect", lambda: inspect_image(path, 64)
    for channels in (1, 3):
        for size in ((64, 64), None):
            yield f"{channels} {size}", lambda c=channels, s=size: read_image(path, c, s)


def check(name, path):
    """Read a file in all ways; the longest time that one took, in seconds."""
    longest = 0
    for how, call in calls(path):
        begin = time.perf_counter()
        try:
            call()
        except UnreadableImage as error:
            text = str(error).replace(str(path.parent), "")
            assert text.isprintable() and len(text) <= 400, f"{name}, {how}: {text!r}"
        except Exception as error:
            raise AssertionError(f"{name}, {how}: {error!r}") from error
        longest = max(longest, time.perf_counter() - begin)
    return longest


def peak():
    """The most memory that this process has held since the last call, in bytes (Linux)."""
    with open("/proc/self/status") as file:
        most = next(int(line.split()[1]) for line in file if line.startswith("VmHWM"))
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
    return most * 1024


def measure(folder):
    """Check all files, and print what each took, a line: seconds, GiB beside the start, name."""
    warnings.simplefilter("error")
    Image.init()
    peak()
    start = peak()
    for source in (many(), full_bombs()):
        for name, content in source:
            path = Path(folder) / "a.png"
            path.write_bytes(content)
            del content
            peak()
            longest = check(name, path)
            print(f"{longest:.2f} {(peak() - start) / 2**30:.3f} {name}", flush=True)


def test_some_hostile_files(tmp_path):
    """Of every kind of hostile file a few are read, or named as unreadable in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, content in [*list(many())[::5], *odd()]:
            path = tmp_path / "a.png"
            path.write_bytes(content)
            check(name, path)


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="asks Linux for the memory")
def test_all_hostile_files(tmp_path):
    """None of all hostile files takes 1 GiB or 10 s, and each is a picture or one line."""
    program = f"from data import test_hostile; test_hostile.measure({str(tmp_path)!r})"
    path = os.pathsep.join(map(str, (files.ROOT, files.ROOT / "tests")))
    environment = dict(os.environ, PYTHONPATH=path)
    result = subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    lines = [line.split(" ", 2) for line in result.stdout.splitlines()]
    assert len(lines) > 400
    for seconds, memory, name in lines:
        assert float(seconds) < 10 and float(memory) < 1, (name, seconds, memory)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "tif", "avif"])
def test_upright(tmp_path, kind):
    """An image that is stored turned by any of the eight EXIF orientations is read upright."""
    upright = smooth()
    turns = [None, "FLIP_LEFT_RIGHT", "ROTATE_180", "FLIP_TOP_BOTTOM", "TRANSPOSE", "ROTATE_90"]
    turns += ["TRANSVERSE", "ROTATE_270"]
    for orientation, turn in enumerate(turns, 1):
        stored = upright.transpose(Image.Transpose[turn]) if turn else upright
        exif = Image.Exif()
        exif[0x0112] = orientation
        (tmp_path / "a").write_bytes(encoded(stored, kind, exif=exif))
        for pixels in (read_image(tmp_path / "a", 3), inspect_image(tmp_path / "a", 200).pixels):
            difference = np.abs(pixels.astype(int) - np.asarray(upright, int))
            assert difference.mean() < 6, (kind, orientation)


NAMES = ["two\nlines", "re\rturn", "\x1b[2Jgone", "tab\t", "bad\udcff", "-x", "a" * 240, "\x85"]


@pytest.mark.parametrize("name", NAMES)
def test_odd_names(tmp_path, name):
    """A name of any bytes is read, and shown in one line without control characters."""
    path = tmp_path / f"{name}.png"
    path.write_bytes(encoded(smooth(), "png"))
    assert read_image(path, 3).shape == (90, 120, 3)
    path.write_bytes(b"no image")
    for _, call in calls(path):
        with pytest.raises(UnreadableImage) as caught:
            call()
        text = str(caught.value).replace("\udcff", "").removeprefix(str(tmp_path))
        assert text.isprintable() and len(text) <= 400


def test_no_files(tmp_path):
    """A folder, a pipe and a device answer at once, whatever they are called."""
    (tmp_path / "x.jpg").mkdir()
    os.mkfifo(tmp_path / "pipe.jpg")
    for path in (tmp_path / "x.jpg", tmp_path / "pipe.jpg", Path("/dev/zero"), Path(os.devnull)):
        for _, call in calls(path):
            with pytest.raises(UnreadableImage, match="not a regular file"):
                call()
