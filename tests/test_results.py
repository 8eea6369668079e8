"""The README's tables and its plot are what results/ says, and a row that is stale is found out."""

import json
import re
import shlex

import pytest
from accelerate.state import AcceleratorState

import results
from lenslet import files
from lenslet.distributed import determinism
from lenslet.errors import run_main
from lenslet.training import build, options

TEXT = (files.RESULTS / "results.json").read_text()
STORED = json.loads(TEXT)
TABLES = STORED["results"] + STORED["comparisons"] + STORED["toolbox"]
RUN = {"seed": 0, "date": "2026-11-21", "commit": "a", "accuracy": 0.5, "seconds": 1.0}
DIGITS = {
    "title": "a",
    "recipe": "digits",
    "command": "make train DATA=digits RECIPE=digits ARGS='--lr 0.1'",
    "machine": "b",
    "runs": [RUN],
    "stamp": None,
}


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """results/ and the README where a test can change them."""
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    (tmp_path / "results.json").write_text(TEXT)
    (tmp_path / "README.md").write_text("\n".join(results.table_rows(STORED)))
    return tmp_path


@pytest.fixture
def one_row(copy):
    """results/ with a row of the digits, and nothing else; reads the row."""
    empty = {"curves": [], "comparisons": [], "toolbox": []}
    stored = {"machines": {"b": {}}, "results": [dict(DIGITS)], **empty}
    (copy / "results.json").write_text(results.encode(stored))
    return lambda: json.loads((copy / "results.json").read_text())["results"][0]


def test_the_readme_tells_the_stored_results():
    """Every figure of the README's tables is computed from results/results.json."""
    readme = (files.ROOT / "README.md").read_text()
    for row in results.table_rows(STORED):
        assert row in readme, row


def test_the_plot_is_of_the_stored_results():
    """The README's plot was drawn from the results as they are; else run `make results`."""
    plot = (files.RESULTS / "accuracy.svg").read_text()
    assert results.fingerprint(results.curves(STORED)) in plot


def test_what_is_stored_of_each_figure():
    """Each row has its machine, its versions and its command, and each run its date, its commit
    and, of a training, its seed, where null says that it was not recorded.
    """
    for row in TABLES + STORED["curves"]:
        machine = STORED["machines"][row["machine"]]
        assert machine.keys() >= {"processor", "bf16", "cores", "gpu"}
        assert row.keys() >= {"command", "versions", "runs"} and row["runs"]
        for run in row["runs"]:
            assert run.keys() >= {"date", "commit"} and ("seed" in run or "rounds" in run)
            assert run["date"] is None or re.fullmatch(r"\d{4}-\d\d-\d\d", run["date"])
    assert len({row["title"] for row in STORED["results"]}) == len(STORED["results"])


def test_commands_of_the_results():
    """Each result was reached by a recipe that is there, and its command gives train.py options."""
    for row in STORED["results"]:
        assert (files.RECIPES / f"{row['recipe']}.yaml").is_file() and "stamp" in row
        words = results.words_of(row)
        assert words[0] == "--data" and options.parse(words)["data"] in row["command"]
    words = results.words_of(DIGITS | {"width": 16})
    assert shlex.join(words) == "--data digits --config digits --width 16 --lr 0.1"


def test_per_cent():
    """One or two runs are told as they are; of more, the mean and Student's 95 % interval."""
    assert results.per_cent([0.8862]) == "88.6"
    assert results.per_cent([0.816, 0.822]) == "81.6, 82.2"
    assert results.per_cent([0.5, 0.6, 0.7]) == "60.0 ± 24.8"  # 4.303 · 10 / √3
    assert results.per_cent([]) == ""


def test_rows_of_a_result():
    """A row has its figures, the number of runs, and the machine; what is null is left out."""
    runs = [RUN, RUN | {"accuracy": 0.7, "seconds": 2.9, "tta_accuracy": 0.61}]
    row = DIGITS | {"command": "make", "runs": runs}
    unknown = row | {"runs": [RUN | {"seconds": None, "tta_accuracy": None}]}
    compared = {"title": "c", "command": "d", "machine": "b", "runs": [{"ratio": 1.5}]}
    gains = [{"without": 0.1, "with": 0.2}]
    stored = {"results": [row, unknown], "comparisons": [compared]}
    stored["toolbox"] = [{"title": "e", "machine": "b", "runs": gains}]
    assert results.table_rows(stored) == [
        "| a | 50.0, 70.0 (2 runs) | 61.0 | 2 s | b | `make` |",
        "| a | 50.0 (single run) |  |  | b | `make` |",
        "| c | 1.50 | b | `d` |",
        "| e | 10.0 | 20.0 | b |",
    ]


def test_results_draws_and_compares(copy, capsys):
    """The plot is drawn anew, the rows are printed, and the status is 0 where all agree."""
    (copy / "accuracy.svg").write_text("<svg>an older one</svg>")
    assert run_main(results.main, []) == 0
    assert results.fingerprint(results.curves(STORED)) in (copy / "accuracy.svg").read_text()
    said = capsys.readouterr().out
    assert all(row in said for row in results.table_rows(STORED))


def test_results_finds_a_row_that_is_out_of_date(copy, capsys):
    """A row of the README with another figure is named, with status 1, and stays as it is."""
    readme = copy / "README.md"
    right = readme.read_text()
    wrong = re.sub(r"(?<=\| CIFAR-10, one minute \| )\S+", "99.9", right)
    assert wrong != right
    readme.write_text(wrong)
    assert run_main(results.main, []) == 1
    assert "lacks this row: | CIFAR-10, one minute | " in capsys.readouterr().out
    assert readme.read_text() == wrong


def test_encode():
    """results.json is stored as it is read, with a line for each run."""
    assert results.encode(STORED) == TEXT
    assert json.loads(results.encode({"a": ["x  [y]", {"b": "{\n"}]})) == {
        "a": ["x  [y]", {"b": "{\n"}]
    }


def run_here(work, words):
    """A process of its own is three seconds slower, and does not see the folders of a test."""
    AcceleratorState._reset_state(True)
    return work(words)


def test_stamp_and_check(one_row, monkeypatch, capsys):
    """A stamped row is up to date while 20 steps of its settings give the same weights; where other
    code gives others it is stale, with status 1.
    """
    monkeypatch.setattr(results, "run_apart", run_here)
    runs = files.RUNS
    assert run_main(results.main, ["--check"]) == 0
    assert (
        "a: not checked: it has no stamp\nstale: 0, up to date: 0, of 1" in capsys.readouterr().out
    )
    assert run_main(results.main, ["--stamp", "a"]) == 0
    stamp = one_row()["stamp"]
    assert stamp["steps"] == 20 and len(stamp["sha256"]) == 64
    assert run_main(results.main, ["--check"]) == 0
    assert "a: up to date\nstale: 0, up to date: 1, of 1" in capsys.readouterr().out
    real = build.create_objective

    def other(args, inputs):
        args.label_smoothing = 0.1
        return real(args, inputs)

    monkeypatch.setattr(build, "create_objective", other)
    assert run_main(results.main, ["--check"]) == 1
    said = capsys.readouterr().out
    assert "a: stale: its first steps give other weights\nstale: 1, up to date: 0, of 1" in said
    assert one_row()["stamp"] == stamp and not (runs / "latest").is_symlink()


def test_what_cannot_be_checked(monkeypatch):
    """A row is not compared on another processor, with another torch or other images, nor where
    its images would have to be fetched.
    """
    here = determinism.environment("auto")
    stamp = {"device": here["device"], "torch": here["versions"]["torch"], "data_sha256": "a"}
    elsewhere = stamp | {"device": "an abacus"}
    said = results.compare(DIGITS | {"stamp": elsewhere})
    assert said == f"cannot be compared here: measured on an abacus, torch {stamp['torch']}"
    assert results.compare(DIGITS | {"stamp": stamp | {"torch": "1"}}).startswith("cannot be")
    monkeypatch.setattr(results, "stamp", lambda row: stamp | {"data_sha256": "b"})
    assert "with other images" in results.compare(DIGITS | {"stamp": stamp})
    for data in ("mnist", "pictures/none"):
        row = DIGITS | {"stamp": stamp, "command": f"make train DATA={data}"}
        assert results.compare(row) == "not checked: its images are not at hand"


def test_stamp_mistakes(one_row, capsys):
    """A title that there is not is one line, and nothing is written."""
    assert run_main(results.main, ["--stamp", "b"]) == 2
    assert "--stamp b: no such row" in capsys.readouterr().err
    assert one_row() == DIGITS
