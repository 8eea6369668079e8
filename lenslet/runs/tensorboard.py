"""What a run logs for TensorBoard."""

import contextlib
import threading
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter


class TensorBoard:
    """What a run logs for TensorBoard.  A full disk costs points of the curves, not the run.

    step: of the run so far.  What was logged beyond it, by a run that was killed and now goes on
    from its checkpoint, is not shown (TensorBoard's "purge").
    """

    def __init__(self, folder: Path, step: int):
        self.folder = folder
        threading.excepthook = _without_full_disks
        self._open(step)

    def _open(self, step: int) -> None:
        try:
            self.writer = SummaryWriter(self.folder, purge_step=step + 1 if step else 0)
        except OSError:
            self.writer = None

    def add(self, kind: str, *args) -> None:
        """Call SummaryWriter's add_<kind>(*args), if there is room on the disk."""
        self._attempt(lambda: getattr(self.writer, f"add_{kind}")(*args))

    def add_hparams(self, options: dict, results: dict, step: int) -> None:
        """The options as hyper-parameters; SummaryWriter's own call makes a run of its own."""
        from torch.utils.tensorboard.summary import hparams

        flat = {k: v if isinstance(v, int | float) else str(v) for k, v in options.items()}
        for part in hparams(flat, results):
            self._attempt(lambda part=part: self.writer.file_writer.add_summary(part))
        for key, value in results.items():
            self.add("scalar", key, value, step)

    def flush(self, step: int) -> None:
        """Hand over what was logged; where that has failed before, begin anew after this step."""
        if not self.writer:
            self._open(step)
        self._attempt(lambda: self.writer.flush())

    def close(self) -> None:
        self._attempt(lambda: self.writer.close())

    def _attempt(self, work) -> None:
        try:
            if self.writer:
                work()
        except OSError:  # saving, which fails then too, says so
            with contextlib.suppress(OSError):
                self.writer.close()
            self.writer = None


def _without_full_disks(args) -> None:
    """threading.excepthook, but for TensorBoard's writing thread: what ends it is raised later."""
    writing = type(args.thread).__module__.startswith("tensorboard")
    if not (writing and issubclass(args.exc_type, OSError)):
        threading.__excepthook__(args)
