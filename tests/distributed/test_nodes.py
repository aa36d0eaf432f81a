"""Two nodes with disks of their own: one dies, they differ, they change places, the cable is pulled."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import without_speed
from nodes import Cluster, Node, obstacle
from safetensors.torch import load_file, save_file

from lars.run import checkpoint
from lars.run.reading import read_lines, read_result

pytestmark = pytest.mark.skipif(bool(obstacle()), reason=obstacle())

A_MINUTE = 60  # what the promise names
LONG = pytest.mark.long


@pytest.fixture
def cluster(tmp_path: Path, tiny: tuple[str, ...]) -> Iterator[Cluster]:
    data = Path(tiny[0].removeprefix("data.path="))
    with Cluster(tmp_path, data, tag=str(os.getpid())) as made:
        yield made


@pytest.fixture
def keys(tiny: tuple[str, ...]) -> tuple[str, ...]:
    """The run of `tiny_runs`, on the data that each node has beside its recipe."""
    return (*tiny[1:], "max_steps=24", "log_samples=true", "checkpoint.every_steps=3")


def assert_the_same_run(node: Node, control: Path) -> None:
    """What stands on the node's disk is the run of one machine, with all its lines."""
    ours, theirs = read_result(node.run), read_result(control)
    for key in ("status", "steps", "weights_sha256", "samples_hash", "data_fingerprint", "reproducibility"):
        assert ours[key] == theirs[key], key
    for name in ("metrics.jsonl", "ledger.jsonl"):
        assert without_speed(node.run / name) == without_speed(control / name)


def assert_it_names_the_dead_node(survivor: Node, dead: Node, killed: float) -> None:
    statuses = survivor.wait(A_MINUTE)
    assert time.monotonic() - killed < A_MINUTE, survivor.said
    assert not {0, 2, 75} & set(statuses), (statuses, survivor.said)
    assert len(survivor.errors) == 1, survivor.said
    assert dead.name in survivor.errors[0] and "start the same command again to go on" in survivor.errors[0]
    assert "Traceback" not in survivor.said


@LONG
@pytest.mark.parametrize(("killed", "per_node"), [("b", 1), ("a", 1), ("b", 2), ("a", 2)])
def test_a_node_is_killed_and_the_same_command_goes_on(
    killed: str, per_node: int, cluster: Cluster, keys: tuple[str, ...], tiny_runs: dict[int, Path]
) -> None:
    dead, survivor = (cluster.b, cluster.a) if killed == "b" else (cluster.a, cluster.b)
    cluster.start(*keys, per_node=per_node)
    cluster.a.wait_for_checkpoint()
    dead.kill()
    assert_it_names_the_dead_node(survivor, dead, time.monotonic())

    cluster.start(*keys, per_node=per_node)
    assert cluster.wait() == [0] * (2 * per_node), cluster.said
    assert "resuming after step" in cluster.a.said
    assert not cluster.b.run.exists()  # weights and momentum came from worker-a
    assert_the_same_run(cluster.a, tiny_runs[1])


@pytest.mark.long
def test_the_nodes_change_places_and_the_end_is_seen_from_any_of_them(
    cluster: Cluster, keys: tuple[str, ...], tiny_runs: dict[int, Path]
) -> None:
    """The launcher gives rank 0 to a node without a checkpoint; later only that one holds the finished run."""
    cluster.start(*keys)
    cluster.a.wait_for_checkpoint()
    cluster.b.kill()
    assert_it_names_the_dead_node(cluster.a, cluster.b, time.monotonic())

    cluster.start(*keys, first=cluster.b)
    assert cluster.wait() == [0, 0], cluster.said
    assert "resuming after step" in cluster.b.said
    assert read_result(cluster.a.run)["status"] == "failed"
    assert_the_same_run(cluster.b, tiny_runs[1])
    assert [line["step"] for line in read_lines(cluster.b.run / "metrics.jsonl", "train")] == list(range(1, 25))

    for first in (cluster.a, cluster.b):
        before = [node.listing() for node in cluster.nodes]
        cluster.start(*keys, first=first)
        assert cluster.wait(A_MINUTE) == [0, 0], cluster.said
        assert "already finished after 24 steps" in first.said
    assert [node.listing() for node in cluster.nodes] == before


def edit_a_source(node: Node, run: Path) -> None:
    with open(node.clone / "lars/optim/lars.py", "a") as file:
        file.write("\n# another line\n")


def change_rows(node: Node, run: Path) -> None:
    file = node.data / "train-00001-of-00005.parquet"
    table = pq.read_table(file)
    pq.write_table(table.take(list(range(1, table.num_rows)) + [0]), file, row_group_size=50)


def lose_a_file(node: Node, run: Path) -> None:
    (node.data / "train-00001-of-00005.parquet").unlink()


def change_a_checkpoint(node: Node, run: Path) -> None:
    """What another run would have left: whole, with right hashes."""
    shutil.copytree(run, node.run)
    newest = checkpoint.saved(node.run)[-1]
    momentum = load_file(newest / "momentum.safetensors")
    save_file({name: torch.zeros_like(tensor) for name, tensor in momentum.items()}, newest / "momentum.safetensors")
    state = json.loads((newest / "state.json").read_text())
    state["files"]["momentum.safetensors"] = checkpoint.sha256(newest / "momentum.safetensors")
    (newest / "state.json").write_text(json.dumps(state))
    (newest / "state.sha256").write_text(checkpoint.sha256(newest / "state.json"))
    assert checkpoint.verified(newest)


def leave_it(node: Node, run: Path) -> None:
    return


@pytest.mark.parametrize(
    ("spoil", "on_b", "named"),
    [
        pytest.param(leave_it, ("optimizer.lr=8",), ("optimizer.lr", "8.0", "16.0"), id="rate"),
        pytest.param(leave_it, ("optimizer.lr=-1",), ("optimizer.lr", "-1"), id="invalid", marks=LONG),
        pytest.param(leave_it, ("checkpoint.keep=4",), ("checkpoint.keep", "4", "2"), id="saves", marks=LONG),
        pytest.param(edit_a_source, (), ("lars/optim/lars.py", "worker-a"), id="source", marks=LONG),
        pytest.param(change_rows, (), ("train-00001-of-00005.parquet", "509 rows"), id="rows", marks=LONG),
        pytest.param(lose_a_file, (), ("train-00001-of-00005.parquet",), id="missing", marks=LONG),
        pytest.param(change_a_checkpoint, (), ("different checkpoints of step 24",), id="checkpoint", marks=LONG),
    ],
)
def test_a_node_that_differs_is_refused_before_anything_is_written(
    spoil: Callable[[Node, Path], None],
    on_b: tuple[str, ...],
    named: tuple[str, ...],
    cluster: Cluster,
    keys: tuple[str, ...],
    tiny_runs: dict[int, Path],
) -> None:
    if spoil is change_a_checkpoint:
        shutil.copytree(tiny_runs[1], cluster.a.run)
    spoil(cluster.b, tiny_runs[1])
    before = [node.listing() for node in cluster.nodes]
    cluster.start(*keys, "max_steps=26", on_b=on_b)  # beyond the checkpoints' end, or the run would be finished already
    assert cluster.wait(A_MINUTE * 2) == [2, 2], cluster.said
    assert len(cluster.a.errors) == 1 and cluster.b.errors == [], cluster.said
    assert all(words in cluster.a.errors[0] for words in ("rank 1 on worker-b", *named)), cluster.said
    assert "Traceback" not in cluster.said
    assert [node.listing() for node in cluster.nodes] == before


@pytest.mark.long
def test_a_pulled_cable_ends_both_sides_within_a_minute(
    cluster: Cluster, keys: tuple[str, ...], tiny_runs: dict[int, Path]
) -> None:
    """No connection is closed: only the missing signs of life tell."""
    cluster.start(*keys)
    cluster.a.wait_for_checkpoint()
    cluster.cut()
    pulled = time.monotonic()
    assert_it_names_the_dead_node(cluster.a, cluster.b, pulled)
    assert_it_names_the_dead_node(cluster.b, cluster.a, pulled)
    assert time.monotonic() - pulled < A_MINUTE
    cluster.mend()
    cluster.start(*keys)
    assert cluster.wait() == [0, 0], cluster.said
    assert_the_same_run(cluster.a, tiny_runs[1])
