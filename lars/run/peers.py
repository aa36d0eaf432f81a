"""The processes of a run and how they speak to each other: over gloo on the CPU, one process as well as thousands."""

from __future__ import annotations

import os
import socket
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, wait
from contextlib import ExitStack
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from accelerate import PartialState
from torch import Tensor

from lars.recipe.launched import Alone, place, uses_cpu, uses_deepspeed
from lars.recipe.refusal import RecipeError, one_line, short

T = TypeVar("T")

_CHUNK = 1 << 24  # bytes of a file that are sent at a time
_UNKNOWN, _MUTE = 30, 60  # seconds until a name is known, and until something that listens has answered
_FIRST_MEETING = timedelta(minutes=30)  # until all processes have started, and for an exchange that nobody ends


def compile_nothing() -> None:
    """Before DeepSpeed starts on CPUs: leave out the sum that it has for inference.

    It would be compiled first, for a minute, and keeps 64 MiB of shared memory for each process when they have ended.
    """
    import deepspeed.ops

    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


class Peers:
    """The processes of a run, and what they tell each other; on the CPU, so that nobody waits for a GPU."""

    def __init__(self) -> None:
        """Of a process group that is there already, or of this process alone."""
        self.rank, self.processes, self.group = 0, 1, None
        if dist.is_initialized() and dist.get_world_size() > 1:
            self.rank, self.processes = dist.get_rank(), dist.get_world_size()
            self.group = dist.new_group(backend="gloo")
        self.leads_node = int(os.environ.get("LOCAL_RANK", 0)) == 0  # one process a node looks at the node's disk
        self.nodes: list[str] = self.gather(socket.gethostname())

    @classmethod
    def meet(cls, refused: RecipeError | None) -> Peers:
        """Start the process group of the launcher, on which accelerate and the engines go on.

        A process that cannot begin comes too, to say so: one that stayed away would leave the others waiting.

        Raises:
            Alone: nobody can be met.
            RecipeError: on all processes, what one of them brought.
        """
        if told := place():
            # Held until the group has a client of its own.
            store = _first_word(refused, told["RANK"], told["WORLD_SIZE"])
            os.environ.setdefault("TORCH_GLOO_LAZY_INIT", "1")  # or each process opens a socket to each other one
            backend = "gloo" if uses_cpu() else "nccl"  # named, or accelerate finds none on a CPU
            if uses_deepspeed() and uses_cpu():
                os.environ.setdefault("DS_ACCELERATOR", "cpu")
                compile_nothing()
            warnings.filterwarnings("ignore", "OMP_NUM_THREADS/MKL_NUM_THREADS unset")  # the engine pins the threads
            PartialState(cpu=uses_cpu() and not uses_deepspeed(), backend=backend, timeout=_FIRST_MEETING)
            del store
        elif refused:
            raise refused
        return cls()

    def part(self) -> None:
        """End the process group; a process that leaves it open can abort at exit."""
        if dist.is_initialized():
            dist.destroy_process_group()

    def gather(self, value: T) -> list[T]:
        """Everybody's value, in order of rank."""
        if self.group is None:
            return [value]
        values: list[Any] = [None] * self.processes
        dist.all_gather_object(values, value, group=self.group)
        return values

    def largest(self, values: np.ndarray) -> np.ndarray:
        """Of each number the largest that a process has."""
        if self.group is not None:
            dist.all_reduce(torch.from_numpy(values), dist.ReduceOp.MAX, group=self.group)  # in place
        return values

    def broadcast(self, value: T, source: int = 0) -> T:
        """The value of the process `source`."""
        if self.group is None:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=source, group=self.group)
        return values[0]

    def broadcast_tensors(self, tensors: dict[str, Tensor] | None, source: int) -> dict[str, Tensor]:
        """Tensors of any type on the CPU, from the process that has them to those that give None."""
        if self.group is None:
            return tensors
        described = None if tensors is None else [(name, t.shape, t.dtype) for name, t in tensors.items()]
        described = self.broadcast(described, source)
        tensors = tensors or {name: torch.empty(shape, dtype=dtype) for name, shape, dtype in described}
        for tensor in tensors.values():
            dist.broadcast(tensor.reshape(-1).view(torch.uint8), src=source, group=self.group)
        return tensors

    def copy_file(self, file: Path, source: int, target: int) -> None:
        """Give a file, if it is there, from one process to another, in place of whatever that one has."""
        if not self.broadcast(file.is_file(), source):
            return
        beside = file.with_name(f"{file.name}.copy")
        with ExitStack() as streams:
            sent = streams.enter_context(open(file, "rb")) if self.rank == source else None
            taken = streams.enter_context(open(beside, "wb")) if self.rank == target else None
            while chunk := self.broadcast(sent.read(_CHUNK) if sent else b"", source):
                if taken:
                    taken.write(chunk)
        if self.rank == target:
            os.replace(beside, file)

    def together(self, action: Callable[[], T]) -> T | None:
        """Do what may be refused on this process alone, and end on all if it was.

        Raises:
            RecipeError: the first one's, with its rank and node where it is not rank 0's.
        """
        result, refused = None, None
        try:
            result = action()
        except RecipeError as error:
            refused = error
        for rank, error in enumerate(self.gather(refused)):
            if error is not None:
                raise RecipeError(f"{self.name(rank)}: {error}" if rank else str(error))
        return result

    def agree(self, facts: Mapping[str, Any]) -> None:
        """Go on only if all processes hold the same facts.

        Rank 0 sends its facts once and the others compare, so that thousands of processes do not all read each other's.

        Raises:
            RecipeError: on all processes; names the first node that differs, its first such key and both values.
        """
        reference = self.broadcast(dict(facts))
        keys = (key for key in {**reference, **facts} if reference.get(key) != facts.get(key))
        first = next(((key, facts.get(key), reference.get(key)) for key in keys), None)
        for rank, (key, theirs, ours) in ((rank, found) for rank, found in enumerate(self.gather(first)) if found):
            raise RecipeError(
                f"{self.name(rank)} has {key}={short(theirs)}, {self.name(0)} has {short(ours)}: all processes of a "
                "run need the same recipe, sources, versions and data"
            )

    def name(self, rank: int) -> str:
        return f"rank {rank} on {self.nodes[rank]}"


def _first_word(refused: RecipeError | None, rank: int, processes: int) -> dist.Store:
    """Tell the others if this process cannot begin, on torch's store: one without its GPUs can join no process group.

    Raises:
        RecipeError: on all processes, what one of them said; of several the first to come.
    """
    store = dist.PrefixStore("first word", _store(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])))
    if refused:
        store.compare_set("refused", "", f"rank {rank} on {socket.gethostname()}: {refused}" if rank else str(refused))
    if store.add("here", 1) == processes:
        store.set("all", "here")
    store.wait(["all"], _FIRST_MEETING)
    if store.check(["refused"]):
        reason = store.get("refused").decode()
        store.add("heard", 1)
        for _ in range(200 if rank == 0 else 0):  # the store may end with this process
            if store.add("heard", 0) < processes:
                time.sleep(0.05)
        raise RecipeError(reason)
    return store


def _store(address: str, port: int) -> dist.Store:
    """torch's store, once the process that holds it has started.

    Raises:
        Alone: its place has no address, is taken, something else answers there, or the launcher that held it is gone.
    """
    for _ in range(_UNKNOWN):
        try:
            socket.getaddrinfo(address, port)
            break
        except (OSError, UnicodeError) as error:
            unknown = error
            time.sleep(1)
    else:
        raise Alone(f"MASTER_ADDR={address} has no address here ({unknown}): name a machine that all nodes know")
    held = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"  # by the launcher, before it starts a process
    answer = aside(lambda: next(dist.rendezvous("env://", timeout=_FIRST_MEETING))[0])  # torch waits without end
    mute = closed = 0
    while not wait([answer], timeout=1).done and mute < _MUTE and closed < _MUTE:
        try:
            socket.create_connection((address, port), timeout=1).close()
            mute += 1
        except OSError:
            closed += held
    failed = answer.exception() if answer.done() else None
    if answer.done() and not failed:
        return answer.result()
    why = one_line(failed) if failed else "whoever listens there does not answer as torch's store does"
    if closed >= _MUTE:
        raise Alone(f"nobody listens at MASTER_ADDR={address} MASTER_PORT={port} any more: the launcher is gone")
    raise Alone(
        f"MASTER_ADDR={address} MASTER_PORT={port} is no place to meet: {why}; give a port that nobody else uses"
    )


def aside(call: Callable[[], T]) -> Future[T]:
    """The outcome of a call in a thread of its own, for which nobody has to wait: not even the end of the process."""
    outcome: Future[T] = Future()

    def play() -> None:
        try:
            outcome.set_result(call())
        except Exception as error:
            outcome.set_exception(error)

    threading.Thread(target=play, daemon=True).start()
    return outcome
