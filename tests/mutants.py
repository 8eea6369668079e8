"""Changes the code in small ways, one at a time: does a test notice each?

    make mutants                                                       320 of all changes
    make mutants ARGS='--number 0 --jobs 1 lenslet/data/split.py'      every change of one module

A changed module, a mutant, is killed when a test of it fails or does not end.  Status 0: at least
90 % are killed, and SURVIVORS says of each other one why no test should notice it.  Comparisons,
arithmetic, and/or/not, conditions, numbers, True and False, slices, calls, keyword arguments, what
is returned, and statements are changed; strings, annotations, errors raised and asserts are not.

torch is imported once: every mutant is a fork, in which one module's import gives the changed code.
A test that starts other processes would not meet it there, so TESTS has none of those.
"""

import argparse
import ast
import contextlib
import hashlib
import importlib
import os
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator
from importlib.machinery import SourceFileLoader
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SECONDS = 120  # for the tests of a mutant: most take 5
SHARE = 0.9  # of the mutants, to be killed
# All that the tests import from elsewhere; what is ours is new in each fork.
LIBRARIES = """accelerate numpy PIL.Image pytest safetensors.torch sklearn.metrics timm torch
    torch.utils.tensorboard torchvision.transforms.v2"""
TESTS = {
    "lenslet/metrics.py": ["tests/test_metrics.py"],
    "lenslet/weights.py": [
        "tests/test_weights.py",
        "tests/test_damage.py",
        "tests/test_predict.py",
    ],
    "lenslet/data/augment.py": ["tests/data/test_augment.py"],
    "lenslet/data/batches.py": ["tests/data/test_batches.py"],
    "lenslet/data/split.py": ["tests/data/test_split.py"],
    "lenslet/runs/checkpoint.py": ["tests/runs/test_checkpoint.py"],
    "lenslet/training/losses.py": ["tests/training/test_losses.py"],
    "lenslet/training/schedules.py": ["tests/training/test_schedules.py"],
}
# {module: {"before → after", or what only the changed line has: why no test should notice}}
SURVIVORS = {
    "lenslet/metrics.py": {
        "gather(rows).double()": "only a GPU notices",
        "rows[:, 1] >= 0": "what pads the rows has -1 in every column",
        "pad_index=-2": "any number below 0 is no index",
        "guessed).clamp(min=2)": "a hit counts twice: a sum of 1 has none, and 0 / 2 is 0 too",
        "strict=False": "a guard: every column has a number for each class",
    },
    "lenslet/weights.py": {
        "type(n) is int or n >= 0": "what is wrong there fits no digest and no network either",
        '"minute": 61': "it is told as a second or as a minute",
        "size >= LARGEST": "no header is near it",
        "parse_json(head[8:])": "JSON is read from bytes, too",
        "tensor.itemsize > 2": "16 bits are checked as well in 32",
        "key=str)[:]": "the first of them is an error",
        "sha.update(tensor.cpu()": "a view as bytes has no gradient",
        "tensor.detach().clone(": "only a GPU notices",
        "tensor.detach().contiguous()": "only a GPU notices",
        "json.dumps(v) for": "JSON says the same in ASCII",
        "ensure_ascii=True": "JSON says the same in ASCII",
    },
    "lenslet/data/augment.py": {
        "zip(images, index.tolist())": "a guard: no caller has more images than indices",
        "zip(images, index.tolist(), strict=False)": "a guard: no caller has more images",
        "<= 0.5": "one draw in 16 million is 0.5",
        "len(index) >= 1": "an image that is mixed with itself stays as it is",
        "one <= 0": "ones are above 0",
        "one < 1": "ones are not below 1",
    },
    "lenslet/data/batches.py": {
        "batches.read(1, ": "the epoch is for random crops only",
        "→ key = (split.images)": "a tensor is a key by its identity, too",
        "count > 2": "whatever a batch holds, 2 images do not leave one",
        '.type == "cpu"': "only a GPU notices",
        "(part.to(device) for": "only a GPU notices",
        "self.split.labels.device)": "only a GPU notices",
        "non_blocking=False": "only a GPU notices",
        "for i, draw in zip(indices, draws)": "a guard: there is a draw for each",
        "strict=False": "a guard: there is a draw for each",
    },
    "lenslet/data/split.py": {
        "first <= ": "a whole number is never 25.6 or 51.2",
        "→ least = labels.bincount(minlength=1).min()": "a number as a tensor prints alike",
        ":= ((counts > 0).sum())": "a number as a tensor compares and prints alike",
        "limit > len(labels)": "so many images are all of them, in order, below too",
        "share.argsort()": "torch sorts stably on a CPU in any case, but promises it only if told",
        "stable=False": "torch sorts stably on a CPU in any case, but promises it only if told",
    },
    "lenslet/runs/checkpoint.py": {
        "path.name[:2]": "a checkpoint's number has six digits or more",
        "indent=2": "spaces between the entries of JSON",
        'return "" → return None': "None is no fault either",
    },
    "lenslet/training/losses.py": {
        "(len(counts) * counts)": "torch divides whole numbers to the same floats",
        "-2.0": "any number below 0 is refused",
    },
    "lenslet/training/schedules.py": {
        "for word in words[ :])": "a number in capitals that is given cannot be read either",
        "(SCHEDULES[name], words)]": "a guard: the words were counted",
        "strict=False": "a guard: the words were counted",
        "if progress <= rise else": "both sides are 1 there",
        "_half_cosine(1 + share)": "a cosine is the same on both sides of pi",
    },
}

OPERATORS = dict(
    zip(
        "< <= > >= == != + - * / // % ** & | ^ << >> and or min max any all".split(),
        "<= < >= > != == - + / * / // * | & | >> << or and max min all any".split(),
        strict=True,
    )
) | {"in": "not in", "not in": "in", "is": "is not", "is not": "is"}
# Of these the other operator, or none, is the negation of the condition already.
NEGATED = (ast.UnaryOp, ast.Eq, ast.NotEq, ast.In, ast.NotIn, ast.Is, ast.IsNot)
LEFT_ALONE = (ast.Raise, ast.Assert, ast.JoinedStr, ast.Import, ast.ImportFrom)


class Source:
    """A module's text, and the places of its syntax tree's nodes there, in bytes."""

    def __init__(self, text: str):
        self.bytes, self.tree, self.starts = text.encode(), ast.parse(text), [0]
        for line in self.bytes.splitlines(keepends=True):
            self.starts.append(self.starts[-1] + len(line))
        # What is imported is a module or a class: its functions are no methods of a value.
        imports = [n for n in ast.walk(self.tree) if isinstance(n, ast.Import | ast.ImportFrom)]
        self.imported = {(a.asname or a.name).split(".")[0] for n in imports for a in n.names}

    def begin(self, node: ast.AST) -> int:
        return self.starts[node.lineno - 1] + node.col_offset

    def end(self, node: ast.AST) -> int:
        return self.starts[node.end_lineno - 1] + node.end_col_offset

    def __getitem__(self, place) -> str:
        return self.bytes[place].decode()

    def text(self, node: ast.AST) -> str:
        return self[self.begin(node) : self.end(node)]

    def walk(self, node: ast.AST) -> Iterator[ast.AST]:
        """The nodes in a node that may be changed."""
        yield node
        for name, value in ast.iter_fields(node):
            if name not in ("annotation", "returns", "decorator_list"):
                for child in value if isinstance(value, list) else [value]:
                    if isinstance(child, ast.AST) and not isinstance(child, LEFT_ALONE):
                        yield from self.walk(child)

    def edits(self, node: ast.AST) -> Iterator[tuple[int, int, str]]:
        """(begin, end, new text) of each change of a node itself."""
        begin, end, text = self.begin, self.end, self.text
        pairs = []  # operands with an operator between them
        match node:
            case ast.BinOp(left=left, right=right):
                pairs = [(left, right)]
            case ast.Compare(left=left, comparators=others):  # 0 <= x < 1 has two
                pairs = zip([left, *others], others, strict=False)
            case ast.BoolOp(values=values):
                pairs = zip(values, values[1:], strict=False)
            case ast.UnaryOp():  # not, - and ~
                yield begin(node), end(node), text(node).removeprefix("not").lstrip("-~ ")
            case ast.Constant(value=bool() as value):
                yield begin(node), end(node), str(not value)
            case ast.Constant(value=int() | float() as value):
                yield begin(node), end(node), repr(value + 1)
            case ast.If(test=test) | ast.IfExp(test=test) | ast.comprehension(ifs=[test]):
                if not isinstance(getattr(test, "ops", [test])[0], NEGATED):
                    yield begin(test), end(test), f"not ({text(test)})"
            case ast.Slice(lower=lower, upper=upper, step=step):
                for part in filter(None, (lower, upper, step)):
                    yield begin(part), end(part), ""
            case ast.Return(value=ast.expr() as value) if text(value) != "None":
                yield begin(value), end(value), "None"
            case ast.Call(func=ast.Attribute(value, name)) if text(value) not in self.imported:
                until = end(node.func) - len(f".{name}")
                yield begin(node), end(node), self[begin(node) : until]  # x.clamp(0) → x
            case ast.Call(func=ast.Name(id=name) as function, args=[_, *more]):
                if name in OPERATORS:
                    yield begin(function), end(function), OPERATORS[name]
                if not more:
                    yield begin(node), end(node), self[end(function) : end(node)]  # round(x) → (x)
        for left, right in pairs:
            operator = self[end(left) : begin(right)].strip("() \n")
            changed = self[end(left) : begin(right)].replace(operator, OPERATORS[operator])
            yield end(left), begin(right), changed
        match node:
            case ast.Call(args=arguments, keywords=keywords):
                given = [*arguments, *keywords]
                for k in range(len(arguments), len(given)):
                    if k:
                        yield end(given[k - 1]), end(given[k]), ""
                    else:  # with the comma behind it
                        yield begin(given[0]), begin(given[1]) if given[1:] else end(given[0]), ""
            case ast.Expr(value=ast.Call()) | ast.AugAssign() | ast.Break() | ast.Continue():
                yield begin(node), end(node), "pass"
            case ast.Assign(targets=[ast.Attribute() | ast.Subscript()]):
                yield begin(node), end(node), "pass"

    def mutants(self) -> Iterator[tuple[int, str, str, str]]:
        """(line, what is there, what is there instead, the whole changed text) of each change."""
        for node in self.walk(self.tree):
            for begin, end, new in self.edits(node):
                text = self[:begin] + new + self[end:]
                try:
                    compile(text, "", "exec")
                except SyntaxError:
                    continue
                first, left = self[:begin].count("\n"), self[end:].count("\n")
                before, after = (
                    " ".join(line.strip() for line in lines[first : len(lines) - left])
                    for lines in (self[:].split("\n"), text.split("\n"))
                )
                yield first + 1, before, after, text


def fork(module: str, text: str, folder: Path) -> int:
    """Start the tests of a module in a group of processes, where the module's text is this one."""
    if process := os.fork():
        return process
    os.setpgid(0, 0)
    signal.alarm(SECONDS)  # ends the process, whatever it does
    output = os.open(folder.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    path, get_code = str(ROOT / module), SourceFileLoader.get_code

    def changed(loader, name):
        return compile(text, path, "exec") if loader.path == path else get_code(loader, name)

    SourceFileLoader.get_code = changed
    options = ["-x", "-p", "no:cacheprovider", "--basetemp", str(folder)]
    status = 1
    try:
        status = sys.modules["pytest"].main([*options, *TESTS[module]])
    finally:
        os._exit(status)


def kill(group: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(group, signal.SIGKILL)


def run(mutants: list[tuple], jobs: int) -> Iterator[tuple[tuple, int, str]]:
    """(mutant, exit status, output) of each, as they end.  A mutant: (module, …, its text)."""
    waiting, running, folder = list(enumerate(mutants)), {}, Path(tempfile.mkdtemp())
    try:
        while waiting or running:
            while waiting and len(running) < jobs:
                number, mutant = waiting.pop(0)
                running[fork(mutant[0], mutant[-1], folder / str(number))] = number, mutant
            process, status = os.wait()
            kill(process)  # what it has started, if that is still there
            number, mutant = running.pop(process)
            output = (folder / f"{number}.txt").read_text(errors="replace")
            shutil.rmtree(folder / str(number), ignore_errors=True)
            yield mutant, os.waitstatus_to_exitcode(status), output
    finally:
        for process in running:
            kill(process)
        shutil.rmtree(folder, ignore_errors=True)


def known(module: str, before: str, after: str) -> str | None:
    """The entry of SURVIVORS for a change."""
    for entry in SURVIVORS.get(module, {}):
        if f"{before} → {after}".endswith(entry) or (entry in after and entry not in before):
            return entry
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("modules", nargs="*", default=list(TESTS), metavar="module")
    parser.add_argument("--number", type=int, default=320, help="mutants; 0: all (default: 320)")
    parser.add_argument("--seed", type=int, default=0, help="which mutants (default: 0)")
    parser.add_argument("--jobs", type=int, default=2, help="at a time (default: 2)")
    args = parser.parse_args()
    if unknown := set(args.modules) - set(TESTS):
        parser.error(f"{min(unknown)} has no tests here: choose from {', '.join(TESTS)}")
    os.chdir(ROOT)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    for name in LIBRARIES.split():
        importlib.import_module(name)
    sources = {module: Source(Path(module).read_text(encoding="utf-8")) for module in args.modules}
    every = [(module, *mutant) for module in sources for mutant in sources[module].mutants()]
    # Drawn by what they are: an edit of the code changes few of those that are drawn.
    every.sort(key=lambda m: hashlib.sha256(repr((args.seed, m[0], *m[2:4])).encode()).digest())
    for (module, *_), status, output in run([(m, sources[m][:]) for m in sources], args.jobs):
        if status:
            print(output, f"{module}: its tests fail without a change", sep="\n")
            return 1
    began, drawn = time.monotonic(), every[: args.number or None]
    killed, slow, unlisted = 0, 0, 0
    for (module, line, before, after, _), status, _ in run(drawn, args.jobs):
        entry = known(module, before, after)
        killed += status != 0
        slow += status == -signal.SIGALRM
        unlisted += not status and not entry
        if not status or entry:
            said = SURVIVORS[module][entry] if entry else "no test fails"
            said = f"killed, but in SURVIVORS ({said})" if status else said
            print(f"{module}:{line}: {said}\n  - {before}\n  + {after}", flush=True)
    unused = {(module, entry) for module in sources for entry in SURVIVORS.get(module, {})}
    for module, entry in unused - {(m[0], known(m[0], *m[2:4])) for m in every}:
        print(f"{module}: in SURVIVORS, but no change: {entry}")
    print(
        f"{killed} of {len(drawn)} mutants killed ({killed / len(drawn):.1%}, {slow} by time), "
        f"{unlisted} of the others not in SURVIVORS; {(time.monotonic() - began) / 60:.0f} minutes"
    )
    return int(unlisted > 0 or killed < SHARE * len(drawn))


if __name__ == "__main__":
    sys.exit(main())
