"""What several tests need: tiny recipes of real images, and real launches."""

from __future__ import annotations

import fcntl
import json
import multiprocessing
import os
import random
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if not any("tests/gpu" in word for word in sys.argv):
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # tests of gloo would meet as NCCL on a machine with one GPU

import pyarrow.parquet as pq
import pytest
import torch

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "recipes" / "demo"
sys.path.insert(0, str(ROOT))  # for `recipes.train` and `recipes.alexnet.model`

from lars.recipe.launched import environment_of  # noqa: E402


def accelerate_line(processes: int, where: str = "") -> list[str]:
    """`accelerate launch` for CPU processes or with the file `where` of launch/, as far as the script."""
    file = ROOT / "launch" / f"{where or ('cpu-1' if processes == 1 else 'cpu-2')}.yaml"
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
    return [*accelerate, "--num_processes", str(processes)]


def launch_line(processes: int, recipe: Path, overrides: tuple[str, ...]) -> list[str]:
    """An `accelerate launch` line for CPU processes; train.py is the one of `recipe`'s repository."""
    train = recipe.parents[1] / "train.py"
    return [*accelerate_line(processes), str(train), "--config", str(recipe), *overrides]


def launch(processes: int, recipe: Path, *overrides: str, timeout: float = 240) -> subprocess.CompletedProcess:
    """Run a recipe to its end under `accelerate launch`; output and errors together in `.stdout`."""
    return subprocess.run(
        launch_line(processes, recipe, overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        cwd=ROOT,
    )


# The launcher and each of its ranks import torch, timm and datasets anew, six seconds apiece. Tests that are not about
# the launcher fork their ranks from a server that has imported them: real processes, real gloo, no waiting.
RANKS = multiprocessing.get_context("forkserver")
RANKS.set_forkserver_preload(["recipes.train", "accelerate", "timm", "datasets"])


def free_port() -> int:
    """A port for a meeting, below those that Linux gives to outgoing connections.

    One of these could take the port before it is used.
    """
    for port in random.SystemRandom().sample(range(20_000, 32_000), 100):
        with socket.socket() as free, suppress(OSError):
            free.bind(("127.0.0.1", port))
            return port
    raise OSError("no port is free between 20,000 and 32,000")


@dataclass
class Ranks:
    """Processes of one launch, started without a launcher."""

    processes: list
    log: Path

    def wait(self, timeout: float = 240) -> list[int]:
        """Exit statuses in the order of starting, which is that of the ranks; negative for a signal."""
        end = time.time() + timeout
        for process in self.processes:
            process.join(max(0.1, end - time.time()))
            assert process.exitcode is not None, f"a process still runs after {timeout} s: {self.output}"
        return [process.exitcode for process in self.processes]

    @property
    def output(self) -> str:
        return self.log.read_text()


def start_ranks(
    processes: int, recipe: Path, *overrides: str, log: Path, where: str = "", first: Callable[[], None] | None = None
) -> Ranks:
    """What a launcher does: `processes` processes with torch's variables, and those of the file `where` of launch/.

    `first` is called in each process before it trains.
    """
    port = free_port()
    log.parent.mkdir(parents=True, exist_ok=True)
    log.write_text("")
    variables = (
        {}
        if processes == 1 and not where
        else {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    )
    variables |= environment_of(ROOT / "launch" / f"{where}.yaml") if where else {}
    ranks = [
        RANKS.Process(target=_rank, args=(r, variables, str(recipe), overrides, str(log), first))
        for r in range(processes)
    ]
    for rank in ranks:
        rank.start()
    return Ranks(ranks, log)


def wait_until(happened: Callable[[], bool], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < end, f"it has not happened within {seconds} s"
        time.sleep(0.005)


def speak_into(log: str) -> None:
    """In a forked process: work in the repository's root, and print into a file."""
    os.chdir(ROOT)
    with open(log, "a") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)


def _rank(
    rank: int, variables: dict[str, str], recipe: str, overrides: tuple[str, ...], log: str, first: Callable | None
) -> None:
    speak_into(log)
    if variables:
        os.environ.update(
            variables,
            RANK=str(rank),
            LOCAL_RANK=str(rank),
            LOCAL_WORLD_SIZE=variables["WORLD_SIZE"],
            OMP_NUM_THREADS="1",
        )
        torch.set_num_threads(1)  # torch is imported already and no longer looks at OMP_NUM_THREADS
    from recipes.train import main

    if first:
        first()
    sys.exit(main(["--config", recipe, *overrides]))


def play(processes: int, recipe: Path, *overrides: str, **how: Any) -> str:
    """Run a recipe to its end on `processes` processes, expect success, return what they printed."""
    ranks = start_ranks(processes, recipe, *overrides, **how)
    assert ranks.wait() == [0] * processes, ranks.output
    return ranks.output


def without_speed(file: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl or ledger.jsonl, less what no two runs share."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "images_per_second"} for line in lines]


def tiny_overrides(folder: Path) -> tuple[str, ...]:
    """Overrides of the demo's resnet50.yaml: 1,009 + 199 of its images (both prime), four blocks instead of sixteen.

    12 passes of 8 images a step, which W = 1, 2, 3, 4, 6, 12 divide. The images are written to `folder`.
    """
    for source, rows in (
        ("train-00000-of-00005", 500),
        ("train-00001-of-00005", 509),
        ("validation-00000-of-00001", 199),
    ):
        table = pq.read_table(DEMO / "data" / f"{source}.parquet").slice(0, rows)
        pq.write_table(table, folder / f"{source}.parquet", row_group_size=50)
    model = ("model.kwargs.layers=[1,1,1,1]", "global_batch=96", "bn_group=4", "runtime.micro_batch=8")
    # Forked ranks have imported torch already and cannot be portable; those of a launcher beside them must not be.
    return (f"data.path={folder}", *model, "runtime.portable=false", "trackers=[]")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    return tiny_overrides(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory, tiny: tuple[str, ...]) -> dict[int, Path]:
    """{processes: run folder}: 24 steps, more than two epochs, with 1, 2, 3 and 5 processes (5 do not divide 12).

    Under pytest-xdist the first worker that wants them trains them for all.
    """
    own = tmp_path_factory.getbasetemp()
    folder = (own.parent if "PYTEST_XDIST_WORKER" in os.environ else own) / "tiny_runs"
    folder.mkdir(exist_ok=True)
    runs = {processes: folder / str(processes) for processes in (1, 2, 3, 5)}
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            for processes, run in runs.items():
                overrides = (*tiny, "max_steps=24", "log_samples=true", f"run_dir={run}")
                play(processes, DEMO / "resnet50.yaml", *overrides, log=folder / f"{processes}.log")
            (folder / "complete").touch()
    return runs
