"""`make chaos`: one run, interrupted at random at least fifty times in every way that a cluster has, against an undisturbed one.

SIGKILL of one process, of all, of the launcher; SIGTERM to the launcher or to one process; SIGUSR1 to one process; a
newest checkpoint that a disk has spoiled; a write cut off by a power loss; every start on another number of processes,
with checkpoints at another interval, from another folder of the same data. The final weights must have the same SHA-256.
The undisturbed run is trained last, as far as the interruptions have come: on a faster machine they come further.
"""
from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parent))
from conftest import DEMO, ROOT, launch_line, play, start_ranks, tiny_overrides  # noqa: E402
from lars.checkpoint import saved  # noqa: E402
from lars.run import read_result  # noqa: E402

RECIPE, INTERRUPTIONS = DEMO / "resnet50.yaml", 50
EPOCHS, MOST_STEPS = 100, 1050  # twenty steps for each interruption, of which it takes one to eight
KINDS = ("kill one", "kill all", "kill launcher", "terminate launcher", "terminate one", "usr1 to one", "damage", "power loss")


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


def interrupt(run: Path, kind: str, processes: int, keys: tuple[str, ...], log: Path, dice: random.Random) -> bool:
    """Start or resume the run, let it come a few steps further, strike; False if it finished first."""
    start, further = last_step(run), dice.randint(1, 3)
    launcher = None
    if "launcher" in kind:
        with open(log, "a") as stream:
            launcher = subprocess.Popen(launch_line(max(processes, 2), RECIPE, keys), stdout=stream, stderr=stream, cwd=ROOT)
        alive = lambda: launcher.poll() is None  # noqa: E731
    else:
        ranks = start_ranks(processes, RECIPE, *keys, log=log)
        alive = lambda: any(p.is_alive() for p in ranks.processes)  # noqa: E731
    began = time.time()
    while alive() and (last_step(run) == start and time.time() - began < 60 or last_step(run) < start + further and time.time() - began < 20):
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
        number = {"terminate one": signal.SIGTERM, "usr1 to one": signal.SIGUSR1}.get(kind, signal.SIGKILL)
        for pid in everyone if kind in ("kill all", "power loss", "damage") else [dice.choice(everyone)]:
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
        print(f"interruptions: {done} ({', '.join(f'{n} x {kind}' for kind, n in counts.items())}); damaged checkpoints passed over: {passed_over}")
        print(f"undisturbed {calm['weights_sha256'][:16]}  interrupted {chaos['weights_sha256'][:16]}  {'SAME RUN' if same else 'DIFFERENT RUNS'}")
        return 0 if same and done >= INTERRUPTIONS and passed_over else 1


if __name__ == "__main__":
    sys.exit(main())
