"""What the processes of a run tell each other: counted at 2 to 32 processes, and simulated for up to 2,048.

    make scale

It writes scale.json beside this file and the table of docs/clusters.md. Counted are the bytes that each rank of a real
run has sent into its gloo sockets, as the kernel tells (TCP_INFO). Simulated is the same code in one process:
`Simulated` stands in for `Peers` and writes down what W processes would exchange. Its prices are those of gloo's
algorithms, which the counted runs check; seconds follow from a network that the table names. What NCCL does with the
gradients on GPUs is no part of it.
"""

from __future__ import annotations

import json
import math
import os
import pickle
import socket
import struct
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import nullcontext, redirect_stdout
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import DEMO, ROOT, start_ranks, tiny_overrides
from torch import Tensor

import recipes.train as train
from lars.commands.tables import markdown, replace_marked
from lars.data.footers import Footer
from lars.data.index import Index
from lars.recipe import config
from lars.recipe.launched import Launched
from lars.run import signals
from lars.run.peers import Peers

COUNTED = (2, 4, 8, 16, 32)
SIMULATED = (8, 64, 512, 2048)
# 32 passes of 4 images: one process plays as few as one.
TINY = ("global_batch=128", "runtime.micro_batch=4", "data.workers=1")
STEPS = 2
LATENCY, BANDWIDTH = 50e-6, 1.25e9  # seconds a message, bytes a second: TCP over 10 Gbit/s Ethernet
# gloo puts 48 bytes before what it sends, once more to say that it is about to, and the receiver answers with 48.
HEADS, ANSWER = 96, 48


class Price(NamedTuple):
    """Of one exchange."""

    most: float  # bytes that the busiest process sends
    all: float  # that all processes send together
    hops: int  # messages that follow one another

    @property
    def seconds(self) -> float:
        return self.hops * LATENCY + self.most / BANDWIDTH


def all_gather(size: int, processes: int) -> Price:
    """gloo's ring: a value passes every process, in two parts."""
    sent = (processes - 1) * (size + 2 * (HEADS + ANSWER))
    return Price(sent, processes * sent, processes - 1)


def all_reduce(size: int, processes: int) -> Price:
    """gloo's ring: 2 W segments of whole int64 numbers (fewer of a short vector) go round twice."""
    segment = 8 * math.ceil(size / 8 / (2 * processes))
    sent = 2 * (processes - 1) / processes * (size + math.ceil(size / segment) * (HEADS + ANSWER))
    return Price(sent, processes * sent, 2 * (processes - 1))


def broadcast(size: int, processes: int) -> Price:
    """gloo's binomial tree: the source sends to ceil(log2 W) others."""
    rounds = (processes - 1).bit_length()
    return Price(rounds * (size + HEADS), (processes - 1) * (size + HEADS + ANSWER), rounds)


def vote(processes: int) -> Price:
    """`lars/run/vote.py`: a byte to one process and an answer to another, in each round."""
    rounds = (processes - 1).bit_length()
    sent = rounds * (1 + HEADS + ANSWER)
    return Price(sent, processes * sent, rounds)


def sockets(processes: int) -> int:
    """Of a process to others: distances 1, 2, 4, ... both ways for votes, a ring for gradients, two to the store."""
    distances = [2**k for k in range((processes - 1).bit_length())]
    return len({sign * d % processes for d in distances for sign in (1, -1)}) + len({1, processes - 1}) + 2


class Simulated(Peers):
    """Rank 0 of so many processes that all hold what it holds; each exchange is put down under the present `phase`."""

    def __init__(self, processes: int) -> None:
        self.rank, self.processes, self.group, self.leads_node = 0, processes, None, True
        self.phase, self.prices = "start", defaultdict(list)
        self.nodes = self.gather(socket.gethostname())

    def gather(self, value: Any) -> list[Any]:
        self._pay(all_gather(8, self.processes), all_gather(len(pickle.dumps(value)), self.processes))
        return [value] * self.processes

    def largest(self, values: np.ndarray) -> np.ndarray:
        self._pay(all_reduce(values.nbytes, self.processes))
        return values

    def broadcast(self, value: Any, source: int = 0) -> Any:
        self._pay(broadcast(8, self.processes), broadcast(len(pickle.dumps(value)), self.processes))
        return value

    def broadcast_tensors(self, tensors: dict[str, Tensor] | None, source: int) -> dict[str, Tensor]:
        self.broadcast([(name, t.shape, t.dtype) for name, t in tensors.items()], source)
        self._pay(*(broadcast(t.nbytes, self.processes) for t in tensors.values()))
        return tensors

    def part(self) -> None:
        pass

    def _pay(self, *prices: Price) -> None:
        self.prices[self.phase] += prices

    def total(self, phase: str) -> Price:
        return Price(*map(sum, zip(*self.prices[phase]))) if self.prices[phase] else Price(0, 0, 0)


def simulate(processes: int, recipe_file: Path, overrides: tuple[str, ...], indexes: tuple[Index, Index] | None = None):
    """A start, a step, a checkpoint and a resume: {phase: Price}. Nothing is trained."""
    recipe = config.load(recipe_file, list(overrides))
    watchdog = SimpleNamespace(at=None, end=lambda: None, leave=lambda reason: None)
    here = mock.patch.multiple(train, Watchdog=lambda *_: watchdog)
    nobody = mock.patch.multiple(signals, Vote=lambda peers: None)
    known = mock.patch("lars.commands.preflight.build_indexes", lambda *_: indexes)
    phases = {}
    with here, nobody, known if indexes else nullcontext():
        for phase in ("start", "resume"):
            peers = Simulated(processes)
            peers.phase = phase
            launched = Launched.read(recipe)
            checked = train.preflight(recipe, launched.engine, 1)
            run = train.Training(recipe, recipe_file, launched, peers)
            peers.gather(None)  # the watchdog waits for everybody's first sign
            run.setup(peers.broadcast(checked))
            phases[phase] = peers.total(phase)
            if phase == "start":
                peers.phase = "checkpoint"
                for parameter in run.model.parameters():
                    parameter.grad = parameter.detach().clone()
                run.engine.step(0.0, 1)  # so that there is momentum to save
                run.save()
                run.writer.wait(needed=True)
                phases["checkpoint"] = peers.total("checkpoint")
                passes = -(-checked.plan.passes // processes)
                step = [vote(processes)] * passes + [all_reduce(run.sums.total.nbytes, processes)]
                phases["step"] = Price(*map(sum, zip(*step)))
                phases["votes"] = Price(*(passes * part for part in vote(processes)))
            run.cleanup()
    return phases


# --- counted ----------------------------------------------------------------------------------------------------------


_sent: dict[str, int] = {}  # of each socket that there was: a process that has ended takes its own with it


def sent() -> tuple[int, int]:
    """Sockets to other processes that this one holds, and bytes that it has sent through those of gloo."""
    store, found = int(os.environ["MASTER_PORT"]), 0
    for number in os.listdir("/proc/self/fd"):
        try:
            if not (name := os.readlink(f"/proc/self/fd/{number}")).startswith("socket:"):
                continue
            end = socket.socket(fileno=os.dup(int(number)))
        except OSError:
            continue
        with end:
            if end.family not in (socket.AF_INET, socket.AF_INET6) or end.type != socket.SOCK_STREAM:
                continue
            told = end.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 232)
            if told[0] != 1 or end.getsockname()[1] == store:  # not connected, or the store's own end
                continue
            found += 1
            if end.getpeername()[1] != store:
                _sent[name] = struct.unpack_from("Q", told, 200)[0]  # tcpi_bytes_sent
    return found, sum(_sent.values())


def count(folder: str) -> None:
    """In a rank: write down what it has sent when a phase is over."""
    told: dict[str, Any] = {"at": 0}

    def after(name: str, action: Callable) -> Callable:
        def counted(*arguments: Any, **named: Any) -> Any:
            before = sent()[1] if told["at"] else 0
            result = action(*arguments, **named)
            time.sleep(0.5)  # the last vote travels beside the pass
            found, now = sent()
            told.setdefault(name, []).append(now - before)
            told.update(at=now, sockets=found)
            (Path(folder) / os.environ["RANK"]).write_text(json.dumps(told))
            return result

        return counted

    train.Training.setup = after("start", train.Training.setup)
    train.Training.train_step = after("step", train.Training.train_step)
    train.Training.save = after("checkpoint", train.Training.save)


def counted(processes: int, overrides: tuple[str, ...], folder: Path) -> dict[str, dict[str, float]]:
    """{phase: bytes of the busiest process and of all} of a run that starts, saves, and starts again; its sockets."""
    found: dict[str, Any] = {}
    for phase, steps in (("start", STEPS), ("resume", STEPS + 1)):
        place = folder / phase
        place.mkdir(parents=True)
        how = (*overrides, f"max_steps={steps}", f"run_dir={folder / 'run'}")
        ranks = start_ranks(
            processes, DEMO / "resnet50.yaml", *how, log=folder / f"{phase}.log", first=partial(count, str(place))
        )
        statuses = ranks.wait(900)
        assert statuses == [0] * processes, ranks.output
        told = [json.loads((place / str(rank)).read_text()) for rank in range(processes)]
        bytes_of = {name: [rank[name][-1] for rank in told] for name in ("start", "step", "checkpoint")}
        if phase == "start":
            found |= {name: {"most": max(sizes), "all": sum(sizes)} for name, sizes in bytes_of.items()}
            found["sockets"] = max(rank["sockets"] for rank in told)
        else:
            found["resume"] = {"most": max(bytes_of["start"]), "all": sum(bytes_of["start"])}
    return found


# --- ImageNet ---------------------------------------------------------------------------------------------------------


def imagenet(files: int, rows: int, per_group: int) -> Index:
    """An index of the size of a split of ImageNet as the Hub has it."""
    groups = -(-rows // per_group)
    numbers = np.arange(groups)
    sizes = np.full(groups, per_group)
    sizes[-1] = rows - per_group * (groups - 1)
    names = tuple(f"/data/imagenet-1k/data/train-{n:05d}-of-{files:05d}.parquet" for n in range(files))
    spans = np.stack([numbers, numbers + 1], axis=1)
    footers = tuple(Footer.of(name.encode()) for name in names)
    states = tuple("500000000 1700000000000000000" for _ in names)
    memory = np.full(groups, per_group * 110_000)
    return Index(
        names, numbers * files // groups, numbers, sizes, "0" * 64, spans, footers, states, 90.0, "/data", memory
    )


def main() -> dict[str, Any]:
    found: dict[str, Any] = {"counted": {}, "simulated": {}, "latency": LATENCY, "bandwidth": BANDWIDTH}
    commit = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    found["commit"] = subprocess.run(commit, cwd=ROOT, capture_output=True, text=True).stdout.strip()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        (folder / "data").mkdir()
        overrides = (*tiny_overrides(folder / "data"), *TINY)
        for processes in COUNTED:
            told = counted(processes, overrides, folder / f"counted-{processes}")
            expected = simulate(processes, DEMO / "resnet50.yaml", (*overrides, f"run_dir={folder / f's{processes}'}"))
            found["counted"][processes] = told | {"simulated": {k: v._asdict() for k, v in expected.items()}}
            print(processes, told, expected, sockets(processes), file=sys.stderr, flush=True)
        indexes = imagenet(294, 1_281_167, 100), imagenet(14, 50_000, 100)
        big = ROOT / "recipes" / "resnet50" / "lars-b32k-90ep.yaml"
        for processes in SIMULATED:
            overrides = (
                "data.path=/data",
                "bn_group=16",
                "runtime.micro_batch=16",
                f"run_dir={folder / f'big{processes}'}",
            )
            phases = simulate(processes, big, overrides, indexes)
            found["simulated"][processes] = {
                name: price._asdict() | {"seconds": price.seconds} for name, price in phases.items()
            } | {"sockets": sockets(processes)}
    return found


def table(simulated: dict[str, dict[str, Any]]) -> str:
    """The table of docs/clusters.md: a line for each number of processes."""
    head = ["processes", "sockets of one", *(f"{what}: messages, MB, s" for what in ("start", "resume", "checkpoint"))]
    rows = [
        [f"{int(processes):,}", str(told["sockets"])]
        + [
            f"{told[name]['hops']:,}, {told[name]['most'] / 1e6:,.1f}, {told[name]['seconds']:.2f}"
            for name in ("start", "resume", "checkpoint")
        ]
        + [f"{told['votes']['hops']}, {told['votes']['most'] / 1e3:.1f} kB, {told['votes']['seconds'] * 1e3:.1f} ms"]
        for processes, told in simulated.items()
    ]
    return markdown([*head, "votes of a step: messages, bytes, time"], rows)


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):
        found = main()
    Path(__file__).with_suffix(".json").write_text(json.dumps(found, indent=1) + "\n")
    page = ROOT / "docs/clusters.md"
    page.write_text(replace_marked(page.read_text(), "scale", table(found["simulated"])))
