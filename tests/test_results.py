"""The README's tables and its plot are what results/ says."""

import json

import pytest

import results
from lenslet import files
from lenslet.errors import run_main

STORED = (files.RESULTS / "results.json").read_bytes()


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """results/ and the README where a test can change them."""
    monkeypatch.setattr(files, "ROOT", tmp_path)
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    (tmp_path / "results.json").write_bytes(STORED)
    (tmp_path / "README.md").write_text("\n".join(results.table_rows(json.loads(STORED))))
    return tmp_path


def test_the_readme_tells_the_stored_results():
    """Every figure of the README's tables is computed from results/results.json."""
    readme = (files.ROOT / "README.md").read_text()
    for row in results.table_rows(json.loads(STORED)):
        assert row in readme, row


def test_recipes_of_the_results_exist():
    """Each result was reached by a recipe that is there."""
    for result in json.loads(STORED)["results"]:
        assert (files.RECIPES / f"{result['recipe']}.yaml").is_file()


def test_the_plot_is_of_the_stored_results():
    """The README's plot was drawn from the results as they are; else run `make results`."""
    assert results.is_drawn_from((files.RESULTS / "accuracy.svg").read_text(), STORED)


def test_per_cent():
    """One run has no deviation; several have that of a sample."""
    assert results.per_cent([0.8862]) == "88.6"
    assert results.per_cent([0.5, 0.6, 0.7]) == "60.0 ± 10.0"


def test_rows_of_a_result():
    """A row has the mean over runs, their number, the figure with --tta where there is one."""
    run = {"title": "a", "command": "make", "accuracy": [0.5, 0.7], "train_seconds": [1.0, 2.9]}
    stored = {"results": [run, run | {"tta_accuracy": [0.61]}]}
    stored["comparisons"] = [{"title": "b", "times": 1.5, "command": "c"}]
    stored["toolbox"] = [{"title": "d", "without": [0.1], "with": [0.2]}]
    assert results.table_rows(stored) == [
        "| a | 60.0 ± 14.1 (2) |  | 2 s | `make` |",
        "| a | 60.0 ± 14.1 (2) | 61.0 | 2 s | `make` |",
        "| b | 1.50 | `c` |",
        "| d | 10.0 | 20.0 |",
    ]


def test_results_draws_and_checks(copy, capsys):
    """The plot is drawn anew, the rows are printed, and the status is 0 where all agree."""
    (copy / "accuracy.svg").write_text("<svg>an older one</svg>")
    assert run_main(results.main, ["--check"]) == 1
    assert "accuracy.svg is of other results" in capsys.readouterr().out
    assert run_main(results.main, []) == 0
    assert results.is_drawn_from((copy / "accuracy.svg").read_text(), STORED)
    said = capsys.readouterr().out
    assert all(row in said for row in results.table_rows(json.loads(STORED)))
    assert run_main(results.main, ["--check"]) == 0


def test_results_finds_a_row_that_is_out_of_date(copy, capsys):
    """A row of the README with another figure is named, with status 1, and nothing is written."""
    readme = copy / "README.md"
    readme.write_text(readme.read_text().replace("84.8 ± 0.4", "94.8 ± 0.4"))
    assert run_main(results.main, []) == 1
    assert "lacks this row: | CIFAR-10, one minute | 84.8 ± 0.4 (3)" in capsys.readouterr().out
    assert "94.8 ± 0.4" in readme.read_text()
