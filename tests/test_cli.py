"""Options mean the same from a file and from the command line, and mistakes end in one line."""

import argparse

import predict
import pytest
import test as test_script

from lenslet import cli, files
from lenslet.cli import number, steps_or_time
from lenslet.errors import UserError
from lenslet.training import options

PARSER = options.build_parser()  # that with the most options, and all kinds of them


@pytest.fixture
def config(tmp_path):
    """Reads a YAML file with PARSER: all options, with the words of a command line over it."""

    def read(text, *words):
        read.path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return cli.layered(PARSER, cli.read_config(PARSER, read.path), cli.explicit(PARSER, words))

    read.path = tmp_path / "a.yaml"
    return read


def refuse(call, *parts):
    with pytest.raises(UserError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_config_values(config):
    """Numbers, words, lists and lists of one are read as the command line would read them."""
    args = config("lr: 1e-3\nbatch-size: 32\nmodel: lenet\nmean: [0.1, 0.2, 0.3]\nstd: 0.5\n")
    assert (args.lr, args.batch_size, args.model) == (0.001, 32, "lenet")
    assert args.mean == [0.1, 0.2, 0.3]
    assert args.std == [0.5]
    assert config("").epochs == PARSER.get_default("epochs")


@pytest.mark.parametrize("yes", ["true", "yes", "True", "TRUE"])
@pytest.mark.parametrize("no", ["false", "no", "False", "FALSE"])
def test_config_booleans(config, yes, no):
    """A flag is switched by any of YAML's own words for yes and no."""
    args = config(f"skip-broken: {yes}\nnesterov: {no}\n")
    assert args.skip_broken is True
    assert args.nesterov is False


@pytest.mark.parametrize("null", ["", "null", "~"])
def test_config_null(config, null):
    """Null leaves an option at its default."""
    args = config(f"lr: {null}\nmodel: {null}\nskip-broken: {null}\n")
    assert args.lr == PARSER.get_default("lr")
    assert args.model is None
    assert args.skip_broken is False


def test_config_no_is_a_word(config):
    """`precision: no` means the choice of that name, not false."""
    assert config("precision: no").precision == "no"


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("batchsize: 4", ["--batchsize", "--batch-size"]),
        ("learning: ", ["--learning"]),
        ("lr: fast", ["--lr", "fast"]),
        ("epochs: 0", ["--epochs", "at least 1"]),
        ("augment: lihgt", ["--augment", "lihgt"]),
        ("config: digits", ["config", "another"]),
        ("skip-broken: maybe", ["--skip-broken", "maybe"]),
        ("skip-broken: [true]", []),
        ("skip-broken: {a: b}", ["skip-broken"]),
        ("lr: {a: 1}", ["lr"]),
        ("mean: [1, [2]]", ["mean"]),
        ("- lr\n- 3", ["option: value"]),
        ("only words", ["option: value"]),
        ("lr: [1\nmodel: 3", ["not a YAML file"]),
        (b"\x89PNG\r\n\x1a\n\x00\xff\xfe", ["not a YAML file"]),
        ("lr: -1", ["--lr", "above 0"]),
        ("lr: nan", ["--lr", "above 0"]),
    ],
)
def test_config_mistakes(config, text, parts):
    """A mistake in a file names the file and the option, a misspelt one with its neighbour."""
    refuse(lambda: config(text), str(config.path), *parts)


def test_renamed_options(config):
    """Files keep the names that options had when they were written; the command line does not."""
    for old, new in cli.RENAMED.items():
        assert getattr(config(f"{old}: a.csv"), new.replace("-", "_")) == "a.csv"
        refuse(lambda old=old: config("", f"--{old}", "a.csv"), f"--{old}")


def test_the_origin_of_a_mistake(config):
    """A file is named for a mistake in it, and not for a later one on the command line."""
    refuse(lambda: config("lr: x"), str(config.path))
    with pytest.raises(UserError) as caught:
        config("epochs: 1", "--lr", "x")
    assert "--lr" in str(caught.value) and str(config.path) not in str(caught.value)


def test_layers(config):
    """Each layer is over those before it, and all are over the defaults."""
    given = cli.explicit(PARSER, ["--lr", "6", "--no-resume"])
    assert given == {"lr": 6, "resume": False}
    layers = {"lr": 1, "epochs": 2, "seed": 3}, {"lr": 4, "epochs": 5, "mean": [0.5]}, given
    args = cli.layered(PARSER, *layers)
    assert (args.lr, args.epochs, args.seed, args.mean, args.resume) == (6, 5, 3, [0.5], False)
    assert args.batch_size == PARSER.get_default("batch_size")
    assert vars(cli.layered(PARSER)) == vars(PARSER.parse_args([]))


def test_a_default_that_is_given(config):
    """An option that is given as its default is given: it is over a file that says otherwise."""
    default = PARSER.get_default("lr")
    assert cli.explicit(PARSER, ["--lr", str(default)]) == {"lr": default}
    assert (
        config("lr: 7\nskip-broken: true", "--lr", str(default), "--no-skip-broken").lr == default
    )
    assert cli.explicit(PARSER, []) == {}


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["--mean", "0.1", "0.2", "0.3", "--std", "1", "--skip-broken", "--clip", "1e-7"],
        ["--data", "no", "--model", "Öl/ 日本: #1", "--precision", "no", "--workers", "0"],
        ["--output", "- a", "--lr", "1e-30", "--no-nesterov", "--weight-decay", "0"],
    ],
)
def test_saved_options(config, words):
    """The options that a run stores give the same options when they are read back."""
    args = cli.layered(PARSER, cli.explicit(PARSER, words))
    assert vars(config(cli.as_yaml(cli.stored(args)))) == vars(args)


RECIPES = sorted(path.stem for path in files.RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_find_config(recipe, tmp_path, monkeypatch):
    """A recipe is found by its name, with or without .yaml, unless there is a file of that name."""
    monkeypatch.chdir(tmp_path)
    there = files.RECIPES / f"{recipe}.yaml"
    assert cli.find_config(recipe) == cli.find_config(f"{recipe}.yaml") == there
    (tmp_path / recipe).write_text("lr: 3\n")
    assert cli.read_config(PARSER, recipe) == {"lr": 3}


def test_unknown_recipe():
    """A recipe that does not exist is answered with those that do, the nearest first."""
    refuse(lambda: cli.find_config("digit"), "--config digit", "did you mean digits?", *RECIPES)
    refuse(lambda: cli.find_config("some/where.yaml"), "some/where.yaml")
    refuse(lambda: cli.find_config("some/digits"), "some/digits")


@pytest.mark.parametrize("read", [cli.parse, cli.explicit])
@pytest.mark.parametrize("script", [options, test_script])
def test_command_line_mistakes(script, read):
    """No option is guessed from its beginning; a misspelt one is answered with the nearest."""
    parser = script.build_parser()
    refuse(lambda: read(parser, ["--batch", "4"]), "--batch ", "did you mean --batch-size")
    refuse(lambda: read(parser, ["--worker=4"]), "--worker ", "did you mean --workers")
    refuse(lambda: read(parser, ["--batch-size", "0"]), "--batch-size")
    refuse(lambda: read(parser, ["-b", "1.5"]), "'1.5' is not a whole number")
    refuse(lambda: read(parser, ["stray"]), "stray")


def test_number():
    """Bounds belong to the range unless `above` says otherwise; nan is in no range."""
    share, rate = number(float, 0, 0.9), number(float, 0, above=True)
    assert (share("0"), share("0.9"), rate("1e-9")) == (0, 0.9, 1e-9)
    for convert, text in ((share, "-0.1"), (share, "0.91"), (share, "nan"), (rate, "0")):
        with pytest.raises(Exception, match="must be"):
            convert(text)


TIMES = {"90s": 90, "5m": 300, "2h": 7200, "1.5h": 5400, "0.5s": 0.5, "1e2s": 100, "007m": 420}
NO_TIMES = "|0|-1|1.5|s|m|h|0s|0.0h|-1s|-5m|inf s|infs|nan s|nanh|5d|5M|5 minutes|m5|1h30m|5m."


@pytest.mark.parametrize(("text", "seconds"), TIMES.items())
def test_duration(text, seconds):
    """A time is a number above zero and s, m or h."""
    assert cli.parse_duration(text) == seconds
    assert steps_or_time(text) == seconds and isinstance(steps_or_time(text), float)


@pytest.mark.parametrize("text", NO_TIMES.split("|"))
def test_no_duration(text):
    """Anything else is no time, and no number of steps: refused, with what would be one."""
    for convert in (cli.parse_duration, steps_or_time):
        with pytest.raises(argparse.ArgumentTypeError) as caught:
            convert(text)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", ["1", "5", "500", "1000000"])
def test_interval(text):
    """A number of steps is a whole number from 1 on; alone, without a unit, it is no time."""
    assert steps_or_time(text) == int(text) and isinstance(steps_or_time(text), int)
    with pytest.raises(argparse.ArgumentTypeError, match="not a time like 90s, 5m or 2h"):
        cli.parse_duration(text)


@pytest.mark.parametrize(
    ("convert", "values", "wrong"),
    [
        (
            cli.fold,
            {"2/5": (2, 5), "1/2": (1, 2), "5/5": (5, 5)},
            "2 6/5 0/5 1/1 1/0 a/5 1.5/3",
        ),
        (cli.steps_or_percent, {"500": 500, "20%": 20, "0": 0, "100%": 100}, "20.5 -1 101% % x%"),
        (cli.alpha, {"0": 0, "0.2": 0.2, "1": 1, "100": 100}, "-1 1e-300 101 nan inf x"),
    ],
)
def test_other_types(convert, values, wrong):
    """What such an option takes is a value; all else is refused."""
    assert {text: convert(text) for text in values} == values
    for text in wrong.split():
        with pytest.raises(argparse.ArgumentTypeError):
            convert(text)
        with pytest.raises(argparse.ArgumentTypeError):
            cli.as_written(convert)(text)
    assert all(cli.as_written(convert)(text) == text for text in values)


def test_stored():
    """What a run stores is what it is told by: not where that came from, nor what it resumes."""
    words = ["--config", "digits", "--resume", "runs/a", "--lr", "3"]
    stored, plain = (
        cli.stored(cli.layered(PARSER, cli.explicit(PARSER, words)))
        for words in (words, ["--lr", "3"])
    )
    assert stored == plain and stored["lr"] == 3
    assert "config" not in stored and "resume" not in stored


def test_command(monkeypatch):
    """A command that is shown can be pasted where it was shown, odd file names included."""
    monkeypatch.chdir(files.ROOT)
    words = cli.command("test.py", "--weights", files.ROOT / "runs" / "my run" / "m").split()
    assert words[1:] == ["scripts/test.py", "--weights", "'runs/my", "run/m'"]
    monkeypatch.chdir("/")
    assert str(files.ROOT / "scripts" / "test.py").lstrip("/") in cli.command("test.py")


def test_an_empty_value_is_a_mistake():
    """--data '' of a shell variable that is not set does not mean the default."""
    for name in ("--data", "--resume", "--config", "--image-weights"):
        refuse(lambda name=name: options.parse([name, ""]), f"{name} is empty")
    for main, name in ((predict.main, "--weights"), (predict.main, "--grid")):
        refuse(lambda main=main, name=name: main(["a.png", name, ""]), f"{name} is empty")
    refuse(lambda: predict.main(["a.png", ""]), "images is empty")  # not the working directory
