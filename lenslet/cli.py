"""The command line: a parser whose errors are one line, --config files, and shared options."""

import argparse
import os
import shlex
import sys
from pathlib import Path

from lenslet import files
from lenslet.errors import UserError, nearest


def command(script: str, *words) -> str:
    """A command of scripts/ as it can be pasted here, with the Python that is running."""
    python = os.path.relpath(sys.executable)
    parts = [
        sys.executable if python.startswith("..") else python,
        files.ROOT / "scripts" / script,
        *words,
    ]
    return shlex.join(files.shown(p) if isinstance(p, Path) else str(p) for p in parts)


BOOLEANS = {"true": True, "yes": True, "false": False, "no": False}
DEVICE = "cpu, cuda, cuda:1, mps, …; auto: the GPU if there is one, else the CPU"
LABELS = "classes of a folder's images: a CSV file with columns file, label[, split, weight, group]"
RENAMED = {"picture-weights": "image-weights"}  # what older files call an option


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which names the option nearest to a misspelt one."""

    origin = ""  # the file that the words being parsed come from

    def error(self, message):
        raise UserError(f"{self.origin}{message}")

    def parse_args(self, argv=None, namespace=None):
        try:
            values, unknown = self.parse_known_args(argv, namespace)
            if unknown:
                word = unknown[0].split("=")[0]
                hint = nearest(word, self._option_string_actions)
                self.error(f"unknown option {word}{hint}")
            for name, value in vars(values).items():
                if value == "" or (isinstance(value, list) and "" in value):  # an unset variable
                    option = f"--{name.replace('_', '-')}"
                    self.error(
                        f"{option if option in self._option_string_actions else name} is empty"
                    )
        except UserError as error:
            takes_files = any(not action.option_strings for action in self._actions)
            for word in argv if takes_files else ():
                if word.startswith("-") and os.path.lexists(word):
                    hint = f"{self.prog} -- {shlex.quote(word)}"
                    raise UserError(f"{error}; for the file of that name: {hint}") from None
            raise
        return values


class Formatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Docstrings as they are written, and the default behind each option that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None else super()._get_help_string(action)


def create_parser(description: str) -> Parser:
    """A command's parser; description is its module docstring."""
    return Parser(description=description, allow_abbrev=False, formatter_class=Formatter)


def parse(parser: Parser, argv: list[str] | None) -> argparse.Namespace:
    """The options of a command that has no --config; argv None: of the command line."""
    return parser.parse_args(_words(argv))


def explicit(parser: Parser, argv: list[str] | None) -> dict:
    """Only the options that argv gives, without any default: {name: value}."""
    unset = object()
    names = [action.dest for action in parser._actions if action.dest != "help"]
    empty = argparse.Namespace(**dict.fromkeys(names, unset))
    values = vars(parser.parse_args(_words(argv), empty))
    return {name: value for name, value in values.items() if value is not unset}


def read_config(parser: Parser, name: str | Path) -> dict:
    """Only the options that a file gives (or recipes/<name>.yaml): {name: value}.

    Errors: UserError naming the file and the option.
    """
    path = find_config(name)
    words = config_words(parser, path)
    parser.origin = f"{path}: "
    try:
        return explicit(parser, words)
    finally:
        parser.origin = ""


def layered(parser: Parser, *layers: dict) -> argparse.Namespace:
    """All options: the defaults, and each layer over those before it."""
    values = {a.dest: a.default for a in parser._actions if a.dest != "help"}
    for layer in layers:
        values |= layer
    return argparse.Namespace(**values)


def _words(argv: list | None) -> list[str]:
    return sys.argv[1:] if argv is None else [str(word) for word in argv]


def find_config(name: str | Path) -> Path:
    """A --config file, or the recipe of that name."""
    path = Path(name)
    if not path.is_file() and path.name == str(name):
        path = files.RECIPES / f"{path.name.removesuffix('.yaml')}.yaml"
    if not path.is_file():
        known = sorted(p.stem for p in files.RECIPES.glob("*.yaml"))
        raise UserError(
            f"--config {name}: no such file or recipe{nearest(str(name), known)}; "
            f"the recipes are {', '.join(known)}"
        )
    return path


def config_words(parser: Parser, path: Path) -> list[str]:
    """A YAML file's entries as command-line words, so that argparse checks keys and values."""
    import yaml

    try:
        # The base loader keeps every value as it was written: `no` stays a word, 1e-3 a number.
        entries = yaml.load(path.read_text(), yaml.BaseLoader) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a YAML file ({' '.join(str(error).split())})") from None
    if not isinstance(entries, dict):
        raise UserError(f"{path}: expected `option: value` lines")
    words = []
    for key, value in entries.items():
        if key == "config":
            raise UserError(f"{path}: config: a file cannot name another one")
        key = RENAMED.get(key, key)
        action = parser._option_string_actions.get(f"--{key}")
        if isinstance(action, argparse.BooleanOptionalAction) and str(value).lower() in BOOLEANS:
            words.append(f"--{key}" if BOOLEANS[value.lower()] else f"--no-{key}")
        elif isinstance(value, list) and all(isinstance(word, str) for word in value):
            words += [f"--{key}", *value]
        elif isinstance(value, dict | list):
            raise UserError(f"{path}: {key}: expected a value or a flat list")
        elif value not in ("", "~", "null") or action is None:
            words.append(f"--{key}={value}")
    return words


def stored(options: argparse.Namespace) -> dict:
    """The options that a run is made of: without those that say where to read them or which device
    to use, and without epochs where --time decides.
    """
    others = {"config", "resume", "device"} | ({"epochs"} if options.time else set())
    return {key: value for key, value in vars(options).items() if key not in others}


def as_yaml(values: dict) -> str:
    """A run's stored() options as a file that --config reads back."""
    import yaml

    entries = {key.replace("_", "-"): value for key, value in values.items()}
    return yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)


def number(kind, least, most=float("inf"), above=False):
    """An argparse type: an int or float in [least, most] (above: in (least, most])."""

    def convert(text):
        try:
            value = kind(text)
        except ValueError:
            name = "whole number" if kind is int else "number"
            raise argparse.ArgumentTypeError(f"{text!r} is not a {name}") from None
        in_bounds = (least < value if above else least <= value) and value <= most
        if not in_bounds or value == float("inf"):
            bounds = f"{'above' if above else 'at least'} {least}"
            bounds += f" and at most {most}" if most != float("inf") else ""
            raise argparse.ArgumentTypeError(f"must be {bounds}, not {text}")
        return value

    return convert


def parse_duration(text: str) -> float:
    """An argparse type: the seconds of '90s', '5m' or '2h'."""
    amount, unit = text[:-1], {"s": 1, "m": 60, "h": 3600}.get(text[-1:])
    if not unit:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time like 90s, 5m or 2h")
    return number(float, 0, above=True)(amount) * unit


def as_written(convert):
    """An argparse type that checks a value with convert() and keeps it as it was written."""

    def check(text):
        convert(text)
        return text

    return check


def steps_or_time(text: str) -> float:
    """An argparse type: a number of steps ('500'), or a duration in seconds ('90s')."""
    return number(int, 1)(text) if text.isdecimal() else parse_duration(text)


def steps_or_percent(text: str) -> float:
    """An argparse type: a number of steps ('500'), or a share of them all ('20%')."""
    return number(float, 0, 100)(text[:-1]) if text.endswith("%") else number(int, 0)(text)


def fold(text: str) -> tuple[int, int]:
    """An argparse type: '2/5' as (2, 5)."""
    part, slash, parts = text.partition("/")
    if not slash:
        raise argparse.ArgumentTypeError(f"{text!r} is not a fold like 2/5")
    count = number(int, 2)(parts)
    return number(int, 1, count)(part), count


def alpha(text: str) -> float:
    """An argparse type: 0, or a parameter that a Beta distribution can be drawn with."""
    value = number(float, 0, 100)(text)
    return value and number(float, 0.01)(text)


def class_weights(text: str) -> None:
    """An argparse type: 'balanced' or 'w1,w2,…'."""
    weights = [1] if text == "balanced" else [number(float, 0)(word) for word in text.split(",")]
    if not any(weights):
        raise argparse.ArgumentTypeError("no weight is above 0")


def add_weights_option(parser: Parser) -> None:
    """Which weights to use."""
    help = "a model.safetensors or a run folder (default: the newest run)"
    parser.add_argument("--weights", metavar="PATH", help=help)


def add_precision_option(add, auto: str = "bf16 where the processor or GPU has it") -> None:
    """In which precision a network computes; auto: in words, how that is chosen."""
    help = f"auto: {auto}; `accelerate launch`'s own choice wins"
    add("--precision", choices=["auto", "no", "fp16", "bf16"], default="auto", help=help)


def add_device_options(add) -> None:
    """Where trained weights compute, and in which precision."""
    add("--device", default="auto", help=DEVICE)
    add_precision_option(add, "as in training where the device has that natively, else no")


def add_running_options(parser: Parser, add_first=add_precision_option):
    """The options of every command that runs a network over a data set; adds more to them."""
    add = parser.add_argument_group("running").add_argument
    add_first(add)
    help = "processes that decode photographs (default: one per core, at most 8)"
    add("--workers", metavar="N", type=number(int, 0), help=help)
    help = "threads per process (default: its share of the cores); changes the last bits of results"
    add("--threads", metavar="N", type=number(int, 1), help=help)
    help = "leave out image files that cannot be read, instead of stopping with a list of them"
    flag = argparse.BooleanOptionalAction
    add("--skip-broken", action=flag, default=False, help=help)
    return add
