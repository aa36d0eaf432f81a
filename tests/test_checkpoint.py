"""Checkpoints: whole or not there, checked when they are read, tied weights once, written beside training."""

from __future__ import annotations

import json
import logging
import resource
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from lars.engine.base import Engine
from lars.recipe.keys import Checkpoint
from lars.recipe.refusal import RecipeError
from lars.run.checkpoint import State, aliases, claims, load_weights, read, saved
from lars.run.checkpoint_writer import CheckpointWriter
from lars.run.folder import weights_sha256
from lars.run.peers import Peers
from lars.run.resume import Found, newest_checkpoint


def state(step: int, tied: dict[str, str] | None = None) -> State:
    return State(step, 1, 0, 1.0, {}, "fingerprint", {}, tied or {})


def newest(run: Path) -> Found | None:
    """As a run of one process finds it."""
    return newest_checkpoint(Peers(), run)


def write(run: Path, *steps: int, keep: int = 2) -> None:
    writer = CheckpointWriter(run, Checkpoint(keep=keep))
    for step in steps:
        writer.save(state(step), {"w": torch.full((300,), float(step))}, {"w": torch.full((300,), -float(step))})
    writer.wait()


def test_weights_keep_the_names_that_the_model_gives_them() -> None:
    """Wrappers put `module.` before names; a part of the model may be called so as well."""

    class Model(nn.Linear):
        def __init__(self) -> None:
            super().__init__(2, 2)
            self.module = nn.Linear(2, 2)

    model = Model()
    assert list(Engine.weights(cast(Engine, SimpleNamespace(model=model)))) == list(model.state_dict())
    assert weights_sha256({"module.weight": torch.ones(1)}) != weights_sha256({"weight": torch.ones(1)})


def test_keeps_the_newest_and_names_it(tmp_path: Path) -> None:
    (tmp_path / "checkpoints/.step-00000001").mkdir(parents=True)  # what a power loss left
    write(tmp_path, 1, 2, 3)
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-00000002", "step-00000003"]
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000003\n"
    found = newest(tmp_path)
    assert (found.path, found.state.step) == (saved(tmp_path)[-1], 3)
    assert [tensors["w"][0] for tensors in read(found.path)] == [3, -3]


def test_the_best_stays_beside_the_newest(tmp_path: Path) -> None:
    writer = CheckpointWriter(tmp_path, Checkpoint(keep=1, keep_best=True))
    for step, (evaluated, top1) in enumerate([(1, 10.0), (2, 30.0), (3, 20.0), (3, 99.0), (5, 30.0), (6, 31.0)], 1):
        reached = replace(state(step), evaluation={"step": evaluated, "top1": top1, "top5": 100.0})
        writer.save(reached, {"w": torch.full((3,), float(step))}, {})
        writer.wait()
        kept = [path.name for path in saved(tmp_path)]
        best = {1: 1, 2: 2, 3: 2, 4: 2, 5: 2, 6: 6}[step]  # the fourth was not evaluated, the fifth is no better
        assert kept == [f"step-{n:08d}" for n in sorted({best, step})]
        assert (tmp_path / "checkpoints/best").read_text() == f"step-{best:08d}\n"


@pytest.mark.parametrize("file", ["model.safetensors", "momentum.safetensors", "state.json", "state.sha256"])
@pytest.mark.parametrize("how", ["flipped", "cut", "gone"])
def test_a_damaged_checkpoint_is_passed_over_with_a_warning(
    file: str, how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1, 2)
    target = saved(tmp_path)[-1] / file
    content = target.read_bytes()
    if how == "gone":
        target.unlink()
    else:
        target.write_bytes(content[:-20] + (bytes(b ^ 1 for b in content[-20:]) if how == "flipped" else b""))
    with caplog.at_level(logging.WARNING):
        assert newest(tmp_path).state.step == 1
    assert "step-00000002 is damaged" in caplog.text and "falling back" in caplog.text


def test_a_checkpoint_of_before_its_state_had_a_hash_is_read(tmp_path: Path) -> None:
    write(tmp_path, 1)
    written = json.loads((saved(tmp_path)[0] / "state.json").read_text())
    (saved(tmp_path)[0] / "state.json").write_text(
        json.dumps({key: value for key, value in written.items() if key != "format"})
    )
    (saved(tmp_path)[0] / "state.sha256").unlink()
    assert newest(tmp_path).state.format == 1


@pytest.mark.parametrize("file", ["model.safetensors", "state.json"])
def test_no_whole_checkpoint_is_an_error_and_none_at_all_a_start(file: str, tmp_path: Path) -> None:
    assert newest(tmp_path) is None
    write(tmp_path, 1)
    (saved(tmp_path)[0] / file).write_bytes(b"")
    with pytest.raises(RecipeError, match="run_dir"):
        newest(tmp_path)


def test_a_tied_weight_is_stored_once_and_comes_back_under_both_names(tmp_path: Path) -> None:
    def tied() -> nn.Sequential:
        model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3, bias=False))
        model[1].weight = model[0].weight
        return model

    model, other = tied(), tied()
    writer = CheckpointWriter(tmp_path, Checkpoint())
    writer.save(state(1, aliases(model)), model.state_dict(), {})
    writer.wait()
    found = newest(tmp_path)
    weights, _ = read(found.path)
    assert found.state.aliases == {"1.weight": "0.weight"} and set(weights) == {"0.weight", "0.bias"}
    load_weights(weights, found.state, other)
    assert torch.equal(other[1].weight, model[0].weight) and other[1].weight is other[0].weight


def test_channels_last_weights_come_back(tmp_path: Path) -> None:
    model = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)
    writer = CheckpointWriter(tmp_path, Checkpoint())
    writer.save(state(1), model.state_dict(), {})
    writer.wait()
    found, other = newest(tmp_path), nn.Conv2d(3, 4, 3)
    load_weights(read(found.path)[0], found.state, other)
    assert torch.equal(other.weight, model.weight)


def test_training_may_change_the_weights_while_they_are_written(tmp_path: Path) -> None:
    writer, w = CheckpointWriter(tmp_path, Checkpoint()), torch.ones(1 << 22)
    writer.save(state(1), {"w": w}, {})
    w.zero_()
    writer.wait()
    assert load_file(newest(tmp_path).path / "model.safetensors")["w"].all()


@pytest.mark.parametrize("on_error", ["go_on", "stop"])
def test_a_full_disk_leaves_the_checkpoint_before(
    on_error: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The operating system itself refuses: no file of this process may grow beyond a limit."""
    write(tmp_path, 1)
    writer = CheckpointWriter(tmp_path, Checkpoint(on_error=on_error))
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
    try:
        with caplog.at_level(logging.WARNING):
            writer.save(state(2), {"w": torch.zeros(1 << 20)}, {})
            if on_error == "stop":
                with pytest.raises(OSError, match="step 2 could not be written, the one before stays"):
                    writer.wait()
            else:
                writer.wait()
                assert "step 2 could not be written" in caplog.text and "going on" in caplog.text
                with pytest.raises(OSError, match="step 2"):
                    writer.wait(needed=True)  # a run does not end well without its last one
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert [p.name for p in (tmp_path / "checkpoints").glob("*step*")] == ["step-00000001"] and newest(
        tmp_path
    ).state.step == 1
    writer.error = None
    writer.save(state(3), {"w": torch.zeros(1 << 20)}, {})  # there is room again
    writer.wait()
    assert newest(tmp_path).state.step == 3


@pytest.mark.parametrize(
    ("change", "same"), [({"seconds": 2.0}, True), ({"samples_hash": 2}, False), ({"trajectory": {"seed": 1}}, False)]
)
def test_two_nodes_that_took_another_time_hold_the_same_checkpoint(change: dict, same: bool, tmp_path: Path) -> None:
    """And those of another run do not."""
    for node, differing in (("a", {}), ("b", change)):
        writer = CheckpointWriter(tmp_path / node, Checkpoint())
        writer.save(replace(state(1), **differing), {"w": torch.ones(3)}, {})
        writer.wait()
    (one,), (other,) = (claims(tmp_path / node) for node in ("a", "b"))
    assert (one.digest == other.digest) == same
