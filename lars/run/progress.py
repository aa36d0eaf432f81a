"""What people see: the groups of parameters, then a bar with rate and time left (plain lines without a terminal)."""

from __future__ import annotations

import os
import sys
import time
from contextlib import suppress
from itertools import accumulate
from typing import TYPE_CHECKING, Any, TextIO

from rich.console import Console
from rich.table import Table
from tqdm import tqdm

if TYPE_CHECKING:  # commands that need no torch print tables, too
    import torch

    from lars.optim.base import Optimizer

_SECONDS_BETWEEN_LINES = 10
_BAR = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{remaining} left{postfix}]"
_SHORTEST_BAR = 3  # columns


class _Lasting:
    """stdout or stderr to which nobody may listen any more."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        with suppress(OSError):
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def outlive_output() -> None:
    """A reader that goes away (`| head`, a closed terminal, `>&-`) ends what is seen of a run, not the run."""
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:  # else the next file that is opened would be stdout
        continue
    os.close(handle)
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        setattr(sys, name, stream if isinstance(stream, _Lasting) else _Lasting(stream))


class Progress:
    """Follows the steps of a run; silent on other ranks than 0."""

    def __init__(self, name: str, step: int, steps: int, shown: bool) -> None:
        self.name, self.first, self.steps, self.shown = name, step, steps, shown
        self.started = self.last_line = time.time()
        terminal = shown and sys.stderr.isatty()
        how = {"desc": name.rpartition("/")[2], "bar_format": _BAR, "dynamic_ncols": True}
        self.bar = tqdm(total=steps, initial=step, **how) if terminal else None

    def step(self, step: int, loss: float, lr: float, images_per_second: float, waited: float) -> None:
        """`waited`: seconds that this process has waited for data so far; told from a hundredth of the time on."""
        share = waited / (time.time() - self.started)
        waiting = f"{share:.0%} of the time waiting for data" if share >= 0.01 else ""
        speed = f"{images_per_second:,.0f} images/s"
        if self.bar:
            self.bar.set_postfix_str(self._fitting([f"loss {loss:.3f}", speed, f"lr {lr:.3g}", waiting]), refresh=False)
            self.bar.update(1)
        elif self.shown and (
            time.time() - self.last_line > _SECONDS_BETWEEN_LINES or step in (self.first + 1, self.steps)
        ):
            self.last_line = time.time()
            left = tqdm.format_interval((self.last_line - self.started) / (step - self.first) * (self.steps - step))
            speed = f"{speed}, {waiting}" if waiting else speed
            self.note(f"step {step}/{self.steps}  loss {loss:.3f}  lr {lr:.3g}  {speed}  {left} left")

    def _fitting(self, parts: list[str]) -> str:
        """As many of the parts, the first ones first, as this terminal has columns for beside a short bar."""
        there = f"{self.bar.desc}: 100%|| {self.steps}/{self.steps} [00:00:00 left]"
        columns = self.bar.format_dict["ncols"] or 1000  # a terminal that does not say how wide it is cuts nothing off
        room = columns - len(there) - _SHORTEST_BAR - len(", ")
        texts = accumulate(filter(None, parts), "{}, {}".format)
        return max((text for text in texts if len(text) <= room), key=len, default="")

    def note(self, text: str) -> None:
        """A line that stays, above the bar."""
        if self.bar:
            self.bar.write(text)
        elif self.shown:
            print(f"{self.name}: {text}", flush=True)

    def close(self) -> None:
        if self.bar:
            self.bar.close()


def stdout(width: int = 120) -> Console:
    """What tables are printed on: as wide as the terminal, and `width` where there is none."""
    return Console(width=None if sys.stdout.isatty() else width)


def group_table(model: torch.nn.Module, optimizer: Optimizer) -> str:
    """Which rule each tensor follows, found by dimension; before an engine puts its slices in their place."""
    names = {p: name for name, p in model.named_parameters()}
    table = Table("rule", "weight decay", "tensors", "parameters", "first", "last")
    rows = [(optimizer.rule_of(one), f"{one['weight_decay']:g}", one["params"]) for one in optimizer.param_groups]
    if frozen := [p for p in names if not p.requires_grad]:
        rows.append(("frozen", "", frozen))
    for rule, decay, members in rows:
        count = f"{sum(p.numel() for p in members):,}"
        table.add_row(rule, decay, str(len(members)), count, names[members[0]], names[members[-1]])
    console = stdout()
    with console.capture() as capture:
        console.print(table)
    return capture.get().rstrip("\n")
