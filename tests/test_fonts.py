"""Class names are drawn in a font that has their letters, or as the number of their class."""

from io import BytesIO
from pathlib import Path

import matplotlib
import pytest
from PIL import ImageFont

from lenslet import fonts

DEJAVU = Path(matplotlib.get_data_path(), "fonts/ttf/DejaVuSans.ttf")


@pytest.fixture(autouse=True)
def fresh():
    fonts.font_for.cache_clear()
    yield
    fonts.font_for.cache_clear()


def offer(monkeypatch, *paths):
    monkeypatch.setattr(fonts, "_candidates", lambda letters: [str(path) for path in paths])


def test_ascii_stays_in_pillows_font(monkeypatch):
    """Names in ASCII never look for a font."""
    monkeypatch.setattr(fonts, "_candidates", None)
    assert fonts.legible(["ants", "T-shirt/top", ""]) == (["ants", "T-shirt/top", ""], "")


def test_a_font_that_has_the_letters(monkeypatch):
    """Greek and Cyrillic are drawn in the first font that has all of their letters."""
    offer(monkeypatch, "/nowhere/a.ttf", DEJAVU)
    names = ["γάτα", "собака", "Öl"]
    assert fonts.legible(names) == (names, "")
    assert fonts.font_for("собака", 11).getname()[0] == "DejaVu Sans"


def test_no_font(monkeypatch, tmp_path):
    """Where no font has them, or the file is none, the class is a number, and that is said."""
    (tmp_path / "a.ttf").write_bytes(b"no font")
    offer(monkeypatch, tmp_path / "a.ttf", DEJAVU)
    names, note = fonts.legible(["cat", "日本", "собака", "犬"])
    assert names == ["cat", "class 1", "собака", "class 3"]
    assert "日本" in note and "\n" not in note


def test_letters_that_are_joined(monkeypatch):
    """Without a library that shapes them, such letters would come out wrong: a number does not."""
    offer(monkeypatch, DEJAVU)
    monkeypatch.setattr(fonts.features, "check", lambda name: False)
    assert fonts.font_for("قط", 11) is None and fonts.font_for("Жук", 11) is not None


def test_without_fontconfig(monkeypatch, tmp_path):
    """Without fc-list, the usual folders are looked through, the widest fonts first."""

    def missing(*_, **__):
        raise FileNotFoundError("fc-list")

    for name in ("a.ttf", "b/NotoSansCJK.ttc", "c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(DEJAVU.read_bytes())
    monkeypatch.setattr(fonts.subprocess, "run", missing)
    monkeypatch.setattr(fonts, "FOLDERS", (str(tmp_path), str(tmp_path / "none")))
    found = [Path(path).name for path in fonts._candidates("日")]
    assert found == ["NotoSansCJK.ttc", "a.ttf"]
    assert fonts.font_for("Жук", 11) is not None


def test_a_missing_letter_is_noticed():
    """A letter is there if its picture is not that of a missing one."""
    font = ImageFont.truetype(BytesIO(DEJAVU.read_bytes()), 11)
    assert fonts._covers(font, "Жук ω 1") and not fonts._covers(font, "Жук 日")
    assert fonts._covers(font, "\t \u200b\n")
