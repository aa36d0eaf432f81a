"""Two nodes that find each other by name, and programs on them: what a launcher or a scheduler needs."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import psutil
from nodes import Cluster, Node


class NamedCluster(Cluster):
    """Each node has an /etc/hosts with both, as a real cluster has one, or a name server."""

    def __enter__(self) -> NamedCluster:
        for node in self.nodes:
            self._hosts(node).parent.mkdir(parents=True)  # `ip netns exec` mounts what lies there over /etc
            lines = [f"{n.address} {n.name}\n" for n in self.nodes]
            self._hosts(node).write_text("".join(["127.0.0.1 localhost\n", *lines]))
        super().__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        for node in self.nodes:
            kill_all(node)
            shutil.rmtree(self._hosts(node).parent, ignore_errors=True)
        super().__exit__(*error)

    @staticmethod
    def _hosts(node: Node) -> Path:
        return Path("/etc/netns", node.namespace, "hosts")


def on(node: Node, *words: str) -> list[str]:
    """The command line that runs these words on this node, under its host name."""
    named = ["unshare", "--uts", "sh", "-c", 'hostname "$0" && exec "$@"', node.name]
    return ["ip", "netns", "exec", node.namespace, *named, *words]


def start(node: Node, *words: str, where: Path, **variables: str) -> subprocess.Popen:
    """Start a program on this node in the folder `where`; what it prints is added to `node.said`."""
    of_threads = ("OMP_NUM_THREADS", "MKL_NUM_THREADS")
    kept = {name: value for name, value in os.environ.items() if name not in of_threads}
    with open(node.disk / "log", "a") as log:
        how = {"env": kept | variables, "cwd": where, "stdout": log, "stderr": log, "start_new_session": True}
        return subprocess.Popen(on(node, *words), **how)


def kill_all(node: Node) -> None:
    """The node is gone: all that runs on it, at once."""
    inside = subprocess.run(["ip", "netns", "pids", node.namespace], capture_output=True, text=True).stdout.split()
    for pid in map(int, inside):
        if psutil.pid_exists(pid):
            psutil.Process(pid).kill()
    for process in node.started:
        process.wait()
