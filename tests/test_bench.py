"""bench.py on tiny images, each command in this process; test_commands.py runs it as users do."""

import io
import json
from contextlib import redirect_stdout
from pathlib import Path

import bench
import bench_clock
import bench_others
import predict
import pytest
import test
import torch
import train
import yaml

from lenslet import files
from lenslet.errors import UserError, run_main

MAINS = {module.__name__: module.main for module in (train, test, predict)}


def run_here(*words):
    """What bench.run_python() does, without another process."""
    if words[0] != "-c":
        with redirect_stdout(io.StringIO()):
            assert run_main(MAINS[Path(words[0]).stem], list(map(str, words[1:]))) == 0


@pytest.fixture
def in_process(monkeypatch):
    """What would be processes of their own run here; fewer steps and images."""

    def run_apart(function, *given):
        with monkeypatch.context() as patch:
            patch.setattr(files, "RUNS", files.RUNS)  # train_aside() sets it, in its own process
            return function(*given)

    monkeypatch.setattr(bench, "run_python", run_here)
    monkeypatch.setattr(bench, "run_apart", run_apart)
    monkeypatch.setattr(bench_clock, "run_apart", run_apart)
    monkeypatch.setattr(bench, "MANY", 20)
    monkeypatch.setattr(bench, "STEPS", {"fastnet": (4, 2), "resnet18": (2, 1)})


def ratios(found, name=""):
    """Every ratio in what was found: (where, it)."""
    if isinstance(found, dict):
        if "ratio" in found:
            yield name, found
        for key, value in found.items():
            yield from ratios(value, f"{name}/{key}")


def test_every_part(in_process, make_folder, tmp_path, capsys):
    """`all` measures every part but `clock`, and prints the ratios that it stores, with rounds and
    spread.
    """
    small = make_folder(tmp_path / "small", {"train": 4, "test": 2}, size=(32, 32))
    photos = make_folder(tmp_path / "photos", {"train": 2}, size=(80, 90), suffix=".jpg")
    words = f"--data {small} --photos {photos} --epochs 1 --rounds 1 --workers 0 "
    bench.main([*words.split(), "--times", "0.1s", "0.2s", "--airbench-epochs", "1"])
    stored = json.loads((files.RUNS / "bench.json").read_text())
    parts = [part for part in bench.PARTS if part != "clock"]
    both = "tutorial_over_recipe"
    assert [*stored] == ["machine", "data", "command", *parts[:2], both, *parts[2:]]
    assert stored["machine"].keys() >= {"processor", "bf16", "cores", "versions", "commit", "date"}
    blocks = capsys.readouterr().out.replace("measuring: ", "measuring ").split("\n\n")
    texts = (block.partition(f"measuring {part}\n") for part in parts for block in blocks)
    printed = {k: v for *_, text in texts if text for k, v in yaml.safe_load(text).items()}
    found, shown = dict(ratios(stored)), dict(ratios(printed))
    expected = {"tutorial/times_faster", *(f"airbench94/{k}_over_airbench94" for k in WHOLE)}
    expected |= {"step/fastnet/step_over_bare", "step/resnet18/images_per_second_over_timm"}
    expected |= {"photos/times_faster", "predict/over_import_torch"}
    assert found.keys() >= {f"/{name}" for name in expected}
    for name, figures in found.items():
        if name != f"/{both}":
            assert figures["rounds"] == 1
            assert shown[name] == {k: float(f"{v:.4g}") for k, v in figures.items()}
        assert 0 < figures["min"] <= figures["ratio"] <= figures["max"]
    assert [*stored["accuracy"]] == ["0.1s", "0.2s"]
    ours = stored["accuracy"]["0.1s"][0]
    assert ours["train_seconds"] > 0 and ours["start_seconds"] > 0 and 0 <= ours["accuracy"] <= 1
    assert stored["photos"]["largest_mean_difference"] < 1  # grey level, from torchvision's pixels
    for side in ("airbench94", "ours"):
        assert all(run.keys() >= WHOLE for run in stored["airbench94"][side])


WHOLE = {"train_seconds", "accuracy", "tta_accuracy"}


def test_the_recipe_must_be_as_accurate():
    """The tutorial is compared with the quickest run that reaches its accuracy, seed by seed."""
    tutorial = [{"train_seconds": 100, "accuracy": 0.5}, {"train_seconds": 120, "accuracy": 0.6}]
    times = {"train_seconds": 5}, {"train_seconds": 10}, {"train_seconds": 20}
    reached = ((0.4, 0.7), (0.5, 0.5), (0.6, 0.7))
    spans = {
        str(i): [time | {"accuracy": a} for a in row]
        for i, (time, row) in enumerate(zip(times, reached, strict=True))
    }
    found = bench.tutorial_over_recipe(tutorial, spans)
    assert [run["train_seconds"] for run in found.pop("recipe")] == [10, 5]
    assert found == {"ratio": 17, "min": 10, "max": 24, "rounds": 2}
    spans = {"0": [run | {"accuracy": 0.1} for run in spans["0"]]}
    assert bench.tutorial_over_recipe(tutorial, spans) is None


@pytest.mark.parametrize(("mode", "size"), [("RGB", (32, 32)), ("L", (20, 20))])
def test_other_loops_learn(make_folder, tmp_path, monkeypatch, mode, size):
    """airbench94 tells two colours apart; grey images of another size will do for both loops."""
    data = make_folder(tmp_path, {"train": 12, "test": 4}, size=size, mode=mode)
    monkeypatch.setattr(bench_others, "BATCH", 8)
    found = bench_others.airbench94(str(data), epochs=4.5, seed=0)
    assert found["tta_accuracy"] >= 0.75 and found["train_seconds"] > 0
    assert len(bench_others.tutorial(str(data), epochs=2, seed=0)["curve"]) == 2


def test_airbench_schedule():
    """The rate rises from 0.2 of itself to all of it at 23 % of the steps, and ends near 0.07."""
    network = bench_others.Airbench94(2, torch.rand(4, 3, 32, 32))
    optimizer, rates = bench_others.Optimizer(network, 1024, 100), []
    for step in range(100):
        optimizer.step(step)
        rates.append([group["lr"] for group in optimizer.sgd.param_groups])
    base = 11.5 / 1024 / (1 + 1 / 0.15)
    assert rates[0] == pytest.approx([0.2 * base, 64 * 0.2 * base])
    assert rates[23] == pytest.approx([base, 64 * base])
    assert base * 0.07 < rates[99][0] < base * 0.09
    weights, biases = (group["params"] for group in optimizer.sgd.param_groups)
    assert (len(weights), len(biases)) == (1 + 6 + 1, 6)  # the whitening bias, 3 × 2, the head


def test_shifts_and_views():
    """Images move by up to two pixels with the border reflected, mirrored where that is said."""
    images = torch.arange(1024.0).view(1, 1, 32, 32).repeat(200, 1, 1, 1)
    mirrored = torch.arange(200) % 2 == 0
    seen = set()
    for image, flipped in zip(bench_others.moved(images, mirrored), mirrored, strict=True):
        image = image.flip(2) if flipped else image
        down, across = divmod(int(image[0, 16, 16]), 32)
        seen.add((down - 16, across - 16))
        inner = images[0, 0, down - 14 : down + 14, across - 14 : across + 14]
        assert torch.equal(image[0, 2:30, 2:30], inner)
    assert seen == {(y, x) for y in range(-2, 3) for x in range(-2, 3)}
    views = bench_others.six_views(images[:1])
    assert [weight for weight, _ in views] == [0.25, 0.25, 0.125, 0.125, 0.125, 0.125]
    assert [int(view[0, 0, 16, 16]) for _, view in views[::2]] == [528, 528 + 33, 528 - 33]


def test_clock_goes_on(in_process, make_folder, tmp_path, monkeypatch, capsys):
    """Trainings that are stored are not repeated; another machine's are not mixed with these."""
    monkeypatch.setattr(files, "RESULTS", tmp_path)
    small = make_folder(tmp_path / "small", {"train": 24, "test": 2}, size=(32, 32))
    words = ["clock", "--data", small, "--widths", "8", "16", "--times", "0.1s", "--seeds", "0"]
    work, left = bench_clock.run_apart, [1]

    def interrupted(*given):
        if not left.pop():
            raise KeyboardInterrupt
        left.append(0)
        return work(*given)

    monkeypatch.setattr(bench_clock, "run_apart", interrupted)
    with pytest.raises(KeyboardInterrupt):
        bench.main(words)
    (first,) = json.loads((tmp_path / "clock.json").read_text())["runs"]
    left[:] = [1]
    bench.main(words)
    stored = json.loads((tmp_path / "clock.json").read_text())
    assert stored["runs"][0] == first and stored.keys() >= {"machine", "data", "command"}
    assert [run["width"] for run in stored["runs"]] == [8, 16]
    assert first["images"] == pytest.approx(first["epochs"] * 46, 0.1)  # 2 validate
    assert {"seed", "time", "val_accuracy", "images_per_second", "date", "commit"} <= first.keys()
    bench.main(words)  # nothing is left to do
    assert "best: " in capsys.readouterr().out
    stored["machine"]["processor"] = "another"
    for text in (json.dumps(stored), "{"):
        (tmp_path / "clock.json").write_text(text)
        with pytest.raises(UserError, match=r"clock\.json: move it away"):
            bench.main(words)


def test_clock_table():
    """Times in order; of each width the median over seeds, and the width that is best then."""
    rows = [("2m", 32, 0.9), ("2m", 16, 0.8), ("30s", 16, 0.7), ("30s", 16, 0.5), ("30s", 32, 0.5)]
    keys, seen = ("time", "width", "val_accuracy"), {"images": 100, "epochs": 0.5}
    found = bench_clock.table([dict(zip(keys, row, strict=True)) | seen for row in rows])
    assert [*found] == ["30s", "2m"] and [*found["2m"]] == [16, 32, "best"]
    assert found["30s"]["best"] == 16 and found["2m"]["best"] == 32
    spread = {"val_accuracy": pytest.approx(0.6), "min": 0.5, "max": 0.7, "seeds": 2}
    assert found["30s"][16] == seen | spread


def test_mistakes_come_before_the_work(make_folder, tmp_path, capsys):
    """A folder of photographs that is not there, or data that a part cannot use, is one line."""
    for folder in ("nosuch", make_folder(tmp_path / "flat", {"": 2})):
        with pytest.raises(UserError, match="--photos"):
            bench.main(["tutorial", "--photos", str(folder)])
    assert "measuring" not in capsys.readouterr().out
    large = make_folder(tmp_path / "large", {"train": 2, "test": 2}, size=(80, 90))
    with pytest.raises(UserError, match=r"--data .*large: needs train images of up to 64 pixels"):
        bench_others.read_images(str(large))
    with pytest.raises(UserError, match="ended with status 3"):
        bench.run_python("-c", "import sys; sys.exit(3)")
