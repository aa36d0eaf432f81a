"""Who is there? The processes of a launch meet at torch's store within seconds, or say why they cannot.

A run gives its processes half an hour to come, and meets over gloo or NCCL, which can wait without a word. Here every
process claims its rank at the address of the launch, all within `COME` seconds, and reports what it has found there.
"""

from __future__ import annotations

import errno
import ipaddress
import json
import os
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import timedelta
from typing import Any

import psutil
import torch.distributed as dist

from lars.commands.claims import Claim, faults_of
from lars.recipe.launched import place
from lars.recipe.refusal import RecipeError, one_line

COME = 25.0  # seconds from the first process's start to the last one's claim
REPORT = 30.0  # seconds for what all are asked to do at the same time
_KNOCK = 3.0  # seconds for a connection between two nodes
_ANSWER = 5.0  # seconds for the store to answer once its port is open


class RollCall:
    """The meeting of all processes of a launch, or of this process alone where no launcher started it."""

    def __init__(self) -> None:
        """Begin to connect, in the background.

        Raises:
            Alone: the launcher's numbers make no sense.
        """
        told = place()
        self.began, self.host = time.monotonic(), socket.gethostname()
        self.rank, self.processes = told.get("RANK", 0), told.get("WORLD_SIZE", 1)
        self.local_rank, self.local_processes = told.get("LOCAL_RANK", 0), told.get("LOCAL_WORLD_SIZE", 1)
        self.several_nodes = self.processes > self.local_processes
        self.leads_node = self.local_rank == 0
        self.turn = 1  # 2 or more: another process has claimed this rank before
        self.claims: list[Claim] = []  # known to the speaker
        self.address, self.port = os.environ.get("MASTER_ADDR", ""), told.get("MASTER_PORT", 0)
        self.store: dist.Store | None = None if told else dist.HashStore()
        self.why, self.interface = "", ""  # why there is no meeting; the network that leads to it
        self.serves = False  # whether the store is this process's
        self.door: socket.socket | None = None  # where others try to connect
        self.thread = threading.Thread(target=self._connect, daemon=True)
        self.thread.start()

    @property
    def speaks(self) -> bool:
        """Whether this process tells the user what all have found."""
        return self.rank == 0 and self.turn == 1

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"

    def meet(self) -> tuple[list[str], list[str]]:
        """Claim the rank; what the speaker finds wrong with all claims, and what is wrong with this process's address.

        Raises:
            RecipeError: this process cannot meet the others.
        """
        self.thread.join(max(0.0, self.began + COME + _ANSWER - time.monotonic()))
        if self.store is None:
            mute = f"whoever listens at {self.address}:{self.port} does not answer as torch's store does"
            raise RecipeError(self.why or f"{mute}: give a port that nobody else uses")
        address, fault = self._own_address()
        with suppress(OSError):  # an address that is not here: others will say that they cannot reach it
            family = socket.AF_INET6 if ":" in address else socket.AF_INET
            self.door = socket.create_server((address, 0), family=family, backlog=1024)
        self.turn = self.store.add(f"claims of {self.rank}", 1)
        port = self.door.getsockname()[1] if self.door else 0
        numbers = (self.rank, self.processes, self.local_rank, self.local_processes)
        claim = Claim(*numbers, self.host, _boot(), os.getpid(), address, port)
        self.store.set(f"claim {self.rank} {self.turn}", json.dumps(claim))
        self.store.add("all", 1)
        if self.speaks:
            faults = self._call()
            self.tell("doors", [c for c in self.claims if c.local_rank == 0])
        else:
            faults = []
        return faults, [fault] * bool(fault)

    def knock(self) -> list[str]:
        """Connect to one process of each other node, as gloo and NCCL do; the nodes that cannot be reached."""
        doors = [Claim(*door) for door in self.hear("doors", COME + REPORT)]
        if not self.leads_node or self.turn > 1:
            return []
        # A node whose address is on loopback has said so itself.
        others = [door for door in doors if door.host != self.host and not _is_loopback(door.address)]

        def trial(door: Claim) -> str:
            try:
                socket.create_connection((door.address, door.port), _KNOCK).close()
                return ""
            except OSError as error:
                return (
                    f"cannot connect to {door.host} at {door.address}, port {door.port} ({one_line(error)})"
                    ": gloo and NCCL take any port that is free, so open all ports between the nodes, both ways"
                )

        with ThreadPoolExecutor(16) as pool:
            return list(filter(None, pool.map(trial, others)))

    def tell(self, what: str, value: Any) -> None:
        self.store.set(what, json.dumps(value))

    def hear(self, what: str, seconds: float) -> Any:
        """What the speaker tells all.

        Raises:
            RecipeError: nothing within so many seconds.
        """
        end = time.monotonic() + seconds
        try:
            while not self.store.check([what]):
                if time.monotonic() > end:
                    raise RecipeError(f"rank 0 has said nothing for {seconds:.0f} s: was it started, and does it live?")
                time.sleep(0.05)
            return json.loads(self.store.get(what))
        except dist.DistError as error:
            raise RecipeError(f"rank 0 is gone ({one_line(error)}): it has said why, or was killed") from None

    def reports(self, what: str) -> tuple[dict[int, Any], list[str]]:
        """{rank: what it reported} of those who came, and a fault for each who did not within `REPORT` seconds."""
        end, found, late = time.monotonic() + REPORT, {}, []
        for claim in self.claims:
            key = f"{what} {claim.rank}"
            while not self.store.check([key]) and time.monotonic() < end:
                time.sleep(0.05)
            if self.store.check([key]):
                found[claim.rank] = json.loads(self.store.get(key))
            else:
                said = f"came, but has not reported its {what} in {REPORT:.0f} s: see what it says there"
                late.append(f"{claim.name} {said}")
        return found, late

    def end(self, status: int) -> int:
        """The speaker's exit status, for all; whoever holds the store stays until they have it."""
        if self.speaks:
            self.tell("status", status)
        else:
            status = self.hear("status", COME + 2 * REPORT)
        with suppress(dist.DistError):  # one that is too slow for that has the status already
            end = time.monotonic() + _ANSWER
            heard = self.store.add("heard", 1)
            while self.serves and heard < self.store.add("all", 0) and time.monotonic() < end:
                time.sleep(0.05)
                heard = self.store.add("heard", 0)
        return status

    def _connect(self) -> None:
        """Find the store, or write into `why` what is in the way."""
        if self.store is not None:
            return
        end = self.began + COME
        try:
            found = {str(entry[4][0]) for entry in socket.getaddrinfo(self.address, self.port)}
        except (OSError, UnicodeError) as error:
            self.why = (
                f"MASTER_ADDR={self.address} has no address on {self.host} ({one_line(error)}): name a machine that "
                "all nodes know"
            )
            return
        self.interface = next(filter(None, map(_interface_of, found)), "")
        if self.several_nodes and self.rank != self.local_rank and all(map(_is_loopback, found)):
            self.why = (
                f"MASTER_ADDR={self.address} is {', '.join(sorted(found))} on {self.host}, which is {self.host} itself "
                "and not the node of rank 0: give a name or an address at which all nodes find that node"
            )
            return
        hosts = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        where = (self.address, self.port, None)
        if hosts and self._serve(where):
            return
        while True:
            try:
                with socket.create_connection((self.address, self.port), 2) as trial:
                    self.interface = _interface_of(trial.getsockname()[0])
                break
            except OSError as error:
                if time.monotonic() > end:
                    self.why = self._unreachable(error)
                    return
                time.sleep(0.2)
        try:
            store = dist.TCPStore(*where, is_master=False, timeout=timedelta(seconds=REPORT))
            self.store = dist.PrefixStore("doctor", store)
        except Exception as error:  # torch has several kinds
            self.why = f"{self.address}:{self.port} is no place to meet: {one_line(error)}"

    def _serve(self, where: tuple) -> bool:
        """Be the one who holds the store; False where the port is taken, perhaps by another rank 0."""
        try:
            how = {"wait_for_workers": False, "multi_tenant": True, "timeout": timedelta(seconds=_ANSWER)}
            store = dist.TCPStore(*where, is_master=True, **how)
        except Exception as error:
            if "EADDRINUSE" in str(error):
                return False
            self.why = (
                f"MASTER_ADDR={self.address} MASTER_PORT={self.port} is no place to meet for rank 0 on {self.host}: "
                f"{one_line(error)}; rank 0 has to be on the machine of that address"
            )
            return True
        store.set_timeout(timedelta(seconds=REPORT))
        self.serves, self.store = True, dist.PrefixStore("doctor", store)
        return True

    def _unreachable(self, error: OSError) -> str:
        place_ = f"{self.address}:{self.port}"
        if error.errno == errno.ECONNREFUSED:
            return (
                f"nobody listens at {place_} (tried from {self.host} for {COME:.0f} s): start rank 0 on that machine, "
                "with the same MASTER_ADDR and MASTER_PORT"
            )
        return (
            f"{place_} cannot be reached from {self.host} ({one_line(error)}, tried for {COME:.0f} s): open the port "
            "between the nodes, or give an address in a network that they share"
        )

    def _own_address(self) -> tuple[str, str]:
        """The address that gloo takes for this process, and a fault if other nodes cannot use it."""
        name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
        if name:
            addresses = [a.address for a in psutil.net_if_addrs().get(name, []) if a.family == socket.AF_INET]
            if not addresses:
                known = ", ".join(psutil.net_if_addrs())
                return "127.0.0.1", f"there is no interface GLOO_SOCKET_IFNAME={name}: there are {known}"
            return addresses[0], ""
        address = _usable(self.host)
        if not self.several_nodes or not _is_loopback(address or "127.0.0.1"):
            return address or "127.0.0.1", ""
        here = self.interface or "the interface that the nodes share"
        why = f"the address of {self.host} here" if address else f"since {self.host} has no address of its own here"
        return address or "127.0.0.1", (
            f"gloo would send the other nodes to {address or '127.0.0.1'}, {why}, where each finds itself: set "
            f"GLOO_SOCKET_IFNAME={here} on this node, or give {self.host} its address in /etc/hosts"
        )

    def _call(self) -> list[str]:
        """Read all claims, once they are there or the time is up; what is wrong with them."""
        while self.store.add("all", 0) < self.processes and time.monotonic() < self.began + COME:
            time.sleep(0.05)
        rivals: dict[int, list[Claim]] = {}
        for rank in range(self.processes):
            keys = [f"claim {rank} {turn + 1}" for turn in range(self.store.add(f"claims of {rank}", 0))]
            rivals[rank] = [Claim(*json.loads(self.store.get(key))) for key in keys if self.store.check([key])]
        self.claims = [claims[0] for claims in rivals.values() if claims]
        where = f"MASTER_ADDR={self.address} MASTER_PORT={self.port}"
        return faults_of(rivals, self.processes, where, COME)


def _boot() -> str:
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        return file.read().strip()
    return ""


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


def _usable(host: str) -> str:
    """The first address of a name that is this machine's, which is what gloo looks for; "" if there is none."""
    with suppress(OSError, UnicodeError):
        for family, kind, protocol, _, where in socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM):
            with suppress(OSError), socket.socket(family, kind, protocol) as trial:
                trial.bind(where)
                return str(where[0])
    return ""


def _interface_of(address: str) -> str:
    plain = address.removeprefix("::ffff:")
    return next((name for name, all_ in psutil.net_if_addrs().items() if plain in [a.address for a in all_]), "")
