"""Stopping in order: a signal asks a run to drop the step under way, save the last finished one and end."""

from __future__ import annotations

import math
import signal
import time

from lars.run.peers import Peers
from lars.run.vote import Vote

EXIT_STOPPED = 75  # sysexits.h EX_TEMPFAIL: start the same command again to go on
_ECHO = 1.0  # seconds in which a SIGINT is the same Ctrl-C, come by way of the launcher too


def interrupts_end_at_once() -> None:
    """Until there is something to save, a Ctrl-C ends a script without a traceback, as SIGTERM does."""
    if signal.getsignal(signal.SIGINT) != signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.SIG_DFL)


class StopRequest:
    """Whether any process was asked to stop. All of them learn of it at the same pass, on every engine."""

    def __init__(self, peers: Peers) -> None:
        self._requested = False
        self._vote = Vote(peers)
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
        """After each pass, by all processes: had one of them been asked by the end of the pass before?"""
        return self._vote.cast(self._requested)
