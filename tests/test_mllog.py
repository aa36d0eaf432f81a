"""MLPerf's own checkers judge logs of ours: whole ones, spoiled ones, and one of a run that was interrupted."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEMO, ROOT, play

from lars.recipe import config
from lars.recipe.batch import BatchPlan
from lars.run.mllog import RULESET, MLLog, broken_rules, seconds_to_target

COMMITTED = DEMO / "results" / "alexnet-mllog" / "seed-0"
# What the closed division fixes and the demo has otherwise.
CLOSED = ("optimizer.weight_decay=0.0004", "schedule.end_lr=0.0001", "mllog=true")


def check(log: Path) -> tuple[bool, str]:
    """The compliance checker's verdict and its output."""
    command = [
        sys.executable,
        "-m",
        "mlperf_logging.compliance_checker",
        "--usage",
        "training",
        "--ruleset",
        RULESET,
        str(log),
        "--log_output",
        str(log.parent / "checked"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    return done.returncode == 0, done.stdout + done.stderr


def events(log: Path) -> list[dict]:
    return [json.loads(line.removeprefix(":::MLLOG ")) for line in log.read_text().splitlines()]


def copy_without(log: Path, target: Path, key: str) -> Path:
    target.write_text(
        "".join(line for line in log.read_text().splitlines(keepends=True) if f'"key": "{key}"' not in line)
    )
    return target


def test_the_committed_log_passes_and_spoiled_ones_do_not(tmp_path: Path) -> None:
    good, output = check(copy_without(COMMITTED / "mllog.txt", tmp_path / "whole.txt", "-"))
    assert good and "SUCCESS" in output, output
    for key in ("run_stop", "eval_accuracy", "lars_epsilon"):
        good, output = check(copy_without(COMMITTED / "mllog.txt", tmp_path / "spoiled.txt", key))
        assert not good and key in output
    late = tmp_path / "late.txt"
    late.write_text((COMMITTED / "mllog.txt").read_text().replace('"value": 0.0001', '"value": 0.0002'))
    assert not check(late)[0]


@pytest.mark.long
def test_a_stopped_run_goes_on_in_the_same_log(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    run = tmp_path / "run"
    overrides = (*tiny, *CLOSED, "runtime.micro_batch=48", "epochs=9", f"run_dir={run}", "checkpoint.every_steps=30")
    output = play(1, DEMO / "resnet50.yaml", *overrides, "max_steps=60", log=tmp_path / "first.log")
    assert "not of MLPerf's closed division: the data are ImageNet's" in output
    first = events(run / "mllog.txt")
    assert [e["metadata"]["epoch_num"] for e in first if e["key"] == "eval_accuracy"] == [4, 6]
    play(2, DEMO / "resnet50.yaml", *overrides, log=tmp_path / "second.log")
    log = events(run / "mllog.txt")
    assert log[: len(first)] == first  # its clock has gone on
    assert [e["metadata"]["epoch_num"] for e in log if e["key"] == "eval_accuracy"] == [4, 6, 8, 9]
    assert [e["key"] for e in log].count("run_start") == 1
    assert {e["metadata"]["file"] for e in log} == {"lars/run/mllog.py"}  # no path of one machine
    assert (
        log[-1]["key"] == "run_stop" and log[-1]["metadata"]["status"] == "aborted"
    )  # 1,009 images do not reach 75.9 %
    assert sorted(e["time_ms"] for e in log) == [e["time_ms"] for e in log]
    good, output = check(run / "mllog.txt")
    assert not good
    complaints = [line for line in output.splitlines() if line.startswith(("ERROR", "WARNING"))]
    assert all("eval_accuracy" in line or "FAILED" in line for line in complaints), output  # nothing but the accuracy


def test_a_link_is_not_written_through(tmp_path: Path) -> None:
    mine, run = tmp_path / "mine", tmp_path / "run"
    mine.write_text("mine")
    run.mkdir()
    (run / "mllog.txt").symlink_to(mine)
    recipe = config.load(DEMO / "resnet50.yaml", [*CLOSED, f"run_dir={run}"])
    MLLog(recipe, BatchPlan.of(recipe, 7680, 1), 1000, step=0, writes=True)
    assert mine.read_text() == "mine" and events(run / "mllog.txt")


def test_blocks_end_where_a_run_is_evaluated(tmp_path: Path) -> None:
    keys = (*CLOSED, "epochs=9", "evaluation.first_epoch=2", f"run_dir={tmp_path}")
    recipe = config.load(DEMO / "resnet50.yaml", list(keys))
    plan = BatchPlan.of(recipe, 7680, 1)  # ten steps an epoch
    log = MLLog(recipe, plan, 1000, step=0, writes=True)
    for epoch in (2, 6, 9):
        log.evaluation(10 * epoch, 1.0, 12.3)
    blocks = [(e["key"], e["metadata"]) for e in events(tmp_path / "mllog.txt") if e["key"].startswith("block")]
    told = [(key, facts["first_epoch_num"], facts["epoch_count"], facts["step"]) for key, facts in blocks]
    assert told == [
        ("block_start", 1, 2, 0),
        ("block_stop", 1, 2, 20),
        ("block_start", 3, 4, 20),
        ("block_stop", 3, 4, 60),
        ("block_start", 7, 3, 60),
        ("block_stop", 7, 3, 90),
    ]


@pytest.mark.parametrize("row", ["1632", "4k", "32k", "67840"])
def test_mlperf_s_own_rows_break_no_rule(row: str) -> None:
    recipe = config.load(ROOT / "recipes" / "resnet50" / f"mlperf-b{row}.yaml", [])
    assert broken_rules(recipe, 1_281_167, 50_000) == []


def test_each_broken_rule_is_named() -> None:
    row = ROOT / "recipes" / "resnet50" / "mlperf-b32k.yaml"
    for change, words in {
        "optimizer.weight_decay=5e-4": "power of two",
        "optimizer.eps=1e-5": "epsilon 0",
        "schedule.end_lr=0.0": "last rate is 1e-4",
        "schedule.power=1": "power 2",
        "augment.mixup=0.2": "cropped and flipped",
        "model.image_size=192": "224 pixels",
        "evaluation.every_epochs=2": "evaluated every 4 epochs",
    }.items():
        (clause,) = broken_rules(config.load(row, [change]), 1_281_167, 50_000)
        assert words in clause
    assert len(broken_rules(config.load(row, []), 1_281_167, 49_999)) == 1


@pytest.mark.parametrize(("optimizer", "clauses"), [("sgd", 0), ("sgd_nesterov", 1)])
def test_the_clauses_of_lars_are_not_asked_of_another_optimizer(optimizer: str, clauses: int) -> None:
    row = ROOT / "recipes" / "resnet50" / "sgd-b8k-90ep.yaml"
    recipe = config.load(row, [f"optimizer.name={optimizer}", *CLOSED, "augment.label_smoothing=0.1"])
    assert [c for c in broken_rules(recipe, 1_281_167, 50_000) if "optimizer" in c or "LARS" in c] == [
        "the optimizer is sgd or lars, not sgd_nesterov"
    ] * clauses


def test_time_to_target_is_that_of_the_log(tmp_path: Path) -> None:
    stamped = {e["key"]: e["time_ms"] for e in events(COMMITTED / "mllog.txt")}
    assert seconds_to_target(COMMITTED) == (stamped["run_stop"] - stamped["run_start"]) / 1000 > 0
    assert seconds_to_target(tmp_path) is None
