"""What several tests need: tiny recipes of real images, and real launches."""
from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
DEMO = ROOT / "recipes" / "demo"
sys.path.insert(0, str(ROOT))  # for `recipes.train` and `recipes.alexnet.model`

TINY = (
    # resnet50.yaml of the demo, four blocks instead of sixteen: 12 passes of 8 images, W = 1, 2, 3, 4, 6, 12
    "model.kwargs.layers=[1,1,1,1]",
    "global_batch=96",
    "bn_group=4",
    "runtime.micro_batch=8",
    "trackers=[]",
)


def launch_line(processes: int, recipe: Path, overrides: tuple[str, ...]) -> list[str]:
    """An `accelerate launch` line for CPU processes; train.py is the one of `recipe`'s repository."""
    file = ROOT / "launch" / ("cpu-1.yaml" if processes == 1 else "cpu-2.yaml")
    accelerate = [sys.executable, "-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
    train = recipe.parents[1] / "train.py"
    return [*accelerate, "--num_processes", str(processes), str(train), "--config", str(recipe), *overrides]


def launch(processes: int, recipe: Path, *overrides: str, timeout: float = 240, cwd: Path = ROOT) -> subprocess.CompletedProcess:
    """Run a recipe to its end with real processes; output and errors together in `.stdout`."""
    return subprocess.run(
        launch_line(processes, recipe, overrides),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        cwd=cwd,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
    )


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """{processes: run folder}: the same 106 steps, a bit over one epoch, with 1, 2, 3 and 4 processes."""
    folder = tmp_path_factory.mktemp("tiny")
    runs = {}
    for processes in (1, 2, 3, 4):
        runs[processes] = folder / str(processes)
        done = launch(
            processes, DEMO / "resnet50.yaml", *TINY, "max_steps=106", "ledger=true", f"run_dir={runs[processes]}"
        )
        assert done.returncode == 0, done.stdout
    return runs
