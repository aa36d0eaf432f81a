"""`python -m tests.benchmarks.wire [--json]`: the exchange of ResNet-50's gradient between two nodes on a slow wire.

Two network namespaces of this machine, joined by a pair of interfaces that `tc` holds to 1 and to 10 Gbit/s; a process
each. The ways are those of `reduction.py`, in turns. Needs root, `ip` and `tc`.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from importlib.metadata import version

from lars.exact.portable import cpu
from tests.benchmarks.reduction import ELEMENTS, exchange  # it makes `distributed` known

from distributed.nodes import obstacle  # isort: skip

RATES = ("1gbit", "10gbit")
NODES = ("lars-wire-0", "lars-wire-1")


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)


def lay(rate: str) -> None:
    """Both namespaces, and a wire of that rate between them."""
    for node in NODES:
        ip("netns", "add", node)
    ip("link", "add", "wire0", "netns", NODES[0], "type", "veth", "peer", "name", "wire1", "netns", NODES[1])
    for number, node in enumerate(NODES):
        inside = ["netns", "exec", node]
        ip("-n", node, "addr", "add", f"10.77.0.{number + 1}/24", "dev", f"wire{number}")
        ip("-n", node, "link", "set", f"wire{number}", "up")
        ip("-n", node, "link", "set", "lo", "up")
        shape = ["root", "tbf", "rate", rate, "burst", "10mb", "latency", "400ms"]
        ip(*inside, "tc", "qdisc", "add", "dev", f"wire{number}", *shape)


def measure(rate: str) -> dict[str, float]:
    """{way: milliseconds} at that rate."""
    try:
        lay(rate)
        command = [sys.executable, "-m", "tests.benchmarks.wire", "--rank"]
        nodes = [
            subprocess.Popen(
                ["ip", "netns", "exec", node, *command, str(rank)],
                stdout=subprocess.PIPE,
                env={**os.environ, "GLOO_SOCKET_IFNAME": f"wire{rank}"},
            )
            for rank, node in enumerate(NODES)
        ]
        told = [node.communicate()[0] for node in nodes]
        if any(node.returncode for node in nodes):
            raise RuntimeError(f"a node of the wire of {rate} failed")
        return json.loads(told[0])
    finally:
        for node in NODES:
            subprocess.run(["ip", "netns", "del", node])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.rank is not None:
        print(json.dumps(exchange(args.rank, len(NODES), "tcp://10.77.0.1:29600")))
        return
    if why := obstacle():
        sys.exit(f"error: {why}")
    machine = {"cpu": cpu()[0], "torch": version("torch"), "load": os.getloadavg()}
    found = {"machine": machine, "elements": ELEMENTS, "rates": {rate: measure(rate) for rate in RATES}}
    if args.json:
        print(json.dumps(found, indent=1))
        return
    for rate, ways in found["rates"].items():
        print(f"{rate}: " + ", ".join(f"{way} {ms:,.0f} ms" for way, ms in ways.items()))


if __name__ == "__main__":
    main()
