"""Names the process that is gone or hangs: without it a run whose rank 17 stands still is silent for half an hour."""

from __future__ import annotations

import json
import os
import re
import sys
import threading
from collections.abc import Callable, Iterable
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist

from lars.recipe.keys import Runtime
from lars.run.peers import Peers, aside

GONE_AFTER = 30  # ticks (seconds) without a sign of life: a machine without power closes no connection
_AT_ONCE = 4  # ticks that are enough once an exchange has failed
_ANSWER = 5.0  # seconds that torch's store has for an answer
_QUIET = 5  # ticks without a pass, after which a process begins to look at the others
_EACH_OTHER = 64  # processes that all look at all; of more, the first and the last do, and the others look at these two
_COMMUNICATION = re.compile("gloo|nccl|connection|socket|timed? ?out", re.IGNORECASE)


class Watchdog:
    """A thread in every process that ends the run when a process is gone, or when none has moved for a while.

    Each process writes a count and where it stands to torch's store, once a second. Time is counted in these ticks, not
    by the clock, so that a suspended machine does not find itself late. One that has not moved for `seconds` looks at
    all others: those that wait in an exchange are ahead of the one they wait for. A single process looks at itself.

    Looking costs the store a request of a process and second, and W answers. So of many processes only two look at all.
    """

    def __init__(self, peers: Peers, runtime: Runtime, give_up: Callable[..., None]) -> None:
        self.peers, self.seconds, self.give_up = peers, runtime.hang_seconds, give_up
        self.compiles, self.first = runtime.compile, None  # the first step compiles, for as long as that takes
        self.tick = min(1.0, self.seconds / 4)
        self.watch_over(peers.processes)
        self.ticks, self.moved = 0, 0  # own ticks so far, and when the main thread last moved
        self.started = False  # no process hangs before its first pass: an engine may take its time to start
        self.place, self.reason = (0, 0), ""  # why this process ends, once it does
        self.seen: dict[int, tuple[list, int]] = {}  # rank -> its last sign of life, and my tick when it was new
        self.store_lost_at: int | None = None
        self.talking, self.question = threading.Lock(), None  # the last one that was put to the store
        self.asked, self.ended = threading.Event(), threading.Event()
        self.store = None
        if peers.processes > 1:
            # a client of its own: the main thread may hold the group's one while it waits
            store = dist.distributed_c10d._get_default_store().clone()
            store.set_timeout(timedelta(seconds=10))
            self.store = dist.PrefixStore("watchdog", store)
            self._sign()
            peers.gather(None)  # from here on there is a sign of everybody
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def watch_over(self, processes: int) -> None:
        """Whether this process observes all of so many, and whose signs it looks at."""
        observers = {0, processes - 1}
        self.observes = self.peers.rank in observers or processes <= _EACH_OTHER
        self.watched = sorted((set(range(processes)) if self.observes else observers) - {self.peers.rank})

    def at(self, step: int, part: int) -> None:
        """The main thread has come to a pass (or a part of an evaluation) of a step."""
        self.first = step if self.first is None else self.first
        self.place, self.moved, self.started = (step, part), self.ticks, not self.compiles or step > self.first

    def end(self) -> None:
        self.ended.set()
        self.thread.join()

    def leave(self, reason: str) -> None:
        """Tell the others why this process ends before they do."""
        self.reason = reason
        if self.store:
            with suppress(Exception):  # the store is gone, and with it whoever would read this
                self._sign()

    def blame(self, error: BaseException) -> str | None:
        """Who is gone, if this error is of an exchange that another process left; it takes some seconds to tell."""
        if not self.store or not isinstance(error, RuntimeError) or not _COMMUNICATION.search(f"{type(error)} {error}"):
            return None
        self.asked.set()
        started = self.ticks
        while self.ticks - started <= 2 * _AT_ONCE and self.thread.is_alive():
            if who := self._gone(_AT_ONCE):
                return who
            self.ended.wait(self.tick)
        return None

    def _watch(self) -> None:
        while not self.ended.wait(self.tick):
            self.ticks += 1
            try:
                if self.store:
                    self._sign()
                self.store_lost_at = None
            except Exception:
                self.store_lost_at = self.store_lost_at or self.ticks
            late = self.ticks - self.moved
            if self.asked.is_set() or late < _QUIET:
                continue
            if self.store and (who := self._gone(GONE_AFTER)):
                self._complain(who)
            patience = 0 if self.observes else 2 * _AT_ONCE  # for the observers to say it first
            if self.started and (late - patience) * self.tick > self.seconds:
                self._complain(self._behind())

    def _gone(self, after: int) -> str | None:
        """A process without a sign of life for so many of my ticks, or one that has said why it ended."""
        try:
            if self._ask("check", ["verdict"]):
                return self._ask("get", "verdict").decode()
            who = self._silent(after)
            return self._ask("compare_set", "verdict", "", who).decode() if who else None
        except Exception:  # it lies with rank 0, or with its launcher
            lost_at = self.store_lost_at = self.store_lost_at or self.ticks
            return f"{self.peers.name(0)}, or its launcher, is gone" if self.ticks - lost_at >= after else None

    def _silent(self, after: int) -> str | None:
        for rank, sign in zip(self.watched, self._signs(self.watched)):
            if reason := sign[3]:
                return f"{self.peers.name(rank)} has ended ({reason})"
            if sign != self.seen.get(rank, (None, 0))[0]:
                self.seen[rank] = sign, self.ticks
        silent = [rank for rank in self.watched if self.ticks - self.seen[rank][1] >= after]
        if not silent:
            return None
        nodes = ", ".join(list(dict.fromkeys(self.peers.nodes[rank] for rank in silent))[:4])
        return f"{_ranks(silent)} on {nodes} {'are' if len(silent) > 1 else 'is'} gone or stopped"

    def _behind(self) -> str:
        everybody = range(self.peers.processes)
        places = [tuple(sign[1:3]) for sign in self._signs(everybody)] if self.store else [self.place]
        first = min(places)
        last = _ranks([rank for rank, place in enumerate(places) if place == first])
        who, where = f"{last} of {self.peers.processes}", f"step {first[0] + 1}, pass {first[1]}"
        return f"no process has moved for {self.seconds:g} s; {who} came no further than {where}"

    def _sign(self) -> None:
        self._ask("set", f"alive {self.peers.rank}", json.dumps([self.ticks, *self.place, self.reason]))

    def _signs(self, ranks: Iterable[int]) -> list[list]:
        """Of each of these processes: its ticks, step, pass, and why it has ended, if it has."""
        return [json.loads(sign) for sign in self._ask("multi_get", [f"alive {rank}" for rank in ranks])]

    def _ask(self, what: str, *words: Any) -> Any:
        """A call of torch's store, from a thread of its own: where a cable is pulled neither answer nor error comes.

        Raises:
            ConnectionError: the store has not answered the call before.
            TimeoutError: it does not answer this one.
        """
        with self.talking:
            if self.question and not self.question.done():
                raise ConnectionError("torch's store does not answer")
            self.question = aside(lambda: getattr(self.store, what)(*words))
            return self.question.result(_ANSWER)

    def _complain(self, what: str) -> None:
        message = self.say(what)
        self.give_up(error=message)
        os._exit(1)

    def say(self, what: str) -> str:
        """Print it, once in all, and return it as an error for the run's result."""
        message = f"{what}: start the same command again to go on from the last checkpoint"
        try:
            first = self._ask("add", "complaints", 1) == 1
        except Exception:
            first = self.peers.leads_node
        if first:
            print(f"error: {message}", file=sys.stderr, flush=True)
        return message


def _ranks(ranks: list[int]) -> str:
    return f"rank{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks[:8]))}{' ...' * (len(ranks) > 8)}"
