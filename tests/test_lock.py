"""One writer a run folder: starts that meet, processes that are killed or suspended. Real processes, short times."""

from __future__ import annotations

import errno
import json
import os
import signal
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import pytest
from conftest import DEMO, RANKS, Ranks, start_ranks, wait_until, without_speed

from lars.recipe.refusal import RecipeError
from lars.run import lock
from lars.run.lock import LockLost, RunLock
from lars.run.reading import read_result

RECIPE = DEMO / "resnet50.yaml"


def short_times() -> None:
    """Dead after a second and a half instead of a minute."""
    lock.COUNT_EVERY, lock.DEAD_AFTER = 0.2, 1.5


@pytest.fixture
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lock, "COUNT_EVERY", 0.2)
    monkeypatch.setattr(lock, "DEAD_AFTER", 1.5)


def hold(folder: Path, done: Path) -> None:
    """What a run does with its lock, until `done` appears."""
    short_times()
    owner = RunLock(folder)
    owner.acquire()
    wait_until(done.exists)
    owner.release()


def holder(folder: Path, done: Path) -> RANKS.Process:
    process = RANKS.Process(target=hold, args=(folder, done))
    process.start()
    wait_until(lambda: (folder / "lock").exists() and (folder / "lock").stat().st_size > 0)
    return process


def compete(folder: Path, begin: Path, outcome: Path, enough: Path) -> None:
    """Try to get a dead lock at the same moment as others; write down what came of it."""
    short_times()
    mine = RunLock(folder)
    outcome.with_suffix(".ready").touch()
    while not begin.exists():
        pass
    try:
        mine.acquire()
    except RecipeError:
        outcome.write_text("refused")
        return
    outcome.write_text("taken")
    wait_until(enough.exists)
    mine.check()  # still its own
    outcome.write_text("kept")


def test_the_lock_of_a_killed_process_is_taken_at_once(tmp_path: Path) -> None:
    process = holder(tmp_path, tmp_path / "done")
    process.kill()
    process.join()
    started = time.monotonic()
    RunLock(tmp_path).acquire()
    assert time.monotonic() - started < lock.DEAD_AFTER / 4


def test_a_lock_whose_owner_counts_is_refused_and_free_once_it_is_released(tmp_path: Path, short: None) -> None:
    process = holder(tmp_path, tmp_path / "done")
    with pytest.raises(RecipeError, match=f"is being written by process {process.pid} on "):
        RunLock(tmp_path).acquire()
    (tmp_path / "done").touch()
    process.join(60)
    assert process.exitcode == 0 and not (tmp_path / "lock").exists()
    RunLock(tmp_path).acquire()


def test_of_several_observers_of_a_dead_lock_one_gets_it(tmp_path: Path) -> None:
    process = holder(tmp_path / "run", tmp_path / "done")
    process.kill()
    process.join()
    outcomes = [tmp_path / f"{number}.outcome" for number in range(6)]
    args = [(tmp_path / "run", tmp_path / "begin", outcome, tmp_path / "enough") for outcome in outcomes]
    observers = [RANKS.Process(target=compete, args=each) for each in args]
    for observer in observers:
        observer.start()
    wait_until(lambda: all(outcome.with_suffix(".ready").exists() for outcome in outcomes))
    (tmp_path / "begin").touch()
    wait_until(lambda: all(outcome.exists() for outcome in outcomes))
    (tmp_path / "enough").touch()
    for observer in observers:
        observer.join(60)
        assert observer.exitcode == 0
    assert sorted(outcome.read_text() for outcome in outcomes) == ["kept"] + ["refused"] * 5
    assert [file.name for file in (tmp_path / "run").iterdir()] == ["lock"]


def test_an_observer_that_comes_too_late_gives_the_lock_back(tmp_path: Path) -> None:
    """The moment between looking and taking, which no timing of processes would meet."""
    process = holder(tmp_path, tmp_path / "done")
    process.kill()
    process.join()
    dead = lock._read(tmp_path / "lock")
    faster, late = RunLock(tmp_path), RunLock(tmp_path)
    faster.acquire()
    late._remove(dead)
    faster.check()
    assert lock._read(tmp_path / "lock")["token"] == faster.token
    assert [file.name for file in tmp_path.iterdir()] == ["lock"]
    faster.release()
    assert list(tmp_path.iterdir()) == []


def test_an_observer_that_was_killed_while_it_took_a_dead_lock_stops_nobody(tmp_path: Path, short: None) -> None:
    process = holder(tmp_path, tmp_path / "done")
    process.kill()
    process.join()
    (tmp_path / f"lock-after-{lock._read(tmp_path / 'lock')['token']}").touch()
    mine = RunLock(tmp_path)
    mine.acquire()
    mine.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("left", ["nothing", "another machine's"])
def test_a_lock_that_nobody_counts_is_dead_after_a_while(left: str, tmp_path: Path, short: None) -> None:
    """An empty file is what a power loss leaves."""
    owner = {"token": "b", "host": "worker-b", "machine": "another boot", "pid": os.getpid(), "started": "1"}
    (tmp_path / "lock").write_text("" if left == "nothing" else f"{5:020d}\n{json.dumps(owner)}\n")
    started, mine = time.monotonic(), RunLock(tmp_path)
    mine.acquire()
    assert time.monotonic() - started >= lock.DEAD_AFTER
    mine.check()
    mine.release()
    assert list(tmp_path.iterdir()) == []


NO_LOCKS = (
    b"",
    b"1\n",
    b"1\n[]",
    b"1\n{}",
    b"\xff\n{}",
    b"x\n" + b"[" * 2000,
    b'1\n{"token": "../x", "host": "a", "machine": "", "pid": 1, "started": 0}',
    b'1\n{"token": "a", "host": "a", "machine": "", "pid": "1", "started": 0}',
    bytes(5000),
    os.mkfifo,
)


def test_a_damaged_lock_is_dead_after_a_while(tmp_path: Path, short: None) -> None:
    """Each in a folder of its own and all at the same time: they wait, and compute nothing."""

    def take(number: int, content: bytes | Callable[[Path], None]) -> str | None:
        """What is wrong with taking over such a lock; None if nothing is."""
        file = tmp_path / str(number) / "lock"
        file.parent.mkdir()
        file.write_bytes(content) if isinstance(content, bytes) else content(file)
        owner = RunLock(file.parent)
        owner.acquire()
        pid = json.loads(file.read_text().partition("\n")[2])["pid"]
        owner.release()
        return None if pid == os.getpid() and not list(file.parent.iterdir()) else f"{content!r} was not taken over"

    with ThreadPoolExecutor(len(NO_LOCKS)) as pool:
        assert list(pool.map(take, range(len(NO_LOCKS)), NO_LOCKS)) == [None] * len(NO_LOCKS)


def test_a_lock_that_may_not_be_read_is_not_dead(tmp_path: Path, short: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is another user's, who lives. `root` may read everything, so the refusal of the system is played."""
    (tmp_path / "lock").write_text("1\n{}")
    monkeypatch.setattr(
        "lars.run.reading.os.open", Mock(side_effect=PermissionError(errno.EACCES, "Permission denied"))
    )
    with pytest.raises((RecipeError, PermissionError), match="Permission denied"):
        RunLock(tmp_path).acquire()


def test_a_folder_in_the_lock_s_place_is_refused(tmp_path: Path, short: None) -> None:
    (tmp_path / "lock").mkdir()
    with pytest.raises(RecipeError, match="lock"):
        RunLock(tmp_path).acquire()


def test_who_was_suspended_for_too_long_loses_the_lock_and_leaves_the_new_one(tmp_path: Path, short: None) -> None:
    suspended = RunLock(tmp_path)
    assert suspended._create()  # a lock without the thread that counts
    another = RunLock(tmp_path)
    another.acquire()
    with pytest.raises(LockLost, match=f"process {os.getpid()} on .* has taken it over"):
        suspended.check()
    suspended.release()
    another.check()
    another.release()
    assert list(tmp_path.iterdir()) == []


def test_who_finds_no_lock_any_more_has_lost_it(tmp_path: Path) -> None:
    """Another run took the folder over, finished, and gave it back."""
    mine = RunLock(tmp_path)
    mine.acquire()
    (tmp_path / "lock").unlink()
    with pytest.raises(LockLost, match="its lock file is gone"):
        mine.check()


def said(ranks: Ranks) -> list[str]:
    return [line for line in ranks.output.splitlines() if line.startswith("error: ")]


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_two_starts_in_one_folder(
    processes: int, tmp_path: Path, tiny: tuple[str, ...], tiny_runs: dict[int, Path]
) -> None:
    """A second start is refused while the first runs, and takes over when that is suspended; continued, it stops."""
    run = tmp_path / "run"
    keys = (*tiny, "max_steps=24", "log_samples=true", "checkpoint.every_steps=3", f"run_dir={run}")

    def step_is_logged(step: int) -> bool:
        return (run / "metrics.jsonl").exists() and f'"step": {step},' in (run / "metrics.jsonl").read_text()

    until = partial(pause, 5, tmp_path / "first goes on")
    first = start_ranks(processes, RECIPE, *keys, log=tmp_path / "first", first=until)
    wait_until(lambda: step_is_logged(4) and (run / "checkpoints/step-00000003").exists())
    refused = start_ranks(processes, RECIPE, *keys, log=tmp_path / "refused", first=short_times)
    assert refused.wait() == [2] * processes, refused.output
    assert len(said(refused)) == 1, refused.output
    assert f"is being written by process {first.processes[0].pid} on " in said(refused)[0]

    for process in first.processes:
        os.kill(process.pid, signal.SIGSTOP)
    until = partial(pause, 8, tmp_path / "second goes on")
    second = start_ranks(processes, RECIPE, *keys, log=tmp_path / "second", first=until)
    wait_until(lambda: step_is_logged(7))
    (tmp_path / "first goes on").touch()
    for process in first.processes:
        os.kill(process.pid, signal.SIGCONT)
    assert 0 not in first.wait(60) and first.processes[0].exitcode == 1, first.output
    assert f"process {second.processes[0].pid} on " in first.output and "has taken it over" in first.output
    assert len(said(first)) == 1 and "Traceback" not in first.output, first.output
    (tmp_path / "second goes on").touch()
    assert second.wait() == [0] * processes and "resuming after step 3" in second.output, second.output

    ours, theirs = read_result(run), read_result(tiny_runs[1])
    assert (ours["status"], ours["weights_sha256"]) == ("finished", theirs["weights_sha256"])
    for name in ("metrics.jsonl", "ledger.jsonl"):
        assert without_speed(run / name) == without_speed(tiny_runs[1] / name)
    assert not (run / "lock").exists() and list((run / "checkpoints").glob(".*")) == []


def pause(step: int, goes_on: Path) -> None:
    """Stop before the end of a step until a file appears; short times of the lock, which is counted up meanwhile."""
    from recipes.train import Training

    short_times()
    train_step = Training.train_step

    def paused(self: Training, *batches: object) -> object:
        if self.step + 1 == step:
            wait_until(goes_on.exists)
        return train_step(self, *batches)

    Training.train_step = paused


def test_a_folder_that_is_a_file_is_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RecipeError, match="cannot be written"):
        RunLock(tmp_path / "run").acquire()
