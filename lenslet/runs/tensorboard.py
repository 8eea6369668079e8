"""What a run logs for TensorBoard."""

import contextlib
import threading
from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

# Tags of an epoch's record.  TensorBoard sorts them: accuracy and loss come first.
TAGS = {
    "train_accuracy": "accuracy/train",
    "val_accuracy": "accuracy/val",
    "val_loss": "loss/val",
    "val_f1": "metrics/val_f1",
    "images_per_second": "speed/images_per_second",
}


class TensorBoard:
    """A run's log for TensorBoard.  A full disk costs points of the curves, not the run.

    folder: of the run; None: nothing is logged.  step: of the run so far.  What was logged beyond
    it, by a run that was killed and now goes on from its checkpoint, is not shown (TensorBoard's
    "purge").
    """

    def __init__(self, folder: Path | None, step: int):
        self.folder, self.writer = folder, None
        if folder:
            threading.excepthook = _ignore_full_disk
            self._open(step)

    def _open(self, step: int) -> None:
        with contextlib.suppress(OSError):
            self.writer = SummaryWriter(self.folder, purge_step=step + 1 if step else 0)

    def add(self, kind: str, *args) -> None:
        """Call SummaryWriter's add_<kind>(*args), if there is room on the disk."""
        self._attempt(lambda: getattr(self.writer, f"add_{kind}")(*args))

    def add_epoch(self, record: dict, step: int) -> None:
        """The figures of an epoch, as metrics.json has them."""
        for key, tag in TAGS.items():
            if key in record:
                self.add("scalar", tag, record[key], step)

    def add_hparams(self, options: dict, record: dict, step: int) -> None:
        """The options as hyper-parameters, and the best epoch's record as their result.

        SummaryWriter's own call would make a run of its own.
        """
        from torch.utils.tensorboard.summary import hparams

        results = {f"result/{k}": v for k, v in record.items() if k.startswith(("train_", "val_"))}
        flat = {k: v if isinstance(v, int | float) else str(v) for k, v in options.items()}
        for part in hparams(flat, results):
            self._attempt(lambda part=part: self.writer.file_writer.add_summary(part))
        for key, value in results.items():
            self.add("scalar", key, value, step)

    def flush(self, step: int) -> None:
        """Hand over what was logged; where that has failed before, begin anew after this step."""
        if self.folder and not self.writer:
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


def _ignore_full_disk(failure) -> None:
    """threading.excepthook, except for TensorBoard's writing thread: its error is raised later."""
    writing = type(failure.thread).__module__.startswith("tensorboard")
    if not (writing and issubclass(failure.exc_type, OSError)):
        threading.__excepthook__(failure)
