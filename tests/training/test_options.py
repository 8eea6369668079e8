"""train.py's options: where their values come from, which names there are, what goes together."""

import sys

import pytest
import torch
from torch.nn import functional as F

from lenslet import cli, files
from lenslet.data import augment
from lenslet.errors import OutsideError, UserError
from lenslet.runs.folder import point_latest
from lenslet.training import checks, losses, optimizers, options

LENET = {"model": "lenet"}


def refuse(call, *parts):
    with pytest.raises(UserError) as caught:
        call()
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def complete(*words):
    """All options of a command line that names its network."""
    return options.complete(options.parse([*map(str, words), "--model", "lenet"]), "digits", None)


@pytest.fixture
def config(tmp_path):
    """The path of a file of options."""
    (tmp_path / "a.yaml").write_text("lr: 4\nepochs: 5\nmean: 0.5\nmodel: lenet\n")
    return tmp_path / "a.yaml"


@pytest.fixture
def run(tmp_path):
    """A run folder with options."""
    (tmp_path / "runs" / "a" / "checkpoint").mkdir(parents=True)
    args = options.complete(LENET | {"lr": 1.0, "epochs": 2, "seed": 3}, "digits", None)
    (tmp_path / "runs" / "a" / "options.yaml").write_text(cli.as_yaml(cli.stored(args)))
    return tmp_path / "runs" / "a"


def test_the_command_line_wins(config, run, tmp_path, monkeypatch):
    """The command line is over --config, that over the resumed run or the recipe, and those over
    the defaults.
    """
    given = options.parse(["--config", str(config), "--lr", "6", "--resume", str(run)])
    assert given == options.parse(["--resume", str(run)]) | {
        "lr": 6,
        "epochs": 5,
        "mean": [0.5],
        "config": str(config),
    }
    assert given["seed"] == 3
    monkeypatch.setattr(files, "RECIPES", tmp_path)
    (tmp_path / "base.yaml").write_text("lr: 1\nepochs: 2\nseed: 3\nmodel: tutorial_cnn\n")
    args = options.complete({"lr": 6.0, "mean": [0.5]}, "digits", "base")
    assert (args.lr, args.epochs, args.seed, args.mean) == (6, 2, 3, [0.5])
    assert (args.model, args.data) == ("tutorial_cnn", "digits")
    assert args.batch_size == options.build_parser().get_default("batch_size")


def test_only_what_is_given(config):
    """Nothing but what the words and the file say is given, and so nothing hides a recipe."""
    assert options.parse([]) == {}
    assert options.parse(["--no-resume", "--lr", "0.001"]) == {"resume": False, "lr": 0.001}
    keys = {"lr", "epochs", "mean", "model", "config"}
    assert options.parse(["--config", str(config)]).keys() == keys


def test_when_the_recipe_supplies_the_defaults(run):
    """It was made for its own network: another one, a file or a run leaves it out."""
    assert options.needs_recipe({}) and options.needs_recipe({"lr": 1, "resume": False})
    for words in (["--model", "lenet"], ["--config", "digits"], ["--resume", str(run)]):
        assert not options.needs_recipe(options.parse(words))


@pytest.mark.parametrize("recipe", sorted(path.stem for path in files.RECIPES.glob("*.yaml")))
def test_recipes(recipe):
    """Every recipe is a whole set of options that go together, as --config and as defaults."""
    given = options.parse(["--config", recipe])
    args = options.complete(given, "digits", None)
    assert args.model and given["model"] == args.model
    defaults = cli.stored(options.complete({}, "digits", recipe))
    assert defaults | {"decided": args.decided} == cli.stored(args)


def test_a_network_must_be_named(config):
    """A --config without one is refused with the remedy."""
    config.write_text("epochs: 3\n")
    given = options.parse(["--config", str(config)])
    refuse(lambda: options.complete(given, "digits", None), str(config), "--model")


@pytest.mark.parametrize(
    ("words", "parts"),
    [
        (["--optimizer", "sdg"], ["--optimizer: ", "'sdg'", "did you mean sgd"]),
        (["--optimizer", "adamww"], ["did you mean adamw"]),
        (["--optimizer", "lookahead_lookahead_adam"], ["--optimizer: "]),
        (["--loss", "bec"], ["--loss: ", "did you mean bce"]),
        (["--loss", "bce:2"], ["--loss: ", "'bce:2'"]),
        (["--loss", "focal:-1"], ["--loss: ", "at least 0"]),
        (["--class-weights", "0,0"], ["--class-weights: "]),
        (["--augment", "heavy"], ["--augment: "]),
        (["--save-every", "5 minutes"], ["--save-every: "]),
    ],
)
def test_unknown_names(words, parts):
    """A name that is not known is refused with the nearest that is."""
    refuse(lambda: complete(*words), *parts)


def test_unknown_networks():
    """A network that is not known is refused before anything is read, with the nearest."""
    for name, part in (("lennet", "did you mean lenet"), ("resnet81", "resnet")):
        refuse(lambda name=name: options.complete({"model": name}, "digits", None), "--model", part)


def test_names_are_those_of_the_rooms():
    """The names that are written here, so that parsing waits for no import, are those there are."""
    assert list(options.AUGMENTATIONS) == list(augment.AUGMENTATIONS)
    assert list(options.OPTIMIZERS) == list(optimizers.OPTIMIZERS)
    for name in options.OPTIMIZERS:
        optimizers.check_optimizer(name)
    logits, targets = torch.randn(5, 3), F.one_hot(torch.arange(5) % 3, 3).float()
    values = [losses.image_losses(name, logits, targets) for name in options.LOSSES]
    assert all(value.shape == (5,) and value.isfinite().all() for value in values)
    assert len({tuple(value.tolist()) for value in values}) == len(options.LOSSES)


def test_help_shows_every_option_but_two():
    """--plan is reproduce.py's own, --decided options.yaml's: --help has all others, explained."""
    parser = options.build_parser("what it is for")
    shown = parser.format_help()
    assert (
        "--plan" not in shown
        and "--decided" not in shown
        and options.parse(["--plan", "a"]) == {"plan": "a"}
    )
    assert shown.split("\n\n")[1] == "what it is for"
    for action in parser._actions:
        if action.dest not in ("plan", "decided"):
            assert all(name in shown for name in action.option_strings) and action.help


@pytest.mark.parametrize("text", ["5", "90s", "1.5h"])
def test_what_is_kept_as_it_was_written(config, text):
    """--save-every is read alike from the command line, a file and the options of a run."""
    args = complete("--save-every", text)
    config.write_text(f"save-every: {text}\n")
    assert args.save_every == options.parse(["--config", str(config)])["save_every"] == text
    config.write_text(cli.as_yaml(cli.stored(args)))
    assert options.parse(["--config", str(config)])["save_every"] == text
    for wrong in ("0", "-1s", "5 minutes", "", "nanm"):
        refuse(lambda wrong=wrong: options.parse([f"--save-every={wrong}"]), "--save-every")


def test_files_are_found_from_elsewhere(tmp_path, monkeypatch):
    """A file that is there is stored by its whole path; timm, addresses and others as they are."""
    (tmp_path / "a.csv").touch()
    (tmp_path / "b.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    words = ["--image-weights", "a.csv", "--teacher", "b.safetensors", "--pretrained"]
    args = complete(*words, "b.safetensors")
    assert args.image_weights == str(tmp_path / "a.csv")
    assert args.teacher == args.pretrained == str(tmp_path / "b.safetensors")
    (tmp_path / "timm").touch()
    for name in ("timm", "https://example.org/b.pth"):
        assert complete(*words, name).pretrained == name


def test_old_names_of_networks():
    """What is stored of a network that timm has renamed is its present name."""
    assert options.complete({"model": "xception"}, "digits", None).model == "legacy_xception"
    refuse(lambda: options.complete({"model": "xceptoin"}, "digits", None), "--model: ", "xception")


def test_find_run(tmp_path, monkeypatch):
    """A run is found by its folder, by anything in it and by runs/latest."""
    run = files.RUNS / "a"
    newest = run / "checkpoint" / "000001-step-1"
    newest.mkdir(parents=True)
    for path in (run / "options.yaml", newest / "state.json"):
        path.touch()
    point_latest(run)
    for path in (run, f"{run}/", newest, newest / "state.json", files.RUNS / "latest"):
        assert options.named_run(str(path)) == run
    monkeypatch.chdir(run / "checkpoint")
    assert options.named_run(".") == options.named_run("..") == run
    for path in (tmp_path, tmp_path / "runs" / "b", files.RUNS, "/", "/proc/none"):
        refuse(lambda path=path: options.named_run(str(path)), f"{path}: not in a run")


def test_differences(run):
    """What the weights depend on is told with both values; all else may differ."""
    args = options.complete(LENET | {"lr": 1.0, "epochs": 2, "seed": 3}, "digits", None)
    assert options.differences(run, args) == ""
    for name in options.FREE:
        setattr(args, name, "other")
    assert options.differences(run, args) == ""
    args.lr, args.batch_size = 0.5, 7
    changed = options.differences(run, args)
    assert changed == "--batch-size was 64, now 7, --lr was 1.0, now 0.5"
    file = run / "options.yaml"
    text = file.read_text()
    file.write_text(text.replace("lr: 1.0", "lr: 0.5").replace("batch-size: 64", "batch-size: 7"))
    assert options.differences(run, args) == ""
    file.write_text(text + "momentun: 0.5\n")
    assert options.differences(run, args) == "its options.yaml cannot be read"
    file.unlink()
    assert options.differences(run, args) == "its options.yaml cannot be read"


def test_runs_of_an_older_version_compare(run):
    """A run that has an option by its older name is as good as another; one that it lacks has its
    default.
    """
    args = options.complete(LENET | {"lr": 1.0, "epochs": 2, "seed": 3}, "digits", None)
    args.image_weights = "a.csv"
    file = run / "options.yaml"
    text = cli.as_yaml(cli.stored(args)).replace("image-weights", "picture-weights")
    file.write_text(text.replace("compile: false\n", ""))
    assert "compile" not in file.read_text()
    assert options.differences(run, args) == ""


def test_overfit_turns_regularization_off():
    """All that keeps a network from memorizing is off, whatever else says; the rest stays."""
    words = "--erase 0.5 --mixup 1 --cutmix 1 --dropout 0.5 --weight-decay 1 --l1 1 --ema 0.9"
    words += " --label-smoothing 0.1 --augment rand --schedule step:1 --warmup 5 --patience 1"
    words += " --metric f1 --keep last --min-delta 1 --epochs 3 --batch-size 32 --lr 0.5"
    args = vars(complete(*words.split(), "--overfit", "20"))
    plain = "--schedule constant --weight-decay 0 --patience 0 --lr 0.5"
    plain = vars(complete(*plain.split()))
    changed = {name: args[name] for name in args if args[name] != plain[name]}
    assert changed == {"overfit": 20, "epochs": checks.MEMORIZED_AFTER, "batch_size": 20}
    assert complete("--overfit", "20", "--epochs", "999").epochs == 999
    for other in (
        ["--fold", "1/2"],
        ["--time", "9s"],
        ["--limit", "9"],
        ["--plan", "a"],
        ["--teacher", "a"],
    ):
        refuse(lambda other=other: complete(*other, "--overfit", "9"), "--overfit", other[0])


def test_run_name():
    """A run is named by its data and network, and by what makes it another kind of run."""
    for words, name in (
        ([], "digits-lenet"),
        (["--fold", "2/5"], "digits-lenet-fold-2-of-5"),
        (["--overfit", "20"], "digits-lenet-overfit-20"),
    ):
        assert options.run_name(complete(*words)) == name
    given = {"model": "torchvision/resnet18"}
    args = options.complete(given, "/a/my pictures", None)
    assert options.run_name(args) == "my pictures-torchvision-resnet18"
    for path, name in (("/a/b/dataset", "b-dataset-lenet"), ("/dataset", "dataset-lenet")):
        assert options.run_name(options.complete(LENET, path, None)) == name


@pytest.mark.parametrize(
    ("option", "typed", "stored"),
    [
        ("optimizer", "Adam", "adam"),
        ("optimizer", "AdaBelief", "adabelief"),
        ("schedule", "SGDR-2-2", "restarts:2:2"),
        ("schedule", "Cosine", "cosine"),
        ("loss", "CE", "cross-entropy"),
        ("loss", "Focal:3", "focal:3"),
        ("model", "SE_ResNeXt50", "seresnext50_32x4d"),
    ],
)
def test_names_as_people_type_them(option, typed, stored):
    """Names of papers and of other spelling are understood, and stored as ours."""
    args = options.complete(LENET | options.parse([f"--{option}", typed]), "digits", None)
    assert getattr(args, option) == stored


def test_a_run_by_the_clock_has_no_epochs(run):
    """What the clock decides is not among the options that a run is made of."""
    args = options.complete(LENET | {"time": "60s", "epochs": 3}, "digits", None)
    assert "epochs" not in cli.stored(args)
    (run / "options.yaml").write_text(cli.as_yaml(cli.stored(args)))
    args.epochs = 7
    assert options.differences(run, args) == ""
    assert "epochs" in cli.stored(options.complete(LENET | {"epochs": 3}, "digits", None))


def test_training_on_windows(monkeypatch):
    """There it ends in a line that says what works."""
    monkeypatch.setattr(sys, "platform", "win32")
    with pytest.raises(OutsideError, match=r"needs Linux or macOS .*; predict\.py works here"):
        options.parse([])


def test_cautions():
    """Unequal classes and a warm-up that takes the whole run are worth a line; nothing else is."""

    def said(counts, *words):
        return checks.cautions(complete(*words), torch.tensor(counts), 100)

    assert said([10, 30], "--warmup", "99") == said([10, 31], "--class-weights", "balanced") == []
    (line,) = said([10, 31])
    assert "from 10 to 31 training images" in line and "--class-weights balanced" in line
    (line,) = said([10, 10], "--warmup", "100")
    assert "--warmup 100 is as long as the run of 100 steps" in line
    assert said([10, 10], "--warmup", "100", "--time", "60s") == []
