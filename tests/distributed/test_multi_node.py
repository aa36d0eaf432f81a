"""Real launchers on two nodes: where they meet, ranks and nodes that are killed, ZeRO-2 and an elastic range."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil
import pytest
from accelerate.commands import launch
from conftest import ROOT, play
from distributed.parity import RECIPE, bounds, differences, weights_after
from named_nodes import NamedCluster, kill_all, start
from nodes import Cluster, Node, obstacle
from test_nodes import assert_the_same_run

from lars.run.reading import read_result

A_LONG_TIME = 900  # seconds; a hang ends the test, a busy machine does not
PORT = 29500
ACCELERATE = ("-m", "accelerate.commands.accelerate_cli", "launch", "--num_machines", "2", "--num_processes", "2")
MULTI_NODE = (*ACCELERATE, "--config_file", "launch/multi-node.yaml")
RESTARTS = ("--rdzv_backend", "c10d", "--max_restarts", "3")  # what other launch files do not say
ZERO2 = (*ACCELERATE, "--config_file", "launch/zero2.yaml", "--main_process_port", str(PORT), *RESTARTS)
TORCHRUN = ("-m", "torch.distributed.run", "--nproc_per_node", "1", *RESTARTS)
needs_nodes = pytest.mark.skipif(bool(obstacle()), reason=obstacle())


def parsed(*words: str) -> object:
    """What accelerate's launcher makes of a launch file and options."""
    read = launch.launch_command_parser().parse_args([*words, "train.py"])
    return launch._validate_launch_command(read)[0]


def test_accelerate_takes_the_rendezvous_and_the_restarts_from_the_launch_file() -> None:
    """At the top level of the file it drops the one without a word."""
    args = parsed("--config_file", str(ROOT / "launch/multi-node.yaml"), "--num_processes", "6")
    assert (args.rdzv_backend, args.max_restarts, args.main_process_port) == ("c10d", 3, PORT)
    assert (args.num_machines, args.num_processes, args.multi_gpu) == (2, 6, True)


@pytest.mark.parametrize("stage", range(4))
def test_deepspeed_starts_one_run_on_several_nodes(stage: int) -> None:
    assert parsed("--config_file", str(ROOT / f"launch/zero{stage}.yaml")).deepspeed_multinode_launcher == "standard"


@pytest.fixture
def keys(tiny: tuple[str, ...]) -> tuple[str, ...]:
    return (*tiny[1:], "max_steps=24", "log_samples=true")


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory, tiny: tuple[str, ...]) -> Path:
    """The same steps on one machine, all checkpoints kept."""
    folder = tmp_path_factory.mktemp("control")
    more = ("max_steps=24", "log_samples=true", "checkpoint.every_steps=1", "checkpoint.keep=30")
    play(
        1,
        RECIPE,
        *tiny,
        *more,
        f"run_dir={folder / 'run'}",
        log=folder / "log",
    )
    return folder / "run"


@pytest.fixture
def cluster(tmp_path: Path, tiny: tuple[str, ...]) -> Iterator[NamedCluster]:
    with NamedCluster(tmp_path, Path(tiny[0].removeprefix("data.path=")), tag=str(os.getpid())) as made:
        yield made


def begin(node: Node, *words: str) -> None:
    """What somebody types on this node, in the repository's root."""
    variables = {"PYTHONPATH": str(node.clone), "PYTHONDONTWRITEBYTECODE": "1", "GLOO_SOCKET_IFNAME": "veth"}
    variables |= {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}
    node.started = [start(node, sys.executable, *words, where=node.clone, **variables)]


def train(*overrides: str) -> tuple[str, ...]:
    return ("recipes/train.py", "--config", "recipes/demo/resnet50.yaml", "run_dir=../run", *overrides)


def start_accelerate(cluster: Cluster, node: Node, launcher: tuple[str, ...], *overrides: str) -> None:
    rank = str(cluster.nodes.index(node))
    begin(node, *launcher, "--main_process_ip", cluster.a.address, "--machine_rank", rank, *train(*overrides))


def start_torchrun(cluster: Cluster, node: Node, nodes: str, *overrides: str) -> None:
    meet = ("--rdzv_endpoint", f"{cluster.a.address}:{PORT}", "--rdzv_id", "1")
    begin(node, *TORCHRUN, "--nnodes", nodes, *meet, *train(*overrides))


def until(happened: Callable[[], bool], cluster: Cluster) -> None:
    end = time.monotonic() + A_LONG_TIME
    while not happened():
        assert time.monotonic() < end and cluster.a.started[0].poll() is None, cluster.said
        time.sleep(0.02)


@pytest.mark.long
@needs_nodes
@pytest.mark.parametrize("launcher", ["accelerate", "torchrun"])
def test_a_killed_rank_and_a_killed_node_come_back_by_themselves(
    launcher: str, cluster: Cluster, keys: tuple[str, ...], control: Path
) -> None:
    def join(node: Node) -> None:
        overrides = (*keys, "checkpoint.every_steps=3")
        if launcher == "accelerate":
            start_accelerate(cluster, node, MULTI_NODE, *overrides)
        else:
            start_torchrun(cluster, node, "2", *overrides)

    for node in cluster.nodes:
        join(node)
    cluster.a.wait_for_checkpoint(A_LONG_TIME)
    (rank,) = psutil.Process(cluster.b.started[0].pid).children()
    rank.kill()
    until(lambda: cluster.a.said.count("resuming after step") == 1, cluster)

    kill_all(cluster.b)
    join(cluster.b)
    assert cluster.wait(A_LONG_TIME) == [0, 0], cluster.said
    assert cluster.a.said.count("resuming after step") == 2
    assert read_result(cluster.a.run)["world_size"] == 2
    assert not cluster.b.run.exists()
    assert_the_same_run(cluster.a, control)


@pytest.mark.long
@needs_nodes
def test_an_elastic_range_goes_on_with_the_nodes_that_are_left(
    cluster: Cluster, keys: tuple[str, ...], control: Path
) -> None:
    for node in cluster.nodes:
        start_torchrun(cluster, node, "1:2", *keys, "checkpoint.every_steps=3")
    cluster.a.wait_for_checkpoint(A_LONG_TIME)
    kill_all(cluster.b)
    assert cluster.a.wait(A_LONG_TIME) == [0], cluster.said
    assert "2 processes" in cluster.a.said and "resuming after step" in cluster.a.said
    assert read_result(cluster.a.run)["world_size"] == 1
    assert_the_same_run(cluster.a, control)


@pytest.mark.long
@needs_nodes
def test_zero2_takes_the_control_s_step_on_two_nodes(
    cluster: Cluster, keys: tuple[str, ...], control: Path, tiny: tuple[str, ...]
) -> None:
    first = "checkpoints/step-00000002"
    shutil.copytree(control / first, cluster.a.run / first)
    for node in cluster.nodes:
        start_accelerate(cluster, node, ZERO2, *keys, "max_steps=3")
    assert cluster.wait(A_LONG_TIME) == [0, 0], cluster.said
    result = read_result(cluster.a.run)
    assert (result["engine"], result["world_size"], result["steps"]) == ("zero2", 2, 3)
    found, allowed = differences(weights_after(cluster.a.run, 3), control, 2), bounds(control, 2, tiny)
    assert {name for name in found if found[name] > allowed[name]} == set()
