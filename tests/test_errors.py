"""Every known failure is one line on standard error and an exit status; a bug stays a traceback."""

import os
import pty
import subprocess
import sys

import pytest
import torch

from lenslet import errors, files
from lenslet.errors import OutsideError, UserError, counted, error_context, nearest

PRINTING = """
import sys
from lenslet.errors import UserError, run_main

def main(argv):
    print(sys.argv[1])
    raise UserError(sys.argv[1])

sys.exit(run_main(main))
"""


@pytest.mark.parametrize(
    ("error", "status", "line"),
    [
        (UserError("a: wrong; mend it"), 2, "error: a: wrong; mend it\n"),
        (OutsideError("no network"), 1, "error: no network\n"),
        (OSError(28, "No space left", "runs/a"), 1, "error: runs/a: No space left\n"),
        (OSError("no route"), 1, "error: no route\n"),
        (KeyboardInterrupt(), 130, "interrupted\n"),
        (MemoryError(), 1, "error: out of memory: try a smaller batch or image size\n"),
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
            1,
            "error: out of memory: try a smaller batch or image size\n",
        ),
    ],
)
def test_known_failures(capsys, monkeypatch, error, status, line):
    """Known failures become one line on standard error and their status."""
    monkeypatch.delenv("RANK", raising=False)

    def main(argv):
        raise error

    assert errors.run_main(main, []) == status
    assert capsys.readouterr() == ("", line)


def test_statuses(capsys):
    """A command's own status is passed on, none is 0; a bug of ours keeps its traceback."""
    assert [errors.run_main(lambda argv, status=s: status, []) for s in (None, 0, 1)] == [0, 0, 1]
    for bug in (AssertionError, RuntimeError):
        with pytest.raises(bug):
            errors.run_main(lambda argv, bug=bug: (_ for _ in ()).throw(bug()), [])
    assert capsys.readouterr() == ("", "")


def test_several_processes(capsys, monkeypatch):
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


def test_error_context():
    """The caller's words stand in front; the status stays, and other errors are as they were."""
    for kind in (UserError, OutsideError):
        with pytest.raises(kind, match=r"^--data a: line 3: b: wrong$") as caught:  # noqa: SIM117
            with error_context("--data a"), error_context("line 3"):
                raise kind("b: wrong")
        assert type(caught.value) is kind
    with pytest.raises(KeyError, match=r"^'c'$"), error_context("--data a"):
        raise KeyError("c")


def test_nearest():
    """A word that is begun or misspelt has one near it; another has none."""
    known = ["epochs", "epsilon", "batch-size"]
    assert nearest("batch", known) == " (did you mean batch-size?)"
    assert nearest("epoch", iter(known)) == " (did you mean epochs?)"
    assert nearest("ephocs", known) == " (did you mean epochs?)"
    assert nearest("xyz", known) == "" == nearest("a", [])


def test_counted():
    """One is singular, all else plural, and thousands are separated."""
    said = [counted(n, "image") for n in (0, 1, 2, 1234)]
    assert said == ["0 images", "1 image", "2 images", "1,234 images"]
    assert (counted(1, "class", "classes"), counted(2, "class", "classes")) == (
        "1 class",
        "2 classes",
    )


def test_interrupted_import(tmp_path):
    """Ctrl-C while modules are imported ends the command without a traceback."""
    (tmp_path / "slow.py").write_text(
        "import os, signal\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT)\n"
        "except KeyboardInterrupt as error:\n"
        "    raise ImportError('as some libraries do') from error\n"
    )
    program = (
        "import sys; from lenslet.errors import run_main\n"
        "def main(argv):\n    import slow\n"
        "sys.exit(run_main(main))\n"
    )
    command = [sys.executable, "-c", program]
    environment = {**os.environ, "PYTHONPATH": f"{files.ROOT}{os.pathsep}{tmp_path}"}
    result = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (result.returncode, result.stdout, result.stderr) == (130, "", "")


def test_an_ignored_interrupt_stays_ignored():
    """A background job, which the shell lets ignore Ctrl-C, is not ended by one."""
    program = (
        "import os, signal, sys; from lenslet.errors import run_main\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "sys.exit(run_main(lambda argv: os.kill(os.getpid(), signal.SIGINT)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(files.ROOT)}
    assert subprocess.run([sys.executable, "-c", program], env=environment).returncode == 0


def test_control_characters_on_a_terminal(tmp_path):
    """A terminal is shown a file name's control characters; a pipe is given the name as it is."""
    name = "a\x1b[2Jb\x9bc.png"
    command = [sys.executable, "-c", PRINTING, name]
    environment = {**os.environ, "PYTHONPATH": str(files.ROOT), "PYTHONIOENCODING": "utf-8"}
    piped = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert piped.stdout == f"{name}\n" and piped.stderr == f"error: {name}\n"
    ours, theirs = pty.openpty()
    status = subprocess.run(command, stdout=theirs, stderr=theirs, env=environment).returncode
    os.close(theirs)
    said = os.read(ours, 1000).decode()
    os.close(ours)
    assert status == 2 and said == "a\\x1b[2Jb\\x9bc.png\r\nerror: a\\x1b[2Jb\\x9bc.png\r\n"
