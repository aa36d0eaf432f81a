"""What the processes of a launch say of themselves when they meet, and what is wrong with it."""

from __future__ import annotations

from collections import defaultdict
from typing import NamedTuple


class Claim(NamedTuple):
    """A process, as it tells the others of itself."""

    rank: int
    processes: int
    local_rank: int
    local_processes: int
    host: str
    boot: str  # of the machine: two machines may have one name
    pid: int
    address: str  # where gloo would tell the others to connect
    port: int  # where this process listens for the others to try that

    @property
    def name(self) -> str:
        return f"rank {self.rank} on {self.host}"


def faults_of(rivals: dict[int, list[Claim]], processes: int, where: str, waited: float) -> list[str]:
    """Ranks that are there twice, or not at all, or not at their place on their node; `waited` is in seconds."""
    faults = []
    for rank, claims in rivals.items():
        if len(claims) > 1:
            both = " and ".join(f"process {claim.pid} on {claim.host}" for claim in claims)
            faults.append(
                f"rank {rank} is there {len(claims)} times, {both}: give each process a RANK of its own (each node its "
                "--machine_rank or --node_rank)"
            )
    missing, twice = [str(rank) for rank, claims in rivals.items() if not claims], bool(faults)
    if missing:
        names = ", ".join(missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        here = ", ".join(dict.fromkeys(claims[0].host for claims in rivals.values() if claims))
        limit = "" if twice else f" within {waited:.0f} s"
        reason = (
            "" if twice else f", with {where} and {processes} processes; one that was started says what is in its way"
        )
        faults.append(
            f"rank{'s' * (len(missing) > 1)} {names} of {processes} did not come{limit} (those here are on "
            f"{here}): start every process of every node{reason}"
        )
    nodes: dict[tuple[str, str], list[Claim]] = defaultdict(list)
    for claim in (claims[0] for claims in rivals.values() if claims):
        nodes[claim.host, claim.boot].append(claim)
        if claim.processes != processes:
            faults.append(
                f"{claim.name} was told of {claim.processes} processes, rank 0 of {processes}: start all alike"
            )
    for (host, _), there in nodes.items():
        places, told = [claim.local_rank for claim in there], {claim.local_processes for claim in there}
        if not missing and not twice and (places != list(range(len(there))) or told != {len(there)}):
            ranks = ", ".join(f"{claim.rank} ({claim.local_rank} of {claim.local_processes})" for claim in there[:8])
            faults.append(
                f"{host} has {len(there)} processes, with these ranks and places there: {ranks}; LOCAL_RANK has to "
                "count from 0 to LOCAL_WORLD_SIZE - 1, as RANK does, on every node"
            )
    return faults
