"""The mutants of make mutants are what it says, and those that may survive are told apart."""

import mutants

CODE = '''"""Not this."""
import math

def f(x: int = 0, *, y=True) -> bool:
    """Nor "this" == 1."""
    if not x and y < 1.5:
        raise ValueError(f"{x + 1} is not " + str(x == 1))
    assert x != 3
    x.go(math.sqrt(2), key=x[1:])
    return round(-x) is None
'''


def test_changes():
    """One change at a time, of the code alone: no text, annotation, message or assert."""
    found = sorted((line, after) for line, _, after, _ in mutants.Source(CODE).mutants())
    assert found == sorted(
        [
            (4, "def f(x: int = 1, *, y=True) -> bool:"),
            (4, "def f(x: int = 0, *, y=False) -> bool:"),
            (6, "if not (not x and y < 1.5):"),
            (6, "if not x or y < 1.5:"),
            (6, "if x and y < 1.5:"),
            (6, "if not x and y <= 1.5:"),
            (6, "if not x and y < 2.5:"),
            (9, "pass"),
            (9, "x"),
            (9, "x.go(math.sqrt(2))"),
            (9, "x.go(math.sqrt(3), key=x[1:])"),
            (9, "x.go(math.sqrt(2), key=x[:])"),
            (9, "x.go(math.sqrt(2), key=x[2:])"),
            (10, "return None"),
            (10, "return round(-x) is not None"),
            (10, "return (-x) is None"),
            (10, "return round(x) is None"),
        ]
    )
    for line, before, after, text in mutants.Source(CODE).mutants():
        lines = CODE.splitlines()
        assert lines[line - 1].strip() == before
        lines[line - 1] = lines[line - 1].replace(before, after)
        assert text.splitlines() == lines


def test_known_survivors(monkeypatch):
    """An entry is the end of a change, or what only the changed line has."""
    monkeypatch.setattr(mutants, "SURVIVORS", {"a.py": {"x < 1": "", "→ x": ""}})
    assert mutants.known("a.py", "if x > 1:", "if x < 1:") == "x < 1"
    assert mutants.known("a.py", "round(x)", "x") == "→ x"
    assert mutants.known("a.py", "x < 1 or y", "x < 1 and y") is None
    assert mutants.known("b.py", "if x > 1:", "if x < 1:") is None
