"""A finished run is never touched, an interrupted one goes on, and one process trains in a run."""

import json
import os
import platform
import signal
import subprocess
import sys
import time

import pytest

from lenslet import files
from lenslet.errors import UserError
from lenslet.files import Locked
from lenslet.runs import folder as run_folder
from lenslet.runs.checkpoint import VERSION, save_checkpoint
from lenslet.runs.folder import (
    claim,
    is_finished,
    lock_unfinished,
    newest_finished,
    point_latest,
    resume,
    weights_path,
)


@pytest.fixture(autouse=True)
def unlocked(monkeypatch):
    """The locks of a test end with it."""
    monkeypatch.setattr(run_folder, "LOCKS", [])
    yield
    for file in run_folder.LOCKS:
        file.close()


def alike(run):
    """The options of every run are those given."""
    return ""


def begin(run, steps=1):
    """What an interrupted run leaves: its options, and perhaps a checkpoint."""
    run.mkdir(parents=True, exist_ok=True)
    (run / "options.yaml").write_text("lr: 1\n")
    path = None
    for step in range(1, steps + 1):
        path = save_checkpoint(run / "checkpoint", step, {"step": step}, before=path)
    return path


def finish(run, **summary):
    begin(run)
    (run / "metrics.json").write_text(json.dumps({"epochs": [], "summary": summary}))


def content(folder):
    return {path: path.is_file() and path.read_bytes() for path in folder.rglob("*")}


def fork(work):
    """The pid of a process that does work(say) and then waits, and where it is heard."""
    read, write = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.close(read)
            work(lambda word: os.write(write, f"{word}\n".encode()))
            time.sleep(60)
        finally:
            os._exit(1)
    os.close(write)
    return pid, open(read)


def elsewhere(work):
    """What work() returns, or why it is Locked, in words, in another process that is then gone."""

    def answer(say):
        try:
            say(work())
        except Locked as error:
            say(f"Locked: {error}")

    pid, said = fork(answer)
    with said:
        answer = said.readline().strip()
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return answer


def test_new_run(tmp_path):
    """A folder with content is never used again: -2, -3, … follow; an empty one is."""
    folder = tmp_path / "runs" / "a"
    for expected in ("a", "a-2", "a-3"):
        run, checkpoint, notes = claim(folder, lambda run: "lr", resume=False)
        assert (run, checkpoint, notes) == (tmp_path / "runs" / expected, None, [])
        assert os.listdir(run) == [".lock"]
        assert claim(folder, alike, resume=False)[0] == run
        (run / "options.yaml").touch()


def test_foreign_folder(tmp_path):
    """A folder of something else is left alone, with or without the wish to resume."""
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "thesis.tex").write_text("years")
    before = content(tmp_path / "a")
    assert [claim(tmp_path / "a", alike, wish)[0].name for wish in (True, False)] == ["a-2"] * 2
    assert content(tmp_path / "a") == before


def test_no_run(tmp_path):
    """A file where the run's folder should be, or above it, is a mistake to mend."""
    (tmp_path / "a").touch()
    for output in (tmp_path / "a", tmp_path / "a" / "b"):
        with pytest.raises(
            UserError, match=f"^{output} is a file; name a folder|^{output}: cannot be written"
        ):
            claim(output, alike)
    (tmp_path / "b").symlink_to("nowhere")
    with pytest.raises(UserError, match=r"^/.*/b is a file; name a folder"):
        claim(tmp_path / "b", alike)


def test_a_file_in_the_way_of_the_next_number(tmp_path):
    """A file named as the next folder would be is told by its own name."""
    finish(tmp_path / "a")
    (tmp_path / "a-2").touch()
    with pytest.raises(UserError, match=r"^/.*/a-2 is a file"):
        claim(tmp_path / "a", alike)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write everywhere")
def test_no_permission(tmp_path):
    """A folder that cannot be written to is a mistake to mend."""
    for mode in (0o500, 0):
        tmp_path.chmod(mode)
        try:
            for output in (tmp_path, tmp_path / "b"):
                with pytest.raises(UserError, match=f"^{output}: "):
                    claim(output, alike)
        finally:
            tmp_path.chmod(0o700)


@pytest.mark.parametrize("summary", [{}, {"finished": True}])
def test_a_finished_run_is_never_claimed(tmp_path, summary):
    """Neither its options nor what is asked for makes a finished run be trained in again."""
    finish(tmp_path / "a", **summary)  # {}: before runs could be continued
    before = content(tmp_path)
    for wish in (True, False):
        assert claim(tmp_path / "a", alike, wish) == (tmp_path / "a-2", None, [])
    assert content(tmp_path / "a").items() <= before.items()


def test_an_unfinished_run_is_continued(tmp_path):
    """The same options go on from the newest checkpoint, without one from the beginning."""
    begin(tmp_path / "a", steps=0)
    assert claim(tmp_path / "a", alike) == (tmp_path / "a", None, [])
    newest = begin(tmp_path / "a", steps=3)
    assert claim(tmp_path / "a", alike) == (tmp_path / "a", newest, [])
    (tmp_path / "a" / "model.safetensors").touch()
    finish(tmp_path / "a", finished=False)
    assert claim(tmp_path / "a", alike)[0] == tmp_path / "a"
    assert claim(tmp_path / "a", alike, resume=False) == (tmp_path / "a-2", None, [])


def test_the_newest_with_these_options_is_continued(tmp_path):
    """Finished ones and those with other options are passed over, the newest of the rest taken."""
    for name in ("a", "a-2", "a-3", "a-4"):
        newest = begin(tmp_path / name, steps=2)
    finish(tmp_path / "a-5", finished=True)
    assert claim(tmp_path / "a", alike)[:2] == (tmp_path / "a-4", newest)
    different = {"a-4": "--lr was 1, now 2", "a-2": "--seed was 0, now 1"}
    compare = lambda run: different.get(run.name, "")  # noqa: E731
    assert claim(tmp_path / "a", compare)[0] == tmp_path / "a-3"


def test_a_removed_run_hides_no_later_one(tmp_path):
    """The newest unfinished run is continued also where an older one was removed to make room."""
    finish(tmp_path / "a")
    newest = begin(tmp_path / "a-3")
    assert claim(tmp_path / "a", alike)[:2] == (tmp_path / "a-3", newest)


def test_other_options_make_a_new_run(tmp_path):
    """An unfinished run with other options stays as it is; the note says what the difference is."""
    begin(tmp_path / "a")
    before = content(tmp_path / "a")
    run, checkpoint, notes = claim(tmp_path / "a", lambda run: "--lr was 1, now 2")
    assert (run, checkpoint) == (tmp_path / "a-2", None)
    assert len(notes) == 1 and f"{tmp_path / 'a'} is unfinished" in notes[0]
    assert "--lr was 1, now 2" in notes[0] and "new run" in notes[0]
    assert content(tmp_path / "a") == before


def damage(run):
    for path in (run / "checkpoint").iterdir():
        (path / "state.json").write_text("")


def test_all_checkpoints_damaged(tmp_path):
    """Weights are not trained over where nothing tells how to go on: that is said, a new run made.

    Without weights there is nothing to lose, and the run begins again.
    """
    begin(tmp_path / "a", steps=2)
    damage(tmp_path / "a")
    run, checkpoint, notes = claim(tmp_path / "a", alike)
    assert (run, checkpoint) == (tmp_path / "a", None) and len(notes) == 2
    (tmp_path / "a" / "model.safetensors").write_text("of two days")
    run, checkpoint, notes = claim(tmp_path / "a", alike)
    assert (run, checkpoint) == (tmp_path / "a-2", None)
    (note,) = notes
    parts = note.split("; ")
    assert len(parts) == 3 and all("cannot be used (" in part for part in parts[:2])
    assert parts[2].startswith(f"{tmp_path / 'a'} has weights but no usable checkpoint")
    assert "new run" in parts[2]
    assert (tmp_path / "a" / "model.safetensors").read_text() == "of two days"


def test_the_newest_checkpoint_damaged(tmp_path):
    """The run goes on from the one before, and the note names the damaged one."""
    newest = begin(tmp_path / "a", steps=2)
    (newest / "state.json").write_text("")
    (tmp_path / "a" / "model.safetensors").touch()
    for run, checkpoint, notes in (claim(tmp_path / "a", alike), resume(tmp_path / "a", alike)):
        assert run == tmp_path / "a" and checkpoint.name.endswith("step-1")
        assert len(notes) == 1 and str(newest) in notes[0]


def test_resumed(tmp_path):
    """A run that was asked for by name is continued, or it is said why it cannot be."""
    newest = begin(tmp_path / "a", steps=2)
    assert resume(tmp_path / "a", alike) == (tmp_path / "a", newest, [])
    damage(tmp_path / "a")
    run, checkpoint, notes = resume(tmp_path / "a", alike)
    assert (run, checkpoint) == (tmp_path / "a", None) and len(notes) == 2
    (tmp_path / "a" / "model.safetensors").touch()
    with pytest.raises(UserError, match="no usable checkpoint") as caught:
        resume(tmp_path / "a", alike)
    assert str(newest) in str(caught.value) and "\n" not in str(caught.value)
    begin(tmp_path / "b", steps=0)
    assert resume(tmp_path / "b", alike) == (tmp_path / "b", None, [])
    with pytest.raises(UserError, match=r"other options \(--lr was 1, now 2\): leave"):
        resume(tmp_path / "b", lambda run: "--lr was 1, now 2")


def test_what_a_crash_left_is_removed(tmp_path):
    """Files that a killed process was writing go when the run is continued; no others do."""
    run = tmp_path / "a"
    begin(run)
    kept = ["events.out.tfevents.17.host.9", "model.safetensors", ".hidden", "epochs", ".a.b"]
    for name in (*kept[:3], kept[4], "epochs/epoch-001.safetensors"):
        (run / name).parent.mkdir(exist_ok=True)
        (run / name).touch()
    before = content(run)
    for name in (".model.safetensors.123", ".metrics.json.4567890", ".options.yaml.8"):
        (run / name).touch()
    lock_unfinished(run)
    (run / ".lock").unlink()
    assert content(run) == before


def test_what_a_crash_left_among_the_epochs_is_removed(tmp_path):
    """The weights of an epoch that a killed process was writing go too."""
    begin(tmp_path / "a")
    (tmp_path / "a" / "epochs").mkdir()
    (tmp_path / "a" / "epochs" / ".epoch-001.safetensors.123").touch()
    lock_unfinished(tmp_path / "a")
    assert not list((tmp_path / "a" / "epochs").iterdir())


@pytest.mark.parametrize(
    ("text", "finished"),
    [
        (None, False),
        ('{"summary": {"finished": true}}', True),
        ('{"summary": {"finished": false}}', False),
        ('{"summary": {"best_epoch": 3}}', True),  # before runs could be continued
        ("", False),
        ('{"summary": {"fini', False),
        ("{}", False),
        ("[]", False),
        ("null", False),
        ('{"summary": null}', False),
        ('{"summary": [1]}', False),
        ("\udcff", False),
    ],
)
def test_is_finished(tmp_path, text, finished):
    """A run is finished when its metrics.json says so, and not when that is damaged."""
    if text is not None:
        (tmp_path / "metrics.json").write_bytes(text.encode(errors="surrogateescape"))
    assert is_finished(tmp_path) is finished


def test_newest_finished(tmp_path):
    """Of the finished runs the one that ended last, if its options are those asked for."""
    assert newest_finished(tmp_path / "a") is None
    for age, name in ((3, "a"), (1, "a-2"), (2, "a-3"), (0, "ab")):
        finish(tmp_path / name)
        os.utime(tmp_path / name / "metrics.json", (1e9 - age, 1e9 - age))
    finish(tmp_path / "a-4", finished=False)
    begin(tmp_path / "a-5")
    assert newest_finished(tmp_path / "a") == tmp_path / "a-2"
    compare = lambda run: "" if run.name == "a-3" else "--lr was 1, now 2"  # noqa: E731
    assert newest_finished(tmp_path / "a", compare) == tmp_path / "a-3"
    assert newest_finished(tmp_path / "a", lambda run: "--lr was 1, now 2") is None


def test_one_process_trains_in_a_run(tmp_path):
    """Who wants a run that another process trains is told which one, or gets another folder."""
    newest = begin(tmp_path / "a")
    assert claim(tmp_path / "a", alike)[1] == newest
    for work in (lambda: claim(tmp_path / "a", alike), lambda: resume(tmp_path / "a", alike)):
        said = elsewhere(work)
        holder = f"process {os.getpid()} on {platform.node()}"
        assert said == f"Locked: {tmp_path / 'a'} is in use by {holder}"
    assert elsewhere(lambda: claim(tmp_path / "a", alike, False)[0]) == str(tmp_path / "a-2")
    # Those that were refused or have ended freed nothing, and hold nothing.
    assert elsewhere(lambda: claim(tmp_path / "a", alike)).startswith("Locked")
    assert claim(tmp_path / "a-2", alike)[0] == tmp_path / "a-2"


def test_a_new_folder_is_one_process_s(tmp_path):
    """Of two processes that begin a run at the same moment the second gets a folder of its own."""
    assert claim(tmp_path / "a", alike)[0] == tmp_path / "a"
    assert elsewhere(lambda: claim(tmp_path / "a", alike)[0]) == str(tmp_path / "a-2")


def test_other_runs_are_not_in_the_way(tmp_path):
    """A run with other options can be begun while one is trained."""
    begin(tmp_path / "a")
    claim(tmp_path / "a", alike)
    assert elsewhere(lambda: claim(tmp_path / "a", lambda run: "lr")[0]) == str(tmp_path / "a-2")


def test_an_abandoned_lock_is_no_obstacle(tmp_path):
    """The file of a lock says nothing: neither that of a process that is gone, nor of a crash."""
    for text in ("", "process 1 on elsewhere", "x" * 10_000):
        begin(tmp_path / "a")
        (tmp_path / "a" / ".lock").write_text(text)
        assert claim(tmp_path / "a", alike)[0] == tmp_path / "a"
        assert (tmp_path / "a" / ".lock").read_text() == (
            f"process {os.getpid()} on {platform.node()}"
        )
        run_folder.LOCKS.pop().close()
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / ".lock").touch()
    assert claim(tmp_path / "b", alike)[0] == tmp_path / "b"


def test_a_killed_process_frees_its_run_at_once(tmp_path):
    """After SIGKILL the run can be claimed, though a process that the holder forked lives on."""
    newest = begin(tmp_path / "a")

    def hold(say):
        claim(tmp_path / "a", alike)
        child = os.fork()
        if not child:
            time.sleep(60)
            os._exit(0)
        say(child)

    holder, said = fork(hold)
    with said:
        child = int(said.readline())
    try:
        with pytest.raises(Locked, match=f"is in use by process {holder} on"):
            claim(tmp_path / "a", alike)
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
        os.kill(child, 0)  # lives
        assert claim(tmp_path / "a", alike) == (tmp_path / "a", newest, [])
    finally:
        os.kill(child, signal.SIGKILL)


HOLDER = """
import sys, time, multiprocessing
from lenslet.runs import folder as run_folder

if __name__ == "__main__":
    run_folder.claim(sys.argv[1], lambda run: "")
    child = multiprocessing.get_context(sys.argv[2]).Process(target=time.sleep, args=(60,))
    child.start()
    print(child.pid, flush=True)
    time.sleep(60)
"""


@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_decoding_processes_do_not_keep_the_lock(tmp_path, method):
    """However the processes that decode photographs are started, they hold no run."""
    newest = begin(tmp_path / "a")
    (tmp_path / "holder.py").write_text(HOLDER)
    holder = subprocess.Popen(
        [sys.executable, tmp_path / "holder.py", tmp_path / "a", method],
        env={**os.environ, "PYTHONPATH": str(files.ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )
    child = int(holder.stdout.readline())
    try:
        with pytest.raises(Locked, match=f"is in use by process {holder.pid} on"):
            claim(tmp_path / "a", alike)
        holder.kill()
        holder.wait()
        os.kill(child, 0)  # lives
        assert claim(tmp_path / "a", alike)[1] == newest
    finally:
        holder.kill()
        os.kill(child, signal.SIGKILL)


def test_the_newest_checkpoint_of_an_older_version(tmp_path):
    """A checkpoint of an older version is refused in a line that says so; without weights the run
    begins again, with weights a new one does.
    """
    newest = begin(tmp_path / "a")
    manifest = json.loads((newest / "manifest.json").read_text())
    assert manifest["version"] == VERSION
    (newest / "manifest.json").write_text(json.dumps(manifest | {"version": "3"}))
    run, checkpoint, (note,) = claim(tmp_path / "a", alike)
    assert (run, checkpoint) == (tmp_path / "a", None)
    reason = "of another version of this code: 3, not 5"
    assert note == f"{newest} cannot be used ({reason})"
    (tmp_path / "a" / "model.safetensors").touch()
    run, checkpoint, (note,) = claim(tmp_path / "a", alike)
    assert (run, checkpoint) == (tmp_path / "a-2", None)
    assert reason in note and "new run" in note
    with pytest.raises(UserError, match="3, not 5"):
        resume(tmp_path / "a", alike)


@pytest.mark.parametrize("named", ["run", "run/", "run/model.safetensors", "other.safetensors"])
def test_weights_path(tmp_path, monkeypatch, named):
    """Weights are named by their run folder or their file; a file need not be there yet."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    named_file = "other.safetensors" if "other" in named else "run/model.safetensors"
    for prefix in ("", f"{tmp_path}/"):
        assert str(weights_path(prefix + named)) == prefix + named_file


def test_a_folder_without_weights(tmp_path):
    """Another folder, or a run before its first epoch, is refused by its name."""
    begin(tmp_path / "a")
    with pytest.raises(UserError, match=f"^{tmp_path / 'a'}: no model.safetensors in this folder"):
        weights_path(str(tmp_path / "a"))


def test_latest(tmp_path):
    """runs/latest names the newest run, wherever it lies; before the first there is a remedy."""
    with pytest.raises(UserError, match="make train"):
        weights_path(None)
    for run in (files.RUNS / "a", tmp_path / "elsewhere" / "b", files.RUNS / "a"):
        run.mkdir(parents=True, exist_ok=True)
        (run / "model.safetensors").touch()
        point_latest(run)
        assert weights_path(None).resolve() == run / "model.safetensors"
    assert sorted(os.listdir(files.RUNS)) == ["a", "latest"]


def test_latest_from_anywhere(tmp_path, monkeypatch):
    """A run folder that was given relative to where the command ran is found from elsewhere."""
    run = tmp_path / "here" / "a"
    run.mkdir(parents=True)
    (run / "model.safetensors").touch()
    monkeypatch.chdir(tmp_path / "here")
    point_latest(run.relative_to(tmp_path / "here"))
    monkeypatch.chdir("/")
    assert weights_path(None).resolve() == run / "model.safetensors"


def test_latest_where_runs_is_a_link(tmp_path, monkeypatch):
    """With runs/ on another disk, behind a link, a run that lies elsewhere is still found."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "runs").symlink_to(tmp_path / "disk")
    monkeypatch.setattr(files, "RUNS", tmp_path / "a" / "b" / "runs")
    for run in (files.RUNS / "a", tmp_path / "elsewhere" / "b"):
        run.mkdir(parents=True)
        (run / "model.safetensors").touch()
        point_latest(run)
        assert weights_path(None).resolve() == run.resolve() / "model.safetensors"


def test_the_weights_of_the_latest_are_gone(tmp_path):
    """A runs/latest whose run was removed is answered with the remedy."""
    run = files.RUNS / "a"
    run.mkdir(parents=True)
    (run / "model.safetensors").touch()
    point_latest(run)
    (run / "model.safetensors").unlink()
    run.rmdir()
    with pytest.raises(UserError, match="make train"):
        weights_path(None)
