"""The house keeps its shape: imports go down only, and nothing outgrows what a reader can hold."""

import ast
import re
import subprocess
import sys

import pytest

from lenslet import files

# A module may import from the levels below it, and from its own folder.
LEVELS = [
    ["lenslet.fonts"],
    ["lenslet.files", "lenslet.grid", "lenslet.errors"],
    ["lenslet.header"],
    ["lenslet.weights", "lenslet.stems", "lenslet.libraries", "lenslet.cli"],
    ["lenslet.distributed"],
    ["lenslet.data"],
    ["model", "lenslet.metrics"],
    ["lenslet.training"],
    ["lenslet.runs", "lenslet.analysis"],
]
KNOWS_ARGS = {f"training/{name}.py" for name in ("options", "checks", "decide", "build")}
KNOWS_ARGS |= {"runs/run.py"}  # and scripts/
NAMES_OPTIONS = KNOWS_ARGS | {"cli.py", "runs/summary.py", "runs/launch.py"}
NAMES_OPTIONS |= {"distributed/launchers.py"}  # it says which of ours replaces a launcher's
BRANCHES = (ast.If, ast.For, ast.While, ast.ExceptHandler, ast.IfExp, ast.Assert, ast.comprehension)
CODE_LINES = 6865  # what there is: who adds something looks first for what can go


def sources():
    """{path below the repository: text} of the code, without the tests."""
    names = [
        f
        for f in files.ROOT.rglob("*.py")
        if not f.relative_to(files.ROOT).parts[0].startswith(".")
    ]
    places = {f.relative_to(files.ROOT).as_posix(): f for f in names}
    kept = ("lenslet/", "scripts/", "model.py")
    return {name: f.read_text() for name, f in places.items() if name.startswith(kept)}


SOURCES = sources()
TREES = {name: ast.parse(text) for name, text in SOURCES.items()}


def module(name):
    return name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def level(name):
    """(level, room) of a project module; None for one from elsewhere."""
    for number, rooms in enumerate(LEVELS):
        for room in rooms:
            if name == room or name.startswith(room + "."):
                return number, room
    return None


def imported(tree):
    """The names of the modules that a file imports, also inside its functions."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", [n for n in SOURCES if not n.startswith("scripts/")])
def test_imports_go_down(name):
    """No module imports from a level above its own, nor from another room of its level."""
    own = level(module(name))
    if own:  # lenslet/__init__.py is empty
        for other in filter(None, map(level, imported(TREES[name]))):
            assert other[0] < own[0] or other == own, f"{name} imports from {other[1]}"


@pytest.mark.parametrize("name", [n for n in SOURCES if n.startswith("scripts/")])
def test_commands_begin_with_root(name):
    """_root is imported before torch, which reads what it sets, and before anything of ours."""
    first = [module.split(".")[0] for module in imported(ast.Module(TREES[name].body, []))]
    ours = {"torch", "numpy", "lenslet", "model", "train"}
    if name != "scripts/_root.py":
        assert not ours & set(first[: first.index("_root")])


def test_waiting_threads(monkeypatch):
    """Threads wait without spinning for long, unless the user has said how."""
    code = "import sys; sys.path.insert(0, 'scripts'); import _root, os; "
    code += "assert 'torch' not in sys.modules; print(os.environ.get('GOMP_SPINCOUNT'))"
    monkeypatch.chdir(files.ROOT)
    for name, value, said in (
        ("A", "B", "5000"),
        ("GOMP_SPINCOUNT", "7", "7"),
        ("OMP_WAIT_POLICY", "ACTIVE", "None"),
    ):
        with monkeypatch.context() as patch:
            for known in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
                patch.delenv(known, raising=False)
            patch.setenv(name, value)
            run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert run.stdout.strip() == said, run.stderr


def functions(tree):
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]


def length(function):
    return function.end_lineno - function.lineno + 1


def branches(function):
    """McCabe's measure."""
    inner = list(ast.walk(function))
    operators = sum(len(n.values) - 1 for n in inner if isinstance(n, ast.BoolOp))
    return 1 + sum(isinstance(n, BRANCHES) for n in inner) + operators


def most_alive(function):
    """The most local names of a function that are between their first and last use at one line."""
    first, last = {}, {}
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and (isinstance(node.ctx, ast.Store) or node.id in first):
            first[node.id] = min(first.get(node.id, node.lineno), node.lineno)
            last[node.id] = max(last.get(node.id, 0), node.lineno)
    lines = range(function.lineno, function.end_lineno + 1)
    return max(sum(first[n] <= line <= last[n] for n in first) for line in lines)


def test_the_training_loop_fits_on_a_screen():
    """train.py's main(): at most 120 lines, 30 branches and 25 names alive at once."""
    (main,) = (f for f in functions(TREES["scripts/train.py"]) if f.name == "main")
    assert length(main) <= 120 and branches(main) <= 30 and most_alive(main) <= 25


def test_nothing_outgrows_its_reader():
    """A file has 30 to 350 lines, a function at most 60 and 20 branches."""
    for name, tree in TREES.items():
        lines = len(SOURCES[name].splitlines())
        small = name.endswith("__init__.py") or name == "scripts/_root.py"
        assert small or 30 <= lines <= 350, f"{name} has {lines} lines"
        for function in functions(tree):
            if function.name == "build_parser" and name == "lenslet/training/options.py":
                continue  # a table
            allowed = 120 if name == "scripts/train.py" else 60
            assert length(function) <= allowed, f"{name}: {function.name}"
            assert branches(function) <= 20, f"{name}: {function.name}"


def test_packages_say_nothing():
    """An __init__.py is empty: a name has one place to be imported from."""
    assert not any(text for name, text in SOURCES.items() if name.endswith("__init__.py"))


def test_the_top_level_is_short():
    """At most 13 entries at the top of the repository."""
    command = ["git", "ls-files"]
    listed = subprocess.run(command, cwd=files.ROOT, capture_output=True, text=True).stdout
    top = {name.split("/")[0] for name in listed.split("\n") if name and not name.startswith(".")}
    if not top:
        pytest.skip("not a git checkout")
    assert len(top) <= 13, sorted(top)


def documentation(tree):
    """The constants that are docstrings."""
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef
    for node in ast.walk(tree):
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            yield node.body[0]


def test_the_code_does_not_grow():
    """Lines with code on them, without blank lines, comments and docstrings."""
    count = 0
    for name, text in SOURCES.items():
        docs = {n for d in documentation(TREES[name]) for n in range(d.lineno, d.end_lineno + 1)}
        lines = enumerate(text.splitlines(), 1)
        count += sum(bool(re.match(r"\s*[^\s#]", line)) and n not in docs for n, line in lines)
    assert count <= CODE_LINES


@pytest.mark.parametrize("name", [n for n in SOURCES if n.startswith("lenslet/")])
def test_lower_rooms_know_no_options(name):
    """Values go down, not the options: neither args, nor an option's name in an error."""
    below, tree = name.removeprefix("lenslet/"), TREES[name]
    if below not in KNOWS_ARGS:
        taken = [a.arg for n in ast.walk(tree) if isinstance(n, ast.arguments) for a in n.args]
        assert "args" not in taken
    if below not in NAMES_OPTIONS:
        docs = {id(d.value) for d in documentation(tree)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named = re.search(r"(^|[^-\w])--[a-z]", node.value)
                assert id(node) in docs or not named, node.value
