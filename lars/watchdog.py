"""Naming the process that hangs: without it a run whose rank 17 stands still says nothing for half an hour."""
from __future__ import annotations

import json
import math
import os
import sys
import threading
import time
from collections.abc import Callable

import torch.distributed as dist


class Watchdog:
    """A thread in every process that ends the run when no process has moved for a while, and says which one is behind.

    Each process writes where it stands to torch's store (at most once a second). One that has not moved for `seconds`
    looks at all the others: those that wait in an exchange stand in front of the one they wait for.
    """

    def __init__(self, rank: int, processes: int, seconds: float, give_up: Callable[..., None]) -> None:
        self.rank, self.processes, self.seconds, self.give_up = rank, processes, seconds, give_up
        self.place, self.moved = (0, 0), math.inf  # nothing is late before the first pass: an engine may take its time to start
        self.ended = threading.Event()
        self.thread = None
        if processes > 1:
            # a client of its own: the main thread may hold the group's one while it waits
            store = dist.distributed_c10d._get_default_store().clone()
            self.store = dist.PrefixStore("watchdog", store)
            self.thread = threading.Thread(target=self._watch, daemon=True)
            self.thread.start()

    def at(self, step: int, part: int) -> None:
        """The main thread has come to a pass (or a part of an evaluation) of a step."""
        self.place, self.moved = (step, part), time.monotonic()

    def end(self) -> None:
        self.ended.set()
        if self.thread:
            self.thread.join()

    def _watch(self) -> None:
        while not self.ended.wait(min(1.0, self.seconds / 4)):
            try:
                self.store.set(str(self.rank), json.dumps(self.place))
                if time.monotonic() - self.moved > self.seconds:
                    self._complain()
            except Exception:  # the store ends with the launcher, and the launcher ends the ranks
                return

    def _complain(self) -> None:
        places = {}
        for rank in range(self.processes):
            known = self.store.check([str(rank)])
            places[rank] = tuple(json.loads(self.store.get(str(rank)))) if known else (0, 0)
        first = min(places.values())
        behind = [rank for rank, place in places.items() if place == first]
        who = f"rank {behind[0]}" if len(behind) == 1 else f"ranks {', '.join(map(str, behind[:8]))}"
        message = f"no process has moved for {self.seconds:g} s; {who} of {self.processes} came no further than step {first[0] + 1}, pass {first[1]}"
        if self.store.add("complaints", 1) == 1:
            print(f"error: {message}", file=sys.stderr, flush=True)
        self.give_up(error=message)
        os._exit(1)
