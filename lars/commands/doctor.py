"""`lars doctor --config RECIPE [key=value ...]`: are these machines ready for this recipe? Started on all, like a run.

    accelerate launch --config_file launch/cpu-2.yaml -m lars doctor --config recipes/demo/resnet50.yaml

It takes a minute at most and trains nothing. Exit status 0, or 2 with a line and the remedy for each fault; where the
processes cannot meet, each says what is in its way. `torchrun -m lars doctor`, `srun` and one process alone work too;
`--launch FILE` names the launch file where no `accelerate launch` passes it on.
"""

from __future__ import annotations

import argparse
import os
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lars.recipe import command_line

command_line.pin(sys.argv[1:])  # before anything imports torch, as in recipes/train.py
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # faults are ours to tell

import torch.distributed as dist
from rich.markup import escape
from rich.table import Table

from lars.commands.checkup import Checkup
from lars.commands.roll_call import COME, REPORT, RollCall
from lars.recipe.launched import Alone
from lars.recipe.refusal import RecipeError, hidden, one_line, short
from lars.run.peers import Peers
from lars.run.progress import stdout
from lars.run.signals import interrupts_end_at_once

_MEETING, _TRIALS = 30.0, 45.0  # seconds in which the others can keep a process waiting

Reports = Mapping[int, dict[str, Any]]

_REMEDIES = {
    "versions": "install the same versions on all nodes (requirements.txt)",
    "sources": "bring all nodes to the same commit and the same recipe folder",
    "recipe": "start all with the same recipe, overrides and launch file",
    "machine": "such a run is the same up to rounding only, so use machines and drivers that are alike",
    "NVLink": "a link is down, or the GPUs are not alike: look at `nvidia-smi nvlink --status` on both",
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="the recipe")
    parser.add_argument("--launch", default=None, help="a file of launch/, by name or path")
    parser.add_argument("overrides", nargs="*", help="key=value", metavar="key=value")
    args = parser.parse_args()
    interrupts_end_at_once()
    try:
        roll = RollCall()
    except Alone as error:
        return _refused([str(error)])
    checkup = Checkup(roll)
    try:
        checkup.recipe_and_machine(args.config, args.overrides, args.launch)
        checkup.disks_and_data()
    except Exception as error:  # the others must not wait for a process that stumbles
        checkup.fault(f"{type(error).__name__}: {one_line(error)}")
    try:
        return _with_the_others(roll, checkup)
    except RecipeError as error:
        faults = dict.fromkeys([str(error), *checkup.faults])
        return _refused([f"{roll.name}: {fault}" if roll.processes > 1 else fault for fault in faults])
    finally:
        if dist.is_initialized():  # a process that leaves it open can abort at exit
            dist.destroy_process_group()


def _with_the_others(roll: RollCall, checkup: Checkup) -> int:
    """The exit status, the same for all processes.

    Raises:
        RecipeError: the others cannot be met, or have gone.
    """
    of_all, own = roll.meet()
    own += roll.knock()
    for fault in own:
        checkup.fault(fault)
    if roll.turn > 1:  # another process has this rank, and speaks for it
        return roll.end(2)
    ready = not own and checkup.recipe is not None and checkup.launched is not None
    roll.tell(f"state {roll.rank}", {**checkup.report(), "ready": ready})
    reports: Reports = {}
    if roll.speaks:
        reports, late = roll.reports("state")
        of_all += late
        go_on = not of_all and all(report["ready"] for report in reports.values())
        needed = checkup.checked.needed if checkup.checked else 0.0
        roll.tell("go on", {"together": go_on, "needed": needed})
    plan = roll.hear("go on", COME + 2 * REPORT)
    if plan["together"]:
        try:
            peers = _limited(_MEETING, roll, "the meeting over gloo or NCCL", lambda: Peers.meet(None))
            _limited(_TRIALS, roll, "the trial of network, data and loader", checkup.together, peers, plan["needed"])
        except Exception as error:
            checkup.fault(f"network, data and loader together: {type(error).__name__}: {one_line(error)}")
        roll.tell(f"findings {roll.rank}", checkup.report())
        if roll.speaks:
            found, late = roll.reports("findings")
            reports, of_all = {**reports, **found}, of_all + late
    return roll.end(_say(roll, checkup, reports, of_all) if roll.speaks else 2)


def _say(roll: RollCall, checkup: Checkup, reports: Reports, faults: list[str]) -> int:
    """Print what all have found: one table, the faults, one line. Returns the exit status."""
    names = {claim.rank: claim.name for claim in roll.claims} or {0: roll.name}
    faults = [*faults, *differences(reports, names)]
    hosts = {claim.rank: claim.host for claim in roll.claims}
    told = set()
    for rank, report in reports.items():
        for fault in report["faults"]:
            if (hosts.get(rank), fault) not in told:  # the processes of a node see the same
                told.add((hosts.get(rank), fault))
                faults.append(f"{names[rank]}: {fault}" if roll.processes > 1 else fault)
    nodes = list(dict.fromkeys(hosts.values())) or [roll.host]
    there = f"{len(reports)} of {roll.processes} on {', '.join(nodes[:8])}{' ...' * (len(nodes) > 8)}"
    table = Table("what", "seen")
    for what, value in {"processes": there, **rows(reports, names)}.items():
        table.add_row(what, escape(hidden(value)))
    stdout().print(table)
    sys.stdout.flush()
    _refused(faults)
    what = checkup.recipe.name if checkup.recipe is not None else "this recipe"
    count = f"{len(faults)} fault{'s' * (len(faults) > 1)}"
    end = f"{count}, named above: {what} is not ready" if faults else f"OK: {what} can start"
    print(f"doctor: {end}", flush=True)
    return 2 if faults else 0


def differences(reports: Reports, names: Mapping[int, str]) -> list[str]:
    """Facts in which a process differs from rank 0, one fault for each kind and node."""
    faults: dict[tuple[str, str], str] = {}
    ours = reports.get(0, {"facts": {}})["facts"]
    for rank, report in reports.items():
        for kind, theirs in report["facts"].items():
            reference = ours.get(kind, theirs)
            other = [key for key in {**reference, **theirs} if reference.get(key) != theirs.get(key)]
            if not other:
                continue
            more = f" (also {', '.join(other[1:4])}{' ...' * (len(other) > 4)})" if other[1:] else ""
            has = f"has {other[0]}={short(theirs.get(other[0]))}, {names[0]} has {short(reference.get(other[0]))}{more}"
            faults.setdefault((kind, names[rank].partition(" on ")[2]), f"{names[rank]} {has}: {_REMEDIES[kind]}")
    return list(faults.values())


def rows(reports: Reports, names: Mapping[int, str]) -> dict[str, str]:
    """{what: what was seen}, of numbers the smallest and the largest with their processes."""
    found: dict[str, str] = {}
    for what in dict.fromkeys(what for report in reports.values() for what in report["seen"]):
        seen = {rank: report["seen"][what] for rank, report in reports.items() if what in report["seen"]}
        if isinstance(next(iter(seen.values())), str):
            first = {value: names[rank] for rank, value in reversed(seen.items())}
            texts = [f"{name}: {value}" for value, name in reversed(first.items())]
            found[what] = next(iter(first)) if len(first) == 1 else "\n".join(texts[:4] + ["..."] * (len(texts) > 4))
            continue
        low, high = (choose(seen, key=lambda rank: seen[rank][0]) for choose in (min, max))
        least, most = (_number(seen[rank][0]) for rank in (low, high))
        unit = seen[low][1]
        found[what] = f"{least} {unit}" if least == most else f"{least} ({names[low]}) to {most} ({names[high]}) {unit}"
    return found


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def _refused(faults: list[str]) -> int:
    for fault in faults:
        print(f"error: {hidden(fault)}", file=sys.stderr, flush=True)
    return 2


def _limited(seconds: float, roll: RollCall, what: str, action: Callable[..., Any], *arguments: Any) -> Any:
    """Do what can wait for others without end; after so many seconds this process says so and ends."""

    def give_up() -> None:
        _refused([f"{roll.name}: {what} has not ended after {seconds:.0f} s"])
        os._exit(2)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        return action(*arguments)
    finally:
        timer.cancel()
