"""What one process of a launch looks at: recipe, machine, disks, data, and with the others network and loader.

Each check is the run's own: what a run would refuse is a fault here, in the same words. A check that fails keeps no
other from being made.
"""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import psutil
import torch
import torch.distributed as dist

from lars.commands import gpu, trials
from lars.commands.preflight import Preflight, can_be_written, check_room, preflight
from lars.commands.reproduce import launch_file, processes_of
from lars.commands.roll_call import RollCall
from lars.data.index import Index, build_indexes, check_hub, fingerprint, on_the_hub
from lars.data.loader import workers_of
from lars.data.source import DataError
from lars.engine.build import build_model
from lars.exact import portable
from lars.recipe import config
from lars.recipe.batch import BatchPlan
from lars.recipe.launched import Launched, cores_here, environment_of, process_count, uses_cpu
from lars.recipe.refusal import RecipeError
from lars.run.agreement import here
from lars.run.peers import Peers
from lars.run.sources import environment, sources, versions

T = TypeVar("T")

_WRITTEN = 64 * 2**20  # bytes of the trial of a disk
_FILES = 256  # that a process has open beside its connections
_CLOCKS = 5.0  # seconds by which clocks may differ


class Checkup:
    """What this process has found: `seen` for the table, `facts` that all must share, and `faults` with remedies."""

    def __init__(self, roll: RollCall) -> None:
        self.roll = roll
        self.seen: dict[str, Any] = {}  # row of the table -> a text, or [number, unit]
        self.facts: dict[str, dict[str, Any]] = {}
        self.faults: list[str] = []
        self.recipe: Any = None
        self.launched: Launched | None = None
        self.checked: Preflight | None = None  # by the process that speaks

    def fault(self, text: str) -> None:
        if text not in self.faults:
            self.faults.append(text)

    def tried(self, check: Callable[..., T], *arguments: Any) -> T | None:
        """The result of a check, or None and a fault."""
        try:
            return check(*arguments)
        except (RecipeError, DataError) as error:
            self.fault(str(error))
        return None

    def passes(self, check: Callable[..., object], *arguments: Any) -> bool:
        """Whether a check that returns nothing has found nothing."""
        faults = len(self.faults)
        self.tried(check, *arguments)
        return len(self.faults) == faults

    def report(self) -> dict[str, Any]:
        return {"seen": self.seen, "facts": self.facts, "faults": self.faults}

    # --- alone

    def recipe_and_machine(self, file: Path, overrides: list[str], launch: str | None) -> None:
        """Recipe, launch file, sources, versions, machine, threads and open files."""
        self.recipe = self.tried(config.load, file, overrides)
        self.facts |= {"versions": versions(), "sources": sources(file) if file.is_file() else {}}
        self.seen["versions"] = ", ".join(f"{name} {self.facts['versions'].get(name)}" for name in ("torch", "timm"))
        self._open_files()
        if self.recipe is None:
            return
        self.launched = self.tried(self._launched, launch)
        self.facts["recipe"] = config.shared(self.recipe)
        if self.launched:
            self.facts["recipe"] |= {"the launch file's engine": self.launched.engine}
        engine = f"{self.launched.engine}, for {self.launched.processes}" if self.launched else "?"
        self.seen["recipe"] = f"{self.recipe.name} ({engine})"
        machine = environment(self.device)
        del machine["python"], machine["torch"]  # the first changes no bits, the second is among the versions
        self.facts["machine"] = machine
        if self.recipe.runtime.deterministic and self.device.type == "cpu":
            machine["threads"] = 1  # the engine pins it, whatever the launcher says
        self.seen["machine"] = machine["device"]
        if self.recipe.runtime.portable:
            hindered = portable.obstacle() if uses_cpu() else "it runs on a GPU"
            machine["what hinders runtime.portable"] = hindered
            if not hindered:
                del machine["device"], machine["cpu_flags"]
        self.seen["threads"] = (
            f"a process: {machine['threads']} to compute, {workers_of(self.recipe)} to decode, "
            f"{cores_here() / self.roll.local_processes:g} of the cores"
        )
        if self.device.type == "cuda":
            seen, faults = gpu.look_at(self.device, self.recipe.precision)
            self.seen |= seen
            machine["driver"] = seen["driver"]
            self.facts["NVLink"] = {"NVLinks that are up": seen["NVLink"]}
            for fault in faults:
                self.fault(fault)

    @property
    def device(self) -> torch.device:
        return torch.device("cpu") if uses_cpu() else torch.device("cuda", self.roll.local_rank)

    def _launched(self, launch: str | None) -> Launched:
        """What the launcher says; what it leaves out, and what is planned where there is none, says the launch file."""
        file = launch_file(launch) if launch else None
        found = Launched.read(self.recipe, {**(environment_of(file) if file else {}), **os.environ})
        if file and process_count() == 1:
            return Launched(found.engine, processes_of(file, None), found.deepspeed)
        return found

    def _open_files(self) -> None:
        # torch's store, on the machine of rank 0, has two connections to each process, and one while they meet
        holds_store = self.roll.rank < self.roll.local_processes
        limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
        needed = _FILES + 3 * self.roll.processes * holds_store
        self.seen["open files"] = f"ulimit -n {limit:,}"
        if limit < needed:
            self.fault(f"ulimit -n is {limit}, a run of {self.roll.processes} processes needs {needed}: raise it")

    def disks_and_data(self) -> None:
        """Space and speed of the disks, and everything of the recipe that one process can look at."""
        recipe = self.recipe
        if recipe is None or not self.roll.leads_node:
            return
        cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser()
        self._disk("cache", cache, "XDG_CACHE_HOME=...")
        run, speaks = Path(recipe.run_dir), self.roll.speaks and self.launched is not None
        if speaks and self.passes(can_be_written, run):
            self._disk("run folder", run, "run_dir=...")
        place = self.tried(lambda: recipe.data.place)
        hub = place is not None and on_the_hub(recipe.data)
        may_read = place is not None and (not hub or self.passes(check_hub, recipe.data))
        if speaks and may_read:
            self.checked = self.tried(preflight, recipe, self.launched.engine, self.launched.processes)
        if self.checked:
            self.seen["data"] = f"fingerprint {fingerprint(self.checked.train, self.checked.val)[:12]}"
            self.seen["memory"] = self.checked.memory.splitlines()[0].removeprefix("memory a process: ")
        elif may_read and (self.roll.speaks or not hub and "://" not in str(place)):
            self.tried(build_indexes, recipe.data, recipe.model.num_classes)
        if self.roll.speaks and not self.checked and (model := self.tried(build_model, recipe)):
            self.tried(check_room, run, recipe.checkpoint, model[0])

    def _disk(self, row: str, folder: Path, key: str) -> None:
        there = next(p for p in (folder, *folder.absolute().parents) if p.exists())
        free = shutil.disk_usage(there).free
        size = min(_WRITTEN, max(free // 2, 2**20))
        try:
            speed = trials.write_speed(there, size)
        except OSError as error:
            self.fault(f"{there} takes no {size / 2**20:,.0f} MiB ({error.strerror}): make room, or give another {key}")
            return
        self.seen[f"{row}, free"] = [free / 2**30, "GiB"]
        self.seen[f"{row}, writes"] = [speed / 2**20, "MiB/s"]

    # --- with the others

    def together(self, peers: Peers, needed: float) -> None:
        """Network, clocks, memory, rank 0's data on this node, and the loader, by all processes at the same time."""
        if dist.is_initialized():
            self._network()
        peers.gather(None)
        clocks = peers.gather(time.time())
        if peers.rank == 0 and peers.processes > 1:
            ahead = max(range(len(clocks)), key=lambda rank: abs(clocks[rank] - clocks[0]))
            self.seen["clocks"] = [1e3 * (max(clocks) - min(clocks)), "ms apart"]
            if max(clocks) - min(clocks) > _CLOCKS:
                skew = f"the clock of {peers.name(ahead)} differs from {peers.name(0)}'s by"
                self.fault(f"{skew} {clocks[ahead] - clocks[0]:+.1f} s: let NTP set the clocks of all nodes")
        self._memory(needed)
        checked: Preflight | None = peers.broadcast(self.checked)
        if checked is None:
            return
        indexes = [self.tried(here, peers, index, self.recipe.data) for index in (checked.train, checked.val)]
        if all(peers.gather(None not in indexes)):
            self._row_groups([index for index in indexes if index])
            peers.gather(None)
            self._loader(peers, indexes[0], checked.plan)

    def _network(self) -> None:
        backend = dist.get_backend()
        round_trip, bandwidth = trials.network(self.device if backend == "nccl" else torch.device("cpu"))
        self.seen[f"{backend}, round trip"] = [1e3 * round_trip, "ms"]
        self.seen[f"{backend}, bandwidth"] = [bandwidth / 1e9, "GB/s"]

    def _memory(self, needed: float) -> None:
        if self.device.type == "cuda":
            free, where = torch.cuda.mem_get_info(self.device)[0], "of the GPU is"
        else:
            free, where = psutil.virtual_memory().available // self.roll.local_processes, "a process may have is"
        self.seen["memory, free"] = [free / 2**30, "GiB a process"]
        if needed > free:
            self.fault(
                f"a step needs {needed / 2**20:,.0f} MiB of memory, what {where} {free / 2**20:,.0f}: lower "
                "runtime.micro_batch, set runtime.activation_checkpointing=true, or use fewer processes a node"
            )

    def _row_groups(self, indexes: list[Index]) -> None:
        """One row group of each file; what is far away is read by one process of all, not by one of each node."""
        roll, read, files = self.roll, 0, 0
        share = (roll.local_rank, roll.local_processes) if indexes[0].root else (roll.rank, roll.processes)
        for index in indexes:
            if counts := self.tried(trials.read_row_groups, index, self.recipe, *share):
                read, files = read + counts[0], files + counts[1]
        self.seen["row groups read"] = [read, "files, one of each"]
        if read < files:
            self.seen["row groups not read"] = [files - read, "files, for lack of time"]

    def _loader(self, peers: Peers, index: Index, plan: BatchPlan) -> None:
        alone = plan.processes != peers.processes  # planned for a launch that this is not
        passes = range(1) if alone else plan.local_passes(peers.rank)
        speed = self.tried(trials.loader_speed, index, self.recipe, plan, passes, self.device)
        if speed:
            self.seen["loader"] = [speed, "images/s a process"]
