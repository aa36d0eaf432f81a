"""What the start-up says about memory, against what torch keeps and what processes were measured to take."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
import torch
from conftest import DEMO, ROOT

from lars.engine.build import build_model
from lars.engine.memory import activation_bytes, memory_of
from lars.recipe import config
from lars.recipe.batch import BatchPlan


def test_activations_are_what_torch_keeps_for_the_backward() -> None:
    """Control: the same count over a forward that really computes."""
    model = build_model(config.load(DEMO / "resnet50.yaml", ["bn_group=4"]))[0]
    kept: dict[int, int] = {}

    def count(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    random_state = torch.get_rng_state()
    counted = activation_bytes(model, (8, 3, 28, 28))
    assert torch.equal(torch.get_rng_state(), random_state)
    with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
        logits = model(torch.randn(8, 3, 28, 28))
    weights = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    assert counted == sum(size for place, size in kept.items() if place not in weights) > 0
    del logits


def test_the_line_says_what_the_keys_change() -> None:
    lines = {}
    for key in ("seed=0", "precision=bf16", "runtime.activation_checkpointing=true", "runtime.micro_batch=64"):
        recipe = config.load(DEMO / "resnet50.yaml", [key])
        lines[key], needed = memory_of(build_model(recipe)[0], recipe, BatchPlan.of(recipe, 10_007, 2), "plain")
        assert round(needed / 2**20) == pytest.approx(sum(map(int, re.findall(r"(\d+) MiB", lines[key]))), abs=1)
    mib = {key: int(line.split(" + ")[1].split()[0]) for key, line in lines.items()}
    assert "9 MiB of state (24 bytes x 387,306 weights)" in lines["seed=0"]
    # whole MiB: half of one in the larger figure and one in twice the smaller are less than two
    assert mib["runtime.micro_batch=64"] == pytest.approx(2 * mib["seed=0"], abs=1)
    assert mib["precision=bf16"] < mib["seed=0"] and mib["runtime.activation_checkpointing=true"] < mib["seed=0"]
    recipe = config.load(DEMO / "resnet50.yaml", ["runtime.deterministic=false"])
    plan = BatchPlan.of(recipe, 10_007, 2)
    assert "(12 bytes x" in memory_of(build_model(recipe)[0], recipe, plan, "plain")[0]
    line, needed = memory_of(build_model(recipe)[0], recipe, plan, "zero2")
    assert "zero2's share of the state" in line and needed == 0


def test_a_model_that_looks_at_its_numbers_is_not_refused() -> None:
    class Looks(torch.nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            logits = super().forward(x.mean((2, 3)))
            return logits if logits.sum().item() > 0 else -logits

    recipe = config.load(DEMO / "resnet50.yaml", [])
    line, needed = memory_of(Looks(3, 10), recipe, BatchPlan.of(recipe, 10_007, 2), "plain")
    assert "could not be counted" in line and needed == 0


def test_the_readme_shows_the_line_of_resnet_50() -> None:
    recipe = config.load(ROOT / "recipes/resnet50/lars-b32k-90ep.yaml", ["runtime.micro_batch=256"])
    line, _ = memory_of(build_model(recipe)[0], recipe, BatchPlan.of(recipe, 1_281_167, 8), "plain")
    assert line in (ROOT / "docs/start-up.md").read_text()


def test_measured_processes_take_what_the_line_says_whatever_the_number_of_passes() -> None:
    """The committed `python -m tests.benchmarks.memory`; the first process copies weights and velocity to save them."""
    rows = json.loads((ROOT / "tests/benchmarks/memory.json").read_text())["rows"]
    assert [row["passes"] for row in rows] == [8, 64, 512]
    for first, other in (row["growth_mib"] for row in rows):
        stated = sum(rows[0]["stated_mib"])
        assert other == pytest.approx(stated, rel=0.1) and stated < first < stated + rows[0]["stated_mib"][0] / 3
    for rank in (0, 1):
        assert rows[2]["growth_mib"][rank] == pytest.approx(rows[0]["growth_mib"][rank], rel=0.03)


_IMPORTS = """
import gc, sys
from contextlib import redirect_stdout
import recipes.train
assert gc.isenabled() and gc.get_freeze_count()
gc.unfreeze()
from lars.__main__ import main
sys.argv = ["lars", "keys"]
with redirect_stdout(sys.stderr):
    main()
assert gc.isenabled() and gc.get_freeze_count()
"""


def test_garbage_is_collected_again_once_all_is_imported() -> None:
    done = subprocess.run([sys.executable, "-c", _IMPORTS], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
