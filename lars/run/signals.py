"""Stopping in order: a signal asks a run to drop the step under way, save the last finished one and end."""

from __future__ import annotations

import math
import signal
import time

import torch
import torch.distributed as dist

EXIT_STOPPED = 75  # sysexits.h EX_TEMPFAIL: start the same command again to go on
_ECHO = 1.0  # seconds in which a SIGINT is the same Ctrl-C, come by way of the launcher too


def interrupts_end_at_once() -> None:
    """Until there is something to save, a Ctrl-C ends a script without a traceback, as SIGTERM does."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class StopRequest:
    """Whether any process was asked to stop. All of them learn of it at the same pass, on every engine."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        """`group` is one on the CPU (None for one process), so that nobody waits for a GPU to ask."""
        self._requested = False
        self._group = group
        self._flag = torch.zeros(1, dtype=torch.int32)
        self._work: dist.Work | None = None
        self._interrupted = math.inf  # when Ctrl-C came first
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP):
            ignored = signal.getsignal(number) == signal.SIG_IGN  # by `nohup`, or by a shell in the background
            if not ignored or number in (signal.SIGTERM, signal.SIGUSR1):
                signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self._requested = True
        if number == signal.SIGINT:
            if time.monotonic() - self._interrupted > _ECHO:  # a second Ctrl-C: end at once
                signal.signal(number, signal.SIG_DFL)
                signal.raise_signal(number)
            self._interrupted = min(self._interrupted, time.monotonic())

    def requested(self) -> bool:
        """Of this process alone, at any time."""
        return self._requested

    def agreed(self) -> bool:
        """After each pass, by all processes: had one of them been asked by the end of the pass before?

        One pass late, so that no process waits for a slower one here: the exchange runs beside the pass.
        """
        if self._group is None:
            return self._requested
        if self._work is not None:
            self._work.wait()
        answer = bool(self._flag.item())
        self._flag.fill_(self._requested)
        self._work = dist.all_reduce(self._flag, op=dist.ReduceOp.MAX, group=self._group, async_op=True)
        return answer
