"""What a run prints tells something, in numbers that can be read."""

import pytest

from lenslet.runs.summary import epoch_line, is_told, span

RECORD = {"epoch": 3, "train_loss": 0.5, "train_accuracy": 0.75, "lr": 0.01}


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0 s"), (45.4, "45 s"), (119, "2 min"), (4000, "67 min"), (7699, "2 h 8 min")],
)
def test_span(seconds, text):
    """A time is in seconds while they matter, then in minutes, then in hours."""
    assert span(seconds) == text


@pytest.mark.parametrize(
    ("speed", "text"), [(1234.5, "1,234 images/s"), (12, "12 images/s"), (0.034, "0.034 images/s")]
)
def test_speed(speed, text):
    """A slow network's speed is no 0 images/s."""
    assert f"  {text}  " in epoch_line(
        RECORD | {"images_per_second": speed}, "/9", "1 s left", None
    )


def test_what_is_told():
    """Of 30 epochs each has a line, of more the first ones and each tenth."""

    def told(epochs):
        return [n for n in range(1, epochs + 1) if is_told({"epoch": n, "step": 7 * n}, 7 * epochs)]

    assert told(30) == list(range(1, 31))
    assert told(45) == [1, 2, 3, 10, 20, 30, 40]
