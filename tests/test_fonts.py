"""A class name is drawn with a font that has its characters, or its number is, and that is said."""

import csv
import os
import subprocess
from pathlib import Path
from types import SimpleNamespace

import predict
import pytest
import torch
import train
from test_predict import measure

from lenslet import fonts
from lenslet.analysis.report import draw_confusion
from lenslet.errors import run_main
from lenslet.grid import draw_grid

ODD = ["😀", "a\nb", "\x00", "\x1b[31m", "\udcff", "\u2028", "\ue000", "\u3000", "e\u0301\u0301"]


@pytest.fixture
def dejavu():
    """A font of Latin, Greek, Cyrillic, Arabic and Hebrew letters, and of no Chinese ones."""
    return pytest.importorskip("matplotlib").get_data_path() + "/fonts/ttf/DejaVuSans.ttf"


@pytest.fixture
def system(monkeypatch):
    """The function that says which font files the system has, and returns the searches so far."""

    def forget():
        del fonts._used[1:]
        fonts._search.cache_clear()

    def has(*files):
        forget()
        searches = []
        faces = [(str(file), 0) for file in files]
        monkeypatch.setattr(fonts, "candidates", lambda text: searches.append(text) or iter(faces))
        return searches

    yield has
    forget()


def test_plain_names_keep_their_font(system, dejavu):
    """For names in plain Latin letters no font is searched, and Pillow's own draws them."""
    searches = system(dejavu)
    assert fonts.drawable(["cat", "T-shirt/top 3"]) == (["cat", "T-shirt/top 3"], [])
    assert not searches and fonts.font_for("-> cat", 11).getname()[0] == "Aileron"


def test_other_letters(system, dejavu):
    """A name is drawn with a font that has all of it, and by its number where none has; the first
    of these is named in one line, and fonts are searched once.
    """
    searches = system(dejavu)
    names = ["cat", "кошка", "猫", "γάτα", "cafe\u0301", "кошка 猫"]
    for _ in range(3):
        shown, notes = fonts.drawable(names)
        assert shown == ["cat", "кошка", "class 2", "γάτα", "café", "class 5"]
        (note,) = notes
        assert note.startswith("pictures have numbers for 2 of 6 class names: no font here can ")
        assert "(class 2 is '猫')" in note
    assert len(searches) == 1 and set(searches[0]) == set("кошка猫γάταcafé ")
    used = [fonts.font_for(f"-> {name}", 11).getname()[0] for name in shown]
    assert used == ["Aileron", "DejaVu Sans", "Aileron", "DejaVu Sans", "DejaVu Sans", "Aileron"]


def test_without_fonts(system, tmp_path, dejavu):
    """With no font there are numbers; a file that is none, or is gone, is passed over."""
    system()
    assert fonts.drawable(["кошка", "café", "cat"])[0] == ["class 0", "class 1", "cat"]
    (tmp_path / "broken.ttf").write_bytes(Path(dejavu).read_bytes()[:3000])
    (tmp_path / "empty.ttf").touch()
    broken = [tmp_path / f"{name}.ttf" for name in ("broken", "empty", "gone")]
    system(*broken)
    assert fonts.drawable(["кошка"])[0] == ["class 0"]
    system(*broken, dejavu)
    assert fonts.drawable(["кошка"]) == (["кошка"], [])


@pytest.mark.parametrize("shapes", [True, False])
def test_letters_that_join(system, monkeypatch, dejavu, shapes):
    """Scripts that run to the left or join letters are drawn only where Pillow can shape them."""
    monkeypatch.setattr(fonts, "SHAPES", shapes)
    fonts._has.cache_clear()
    system(dejavu)
    names = ["חתול", "قطة", "می\u200cخواهم", "q\u0301"]
    shown, notes = fonts.drawable([*names, "кошка"])
    assert shown[:4] == (names if shapes else [f"class {k}" for k in range(4)])
    assert shown[4] == "кошка" and len(notes) == (not shapes)
    fonts._has.cache_clear()


def test_a_search_ends(system, monkeypatch, dejavu):
    """Fonts are searched for SECONDS at most."""
    system("gone.ttf", dejavu)
    monkeypatch.setattr(fonts, "SECONDS", -1)
    assert fonts.drawable(["кошка"])[0] == ["class 0"]


def test_candidates(tmp_path, monkeypatch):
    """fontconfig's fonts come first, with their place in a file of several; then, or where it is
    missing or slow, those in the usual folders, the regular ones first.
    """
    for name in "AB-Bold.ttc AB-Regular.ttc readme.txt LastResort.otf".split():
        (tmp_path / name).touch()
    (tmp_path / "share" / "fonts" / "deep").mkdir(parents=True)
    (tmp_path / "share" / "fonts" / "deep" / "C.TTF").touch()
    monkeypatch.setattr(fonts, "FOLDERS", f"{tmp_path}/gone {tmp_path}")
    files = ["AB-Regular.ttc", "AB-Bold.ttc", "share/fonts/deep/C.TTF"]
    found = [(f"{tmp_path}/{name}", 0) for name in files]
    asked = []

    def fontconfig(command, **_):
        asked.append(command[-1])
        return SimpleNamespace(stdout=os.fsencode("/fonts/a b.ttc\t2\n/猫.otf\t0\n"))

    monkeypatch.setattr(subprocess, "run", fontconfig)
    assert list(fonts.candidates("猫a猫")) == [("/fonts/a b.ttc", 2), ("/猫.otf", 0), *found]
    assert asked[0].endswith(":charset=61 732b")
    monkeypatch.setenv("XDG_DATA_DIRS", f":{tmp_path}/share")
    for error in (FileNotFoundError, subprocess.TimeoutExpired("fc-match", 1)):

        def fails(*_, error=error, **__):
            raise error

        monkeypatch.setattr(subprocess, "run", fails)
        assert list(fonts.candidates("猫")) == [*found, found[2]]


@pytest.mark.parametrize("has", [True, False])
def test_odd_names_can_be_drawn(system, dejavu, has):
    """Emoji, control characters, half characters and spaces of any kind do no harm."""
    system(*([dejavu] if has else []))
    shown, notes = fonts.drawable(ODD)
    assert shown[1:7] == [f"class {k}" for k in range(1, 7)]
    assert len(notes) == 1 and notes[0].isprintable()
    image = torch.zeros(3, 4, 4, dtype=torch.uint8)
    for names in (shown, ODD):  # captions that did not go through drawable() are drawn somehow
        assert draw_grid([image] * len(ODD), names).dtype == torch.uint8
    draw_confusion(torch.eye(len(ODD), dtype=torch.int64), ODD)


def test_other_fonts_keep_the_lines(system, dejavu):
    """A line of another font stands on the same base line, and is cut to the same width."""
    system(dejavu.replace("DejaVuSans", "STIXGeneral"))  # its letters begin deeper below its top
    image = torch.full((3, 8, 8), 255, dtype=torch.uint8)
    drawn = []
    for name in ("xx", "хх", "хх" * 100):  # Latin, and twice Cyrillic
        assert fonts.drawable([name]) == ([name], [])
        drawn.append((draw_grid([image], [f"{name}\n"]) < 200).any(0))
    last = [dark.any(1).nonzero().max().item() for dark in drawn]
    assert last[0] == last[1] == last[2]
    assert drawn[2].any(0).nonzero().max() < 8 + 112 and not torch.equal(drawn[0], drawn[1])


def test_pictures_have_the_letters(system, dejavu):
    """Other letters make another picture, and with no font a class has its number."""
    image, cells = torch.zeros(3, 8, 8, dtype=torch.uint8), torch.eye(2, dtype=torch.int64)
    system(dejavu)
    names = ["и", "д"], ["й", "д"]  # as wide as each other
    assert fonts.drawable(names[0] + names[1])[1] == []
    grids = [draw_grid([image] * 2, some) for some in names]
    matrices = [draw_confusion(cells, some) for some in names]
    assert not torch.equal(*grids) and not torch.equal(*matrices)
    system()
    assert torch.equal(draw_confusion(cells, names[0]), draw_confusion(cells, names[1]))
    assert torch.equal(
        draw_confusion(cells, names[0]), draw_confusion(cells, ["class 0", "class 1"])
    )


def test_commands_with_such_names(system, make_folder, tmp_path, capsys, monkeypatch):
    """What has no font is said once by each command that draws, and pictures have numbers; tables,
    CSV files and answers have every name.
    """
    system()
    drawn = []

    def record(images, captions, *others):
        drawn.append({line for caption in captions for line in caption.split("\n")})
        return draw_grid(images, captions, *others)

    for module in ("grid", "runs.summary", "analysis.report"):
        monkeypatch.setattr(f"lenslet.{module}.draw_grid", record)
    names = ["кошка", "猫"]
    pictures = make_folder(tmp_path / "pictures", {"train": 8, "test": 2}, tuple(names))
    run, sheet = tmp_path / "run", tmp_path / "sheet.png"
    words = "--model lenet --epochs 1 --workers 0 --batch-size 8 --device cpu --output".split()
    commands = [(train.main, ["--data", pictures, *words, run]), (measure.main, ["--weights", run])]
    commands += [(predict.main, [pictures / "test", "--weights", run, "--grid", sheet])]
    for main, words in commands:
        assert run_main(main, list(map(str, words))) == 0
        said = capsys.readouterr()
        lines = (said.err if main is predict.main else said.out).splitlines()
        assert sum(line.startswith("pictures have numbers for 2 of 2 ") for line in lines) == 1
        if main is measure.main:
            assert {"кошка", "猫"} <= {line.split()[0] for line in lines}
    assert {line.split(": ")[1].split()[0] for line in said.out.splitlines()} <= set(names)
    text = (run / "report" / "predictions.csv").read_bytes().decode("utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert list(rows[0])[4:] == names and [row["label"] for row in rows[::2]] == names
    assert sheet.is_file() and len(drawn) == 3
    assert all("class 0" in lines and "".join(lines).isascii() for lines in drawn)
