"""What people see while they wait, on a real pseudo-terminal of some width."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import struct
import sys
import termios
from pathlib import Path

import pytest
from conftest import DEMO, play
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from lars.run.reading import read_lines

_PLAY = """
from lars.run.progress import Progress
shown = Progress("starter/resnet18", 0, 90_000, shown=True)
shown.bar.mininterval = shown.bar.miniters = 0
for step in range(1, 9):
    shown.step(step, 2.3025, 0.0512, 12345.6, 0.0)
shown.note("epoch 1.00: top-1 12.34 %")
shown.step(9, 2.3025, 0.0512, 12345.6, 0.0)
shown.close()
"""


def on_terminal(columns: int) -> list[str]:
    """The lines that a terminal of so many columns is given, each redrawing of the bar for itself."""
    child, terminal = pty.fork()
    if child == 0:
        fcntl.ioctl(2, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
        os.execv(sys.executable, [sys.executable, "-c", _PLAY])
    text = b""
    try:
        while part := os.read(terminal, 65536):
            text += part
    except OSError:  # how Linux says that the other end is closed
        pass
    os.close(terminal)
    assert os.waitpid(child, 0)[1] == 0, text.decode()
    return [line for line in re.split(r"[\r\n]+", text.decode()) if line.strip()]


@pytest.mark.parametrize(
    "columns, shown",
    [
        (40, ("/90000",)),
        (60, ("left, loss 2.303]",)),
        (80, ("left, loss 2.303, 12,346 images/s]",)),
        (100, ("left, loss 2.303, 12,346 images/s, lr 0.0512]",)),
    ],
)
def test_the_bar_fits_and_says_what_matters_most_first(columns: int, shown: tuple[str, ...]) -> None:
    lines = on_terminal(columns)
    bars = [line for line in lines if "|" in line]
    assert max(map(len, lines)) <= columns and "epoch 1.00: top-1 12.34 %" in [line.strip() for line in lines]
    for bar in bars[1:]:
        assert bar.startswith("resnet18:   0%|") and "/90000" in bar
        assert all(part in bar for part in shown), bar


def test_tensorboard_gets_the_numbers_of_two_processes_once(tiny: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    keys = (*tiny, "trackers=[tensorboard]", "max_steps=2", f"run_dir={run}")
    play(2, DEMO / "resnet50.yaml", *keys, log=tmp_path / "log")
    assert "WARNING" not in (tmp_path / "log").read_text()
    (events,) = run.glob("logs/**/events.out.tfevents.*.0")
    found = EventAccumulator(str(events)).Reload()
    losses = [line["loss"] for line in read_lines(run / "metrics.jsonl", "train")]
    assert [scalar.value for scalar in found.Scalars("train/loss")] == pytest.approx(losses)  # in float32
    assert [scalar.step for scalar in found.Scalars("eval/top1")] == [2]
    waited = [scalar.value for scalar in found.Scalars("train/waited_seconds")]
    assert 0 < waited[0] <= waited[1]  # for the first batch, at least, and it adds up
