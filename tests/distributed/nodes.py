"""Two nodes on one machine: each has a network and a host name of its own, and shares no file with the other."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

from conftest import ROOT

CLONED = (
    "lars",
    "launch",
    "recipes/alexnet",
    "recipes/train.py",
    "recipes/demo/model.py",
    "recipes/demo/resnet50.yaml",
)
PORT = 29400  # each pair of nodes has networks of its own, so the port is free


def obstacle() -> str:
    """Why this machine cannot play two nodes; empty if it can."""
    if os.name != "posix" or os.geteuid() != 0 or not shutil.which("ip") or not shutil.which("unshare"):
        return "two nodes on one machine need root, `ip` and `unshare`"
    trial = f"lars-trial-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", trial], capture_output=True, text=True)
    if done.returncode == 0:
        subprocess.run(["ip", "netns", "del", trial], check=True)
    return f"no network namespace can be made here: {done.stderr.strip()}" if done.returncode else ""


@dataclass
class Node:
    """A machine by its name, with a clone of this repository and data of its own below `disk`."""

    name: str
    address: str
    namespace: str
    disk: Path
    started: list[subprocess.Popen] = field(default_factory=list)

    @property
    def clone(self) -> Path:
        return self.disk / "clone"

    @property
    def data(self) -> Path:
        return self.clone / "recipes/demo/data"

    @property
    def run(self) -> Path:
        """The run folder of all tests: the same words on the command line, another place on each node."""
        return self.disk / "run"

    @property
    def said(self) -> str:
        """What the processes of the last start printed here."""
        return (self.disk / "log").read_text()

    @property
    def errors(self) -> list[str]:
        return [line for line in self.said.splitlines() if line.startswith("error: ")]

    def set_up(self, data: Path, age: int) -> None:
        """Clone the repository and copy the data, whose files look `age` seconds older than they are."""
        for name in CLONED:
            source, target = ROOT / name, self.clone / name
            target.parent.mkdir(parents=True, exist_ok=True)
            if source.is_dir():
                shutil.copytree(source, target, ignore=shutil.ignore_patterns("__pycache__", "results"))
            else:
                shutil.copyfile(source, target)
        shutil.copytree(data, self.data)
        for file in self.data.iterdir():
            os.utime(file, (time.time() - age,) * 2)

    def start(self, ranks: range, processes: int, master: str, *overrides: str) -> None:
        """Start these ranks of a run, as a launcher would, without its variables for threads."""
        of_threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
        variables = {name: value for name, value in os.environ.items() if name not in of_threads}
        variables |= {"PYTHONPATH": str(self.clone), "GLOO_SOCKET_IFNAME": "veth", "PYTHONDONTWRITEBYTECODE": "1"}
        variables |= {"WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(len(ranks))}
        variables |= {"MASTER_ADDR": master, "MASTER_PORT": str(PORT)}
        train = [sys.executable, "clone/recipes/train.py", "--config", "clone/recipes/demo/resnet50.yaml"]
        train += [*overrides, "run_dir=run"]
        named = ["sh", "-c", 'hostname "$0" && exec "$@"', self.name, *train]
        self.started = []
        with open(self.disk / "log", "w") as log:
            for local, rank in enumerate(ranks):
                own = variables | {"RANK": str(rank), "LOCAL_RANK": str(local)}
                command = ["ip", "netns", "exec", self.namespace, "unshare", "--uts", *named]
                how = {"env": own, "cwd": self.disk, "stdout": log, "stderr": log, "start_new_session": True}
                self.started.append(subprocess.Popen(command, **how))

    def wait_for_checkpoint(self, seconds: float = 240) -> None:
        """Until this node, which must be rank 0's, has saved a checkpoint and gone on for two steps."""
        end = time.monotonic() + seconds
        while not self._has_gone_on():
            alive = all(process.poll() is None for process in self.started)
            assert alive and time.monotonic() < end, f"{self.name} saved nothing, or ended: {self.said}"
            time.sleep(0.02)

    def _has_gone_on(self) -> bool:
        steps = [int(folder.name.removeprefix("step-")) for folder in (self.run / "checkpoints").glob("step-*")]
        return bool(steps) and f'"step": {min(steps) + 2},' in (self.run / "metrics.jsonl").read_text()

    def kill(self) -> None:
        """All its processes at once, the ranks' own children too."""
        for process in self.started:
            try:
                os.killpg(process.pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        for process in self.started:
            process.wait()

    def wait(self, seconds: float = 240) -> list[int]:
        """Exit statuses in order of rank; negative for a signal."""
        end = time.monotonic() + seconds
        try:
            return [process.wait(max(0.1, end - time.monotonic())) for process in self.started]
        except subprocess.TimeoutExpired:
            raise AssertionError(f"{self.name} still runs after {seconds} s: {self.said}") from None

    def listing(self) -> dict[str, bytes | None]:
        """All that the disk holds, but for the log: {path: contents, None for a folder}."""
        found = {str(p.relative_to(self.disk)): p.read_bytes() if p.is_file() else None for p in self.disk.rglob("*")}
        return {name: content for name, content in found.items() if name != "log"}


class Cluster:
    """`worker-a` and `worker-b`, joined by one cable; made new for each test that asks, ended with it."""

    def __init__(self, folder: Path, data: Path, tag: str) -> None:
        self.a, self.b = (
            Node(f"worker-{letter}", f"10.77.1.{number}", f"lars-{letter}-{tag}", folder / f"disk-of-{letter}")
            for number, letter in enumerate("ab", 1)
        )
        self.nodes = (self.a, self.b)
        for age, node in enumerate(self.nodes, 1):
            node.set_up(data, age=3600 * age)

    def __enter__(self) -> Cluster:
        try:
            for node in self.nodes:
                _ip("netns", "add", node.namespace)
            ends = [("name", "veth", "netns", node.namespace) for node in self.nodes]
            _ip("link", "add", *ends[0], "type", "veth", "peer", *ends[1])
            for node in self.nodes:
                _ip("-n", node.namespace, "address", "add", f"{node.address}/24", "dev", "veth")
                for device in ("lo", "veth"):
                    _ip("-n", node.namespace, "link", "set", device, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *error: object) -> None:
        for node in self.nodes:
            node.kill()
            subprocess.run(["ip", "netns", "del", node.namespace], capture_output=True)

    def start(self, *overrides: str, first: Node | None = None, on_b: tuple[str, ...] = (), per_node: int = 1) -> None:
        """The same command on both, rank 0 on `first` (worker-a); `on_b` are overrides that only worker-b has."""
        first = first or self.a
        order = (first, self.b if first is self.a else self.a)
        for place, node in enumerate(order):
            ranks = range(place * per_node, (place + 1) * per_node)
            node.start(ranks, 2 * per_node, first.address, *overrides, *(on_b if node is self.b else ()))

    def cut(self) -> None:
        """Pull the cable: no process hears that a connection has ended."""
        _ip("-n", self.a.namespace, "link", "set", "veth", "down")

    def mend(self) -> None:
        """Put the cable back."""
        _ip("-n", self.a.namespace, "link", "set", "veth", "up")

    def wait(self, seconds: float = 240) -> list[int]:
        """Exit statuses, worker-a's first."""
        return self.a.wait(seconds) + self.b.wait(seconds)

    @property
    def said(self) -> str:
        return "".join(f"--- {node.name}\n{node.said}" for node in self.nodes)


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"ip {' '.join(words)}: {done.stderr.strip()}")
