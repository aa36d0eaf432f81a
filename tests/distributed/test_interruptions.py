"""Signals in the middle of long steps and evaluations, and a process that hangs: real processes, real signals."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch.distributed as dist
from conftest import DEMO, RANKS, Ranks, free_port, play, start_ranks

from lars.run.peers import Peers
from lars.run.reading import read_lines, read_result
from lars.run.vote import Vote

RECIPE = DEMO / "resnet50.yaml"


def wait_for(words: str, file: Path, ranks: Ranks, seconds: float = 120) -> None:
    end = time.time() + seconds
    while not file.exists() or words not in file.read_text():
        assert ranks.processes[0].is_alive() and time.time() < end, ranks.output
        time.sleep(0.02)


def slow_passes() -> None:
    """From the third step on a pass takes three seconds, so that a step of six passes takes eighteen."""
    from lars.engine.plain import Engine

    forward = Engine.forward

    def slow(self: Engine, images: object, labels: object, step: int, index: int) -> object:
        time.sleep(3 if step >= 2 else 0)
        return forward(self, images, labels, step, index)

    Engine.forward = slow


CASTS = 12


def cast_votes(rank: int, processes: int, port: int, place: Path) -> None:
    """In a process of its own: say yes in every third vote, if it is this rank's turn, and write down the answers."""
    os.environ["LOCAL_RANK"] = str(rank)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=processes)
    vote = Vote(Peers())
    answers = [vote.cast(turn % 3 == 0 and turn % processes == rank) for turn in range(CASTS)]
    (place / str(rank)).write_text(str(answers))
    dist.barrier()
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, 5])
def test_one_yes_is_everybodys_answer_one_vote_later(processes: int, tmp_path: Path) -> None:
    """Whoever says it: 5 is no power of two, and three rounds are needed to reach all."""
    port = free_port()
    voters = [RANKS.Process(target=cast_votes, args=(r, processes, port, tmp_path)) for r in range(processes)]
    for voter in voters:
        voter.start()
    for voter in voters:
        voter.join(120)
    assert [voter.exitcode for voter in voters] == [0] * processes
    expected = [False] + [turn % 3 == 0 for turn in range(CASTS - 1)]
    assert [(tmp_path / str(rank)).read_text() for rank in range(processes)] == [str(expected)] * processes


@pytest.mark.parametrize(
    "engine", ["", pytest.param("zero2", marks=pytest.mark.long), pytest.param("fsdp2", marks=pytest.mark.long)]
)
def test_a_signal_in_a_long_step_drops_it_and_saves_within_ten_seconds(
    engine: str, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    ranks = start_ranks(2, RECIPE, *tiny, f"run_dir={run}", log=tmp_path / "log", where=engine, first=slow_passes)
    wait_for('"step": 2,', run / "metrics.jsonl", ranks)
    time.sleep(1)
    os.kill(ranks.processes[1].pid, signal.SIGUSR1)
    told = time.time()
    assert ranks.wait() == [75, 75], ranks.output
    written = (run / "checkpoints/step-00000002/state.json").stat().st_mtime
    assert written - told < 10  # the pass under way and one more; the step would have taken seventeen seconds more
    assert read_result(run)["status"] == "preempted" and read_result(run)["steps"] == 2


def slow_evaluation() -> None:
    from recipes import train

    evaluate = train.evaluate

    def slow(engine: object, *rest: object) -> object:
        logits = engine.logits
        engine.logits = lambda images: (print("evaluating", flush=True), time.sleep(1), logits(images))[-1]
        return evaluate(engine, *rest)

    train.evaluate = slow


@pytest.mark.long
def test_a_signal_in_an_evaluation_stops_it_and_the_resumed_run_evaluates(
    tiny: tuple[str, ...], tiny_runs: dict[int, Path], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    keys = (*tiny, "max_steps=24", "log_samples=true", f"run_dir={run}")
    ranks = start_ranks(2, RECIPE, *keys, log=tmp_path / "log", first=slow_evaluation)
    wait_for("evaluating", tmp_path / "log", ranks)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    assert ranks.wait(20) == [75, 75], ranks.output
    assert read_result(run)["steps"] == 11 and read_lines(run / "metrics.jsonl", "eval") == []
    play(1, RECIPE, *keys, log=tmp_path / "log")
    assert read_result(run)["weights_sha256"] == read_result(tiny_runs[1])["weights_sha256"]
    assert read_lines(run / "metrics.jsonl", "eval") == read_lines(tiny_runs[1] / "metrics.jsonl", "eval")


def hang_in_a_pass() -> None:
    """Rank 1 is suspended for good in its second pass of the fourth step, after the signs of where both stand."""
    from lars.engine.plain import Engine

    forward, begun = Engine.forward, []

    def hang(self: Engine, images: object, labels: object, step: int, index: int) -> object:
        begun.append(step)
        if os.environ["RANK"] == "1" and begun.count(3) == 2:
            time.sleep(3)  # a sign of life comes every second, and the other rank ends its own second pass
            print("suspended", flush=True)
            os.kill(os.getpid(), signal.SIGSTOP)
        return forward(self, images, labels, step, index)

    Engine.forward = hang


@pytest.mark.parametrize(
    "engine, who",
    [
        ("", "rank 1 of 2"),
        pytest.param("zero3", "ranks 0, 1 of 2", marks=pytest.mark.long),  # rank 0 waits for the layer's weights
    ],
)
def test_a_process_that_hangs_is_named_with_its_step(
    engine: str, who: str, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    keys = (*tiny, "runtime.hang_seconds=4", "data.retry_seconds=2", f"run_dir={run}")
    ranks = start_ranks(2, RECIPE, *keys, log=tmp_path / "log", where=engine, first=hang_in_a_pass)
    wait_for("suspended", tmp_path / "log", ranks)
    stopped = time.time()
    ranks.processes[0].join(30)
    ranks.processes[1].kill()
    assert ranks.processes[0].exitcode == 1 and time.time() - stopped < 15, ranks.output
    errors = [line for line in ranks.output.splitlines() if line.startswith("error:")]
    told = f"no process has moved for 4 s; {who} came no further than step 4, pass 1: "
    assert len(errors) == 1 and told in errors[0], ranks.output
    result = read_result(run)
    assert result["status"] == "failed" and result["error"] in errors[0]
