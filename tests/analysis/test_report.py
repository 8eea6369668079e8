"""The report tells each figure as it is, and the confusion matrix can be read."""

import csv
import io
import json

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lenslet.analysis.report import (
    LEGIBLE,
    SHOWN,
    draw_confusion,
    draw_predictions,
    figures_table,
    most_confused,
    predictions_csv,
    summary,
    write_report,
    write_samples,
)
from lenslet.data.batches import Data, Split
from lenslet.data.decode import read_image
from lenslet.data.load import load
from lenslet.metrics import figures


def share_of(colour, cells):
    """How much of a picture [3, H, W] is redder or bluer than it is anything else."""
    red, _, blue = cells.int()
    return ((red - blue if colour == "red" else blue - red) > 20).double().mean().item()


def matrix(count, row, column, images):
    counts = torch.zeros(count, count, dtype=torch.int64)
    counts[row, column] = images
    return counts


@pytest.mark.parametrize("count", [2, 10, LEGIBLE, LEGIBLE + 1, 100, 1000])
def test_confusion_of_any_number_of_classes(count):
    """The picture is square and neither tiny nor huge, and its counts come back as colours."""
    names = [f"class {i}" for i in range(count)]
    drawn = draw_confusion(torch.eye(count, dtype=torch.int64), names)
    assert drawn.dtype == torch.uint8 and drawn.shape[0] == 3 and drawn.shape[1] == drawn.shape[2]
    assert 120 < drawn.shape[1] < 1300
    assert share_of("blue", drawn) > 0 and share_of("red", drawn) == 0


@pytest.mark.parametrize("count", [4, 50])
def test_confusion_has_true_classes_in_rows(count):
    """A mistake is red, at the height of its true class and above it its predicted one."""
    row, column = count - 1, 0
    drawn = draw_confusion(matrix(count, row, column, 7), ["a"] * count)
    assert share_of("blue", drawn) == 0
    half = drawn.shape[1] // 2
    assert share_of("red", drawn[:, half:, :half]) > 0
    assert share_of("red", drawn[:, :half]) == share_of("red", drawn[:, half:, half:]) == 0


def test_confusion_shows_names_and_counts_where_they_fit():
    """Up to LEGIBLE classes have names and counts; more have neither, nor room for them."""

    def differs(count, **change):
        plain = {"counts": torch.eye(count, dtype=torch.int64), "names": ["a"] * count}
        first, second = (draw_confusion(*some.values()) for some in (plain, plain | change))
        return first.shape != second.shape or not torch.equal(first, second)

    for count, legible in ((LEGIBLE, True), (LEGIBLE + 1, False)):
        assert differs(count, names=["b"] * count) == legible
        assert differs(count, counts=2 * torch.eye(count, dtype=torch.int64)) == legible


def test_confusion_shade_is_the_share_of_the_true_class():
    """One mistake in a hundred shows, a class ten times as frequent does not outshine others."""
    counts = torch.tensor([[99, 1], [10, 990]])
    faint, frequent = (draw_confusion(times * counts, ["a"] * 2) for times in (1, 10))
    shades = [x[:, 50, -25].tolist() for x in (faint, frequent)]  # in the upper right cell
    assert shades[0] == shades[1] == [246, 231, 232]  # a tenth of the way from white to red
    assert faint[:, -25, 50].tolist() == shades[0]  # and in the lower left one


def test_confusion_without_images_of_a_class():
    """A class that has no test images leaves its row white."""
    assert share_of("red", draw_confusion(torch.zeros(3, 3, dtype=torch.int64), list("abc"))) == 0


def test_long_names_are_cut():
    """A name of any length leaves room for the cells."""
    counts = torch.eye(3, dtype=torch.int64)
    assert draw_confusion(counts, ["a" * 500] * 3).shape[1] < 400


ROWS = torch.tensor([[0, 0, 0, 1, 0.9, 0.1], [1, 1, 0, 1, 0.6, 1.5], [2, 1, 1, 1, 1.0, 0.0]])


def test_predictions_csv():
    """A row per image, whatever is in its name."""
    text = predictions_csv(ROWS, ["a,b.png", 'c"d.png', "é.png"], ["ants", "bees"])
    rows = list(csv.reader(io.StringIO(text)))
    assert rows[0] == ["file", "label", "prediction", "probability"]
    assert rows[2] == ['c"d.png', "bees", "ants", "0.600000"]
    assert len(rows) == 4


def test_predictions_csv_of_every_class():
    """Where the rows have the probability of each class, it has a column by the class's name."""
    more = torch.cat([ROWS, torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.0, 1.0]])], 1)
    rows = list(csv.DictReader(io.StringIO(predictions_csv(more, list("xyz"), ["ants", "bees"]))))
    assert list(rows[0])[3:] == ["probability", "ants", "bees"]
    assert (rows[1]["probability"], rows[1]["ants"]) == ("0.600000", "0.600000")
    assert [row["bees"] for row in rows] == ["0.100000", "0.400000", "1.000000"]


@pytest.fixture
def sheet(monkeypatch):
    """What draw_predictions() has drawn of 360 images of which some are mistakes: the places of the
    images in the split, their captions, which are red, and the heading.
    """
    drawn = []
    monkeypatch.setattr("lenslet.analysis.report.draw_grid", lambda *given: drawn.extend(given))

    def draw(mistakes):
        images = torch.arange(360)[:, None, None, None].expand(-1, 1, 2, 2)
        part = Split(images, torch.zeros(360, dtype=torch.int64), [""] * 360)
        data = Data("images", ["ants", "bees"], 1, (2, 2), 1.0, {"test": part}, "")
        rows = torch.zeros(360, 6)
        rows[:, 4] = 0.95
        for place, probability in mistakes.items():
            rows[place, 2], rows[place, 4] = 1, probability
        draw_predictions(data, "test", rows)
        images, captions, wrong, heading = drawn
        return images[:, 0, 0, 0].tolist(), captions, wrong, heading

    return draw


def test_mistakes_come_first(sheet):
    """The most confident mistakes are at the front, and right answers from the whole split follow;
    captions have the true class, the predicted one and its probability.
    """
    places, captions, wrong, heading = sheet({7: 0.6, 90: 0.875, 200: 0.7})
    assert places[:3] == [90, 200, 7] and wrong == [True] * 3 + [False] * (SHOWN - 3)
    assert places[3] == 0 and places[-1] == 359 and sorted(places[3:]) == places[3:]
    assert captions[0] == "ants\n-> bees\n87.50%" and captions[3] == "ants\n-> ants\n95.00%"
    assert heading == "test images: 3 of 360 are mistakes, the most confident first"


@pytest.mark.parametrize(
    ("count", "said"),
    [
        (0, "no mistakes in 360"),
        (1, "1 of 360 is a mistake"),
        (SHOWN, f"{SHOWN} of 360 are mistakes, the most confident first"),
        (50, "50 of 360 are mistakes, the most confident first"),
    ],
)
def test_any_number_of_mistakes(sheet, count, said):
    """There are SHOWN images on the sheet, and mistakes for as many as there are."""
    places, _, wrong, heading = sheet({i: 0.5 + i / 1000 for i in range(count)})
    assert len(set(places)) == SHOWN and sum(wrong) == min(count, SHOWN)
    assert heading == f"test images: {said}"
    assert not count or places[0] == count - 1


def test_most_confused():
    """The two most frequent mistakes, or as many as there are."""
    classes = ["ants", "bees", "wasps"]

    def said(*rows):
        return most_confused({"confusion": list(rows)}, classes)

    assert said([90, 0, 0], [0, 8, 0], [0, 0, 7]) == ""
    assert said([9, 0, 0], [0, 8, 1], [0, 0, 7]) == "most confused: bees taken for wasps (1 time)"
    found = said([9, 1, 0], [7, 8, 2], [4, 0, 7])
    assert found == "most confused: bees taken for ants (7 times), wasps taken for ants (4)"
    large = most_confused({"confusion": [[0, 2000], [1000, 0]]}, classes[:2])
    assert large.endswith("ants taken for bees (2,000 times), bees taken for ants (1,000)")


def test_table_and_summary():
    """The console has each class, the means and a line of what is true of all images."""
    result = figures(ROWS.double(), 2)
    said = figures_table(result, ["ants", "a long class name"]).splitlines()
    assert len({line.index("%") for line in said[1:]}) == 1  # aligned
    assert said[1].split() == ["ants", "1", "100.00%", "50.00%", "100.00%", "66.67%"]
    assert "66.67%" in said[3] and said[3].startswith("all")
    assert summary(result, "val") == "val accuracy 66.67%, loss 0.5333, 3 images"
    one = figures(ROWS[:1].double(), 6)
    assert summary(one, "val") == "val accuracy 100.00%, top-5 100.00%, loss 0.1000, 1 image"
    assert figures_table(one, list("abcdef")).endswith("(macro means of the 1 class with images)")


def test_figures_of_wide_names():
    """Columns stay aligned where a character is two columns wide, or none."""
    result = figures(ROWS.double(), 2)
    plain, wide = (
        [line[len(name) :] for name, line in zip(names, lines[1:3], strict=True)]
        for names in (["ants", "a long name"], ["猫猫", "한국어 cafe\u0301"])
        for lines in [figures_table(result, names).splitlines()]
    )
    assert plain == wide


@pytest.mark.parametrize("classes", [5, 6])
def test_top5_of_few_classes(classes):
    """With five classes or fewer the top-5 accuracy is always 1: the line is without, the figures
    are not.
    """
    result = figures(ROWS.double(), classes)
    assert result["top5"] == 1.0 and ("top-5" in summary(result, "test")) == (classes > 5)


def test_classes_without_images():
    """A class of which the split has no images is told apart from one that is never right, and
    counts in no mean.
    """
    # index, label, predicted, in_top5, probability, loss: of three classes, two have images
    rows = torch.tensor([[0, 0, 0, 1, 0.9, 0.1], [1, 2, 1, 1, 0.5, 1.0]], dtype=torch.float64)
    result = figures(rows, 3)
    said = figures_table(result, ["ants", "bees", "wasps"]).splitlines()
    assert said[2].split() == ["bees", "0", "–", "–", "–", "–"]
    assert said[3].split() == ["wasps", "1", "0.00%", "0.00%", "0.00%", "0.00%"]
    assert "50.00%" in said[4] and "of the 2 classes with images" in said[4]
    assert result["macro_recall"] == 0.5
    assert json.loads(json.dumps(result))["per_class"][1]["recall"] is None


@pytest.mark.parametrize("size", [(8, 8), (90, 70)])
def test_write_report(make_folder, tmp_path, size):
    """report/ and samples/ of small images and of photographs; old samples go."""
    folder = make_folder(tmp_path / "pictures", {"train": 2, "test": 7}, size=size)
    data = load(str(folder), ["test"])
    count = len(data.splits["test"])
    label = data.splits["test"].labels.double()
    index, ones = torch.arange(count).double(), torch.ones(count).double()
    rows = torch.stack([index, label, 0 * label, ones, 0.5 * ones, ones], 1)
    result = figures(rows, 2)
    (tmp_path / "report").mkdir()
    write_report(tmp_path / "report", {"weights": "w", "epoch": 3}, data, "test", rows, result)

    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert list(metrics) == ["weights", "epoch", "data", "split", "classes", *result]
    assert metrics["top1"] == 0.5 and metrics["confusion"] == [[7, 0], [7, 0]]
    assert len((tmp_path / "report" / "predictions.csv").read_text().splitlines()) == 15
    assert read_image(tmp_path / "report" / "predictions.png", 3).shape[2] == 3
    events = EventAccumulator(str(tmp_path / "report")).Reload()
    assert events.Scalars("test/top1")[0].step == 3
    assert events.Scalars("test/top1")[0].value == 0.5
    (shown,) = events.Images("test/confusion")
    (tmp_path / "shown.png").write_bytes(shown.encoded_image_string)
    expected = draw_confusion(torch.tensor(result["confusion"]), data.classes)
    drawn = torch.from_numpy(read_image(tmp_path / "shown.png", 3)).permute(2, 0, 1)
    assert torch.equal(drawn, expected)

    samples = tmp_path / "samples"
    samples.mkdir()
    (samples / "99-old.png").touch()
    written = write_samples(samples, data, "test")
    assert sorted(written) == sorted(samples.iterdir()) and len(written) == 10
    assert [p.name for p in written[::9]] == ["0-ants.png", "9-bees.png"]
    assert read_image(written[0], 3).shape == (*size, 3)  # in full size


def test_samples_of_odd_class_names(tmp_path):
    """A class name with a slash makes no folder."""
    split = Split(torch.zeros(1, 1, 4, 4, dtype=torch.uint8), torch.tensor([0]), ["0"])
    data = Data("fashion", ["T-shirt/top"], 1, (4, 4), 1.0, {"test": split}, "")
    (sample,) = write_samples(tmp_path, data, "test")
    assert sample == tmp_path / "0-T-shirt-top.png" and sample.is_file()
