"""What a run writes, so that a full disk costs as little as can be."""

from pathlib import Path

from lenslet import files
from lenslet.errors import OutsideError
from lenslet.runs import checkpoint


class RunFiles:
    """The files of a run, on its main process.

    weights: the best so far, as the content of a file; kept: whether they are on the disk.
    pending: other files to write with the next checkpoint, {path: content}.
    """

    def __init__(self, folder: Path, newest: Path | None):
        """newest: the checkpoint that the run goes on from, which has the best weights with it."""
        self.folder, self._checkpoint = folder, newest
        self.pending, self.weights, self._written = {}, None, None
        if newest and (newest / "model.safetensors").exists():
            self.weights = (newest / "model.safetensors").read_bytes()
            self._write_weights()

    @property
    def kept(self) -> bool:
        return self._written is not None

    def write(self, step: int, state: dict, last: bool) -> None:
        """Write what is pending, a checkpoint of the state and, if new, the weights, in this order:
        each of them whatever happened to the others, for it may fit where they did not.

        What cannot be saved costs a line on the console, and the checkpoint before stays.
        Errors: OutsideError instead, if this was the last chance, and where the folder is gone.
        """
        if not (self.folder / "options.yaml").exists():
            raise OutsideError(f"{self.folder} was moved or deleted during the run")
        failed = {}

        def attempt(what, work):
            try:
                work()
            except OSError as error:
                failed[what] = error.strerror or str(error)

        for path in list(self.pending):
            attempt(path.name, lambda path=path: self._write_pending(path))
        attempt("the checkpoint", lambda: self._save_checkpoint(step, state))
        if self.weights is not self._written:
            attempt("the weights", self._write_weights)
        if failed:
            why = ", ".join(dict.fromkeys(failed.values()))
            what = f"{' and '.join(failed)} could not be saved ({why})"
            if self.kept and "the weights" not in failed:
                what += f", but the weights are in {files.shown(self._weights_path)}"
            if last:
                raise OutsideError(f"{what}; once that is mended, run the same command again")
            print(f"step {step}: {what}; training continues")

    @property
    def _weights_path(self) -> Path:
        return self.folder / "model.safetensors"

    def _write_pending(self, path: Path) -> None:
        path.parent.mkdir(exist_ok=True)
        files.atomic_write(path, self.pending[path])
        del self.pending[path]

    def _save_checkpoint(self, step: int, state: dict) -> None:
        folder, before = self.folder / "checkpoint", self._checkpoint
        self._checkpoint = checkpoint.save_checkpoint(folder, step, state, self.weights, before)

    def _write_weights(self) -> None:
        files.atomic_write(self._weights_path, self.weights)
        self._written = self.weights
