"""`make chaos`: a run, interrupted at random in every way that a cluster has, against an undisturbed one.

It is interrupted at least 84 times: SIGKILL of one process, of all, of the launcher;
SIGTERM to the launcher or to one process; SIGUSR1 to one process; Ctrl-C and a closed terminal, which all get; all
suspended for longer than `runtime.hang_seconds`; an output that nobody reads any more; a disk too full for a checkpoint
(a limit on the size of a file stands in for it); one checkpoint kept instead of two; a newest checkpoint that a disk
has spoiled; a write cut off by a power loss. Every start is on another number of processes, with checkpoints at another
interval, from another folder of the same data. The final weights must have the same SHA-256. The undisturbed run is
trained last, as far as the interruptions have come: on a faster machine they come further.
"""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from conftest import DEMO, ROOT, launch_line, play, start_ranks, tiny_overrides

from lars.run.checkpoint import saved
from lars.run.reading import read_result

KINDS = (
    "kill one", "kill all", "kill launcher", "terminate launcher", "terminate one", "usr1 to one", "damage",
    "power loss", "ctrl-c", "hang up", "suspend", "closed output", "full disk", "keep one",
)  # fmt: skip
RECIPE, INTERRUPTIONS = DEMO / "resnet50.yaml", 6 * len(KINDS)
EPOCHS, MOST_STEPS = 100, 1050  # twelve steps for each interruption, of which it takes one to eight
HANG = 4  # runtime.hang_seconds where all processes are suspended for longer
ROOM = 300_000  # bytes of a file on the full disk: less than a checkpoint's 566,000, more than metrics.jsonl takes
SENT = {
    "terminate one": signal.SIGTERM,
    "usr1 to one": signal.SIGUSR1,
    "ctrl-c": signal.SIGINT,
    "hang up": signal.SIGHUP,
}


def full_disk() -> None:
    """In each rank: a checkpoint cannot be written."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (ROOM, resource.RLIM_INFINITY))


def closed_output() -> None:
    """In each rank: whoever read what it prints is gone."""
    reading, writing = os.pipe()
    os.close(reading)
    for stream in (1, 2):
        os.dup2(writing, stream)


FIRST = {"full disk": full_disk, "closed output": closed_output}


def last_step(run: Path) -> int:
    """Steps in metrics.jsonl."""
    file = run / "metrics.jsonl"
    return file.read_text().count('"kind": "train"') if file.exists() else 0


def spoil(run: Path, kind: str, dice: random.Random) -> None:
    """What a disk or a power loss leaves behind."""
    if kind == "damage" and len(saved(run)) > 1:
        file = dice.choice(sorted(saved(run)[-1].iterdir()))
        content = bytearray(file.read_bytes())
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        file.write_bytes(content)
    if kind == "power loss":
        half = run / "checkpoints" / f".step-{last_step(run) + 1:08d}"
        half.mkdir(parents=True, exist_ok=True)
        (half / "model.safetensors").write_bytes(bytes(1000))
        with open(run / "metrics.jsonl", "a") as metrics:
            metrics.write('{"kind": "train", "step": 9')


def suspend(run: Path, everyone: list[int], alive: Callable[[], bool]) -> bool:
    """Stop all processes, with their children, for longer than `hang_seconds`, and see the run go on.

    True if it has finished.
    """
    tree = [
        p
        for pid in everyone
        if psutil.pid_exists(pid)
        for p in (psutil.Process(pid), *psutil.Process(pid).children(recursive=True))
    ]
    for number, pause in ((signal.SIGSTOP, 2 * HANG), (signal.SIGCONT, 0)):
        for process in tree:
            if process.is_running():
                process.send_signal(number)
        time.sleep(pause)
    stood, began = last_step(run), time.time()
    while alive() and last_step(run) == stood and time.time() - began < 60:
        time.sleep(0.01)
    assert last_step(run) > stood or not alive(), "the run does not go on after it was suspended"
    return not alive()


def interrupt(run: Path, kind: str, processes: int, keys: tuple[str, ...], log: Path, dice: random.Random) -> bool:
    """Start or resume the run, let it come a few steps further, strike; False if it finished first."""
    start, further = last_step(run), dice.randint(1, 3)
    launcher = None
    if "launcher" in kind:
        with open(log, "a") as stream:
            launcher = subprocess.Popen(
                launch_line(max(processes, 2), RECIPE, keys), stdout=stream, stderr=stream, cwd=ROOT
            )
        alive = lambda: launcher.poll() is None  # noqa: E731
    else:
        ranks = start_ranks(processes, RECIPE, *keys, log=log, first=FIRST.get(kind))
        alive = lambda: any(p.is_alive() for p in ranks.processes)  # noqa: E731
    began = time.time()
    while alive() and (
        last_step(run) == start
        and time.time() - began < 60
        or last_step(run) < start + further
        and time.time() - began < 20
    ):
        time.sleep(0.01)
    time.sleep(dice.random() * 0.2)  # anywhere in a step, or in a save
    finished = not alive()
    if launcher:
        ranks_of = psutil.Process(launcher.pid).children(recursive=True) if not finished else []
        launcher.send_signal(signal.SIGKILL if kind == "kill launcher" else signal.SIGTERM)
        launcher.wait(60)
        _, left = psutil.wait_procs(ranks_of, timeout=60)
        assert not left, f"processes outlived their launcher: {left}"
    else:
        everyone = [p.pid for p in ranks.processes]
        if kind == "suspend" and not finished:
            finished = suspend(run, everyone, alive)
        number = SENT.get(kind, signal.SIGKILL)
        for pid in [dice.choice(everyone)] if " one" in kind and kind != "keep one" else everyone:
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                finished = True
        ranks.wait(120)
    spoil(run, kind, dice)
    return not finished


def main() -> int:
    dice = random.Random(0)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data = [folder / "data-1", folder / "data-2"]
        for place in data:
            place.mkdir()
            tiny = tiny_overrides(place)[1:]
        common = (*tiny, f"epochs={EPOCHS}")
        run, counts, done, passed_over = folder / "chaos", dict.fromkeys(KINDS, 0), 0, 0
        log = folder / "chaos.log"
        keys = (*common, f"run_dir={run}")
        while done < INTERRUPTIONS:
            kind, processes = KINDS[done % len(KINDS)], dice.choice((1, 2, 3, 4))
            limit = f"max_steps={last_step(run) + 8}"  # where an interruption that comes late leaves the run
            more = (f"data.path={dice.choice(data)}", f"checkpoint.every_steps={dice.randint(1, 3)}", limit)
            more += ("checkpoint.keep=1",) * (kind == "keep one")
            more += (f"runtime.hang_seconds={HANG}", f"data.retry_seconds={HANG - 1}") * (kind == "suspend")
            if interrupt(run, kind, processes, (*keys, *more), log, dice):
                done += 1
                counts[kind] += 1
                print(f"{done:3d}  {kind:18s}  {processes} processes  after step {last_step(run)}", flush=True)
            passed_over += log.read_text().count("falling back to the one before")
            log.write_text("")
            if last_step(run) > MOST_STEPS - 8:
                print(f"the run was over after {done} interruptions", flush=True)
                break
        end = f"max_steps={last_step(run) + 8}"
        play(2, RECIPE, *keys, end, f"data.path={data[1]}", log=log)
        play(2, RECIPE, *common, end, f"data.path={data[0]}", f"run_dir={folder / 'calm'}", log=folder / "calm.log")
        calm, chaos = read_result(folder / "calm"), read_result(run)
        passed_over += log.read_text().count("falling back to the one before")
        same = all(calm[key] == chaos[key] for key in ("weights_sha256", "samples_hash", "top1", "steps"))
        print(
            f"interruptions: {done} ({', '.join(f'{n} x {kind}' for kind, n in counts.items())}); "
            f"damaged checkpoints passed over: {passed_over}"
        )
        print(
            f"undisturbed {calm['weights_sha256'][:16]}  interrupted {chaos['weights_sha256'][:16]}  "
            f"{'SAME RUN' if same else 'DIFFERENT RUNS'}"
        )
        return 0 if same and done >= INTERRUPTIONS and passed_over else 1


if __name__ == "__main__":
    sys.exit(main())
