"""Stopping in order: SIGTERM and SIGUSR1 ask a run to drop the step under way, save the last finished one and end."""
from __future__ import annotations

import signal

EXIT_STOPPED = 75  # sysexits.h EX_TEMPFAIL: start the same command again to go on


class StopRequest:
    """Whether this process was asked to stop. The ranks agree on it because it is summed with the gradient."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._ask)

    def _ask(self, number: int, frame: object) -> None:
        self.asked = True
