"""Images of every kind come out with the right pixels, or are named as unreadable."""

import hashlib
import io
import os
import socket
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, JpegImagePlugin
from sklearn.datasets import load_sample_image
from torchvision.transforms import CenterCrop, Resize

from lenslet import files
from lenslet.data import decode
from lenslet.data.decode import UnreadableImage, inspect_image, read_image
from lenslet.errors import OutsideError

GREY = np.array([[0, 51, 102], [153, 204, 255]], np.uint8)
RGB = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)

# What a camera that was turned stores of an upright image, by its EXIF orientation.
STORED = {
    1: lambda a: a,
    2: np.fliplr,
    3: lambda a: np.rot90(a, 2),
    4: np.flipud,
    5: lambda a: np.rot90(np.fliplr(a)),
    6: np.rot90,
    7: lambda a: np.rot90(np.flipud(a)),
    8: lambda a: np.rot90(a, -1),
}


def smooth(height, width):
    y, x = np.mgrid[0:height, 0:width]
    waves = [np.sin(x / 37) * np.cos(y / 53), np.cos(x / 71), np.sin((x + y) / 91)]
    return (127 + 120 * np.stack(waves, -1)).astype(np.uint8)


def save(path, pixels, **settings):
    Image.fromarray(np.ascontiguousarray(pixels)).save(path, **settings)
    return path


def save_turned(path, upright, orientation, **settings):
    exif = Image.Exif()
    exif[0x0112] = orientation
    return save(path, STORED[orientation](upright), exif=exif, **settings)


def check_grey(path, expected):
    """The image is `expected`, uint8 [H, W], read as one channel and as three."""
    for channels in (1, 3):
        pixels = read_image(path, channels)
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels, np.repeat(expected[..., None], channels, 2))


@pytest.mark.parametrize("suffix", [".png", ".bmp", ".tif", ".gif", ".pgm"])
def test_grey(tmp_path, suffix):
    """A grey image keeps its values in one channel and in three."""
    check_grey(save(tmp_path / f"a{suffix}", GREY), GREY)


def test_one_bit(tmp_path):
    """The two values of a 1-bit image are black and white."""
    bits = np.array([[True, False], [False, True], [True, True]])
    check_grey(save(tmp_path / "a.png", bits), bits.astype(np.uint8) * 255)


def test_colour_to_grey(tmp_path):
    """Colours become grey by their luma (ITU-R 601), to within rounding."""
    grey = read_image(save(tmp_path / "a.png", RGB), 1)
    assert grey.shape == (4, 6, 1)
    assert np.abs(grey[..., 0] - RGB @ [0.299, 0.587, 0.114]).max() <= 1


def test_palette(tmp_path):
    """A palette image has the colours that its indices stand for."""
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60, 70, 80, 90])
    image.save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", 3).tolist() == [
        [[10, 20, 30], [40, 50, 60], [70, 80, 90]]
    ]


def test_palette_transparency(tmp_path):
    """A palette's transparent index is white; the others keep their colours."""
    image = Image.fromarray(np.array([[0, 1]], np.uint8), "L").convert("P")
    image.putpalette([10, 20, 30, 40, 50, 60])
    image.save(tmp_path / "a.png", transparency=0)
    assert read_image(tmp_path / "a.png", 3).tolist() == [[[255, 255, 255], [40, 50, 60]]]


def test_transparent_colour(tmp_path):
    """The one colour that an RGB file calls transparent is white."""
    path = save(
        tmp_path / "a.png", np.array([[[1, 2, 3], [9, 9, 9]]], np.uint8), transparency=(1, 2, 3)
    )
    assert read_image(path, 3).tolist() == [[[255, 255, 255], [9, 9, 9]]]


@pytest.mark.parametrize(("mode", "suffix"), [("RGBA", ".png"), ("LA", ".png"), ("RGBA", ".webp")])
def test_alpha_on_white(tmp_path, mode, suffix):
    """Transparency is composited on white: a pixel of opacity a is a * value + (1 - a) * 255."""
    colour = (60,) * (len(mode) - 1)
    image = Image.new(mode, (3, 1))
    for x, alpha in enumerate((0, 128, 255)):
        image.putpixel((x, 0), (*colour, alpha))
    image.save(
        tmp_path / f"a{suffix}", **({"lossless": True, "exact": True} if "webp" in suffix else {})
    )
    expected = np.array([255, 60 * 128 / 255 + 255 * 127 / 255, 60])
    for channels in (1, 3):
        pixels = read_image(tmp_path / f"a{suffix}", channels)
        assert pixels.shape == (1, 3, channels)
        assert np.abs(pixels[0] - expected[:, None]).max() <= 1


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_sixteen_bits(tmp_path, suffix):
    """16-bit samples are scaled to 8 (by 257), not cut off."""
    deep = np.array([[0, 257, 12850], [32896, 65278, 65535]], np.uint16)
    path = save(tmp_path / f"a{suffix}", deep)
    check_grey(path, np.array([[0, 1, 50], [128, 254, 255]], np.uint8))


def test_wide_integers(tmp_path):
    """A 32-bit TIFF is taken to hold 16-bit samples; what exceeds them is white or black."""
    path = save(tmp_path / "a.tif", np.array([[-5, 0, 25700, 70000]], np.int32))
    check_grey(path, np.array([[0, 0, 100, 255]], np.uint8))


def test_floats(tmp_path):
    """Float samples are rounded and cut to 0..255."""
    path = save(tmp_path / "a.tif", np.array([[-1.0, 0.4, 99.6, 300.0]], np.float32))
    check_grey(path, np.array([[0, 0, 100, 255]], np.uint8))


def test_cmyk_jpeg(tmp_path):
    """A CMYK JPEG has the colours that Pillow converts it to."""
    Image.new("CMYK", (16, 16), (255, 0, 0, 0)).save(tmp_path / "a.jpg", quality=95)
    pixels = read_image(tmp_path / "a.jpg", 3).astype(int)
    assert np.abs(pixels - [0, 255, 255]).max() <= 3


def test_webp(tmp_path):
    """A lossless WebP keeps its pixels."""
    path = save(tmp_path / "a.webp", RGB, lossless=True)
    assert np.array_equal(read_image(path, 3), RGB)


@pytest.mark.parametrize("suffix", [".gif", ".webp", ".png", ".tif"])
def test_first_frame(tmp_path, suffix):
    """Of several frames the first is read."""
    frames = [Image.new("RGB", (5, 4), colour) for colour in ("#ff0000", "#0000ff")]
    settings = {"lossless": True} if suffix == ".webp" else {}
    frames[0].save(tmp_path / f"a{suffix}", save_all=True, append_images=frames[1:], **settings)
    assert (read_image(tmp_path / f"a{suffix}", 3) == [255, 0, 0]).all()


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif", ".jpg"])
def test_orientations(tmp_path, suffix, orientation):
    """All eight EXIF orientations give one upright image, whole and cut to a box."""
    upright = smooth(96, 160)
    settings = {".webp": {"lossless": True}, ".jpg": {"quality": 98, "subsampling": 0}}
    path = save_turned(tmp_path / f"a{suffix}", upright, orientation, **settings.get(suffix, {}))
    plain = save(tmp_path / "plain.png", upright)
    for size, crop in ((None, 1.0), ((20, 40), 0.875), ((40, 20), 1.0)):
        pixels, expected = (read_image(p, 3, size, crop).astype(int) for p in (path, plain))
        assert pixels.shape == expected.shape
        assert np.abs(pixels - expected).mean() <= (2 if suffix == ".jpg" else 0)


def test_unknown_orientation(tmp_path):
    """An orientation that EXIF does not know turns nothing."""
    exif = Image.Exif()
    exif[0x0112] = 9
    path = save(tmp_path / "a.jpg", smooth(40, 80), exif=exif)
    plain = save(tmp_path / "plain.jpg", smooth(40, 80))
    assert np.array_equal(read_image(path, 3, (20, 40)), read_image(plain, 3, (20, 40)))


@pytest.mark.parametrize("orientation", [1, 6])
@pytest.mark.parametrize("shape", [(1200, 1600), (1200, 1601), (1601, 1201), (1600, 1599)])
def test_shrunk_decoding(tmp_path, shape, orientation):
    """A JPEG that its decoder shrinks looks like one decoded in full, odd sides included.

    The decoder pads an odd side at its far end: turned round, that shifts it by half a pixel.
    """
    upright = smooth(*shape)
    path = save_turned(tmp_path / "a.jpg", upright, orientation, quality=95)
    whole = save(tmp_path / "whole.bmp", read_image(path, 3))
    for size, crop in (((224, 224), 0.875), ((128, 160), 1.0)):
        pixels, expected = (read_image(p, 3, size, crop).astype(int) for p in (path, whole))
        assert np.abs(pixels - expected).mean() < (1 if orientation == 1 else 8)


@pytest.mark.parametrize("name", ["china.jpg", "flower.jpg"])
@pytest.mark.parametrize("shape", [(400, 600), (427, 640), (427, 300), (427, 427)])
def test_centre_crop(tmp_path, name, shape):
    """size 224, crop 0.875 is torchvision's Resize(256), CenterCrop(224), to half a grey level."""
    image = load_sample_image(name)[: shape[0], : shape[1]]
    reference = CenterCrop(224)(Resize(256)(Image.fromarray(image)))
    pixels = read_image(save(tmp_path / "a.png", image), 3, (224, 224), 0.875)
    assert np.abs(pixels.astype(int) - np.asarray(reference)).mean() < 0.5


@pytest.mark.parametrize("shape", [(60, 92), (92, 60)])
def test_aspect_ratio(tmp_path, shape):
    """A box has the shape asked for: squares of the image stay square."""
    image = np.zeros(shape, np.uint8)
    image[shape[0] // 2 - 10 : shape[0] // 2 + 10, shape[1] // 2 - 10 : shape[1] // 2 + 10] = 255
    pixels = read_image(save(tmp_path / "a.png", image), 1, (30, 30))[..., 0] > 127
    assert pixels.any(0).sum() == pixels.any(1).sum() == 10
    assert np.array_equal(pixels, pixels[::-1, ::-1])


@pytest.mark.parametrize("shape", [(30, 45), (1, 400), (400, 1), (1, 1), (600, 801)])
@pytest.mark.parametrize("suffix", [".png", ".jpg"])
def test_random_boxes(tmp_path, shape, suffix):
    """Every draw gives a box inside the image, whatever its shape, and the same box again."""
    path = save(tmp_path / f"a{suffix}", smooth(*shape))
    draws = [
        [a, b, c, d] for a in (0, 0.9999999) for b in (0, 0.9999999) for c, d in ((0, 1), (1, 0))
    ]
    draws += np.random.default_rng(0).random((30, 4)).tolist()
    for draw in torch.tensor(draws):
        pixels = read_image(path, 3, (16, 24), 1.0, draw)
        assert pixels.shape == (16, 24, 3)
        assert np.array_equal(pixels, read_image(path, 3, (16, 24), 1.0, draw))


def test_random_boxes_differ(tmp_path):
    """The draws say where and how large the box is: area 25 % at the upper left, or all of it."""
    y, x = np.mgrid[0:100, 0:100]
    path = save(tmp_path / "a.png", np.stack([x, y, x], -1).astype(np.uint8))
    corner = read_image(path, 3, (50, 50), 1.0, torch.tensor([0, 0.5, 0, 0]))
    assert np.array_equal(corner[..., 0], np.mgrid[0:50, 0:50][1])
    far = read_image(path, 3, (50, 50), 1.0, torch.tensor([0, 0.5, 1, 1]))
    assert np.array_equal(far[..., 1], 50 + np.mgrid[0:50, 0:50][0])
    whole = read_image(path, 3, (100, 100), 1.0, torch.tensor([1, 0.5, 0.3, 0.3]))
    assert np.array_equal(whole[..., 0], x)


def test_all_deep_values(tmp_path):
    """Each of the 65,536 values of 16 bits is divided by 257 and rounded."""
    deep = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    check_grey(save(tmp_path / "a.png", deep), (deep / 257).round().astype(np.uint8))


MODES = ["1", "L", "P", "LA", "RGB", "RGBA", "I;16", "transparent"]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("size", [None, (20, 30)])
def test_strips(tmp_path, monkeypatch, mode, size):
    """An image that is converted strip by strip has the pixels of one converted at once."""
    image = Image.fromarray(np.dstack([smooth(50, 70), smooth(50, 70)[..., 2]]))
    if mode == "transparent":
        image.convert("RGB").quantize(8).save(tmp_path / "a.png", transparency=bytes([0, 99]))
    else:
        deep = np.arange(3500, dtype=np.uint16).reshape(50, 70) * 18
        (Image.fromarray(deep) if mode == "I;16" else image.convert(mode)).save(tmp_path / "a.png")
    whole = [read_image(tmp_path / "a.png", channels, size) for channels in (1, 3)]
    grey = inspect_image(tmp_path / "a.png", 64).grey
    monkeypatch.setattr(decode, "STRIP", 70 * 8 + 1)  # the last strip is of two rows
    flattened, real = [], decode._flatten
    monkeypatch.setattr(decode, "_flatten", lambda i: flattened.append(i.height) or real(i))
    for channels, expected in zip((1, 3), whole, strict=True):
        assert np.array_equal(read_image(tmp_path / "a.png", channels, size), expected)
    assert inspect_image(tmp_path / "a.png", 64).grey == grey == (mode in ("1", "L", "LA", "I;16"))
    assert max(flattened) == 8


def head_of_png(width, height, colour):
    """A PNG of 8 bits that ends after its header; colour: 0 grey, 2 RGB, 3 palette, 6 RGBA."""
    image = {0: "L", 2: "RGB", 3: "P", 6: "RGBA"}[colour]
    buffer = io.BytesIO()
    Image.new(image, (1, 1)).save(buffer, "PNG")
    content = bytearray(buffer.getvalue())
    content[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.parametrize(
    ("width", "colour", "reason"),
    [
        (13000, 6, "13000×13000 pixels; needs 1.3 GiB when decoded, more than 1"),
        (14800, 0, "14800×14800 pixels; needs 1.1 GiB when decoded, more than 1"),
        (14600, 0, "truncated"),  # what it needs would be there, and more than Pillow's limit
        (14600, 2, "truncated"),
        (14600, 3, "truncated"),
        (40000, 2, "exceeds limit of"),
    ],
)
def test_memory_by_the_header(tmp_path, width, colour, reason):
    """What an image would need is told from its header, and alike wherever it is read."""
    path = tmp_path / "a.png"
    path.write_bytes(head_of_png(width, width, colour))
    for read in (lambda: read_image(path, 3, (64, 64)), lambda: inspect_image(path, 64)):
        with pytest.raises(UnreadableImage, match=reason):
            read()


def test_slow_formats(tmp_path, monkeypatch):
    """A JPEG 2000 that would take more than 10 s to decode is refused, unless asked for."""
    assert decode.SLOW["JPEG2000"] == 2 * 10**7  # at 2 million pixels a second
    monkeypatch.setitem(decode.SLOW, "JPEG2000", 40 * 50)
    largest, larger = tmp_path / "largest.jp2", tmp_path / "larger.jp2"
    save(largest, smooth(40, 50))
    save(larger, smooth(40, 51))
    assert read_image(largest, 3).shape == (40, 50, 3)
    for read in (lambda: read_image(larger, 3, (8, 8)), lambda: inspect_image(larger, 64)):
        with pytest.raises(UnreadableImage, match="51×40 pixels; takes more than 10 s to decode"):
            read()
    assert read_image(larger, 3, None, most=40 * 51).shape == (40, 51, 3)


def test_memory_after_reduced_decoding(tmp_path, monkeypatch):
    """A JPEG counts as large as it is decoded; a progressive one with all its coefficients; turned
    ones twice.
    """
    monkeypatch.setattr(decode, "GIB", 2**20)
    paths = [tmp_path / name for name in ("a.jpg", "progressive.jpg", "a.png", "turned.png")]
    image = smooth(1200, 1200)
    save(paths[0], image)
    save(paths[1], image, progressive=True)
    save(paths[2], smooth(440, 440))
    save_turned(paths[3], smooth(440, 440), 6)
    assert read_image(paths[0], 3, (64, 64)).shape == (64, 64, 3)
    assert inspect_image(paths[0], 64).side == 1200
    assert read_image(paths[2], 3, (64, 64)).shape == (64, 64, 3)
    for path, size in ((paths[0], None), (paths[1], (64, 64)), (paths[3], (64, 64))):
        with pytest.raises(UnreadableImage, match=r"needs \d+\.\d GiB when decoded, more than 1"):
            read_image(path, 3, size)
    assert read_image(paths[0], 3, None, most=1440000).shape == (1200, 1200, 3)
    with pytest.raises(UnreadableImage, match="1200×1200 pixels, more than 1439999"):
        read_image(paths[0], 3, (64, 64), most=1439999)


def png_bytes():
    buffer = io.BytesIO()
    Image.fromarray(smooth(40, 40)).save(buffer, "PNG")
    return buffer.getvalue()


EPS = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n%%EOF\n"
BROKEN = {
    "empty": b"",
    "truncated": png_bytes()[:-200],
    "only a head": png_bytes()[:40],
    "text": b"a table of contents\n" * 9,
    "PostScript": EPS,
}


@pytest.mark.parametrize("read", [lambda p: read_image(p, 3), lambda p: inspect_image(p, 64)])
@pytest.mark.parametrize("kind", [*BROKEN, "missing", "a folder"])
def test_unreadable(tmp_path, kind, read):
    """What is no whole image is named in one line, and PostScript never reaches a reader."""
    path = tmp_path / "a.png"
    if kind == "a folder":
        path.mkdir()
    elif kind != "missing":
        path.write_bytes(BROKEN[kind])
    with pytest.raises(UnreadableImage) as caught:
        read(path)
    assert isinstance(caught.value, OutsideError)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert ("empty" in str(caught.value)) == (kind == "empty")


NO_FILES = {
    "pipe": "(not a regular file)",
    "socket": "(not a regular file)",
    "device": f"(a link to {os.devnull}: not a regular file)",
    "nowhere": "(a link to gone/b.png: No such file or directory)",
    "loop": "(a link to a.png: Too many levels of symbolic links)",
    "forbidden": "(Permission denied)",
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_is_never_opened(tmp_path, monkeypatch, kind):
    """A pipe, which would wait for a writer, and its like are named with the reason instead."""
    path = tmp_path / "a.png"
    monkeypatch.chdir(tmp_path)  # a socket's path may have 108 bytes at most
    targets = {"device": os.devnull, "nowhere": "gone/b.png", "loop": "a.png"}
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as made:
            made.bind(path.name)
    elif kind == "forbidden":
        path.touch()
    else:
        path.symlink_to(targets[kind])

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    assert decode.longer_side(path) == 0
    for read in (lambda: read_image(path, 3), lambda: inspect_image(path, 64)):
        with pytest.raises(UnreadableImage) as caught:
            read()
        assert str(caught.value) == f"{path}: cannot be read as an image {NO_FILES[kind]}"


def test_truncated_photograph(tmp_path):
    """The quick look at a large JPEG meets every byte of it: a cut one is found out."""
    path = save(tmp_path / "a.jpg", smooth(800, 900), quality=95)
    assert inspect_image(path, 64)[0] == 900
    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(UnreadableImage, match=r"a\.jpg"):
        inspect_image(path, 64)


def test_inspect(tmp_path):
    """The longer side, whether all is grey (in files of colour too), the hash of the file's bytes,
    and pixels if small.
    """
    path = save(tmp_path / "colour.png", RGB)
    side, grey, sha256, pixels = inspect_image(path, 6)
    assert (side, grey) == (6, False)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert np.array_equal(pixels, RGB)
    side, grey, _, pixels = inspect_image(save(tmp_path / "g.png", np.stack([GREY] * 3, -1)), 3)
    assert (side, grey) == (3, True)
    assert np.array_equal(pixels, GREY[..., None])
    assert inspect_image(path, 5) == (6, False, sha256, None)


def test_longer_side(tmp_path):
    """The head of a file tells the longer side; a broken one tells nothing."""
    assert decode.longer_side(save(tmp_path / "a.png", RGB)) == 6
    assert decode.longer_side(tmp_path / "missing.png") == 0


def test_a_narrow_photograph(tmp_path):
    """A JPEG of 5 by 100 pixels is small in one direction only, and whole."""
    path = tmp_path / "narrow.jpg"
    Image.new("RGB", (5, 100), "red").save(path)
    found = decode.inspect_image(path, 64)
    assert (found.side, found.grey, found.pixels) == (100, False, None)
    assert decode.read_image(path, 3, (32, 32), 0.875).shape == (32, 32, 3)


@pytest.mark.parametrize("suffix", [".webp", ".avif", ".jp2"])
def test_newer_formats(tmp_path, suffix):
    """The formats that Pillow loads last are read, and a file of none of them is called that."""
    path = tmp_path / f"red{suffix}"
    Image.new("RGB", (40, 40), "red").save(path)
    assert (decode.read_image(path, 3)[20, 20] - np.array([255, 0, 0])).max() < 8
    path.write_text("no image at all")
    with pytest.raises(decode.UnreadableImage, match="not a known kind of image"):
        decode.read_image(path, 3)


def test_pillow_is_silent(tmp_path):
    """Pillow's warnings are not shown, and nothing is registered before an image is opened."""
    path = save(tmp_path / "a.png", RGB)
    program = f"""
import warnings
import PIL.Image
from lenslet.data.decode import inspect_image, longer_side, read_image
PIL.Image.MAX_IMAGE_PIXELS = 20  # 24 are then worth a warning
assert not any("PIL" in str(entry) for entry in warnings.filters)
assert read_image({str(path)!r}, 3).shape == (4, 6, 3)
assert longer_side({str(path)!r}) == 6 and inspect_image({str(path)!r}, 64).side == 6
"""
    result = subprocess.run(
        [sys.executable, "-W", "always", "-c", program], cwd=files.ROOT, capture_output=True
    )
    assert (result.returncode, result.stderr) == (0, b"")


@pytest.fixture
def heic(tmp_path, monkeypatch):
    """A file called .HEIC, and a function that installs or removes pillow-heif."""
    path = save(tmp_path / "a.jpg", smooth(400, 300)).rename(tmp_path / "a.HEIC")

    def install(module):
        monkeypatch.setitem(sys.modules, "pillow_heif", module)
        decode._reads_heif.cache_clear()

    yield path, install
    decode._reads_heif.cache_clear()


def test_heic_without_its_package(heic):
    """A HEIC file is unreadable, with the remedy, where pillow-heif is not installed."""
    path, install = heic
    install(None)
    for read in (lambda: decode.read_image(path, 3), lambda: decode.inspect_image(path, 64)):
        with pytest.raises(decode.UnreadableImage, match="pip install pillow-heif"):
            read()
    assert decode.longer_side(path) == 0


def test_heic(heic, monkeypatch):
    """pillow-heif is registered once, when the first such file is met; the memory bound holds, and
    no thumbnail is read in place of the image.
    """
    path, install = heic
    registered, drafts = [], []

    class Heif(JpegImagePlugin.JpegImageFile):
        format = "HEIF"

        def draft(self, mode, size):
            drafts.append(size)

    def register():
        registered.append(1)
        monkeypatch.setitem(Image.OPEN, "HEIF", (Heif, None))

    install(SimpleNamespace(register_heif_opener=register))
    monkeypatch.setattr(decode, "FORMATS", ("PNG",))
    assert decode.inspect_image(path, 64).side == 400
    assert decode.read_image(path, 3, (20, 20)).shape == (20, 20, 3)
    assert (registered, drafts) == ([1], [])
    monkeypatch.setattr(decode, "GIB", 400 * 300 * 19)  # 20 bytes a pixel
    with pytest.raises(decode.UnreadableImage, match="GiB when decoded, more than 1"):
        decode.read_image(path, 3)
