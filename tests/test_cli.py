"""Options mean the same from a file and from the command line, and mistakes end in one line."""

import argparse
import subprocess
import sys

import pytest
import test as test_script

from lenslet import cli, errors, files
from lenslet.cli import number, parse, steps_or_time
from lenslet.errors import OutsideError, UserError
from lenslet.training import options


@pytest.fixture
def config(tmp_path):
    """Writes a YAML file and parses it as train.py's --config, with words after it."""

    def read(text, *words, recipe=None):
        path = tmp_path / "a.yaml"
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return parse(options.build_parser(), ["--config", path, *words], recipe)

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
    assert config("").epochs == options.build_parser().get_default("epochs")


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
    assert args.lr == options.build_parser().get_default("lr")
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
        ("optimizer: sdg", ["--optimizer", "sdg"]),
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


def test_command_line_wins(config, tmp_path, monkeypatch):
    """The command line is over --config, --config over the recipe, a recipe over the defaults."""
    (tmp_path / "base.yaml").write_text("lr: 1\nepochs: 2\nseed: 3\nmean: [0, 0, 0]\n")
    monkeypatch.setattr(files, "RECIPES", tmp_path)
    args = config("lr: 4\nepochs: 5\nmean: 0.5", "--lr", "6", recipe="base")
    assert (args.lr, args.epochs, args.seed, args.mean) == (6, 5, 3, [0.5])
    assert args.batch_size == options.build_parser().get_default("batch_size")
    refuse(lambda: config("epochs: 1", "--lr", "x"), "--lr")


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
    args = parse(options.build_parser(), words)
    again = config(cli.as_yaml(cli.stored(args)))
    assert vars(again) == {**vars(args), "config": str(config.path)}


RECIPES = sorted(path.stem for path in files.RECIPES.glob("*.yaml"))


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes(recipe):
    """Every recipe is a whole set of valid options of train.py."""
    args = parse(options.build_parser(), ["--config", recipe])
    assert args.model
    assert parse(options.build_parser(), ["--config", f"{recipe}.yaml"]).lr == args.lr


def test_unknown_recipe():
    """A recipe that does not exist is answered with those that do, the nearest first."""
    call = lambda: parse(options.build_parser(), ["--config", "digit"])  # noqa: E731
    refuse(call, "--config digit", "did you mean digits?", *RECIPES)
    call = lambda: parse(options.build_parser(), ["--config", "some/where.yaml"])  # noqa: E731
    refuse(call, "some/where.yaml")


@pytest.mark.parametrize("script", [options, test_script])
def test_command_line_mistakes(script):
    """No option is guessed from its beginning; a misspelt one is answered with the nearest."""
    refuse(lambda: parse(script.build_parser(), ["--batch", "4"]), "--batch", "--batch-size")
    refuse(lambda: parse(script.build_parser(), ["--worker=4"]), "--worker ", "--workers")
    refuse(lambda: parse(script.build_parser(), ["--batch-size", "0"]), "--batch-size")
    refuse(lambda: parse(script.build_parser(), ["-b", "1.5"]), "'1.5' is not a whole number")
    refuse(lambda: parse(script.build_parser(), ["stray"]), "stray")


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
    assert steps_or_time(text) == text


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
    assert steps_or_time(text) == text
    with pytest.raises(argparse.ArgumentTypeError, match="no time like 90s, 5m or 2h"):
        cli.parse_duration(text)


@pytest.mark.parametrize("text", ["5", "90s", "1.5h"])
def test_save_every(config, text):
    """--save-every is read alike from the command line, a file and the options of a run."""
    args = parse(options.build_parser(), ["--save-every", text])
    assert args.save_every == config(f"save-every: {text}").save_every == text
    assert config(cli.as_yaml(cli.stored(args))).save_every == text
    for wrong in ("0", "-1s", "5 minutes", "", "nanm"):
        refuse(lambda wrong=wrong: config("", f"--save-every={wrong}"), "--save-every")


def test_stored():
    """What a run stores is what it is told by: not where that came from, nor what it resumes."""
    words = ["--config", "digits", "--resume", "runs/a"]
    stored = cli.stored(parse(options.build_parser(), words))
    assert "config" not in stored and "resume" not in stored
    assert stored == cli.stored(parse(options.build_parser(), ["--config", "digits"]))
    assert cli.stored(parse(options.build_parser(), ["--no-resume"])) == cli.stored(
        parse(options.build_parser(), [])
    )


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a: wrong; mend it"), 2, "error: a: wrong; mend it\n"),
        (OutsideError("no network"), 1, "error: no network\n"),
        (OSError(28, "No space left", "runs/a"), 1, "error: runs/a: No space left\n"),
        (OSError("no route"), 1, "error: no route\n"),
        (KeyboardInterrupt(), 130, ""),
    ],
)
def test_run(capsys, monkeypatch, error, status, line):
    """Known failures become one line on standard error and their status."""
    monkeypatch.delenv("RANK", raising=False)

    def main(argv):
        raise error

    assert errors.run_main(main) == status
    assert capsys.readouterr() == ("", line)


def test_run_returns(capsys):
    """A command's own status is passed on, none is 0; a bug of ours keeps its traceback."""
    assert [errors.run_main(lambda argv, status=s: status) for s in (None, 0, 1)] == [0, 0, 1]
    with pytest.raises(AssertionError):
        errors.run_main(lambda argv: (_ for _ in ()).throw(AssertionError()))
    assert capsys.readouterr() == ("", "")


def test_run_on_several_processes(capsys, monkeypatch):
    """A user's mistake is said once, by the first process; an outside failure by whoever met it."""

    def fail(error):
        def main(argv):
            raise error

        return errors.run_main(main)

    monkeypatch.setenv("RANK", "1")
    assert fail(UserError("mistake")) == 2
    assert fail(OutsideError("failure")) == 1
    assert capsys.readouterr().err == "error: failure\n"


def test_closed_pipe(tmp_path):
    """A reader that has seen enough ends a command without a word."""
    (tmp_path / "chatty.py").write_text(
        "import sys\nfrom lenslet import errors\n"
        "def main(argv):\n"
        "    for i in range(100_000):\n"
        "        print(i)\n"
        "sys.exit(errors.run_main(main))\n"
    )
    process = subprocess.Popen(
        [sys.executable, tmp_path / "chatty.py"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={"PYTHONPATH": str(files.ROOT)},
    )
    assert process.stdout.readline() == b"0\n"
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait() == 1


def test_command(monkeypatch):
    """A command that is shown can be pasted where it was shown, odd file names included."""
    monkeypatch.chdir(files.ROOT)
    words = cli.command("test.py", "--weights", files.ROOT / "runs" / "my run" / "m").split()
    assert words[1:] == ["scripts/test.py", "--weights", "'runs/my", "run/m'"]
    monkeypatch.chdir("/")
    assert str(files.ROOT / "scripts" / "test.py").lstrip("/") in cli.command("test.py")
