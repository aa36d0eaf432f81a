"""Signals, suspension, closed output, full disks, wrong launchers: real processes, and real signals to them."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from conftest import DEMO, RANKS, ROOT, Ranks, launch_line, play, start_ranks, wait_until, without_speed
from promises import promised

from lars.commands import reproduce
from lars.commands.preflight import check_room
from lars.recipe import config
from lars.recipe.keys import Checkpoint
from lars.recipe.launched import Alone, place
from lars.recipe.refusal import RecipeError
from lars.run import checkpoint, peers, watchdog
from lars.run.reading import read_lines, read_result
from lars.run.signals import StopRequest
from lars.run.watchdog import Watchdog
from recipes.train import main

RECIPE = DEMO / "resnet50.yaml"
SIX = {
    "RANK": "0",
    "WORLD_SIZE": "2",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "127.0.0.1",
    "MASTER_PORT": "29500",
}


def steps(run: Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count('"kind": "train"') if file.exists() else 0


def errors(ranks: Ranks) -> list[str]:
    assert "Traceback" not in ranks.output, ranks.output
    return [line for line in ranks.output.splitlines() if line.startswith("error: ")]


def family(ranks: Ranks) -> list[psutil.Process]:
    """Ranks and the processes of their loaders."""
    own = [psutil.Process(process.pid) for process in ranks.processes]
    return [*own, *(child for process in own for child in process.children(recursive=True))]


def assert_the_same_run(run: Path, control: Path) -> None:
    ours, theirs = read_result(run), read_result(control)
    assert ours["status"] == "finished" and ours["weights_sha256"] == theirs["weights_sha256"]
    lines, expected = (
        [{**line, "images_per_second": 0} for line in read_lines(r / "metrics.jsonl")] for r in (run, control)
    )
    assert lines == expected


# --- suspended, hanging -----------------------------------------------------------------------------------------------


@promised(
    "Processes",
    (
        "a suspended run: SIGSTOP to all its processes for longer than `runtime.hang_seconds`, then SIGCONT",
        "goes on, to the same hash",
    ),
    long=True,
)
def test_suspended(tiny: tuple[str, ...], tiny_runs: dict[int, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    keys = (*tiny, "max_steps=24", "runtime.hang_seconds=4", "data.retry_seconds=2", f"run_dir={run}")
    ranks = start_ranks(2, RECIPE, *keys, log=tmp_path / "log")
    wait_until(lambda: steps(run) >= 3)
    stopped = family(ranks)
    for process in stopped:
        process.suspend()
    time.sleep(10)
    for process in stopped:
        process.resume()
    assert ranks.wait() == [0, 0], ranks.output
    assert_the_same_run(run, tiny_runs[1])


class Exchange:
    """torch's store for two processes, one of which is this one."""

    def __init__(self, other: list) -> None:
        self.signs = {"alive 1": other}

    def set(self, key: str, value: str) -> None:
        self.signs[key] = value

    def multi_get(self, keys: list[str]) -> list[str]:
        return [self.signs[key] for key in keys]


@promised(
    "Processes",
    (
        "two processes that stand still, at unequal numbers of passes",
        "the one that is behind in its own share is named",
    ),
)
def test_the_one_behind() -> None:
    watchdog = Watchdog(
        SimpleNamespace(processes=1, rank=0, name=str, leads_node=True),
        SimpleNamespace(hang_seconds=600, compile=False),
        print,
    )
    watchdog.end()
    watchdog.peers.processes, watchdog.store = 2, Exchange('[9, 4, 2, ""]')
    watchdog.at(4, 3)
    watchdog._sign()
    assert "rank 1 of 2 came no further than step 5, pass 2" in watchdog._behind()


@promised(
    "Processes",
    (
        "a process of more than 64 that is gone",
        "the first and the last process look at all others, the rest at these two, and it is named",
    ),
)
def test_two_watch_over_many(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watchdog, "_EACH_OTHER", 3)
    asked: list[list[str]] = []

    class Store(Exchange):
        def multi_get(self, keys: list[str]) -> list[str]:
            asked.append(keys)
            return super().multi_get(keys)

    def of(rank: int, processes: int) -> Watchdog:
        peers = SimpleNamespace(processes=1, rank=rank, name=str, nodes=["n"] * processes, leads_node=True)
        one = Watchdog(peers, SimpleNamespace(hang_seconds=600, compile=False), print)
        one.end()
        one.watch_over(processes)
        one.store = Store('[9, 4, 2, ""]')
        one.store.signs |= {f"alive {other}": '[9, 4, 2, ""]' for other in range(processes)}
        return one

    watched = {rank: of(rank, 4).watched for rank in range(4)} | {"of three": of(1, 3).watched}
    assert watched == {0: [1, 2, 3], 1: [0, 3], 2: [0, 3], 3: [0, 1, 2], "of three": [0, 2]}
    last = of(3, 4)
    assert last._silent(30) is None
    last.ticks += 30
    last.store.signs |= {"alive 0": '[39, 4, 2, ""]', "alive 1": '[39, 4, 2, ""]'}
    assert last._silent(30) == "rank 2 on n is gone or stopped"
    other = of(1, 4)
    asked.clear()
    assert other._silent(30) is None and asked == [["alive 0", "alive 3"]]


@promised(
    "Processes",
    (
        "a process that plays its passes after those of another",
        "counts what it has done of its own share, so it is not behind from the first pass on",
    ),
)
def test_places_are_of_the_own_share(tiny: tuple[str, ...], tmp_path: Path) -> None:
    ranks = start_ranks(
        2, RECIPE, *tiny, "max_steps=1", f"run_dir={tmp_path / 'run'}", log=tmp_path / "log", first=tell_places
    )
    assert ranks.wait() == [0, 0], ranks.output
    places = {
        rank: [line for line in ranks.output.splitlines() if line.startswith(f"rank {rank} at ")] for rank in (0, 1)
    }
    assert [line.split(" at ")[1] for line in places[0][:7]] == [line.split(" at ")[1] for line in places[1][:7]], (
        places
    )
    assert places[0][0] == "rank 0 at (0, 0)"


def tell_places() -> None:
    at = Watchdog.at

    def told(self: Watchdog, step: int, part: int) -> None:
        os.write(1, f"rank {self.peers.rank} at {(step, part)}\n".encode())
        at(self, step, part)

    Watchdog.at = told


@promised(
    "Processes",
    (
        "a decoding process that is stopped, in a run of one process",
        "named; the run saves its last step and ends as failed",
        "decoding",
    ),
    ("a reading process that is stopped, in a run of one process", "likewise", "reading"),
    arguments="role",
    long=True,
)
def test_a_loader_stands_still(role: str, tiny: tuple[str, ...], tiny_runs: dict[int, Path], tmp_path: Path) -> None:
    run = tmp_path / "run"
    keys = (*tiny, "max_steps=24", "data.workers=1", "log_samples=true", f"run_dir={run}")
    hang = ("runtime.hang_seconds=9", "data.retry_seconds=1")
    ranks = start_ranks(1, RECIPE, *keys, *hang, log=tmp_path / "log")
    wait_until(lambda: steps(run) >= 1)
    children = sorted(psutil.Process(ranks.processes[0].pid).children(), key=lambda child: child.pid)
    children[0 if role == "reading" else 1].suspend()  # the reader is forked first
    assert ranks.wait(60) == [1], ranks.output
    result = read_result(run)
    assert (
        len(errors(ranks)) == 1
        and f"{role} process {children[role != 'reading'].pid} (stopped) stands still" in errors(ranks)[0]
    ), ranks.output
    assert result["status"] == "failed" and result["error"] in errors(ranks)[0]
    assert (run / f"checkpoints/step-{steps(run):08d}").is_dir() and not any(child.is_running() for child in children)
    play(1, RECIPE, *keys, log=tmp_path / "log")
    assert read_result(run)["weights_sha256"] == read_result(tiny_runs[1])["weights_sha256"]


def stands_in_a_pass() -> None:
    from lars.engine.plain import Engine

    forward = Engine.forward
    Engine.forward = lambda self, images, labels, step, index: (
        time.sleep(90 * (step == 1)) or forward(self, images, labels, step, index)
    )


@promised(
    "Processes",
    (
        "a single process that stands still in a pass",
        "ends as failed after `runtime.hang_seconds`, with the step in the error",
    ),
)
def test_one_process_has_a_watchdog(tiny: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    keys = (*tiny, "runtime.hang_seconds=3", "data.retry_seconds=1", f"run_dir={run}")
    ranks = start_ranks(1, RECIPE, *keys, log=tmp_path / "log", first=stands_in_a_pass)
    assert ranks.wait(70) == [1], ranks.output
    assert (
        len(errors(ranks)) == 1
        and "no process has moved for 3 s; rank 0 of 1 came no further than step 2, pass 0" in errors(ranks)[0]
    )
    assert read_result(run)["status"] == "failed" and read_result(run)["error"] in errors(ranks)[0]


@promised(
    "Processes",
    (
        "`runtime.compile=true`, and a first step that takes longer than `runtime.hang_seconds`",
        "compilation is not counted as hanging; a later step is",
    ),
)
def test_compilation() -> None:
    said: list[str] = []
    watchdog = Watchdog(
        SimpleNamespace(processes=1, rank=0, name=str, leads_node=True),
        SimpleNamespace(hang_seconds=0.4, compile=True),
        print,
    )
    watchdog._complain = said.append
    watchdog.at(7, 0)
    ticks = watchdog.ticks
    wait_until(lambda: watchdog.ticks > ticks + 20)
    assert said == []
    watchdog.at(8, 0)
    wait_until(lambda: len(said) > 0)
    watchdog.end()
    assert "step 9, pass 0" in said[0]


# --- signals ----------------------------------------------------------------------------------------------------------


def at_a_terminal() -> None:
    """Signals as a shell in the foreground gives them to a process, wherever the tests run."""
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


def slow_passes() -> None:
    at_a_terminal()
    from lars.engine.plain import Engine

    forward = Engine.forward

    def slow(self: Engine, images: object, labels: object, step: int, index: int) -> object:
        time.sleep(1.5 if step >= 1 else 0)
        return forward(self, images, labels, step, index)

    Engine.forward = slow


@promised(
    "Processes",
    (
        "Ctrl-C (SIGINT) in a run of one process",
        "the last finished step is saved, exit status 75, one line",
        signal.SIGINT,
        1,
    ),
    ("a closed terminal (SIGHUP), to one of two processes", "likewise, on both", signal.SIGHUP, 2),
    arguments="number, processes",
)
def test_a_signal_saves(number: int, processes: int, tiny: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = start_ranks(processes, RECIPE, *tiny, f"run_dir={run}", log=tmp_path / "log", first=slow_passes)
    wait_until(lambda: steps(run) >= 1)
    os.kill(ranks.processes[-1].pid, number)
    assert ranks.wait() == [75] * processes, ranks.output
    assert "Traceback" not in ranks.output and ranks.output.count("stopped by a signal after step 1;") == 1, (
        ranks.output
    )
    assert read_result(run)["status"] == "preempted" and (run / "checkpoints/step-00000001").is_dir()


def request(ready: Path, ignored: bool) -> None:
    """What a run does with signals, without the run."""
    at_a_terminal()
    if ignored:
        for number in (signal.SIGINT, signal.SIGHUP):
            signal.signal(number, signal.SIG_IGN)
    stop = StopRequest(SimpleNamespace(processes=1))
    ready.touch()
    while not ready.with_suffix(".end").exists():
        if stop.requested():
            ready.with_suffix(".requested").touch()
        time.sleep(0.05)


def requesting(tmp_path: Path, ignored: bool) -> tuple[RANKS.Process, Path]:
    process = RANKS.Process(target=request, args=(tmp_path / "run", ignored))
    process.start()
    wait_until((tmp_path / "run").exists)
    return process, tmp_path / "run.requested"


@promised(
    "Processes",
    (
        "a second Ctrl-C",
        "ends the run at once; one that comes within a second of the first is the launcher's echo and does not",
    ),
)
def test_a_second_interrupt(tmp_path: Path) -> None:
    process, asked = requesting(tmp_path, ignored=False)
    os.kill(process.pid, signal.SIGINT)
    wait_until(asked.exists)
    time.sleep(1.1)
    os.kill(process.pid, signal.SIGINT)
    process.join(60)
    assert process.exitcode == -signal.SIGINT


@promised(
    "Processes",
    ("SIGHUP under `nohup`", "ignored, the run goes on", signal.SIGHUP),
    ("SIGINT in a background job of a script, which ignores it", "likewise", signal.SIGINT),
    arguments="number",
)
def test_an_ignored_signal(number: int, tmp_path: Path) -> None:
    process, asked = requesting(tmp_path, ignored=True)
    os.kill(process.pid, number)
    time.sleep(0.3)
    (tmp_path / "run.end").touch()
    process.join(60)
    assert process.exitcode == 0 and not asked.exists()


@promised(
    "Processes",
    (
        "Ctrl-C or a closed terminal, which reach a run's whole process group",
        "its loader's processes leave them to the run",
    ),
)
def test_children_ignore_signals(tmp_path: Path) -> None:
    from lars.data.forked import fork

    child = fork(lambda: (tmp_path / "there").touch() or time.sleep(60))
    try:
        wait_until((tmp_path / "there").exists)
        ignored = int(
            next(
                line for line in Path(f"/proc/{child}/status").read_text().splitlines() if line.startswith("SigIgn")
            ).split()[1],
            16,
        )
        assert all(
            ignored >> number - 1 & 1 for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM, signal.SIGUSR1)
        )
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@promised("Processes", ("Ctrl-C before training, where there is nothing to save", "ends at once, without a traceback"))
def test_interrupted_before_training() -> None:
    line = (
        "import os, signal; from lars.run.signals import interrupts_end_at_once as end; end(); "
        "os.kill(os.getpid(), signal.SIGINT); print('on')"
    )
    done = subprocess.run(
        [sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True, preexec_fn=at_a_terminal
    )
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def launcher_lines(tiny: tuple[str, ...]) -> dict[str, list[str]]:
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node",
        "2",
        str(ROOT / "recipes/train.py"),
    ]
    return {
        "accelerate 1": launch_line(1, RECIPE, tiny),
        "accelerate 2": launch_line(2, RECIPE, tiny),
        "torchrun": [*torchrun, "--config", str(RECIPE), *tiny],
    }


@promised(
    "Processes",
    ("Ctrl-C in a terminal under `accelerate launch`, one process", "the run is saved", "accelerate 1"),
    ("Ctrl-C in a terminal under `accelerate launch`, two processes", "the run is saved", "accelerate 2"),
    ("Ctrl-C in a terminal under `torchrun`", "the run is saved", "torchrun"),
    arguments="launcher",
    long=True,
)
def test_interrupt_of_a_process_group(launcher: str, tiny: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    line = launcher_lines((*tiny, f"run_dir={run}"))[launcher]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    with open(tmp_path / "log", "w") as log:
        process = subprocess.Popen(
            line, stdout=log, stderr=log, cwd=ROOT, env=environment, start_new_session=True, preexec_fn=at_a_terminal
        )
    try:
        wait_until(lambda: steps(run) >= 1, seconds=300)
        ranks = psutil.Process(process.pid).children(recursive=True)
        os.killpg(process.pid, signal.SIGINT)
        assert process.wait(100) != 0
    finally:
        process.kill()
    _, left = psutil.wait_procs(ranks, timeout=100)
    assert not left and read_result(run)["status"] == "preempted", (tmp_path / "log").read_text()
    assert (run / f"checkpoints/step-{read_result(run)['steps']:08d}").is_dir()
    assert (tmp_path / "log").read_text().count("stopped by a signal after step") == 1


# --- closed output ----------------------------------------------------------------------------------------------------


def broken_pipe() -> None:
    read, write = os.pipe()
    os.close(read)
    for number in (1, 2):
        os.dup2(write, number)


def no_output() -> None:
    os.close(1)
    os.close(2)
    sys.stdout = sys.stderr = None  # what Python makes of missing ones


@promised(
    "Processes",
    ("stdout and stderr read by nobody any more (`| head`)", "the run goes on to its end, exit status 0", broken_pipe),
    ("stdout and stderr closed (`>&- 2>&-`)", "likewise", no_output),
    arguments="first",
)
def test_closed_output(first: Callable[[], None], tiny: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    ranks = start_ranks(1, RECIPE, *tiny, "max_steps=3", f"run_dir={run}", log=tmp_path / "log", first=first)
    assert ranks.wait() == [0]
    assert read_result(run)["status"] == "finished" and steps(run) == 3


def missing_descriptors(tmp_path: Path) -> None:
    from lars.run.progress import outlive_output

    os.close(0)
    no_output()
    outlive_output()
    with open(tmp_path / "file", "w"):
        os.write(1, b"of a library that prints")
        os.write(2, b"of a library that complains")


@promised("Processes", ("a library that prints to a closed stdout", "does not write into the next file that is opened"))
def test_the_next_file_is_not_stdout(tmp_path: Path) -> None:
    process = RANKS.Process(target=missing_descriptors, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0 and (tmp_path / "file").read_text() == ""


@promised(
    "Processes",
    ("a shell's `recipes/train.py ... 2>&1 | head -n 1`", "finishes the run", "2>&1 | head -n 1"),
    ("a shell's `recipes/train.py ... >&- 2>&-`", "finishes the run", ">&- 2>&-"),
    arguments="words",
    long=True,
)
def test_closed_output_of_a_shell(words: str, tiny: tuple[str, ...], tmp_path: Path) -> None:
    keys = " ".join(f"'{key}'" for key in (*tiny, "max_steps=3", f"run_dir={tmp_path / 'run'}"))
    line = f"set -o pipefail; {sys.executable} recipes/train.py --config {RECIPE} {keys} {words}"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == 0 and done.stderr == b"", done
    assert read_result(tmp_path / "run")["status"] == "finished"


@promised("Processes", ("`lars keys | head -n 1`", "no traceback, exit status 0"))
def test_closed_output_of_a_command() -> None:
    line = f"set -o pipefail; {sys.executable} -m lars keys | head -n 1"
    done = subprocess.run(["bash", "-c", line], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr, done.stdout.count("\n")) == (0, "", 1)


# --- full disks -------------------------------------------------------------------------------------------------------


def small_disk(folder: Path, size: str) -> None:
    """A file system of this process's own, in a name space that nobody else sees."""
    import ctypes

    assert ctypes.CDLL(None, use_errno=True).unshare(0x00020000) == 0  # CLONE_NEWNS
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)


def obstacle() -> str:
    trial = ["unshare", "-m", "sh", "-c", "mount -t tmpfs -o size=1m tmpfs /mnt"]
    try:
        done = subprocess.run(trial, capture_output=True, text=True)
    except OSError as error:
        return str(error)
    return f"no small file system can be mounted here: {done.stderr.strip()}" if done.returncode else ""


DISK = pytest.mark.skipif(bool(obstacle()), reason=obstacle())


@DISK
@promised(
    "Processes",
    (
        "a disk without room for `checkpoint.keep` + 1 checkpoints",
        "refused before training, with both numbers; nothing is written",
    ),
)
def test_no_room(tiny: tuple[str, ...], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    first = partial(small_disk, tmp_path / "disk", "2m")
    ranks = start_ranks(1, RECIPE, *tiny, f"run_dir={tmp_path / 'disk/run'}", log=tmp_path / "log", first=first)
    assert ranks.wait() == [2], ranks.output
    assert len(errors(ranks)) == 1 and "has room for 2 MiB, but 3 checkpoints (checkpoint.keep=2" in errors(ranks)[0], (
        ranks.output
    )


@promised(
    "Processes",
    (
        "a disk that is full when a finished run, or one with its checkpoints, is started again",
        "what is there counts: no refusal",
    ),
)
def test_room_counts_what_is_there(
    tiny_runs: dict[int, Path], tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from lars.engine.build import build_model

    model = build_model(config.load(RECIPE, list(tiny)))[0]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=0))
    check_room(tiny_runs[1], Checkpoint(keep=2), model)  # finished
    (tmp_path / "checkpoints").symlink_to(tiny_runs[1] / "checkpoints")
    kept = len(checkpoint.saved(tmp_path))
    with pytest.raises(RecipeError, match="has room for 0 MiB, but"):
        check_room(tmp_path, Checkpoint(keep=kept), model)
    size = sum(file.stat().st_size for file in checkpoint.saved(tmp_path)[0].iterdir())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=size))
    check_room(tmp_path, Checkpoint(keep=kept), model)


def fill(folder: Path, size: str, free_again: bool) -> None:
    """A disk that somebody else fills after the second step, before the first checkpoint.

    It is cleared once the run has met it.
    """
    from recipes.train import Training

    small_disk(folder, size)
    log_step = Training.log_step

    def filling(self: Training, *values: object) -> None:
        if self.step == 3:
            with open(folder / "foreign", "wb", buffering=0) as stream:
                try:
                    while stream.write(bytes(4096)):
                        continue
                except OSError:
                    pass
        if self.folder.trouble and free_again:
            (folder / "foreign").unlink(missing_ok=True)
        log_step(self, *values)

    Training.log_step = filling


def copy_out(folder: Path, target: Path, size: str, free_again: bool) -> None:
    """`fill`, and when the run has ended, its folder where the test can see it."""
    import atexit
    from multiprocessing import util

    fill(folder, size, free_again)
    util.Finalize(None, shutil.copytree, args=(folder / "run", target), exitpriority=1)
    atexit.register(lambda: None)


@DISK
@promised(
    "Processes",
    (
        "a disk that fills up during a run and has room again later",
        "the run goes on; no line of its files is lost; the status is written",
        True,
    ),
    (
        "a disk that fills up during a run, before the first checkpoint, and stays full",
        "ends with one line that says so, exit status 1",
        False,
    ),
    arguments="free_again",
    long=True,
)
def test_a_disk_fills_up(free_again: bool, tiny: tuple[str, ...], tiny_runs: dict[int, Path], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    keys = (*tiny, "max_steps=24", "log_samples=true", f"run_dir={tmp_path / 'disk/run'}")
    first = partial(copy_out, tmp_path / "disk", tmp_path / "copy", "12m", free_again)
    ranks = start_ranks(1, RECIPE, *keys, log=tmp_path / "log", first=first)
    statuses = ranks.wait()
    assert ranks.output.count("cannot be written (No space left on device)") == 1, ranks.output
    if free_again:
        assert statuses == [0], ranks.output
        assert_the_same_run(tmp_path / "copy", tiny_runs[1])
        assert without_speed(tmp_path / "copy/ledger.jsonl") == without_speed(tiny_runs[1] / "ledger.jsonl")
    else:
        assert statuses == [1] and len(errors(ranks)) == 1, ranks.output
        assert "could not be written, and there is none before it" in errors(ranks)[0] and "space" in errors(ranks)[0]


@promised(
    "Processes",
    ("a line that the disk takes only in part", "is written whole once there is room, never in the middle of another"),
)
def test_half_a_line(tmp_path: Path) -> None:
    process = RANKS.Process(target=limited, args=(tmp_path,))
    process.start()
    process.join(60)
    assert process.exitcode == 0
    lines = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert lines == [{"kind": "train", "words": "a" * 900, "step": step} for step in range(12)]
    assert read_result(tmp_path / "run")["status"] == "finished"


def limited(folder: Path) -> None:
    """A limit of the file size stands for a full disk: a write is cut off there, and the next one fails."""
    import resource

    from lars.run.folder import RunFolder

    run = RunFolder(config.load(RECIPE, [f"run_dir={folder / 'run'}"]), writes=True)
    run.lock.acquire()
    run.result = {"heartbeat": None}
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for step in range(12):
        resource.setrlimit(
            resource.RLIMIT_FSIZE, (4000 if 2 < step < 8 else resource.RLIM_INFINITY, resource.RLIM_INFINITY)
        )
        run.log("train", words="a" * 900, step=step)
    run.end("finished")


# --- launchers --------------------------------------------------------------------------------------------------------


@promised(
    "Launchers",
    ("RANK without WORLD_SIZE", "refused", {"RANK": "1"}, "RANK set, but not WORLD_SIZE"),
    ("a RANK that is no number", "refused", {**SIX, "RANK": "one"}, "RANK=one"),
    ("a negative RANK", "refused", {**SIX, "RANK": "-1"}, "RANK=-1"),
    ("RANK >= WORLD_SIZE", "refused", {**SIX, "RANK": "2"}, "RANK=2, WORLD_SIZE=2"),
    ("LOCAL_RANK >= LOCAL_WORLD_SIZE", "refused", {**SIX, "LOCAL_RANK": "2"}, "LOCAL_RANK=2, LOCAL_WORLD_SIZE=2"),
    ("WORLD_SIZE=0", "refused", {**SIX, "WORLD_SIZE": "0"}, "WORLD_SIZE=0"),
    ("MASTER_PORT=0", "refused", {**SIX, "MASTER_PORT": "0"}, "MASTER_PORT=0 of the launcher is no port"),
    ("MASTER_PORT=70000", "refused", {**SIX, "MASTER_PORT": "70000"}, "from 1 to 65535"),
    arguments="variables, words",
)
def test_numbers_that_cannot_be(
    variables: dict[str, str], words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for name in SIX:
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(Alone):  # before train.py is called here, which would wait for the other process
        place()
    assert main(["--config", str(DEMO / "alexnet.yaml")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said, said


@promised(
    "Launchers",
    (
        "a MASTER_ADDR that does not resolve",
        "refused after 30 seconds",
        {**SIX, "MASTER_ADDR": "no.such.host.invalid"},
        "MASTER_ADDR=no.such.host.invalid",
    ),
    (
        "a MASTER_PORT that another program holds, on rank 0",
        "refused",
        {**SIX, "MASTER_PORT": "taken"},
        "address already in use",
    ),
    (
        "a program that never answers at MASTER_PORT, on another rank",
        "refused after a minute",
        {**SIX, "RANK": "1", "MASTER_PORT": "taken"},
        "does not answer",
    ),
    (
        "a launcher that is killed before its processes have met",
        "refused after a minute",
        {**SIX, "MASTER_PORT": "1", "TORCHELASTIC_USE_AGENT_STORE": "True"},
        "the launcher is gone",
    ),
    arguments="variables, words",
)
def test_wrong_variables(variables: dict[str, str], words: str, tmp_path: Path) -> None:
    with socket.socket() as mute:
        mute.bind(("0.0.0.0", 0))
        mute.listen(9)
        port = str(mute.getsockname()[1])
        told = {name: port if value == "taken" else value for name, value in variables.items()}
        process = RANKS.Process(target=start_with, args=(told, tmp_path / "stderr"))
        process.start()
        process.join(120)
        assert process.exitcode == 2
    said = (tmp_path / "stderr").read_text()
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said, said


def start_with(variables: dict[str, str], stderr: Path) -> None:
    """In a process of its own: torch's thread that still asks for the others would speak in the tests that follow."""
    peers._UNKNOWN, peers._MUTE = 1, 2
    peers._FIRST_MEETING = timedelta(seconds=15)  # nobody else will come, should it wait
    os.environ["ACCELERATE_USE_CPU"] = "true"
    for name in SIX:
        os.environ.pop(name, None)
    os.environ.update(variables)
    with open(stderr, "w") as sys.stderr:
        sys.exit(main(["--config", str(DEMO / "alexnet.yaml")]))


def fewer_gpus() -> None:
    """Rank 1's node has lost a GPU; the others train on a CPU, since there is no GPU here."""
    if os.environ["RANK"] == "1":
        from lars.recipe import launched

        launched.uses_cpu = lambda environment: False


@promised(
    "Launchers",
    ("fewer GPUs than processes on one node of several", "refused on all of them at once, with that node's name"),
)
def test_a_node_with_fewer_gpus(tiny: tuple[str, ...], tmp_path: Path) -> None:
    ranks = start_ranks(3, RECIPE, *tiny, f"run_dir={tmp_path / 'run'}", log=tmp_path / "log", first=fewer_gpus)
    assert ranks.wait(60) == [2, 2, 2], ranks.output
    assert (
        len(errors(ranks)) == 1
        and "rank 1 on " in errors(ranks)[0]
        and "3 processes on this machine share 0 GPUs" in errors(ranks)[0]
    )
    assert not (tmp_path / "run").exists()


@promised("Processes", ("a finished run that is started again", "says that it is finished, not that it resumes"))
def test_finished_first(tiny: tuple[str, ...], tiny_runs: dict[int, Path], tmp_path: Path) -> None:
    said = play(1, RECIPE, *tiny, "max_steps=24", "log_samples=true", f"run_dir={tiny_runs[1]}", log=tmp_path / "log")
    assert "already finished after 24 steps" in said and "resuming" not in said


def fails(run: Path) -> list[str]:
    """A launcher's run that has failed, and thirty lines of the launcher."""
    code = (
        "import json, pathlib, sys, time; run = pathlib.Path(sys.argv[1]); run.mkdir(parents=True)\n"
        "failed = {'status': 'failed', 'error': 'a decoder is gone', 'heartbeat': time.time()}\n"
        "(run / 'result.json').write_text(json.dumps(failed))\n"
        "sys.exit('of the launcher\\n' * 30)"
    )
    return ["accelerate", "-c", code, str(run)]


@promised(
    "Launchers", ("an error in a run that `make reproduce-*` has started", "stands last, after the launcher's lines")
)
def test_our_error_stands_last(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    run = tmp_path / "run"
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(reproduce, "launch_command", lambda *rest: fails(run))
    monkeypatch.setattr(
        reproduce, "start", lambda command: subprocess.Popen([sys.executable, *command[1:]], stderr=subprocess.DEVNULL)
    )
    monkeypatch.setattr(reproduce.subprocess, "run", lambda *check, **how: SimpleNamespace(returncode=0))
    monkeypatch.setattr(reproduce, "report", lambda *rest: False)
    monkeypatch.setattr(sys, "argv", ["reproduce", str(RECIPE), f"run_dir={run}"])
    assert reproduce.main() == 1
    assert capsys.readouterr().out.strip().splitlines()[-1] == f"error: {run}: a decoder is gone"


@promised("Launchers", ("the tests, on a machine with GPUs", "play on its CPU"))
def test_the_tests_see_no_gpu() -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""
