"""Several processes of one run without a launcher, for tests of what they do together.

They are forked from a process that has imported torch, which takes seconds.
"""

import importlib
import multiprocessing
import os
import runpy
import socket

from lenslet import errors, files

forked = multiprocessing.get_context("forkserver")
forked.set_forkserver_preload(["torch._dynamo", "torch.utils.tensorboard", "accelerate", "joblib"])


def scripts(count, folder, name, words, status=0):
    """Run scripts/<name>.py, with folder/runs as its runs/; what all processes together said."""
    return _run(count, folder, status, _script, name, [str(word) for word in words])


def programs(count, folder, text, status=0):
    """Run a program that is text, kept in the folder."""
    (folder / "program.py").write_text(text)
    return _run(count, folder, status, runpy.run_path, str(folder / "program.py"))


def _run(count, folder, status, function, *arguments):
    """Call a function in so many processes that find each other."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(s.getsockname()[1])}
    place |= {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count)}
    place |= {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    processes = []
    for rank in range(count):
        environment = {**place, "RANK": str(rank), "LOCAL_RANK": str(rank)}
        words = (environment, folder, function, arguments)
        processes.append(forked.Process(target=_member, args=words))
        processes[-1].start()
    for process in processes:
        process.join(120)
        process.kill()
        process.join()
    said = "".join((folder / f"{rank}.said").read_text() for rank in range(count))
    assert [process.exitcode for process in processes] == [status] * count, said
    return said


def _member(environment, folder, function, arguments):
    os.environ |= environment
    files.RUNS = folder / "runs"
    with open(folder / f"{environment['RANK']}.said", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    status = function(*arguments)
    raise SystemExit(status if isinstance(status, int) else 0)


def _script(name, words):
    return errors.run_main(importlib.import_module(name).main, words)
