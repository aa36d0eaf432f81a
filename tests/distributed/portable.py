"""`make launchers`: one hash whatever starts a run, and whatever x86-64 CPU it runs on. Writes portable.json,
and a table into lars/README.md.

- launchers: twenty steps of a demo recipe with `runtime.portable=true` under each launcher, with 1, 2 and 4 processes.
- emulated: two steps of both demo recipes, loader included, on CPUs that qemu-x86_64 emulates, against this one. An
  emulated CPU has another's instructions, and other kernels are chosen; but its rsqrt and rcp are exact, and in silicon
  they are approximations that each maker has his own of.
- control: the same without the pinned instruction set, where the emulated CPU must give other bits.
- pixels: `pixels.py`, which `make test` compares; emulated CPUs must give the same.

The data are the demo's, but for a validation split of 32 images: what is evaluated changes no weight.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import groupby
from pathlib import Path

import psutil
import pyarrow.parquet as pq

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import DEMO, ROOT, free_port

from lars.exact import portable
from lars.run.reading import read_result
from lars.run.sources import commit

FILE, PAGE = Path(__file__).with_name("portable.json"), ROOT / "lars" / "README.md"
RECIPES = ("demo/alexnet", "demo/resnet50")
RECIPE, STEPS, FEW = RECIPES[0], 20, 4  # of the launchers' cells; `make test` plays the first few steps
LAUNCHERS = ("accelerate launch", "torchrun", "srun-like", "one rank a node", "bare")
PROCESSES = (1, 2, 4)
EMULATED = ("Haswell-v4", "EPYC-Rome", "Skylake-Client-v4")
QEMU = "qemu-x86_64"
TABLE = ("<!-- portable: written by `make launchers` -->\n", "<!-- end of portable -->\n")
_PROCESS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_LEFT_OUT = (*portable.VARIABLES, *_PROCESS, "OMP_NUM_THREADS", "MKL_NUM_THREADS")


def cells() -> list[tuple[str, int]]:
    """(launcher, processes) of the table; without a launcher there is one process."""
    return [(launcher, w) for launcher in LAUNCHERS for w in PROCESSES if w == 1 or launcher != "bare"]


def small_data(folder: Path) -> Path:
    """The demo's training files, and the first 32 rows of its validation split."""
    folder.mkdir(parents=True)
    for file in (DEMO / "data").glob("train-*.parquet"):
        shutil.copy(file, folder)
    name = "validation-00000-of-00001.parquet"
    pq.write_table(pq.read_table(DEMO / "data" / name).slice(0, 32), folder / name)
    return folder


def clean(**variables: str) -> dict[str, str]:
    """This process's variables without those that decide bits or that a launcher sets: no thread count is given."""
    kept = {k: v for k, v in os.environ.items() if k not in _LEFT_OUT and not k.startswith("ACCELERATE_")}
    return {**kept, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT), **variables}


def arguments(recipe: str, steps: int, data: Path, run: Path, *more: str) -> list[str]:
    """Those of train.py."""
    keys = (f"max_steps={steps}", f"data.path={data}", f"run_dir={run}", "trackers=[]", "runtime.portable=true")
    return ["--config", str(ROOT / "recipes" / f"{recipe}.yaml"), *keys, *more]


def launch(launcher: str, processes: int, steps: int, data: Path, run: Path) -> dict:
    """`result.json` of one run under a launcher, to its end."""
    train = [str(ROOT / "recipes/train.py"), *arguments(RECIPE, steps, data, run)]
    port = str(free_port())
    if launcher == "accelerate launch":
        file = ROOT / "launch" / ("cpu-1.yaml" if processes == 1 else "cpu-2.yaml")
        start = ["-m", "accelerate.commands.accelerate_cli", "launch", "--config_file", str(file)]
        commands = [([*start, "--num_processes", str(processes), "--main_process_port", port], {})]
    elif launcher == "torchrun":
        commands = [(["-m", "torch.distributed.run", "--nproc_per_node", str(processes), "--master_port", port], {})]
    elif launcher == "bare":
        commands = [([], {})]
    else:
        shared = {"WORLD_SIZE": str(processes), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        nodes = launcher == "one rank a node"
        local = [("0", "1") if nodes else (str(rank), str(processes)) for rank in range(processes)]
        commands = [
            ([], {**shared, "RANK": str(rank), "LOCAL_RANK": local[rank][0], "LOCAL_WORLD_SIZE": local[rank][1]})
            for rank in range(processes)
        ]
    play([([sys.executable, *start, *train], clean(**told)) for start, told in commands], timeout=600)
    return read_result(run)


def play(commands: list[tuple[list[str], dict[str, str]]], timeout: float) -> None:
    """Run commands at the same time, each to its end; whatever they started ends with them.

    Raises:
        RuntimeError: one did not end well; what it printed.
    """
    with tempfile.TemporaryFile("w+") as log:
        how = {"cwd": ROOT, "stdout": log, "stderr": subprocess.STDOUT, "start_new_session": True}
        started = [subprocess.Popen(command, env=variables, **how) for command, variables in commands]
        try:
            ended = [process.wait(timeout) for process in started]
        finally:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
        if any(ended):
            log.seek(0)
            raise RuntimeError(f"{commands[0][0]} ended with {ended}: {log.read()[-4000:]}")


def two_steps(recipe: str, cpu: str, data: Path, run: Path, *more: str, pinned: bool = True) -> dict:
    """`result.json` after two steps in one process on this CPU ("native"), or on one that qemu emulates."""
    # an emulated run is twenty times slower, and nobody waits for it
    patient = ("data.workers=1", f"runtime.portable={str(pinned).lower()}", "runtime.hang_seconds=3600")
    told = arguments(recipe, 2, data, run, *patient, *more)
    if cpu == "native":
        play([([sys.executable, str(ROOT / "recipes/train.py"), *told], clean())], timeout=3600)
    else:
        emulate([QEMU, "-cpu", cpu, sys.executable, "-m", "tests.distributed.emulated", *told], run)
    return read_result(run)


def emulate(command: list[str], run: Path) -> None:
    """Run an emulated command to its end, from the start again where qemu's fork goes wrong.

    A process that qemu forks can wait for ever for a lock that another thread held at that moment (one in eight did),
    or, more rarely, end at once.

    Raises:
        RuntimeError: it did not end well, or its forks went wrong three times.
    """
    for _ in range(3):
        shutil.rmtree(run, ignore_errors=True)
        with tempfile.TemporaryFile("w+") as log:
            process = subprocess.Popen(
                command, env=clean(), cwd=ROOT, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                ended = _status_or_standstill(process)
            finally:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
            if ended == 0:
                return
            if ended is not None:
                log.seek(0)
                if "process of the loader ended" not in (said := log.read()):
                    raise RuntimeError(f"{command} ended with {ended}: {said[-4000:]}")
    raise RuntimeError(f"{command}: its forked processes stood still or ended three times")


def _status_or_standstill(process: subprocess.Popen) -> int | None:
    """The exit status; None where the process and its children used less than a second of CPU in two minutes."""
    before = -1.0
    while True:
        used = 0.0
        try:
            return process.wait(120)
        except subprocess.TimeoutExpired:
            for part in (whole := psutil.Process(process.pid), *whole.children(recursive=True)):
                with suppress(psutil.NoSuchProcess):
                    used += sum(part.cpu_times()[:4])  # with those of children that have ended
        if used < before + 1:
            return None
        before = used


def pixels_on(cpu: str) -> dict[str, str]:
    """What `pixels.py` prints there."""
    emulator = [] if cpu == "native" else [QEMU, "-cpu", cpu]
    command = [*emulator, sys.executable, "-m", "tests.distributed.pixels"]
    done = subprocess.run(command, env=clean(), cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True)
    return json.loads(done.stdout)


def why_not_here(committed: dict) -> str | None:
    """Why the committed hashes say nothing about this machine; None if they must be met."""
    if reason := portable.excluded():
        return f"the committed hashes are portable ones, and {reason}"
    there, here = committed["versions"], portable.versions()
    other = [f"{name} {here.get(name)}, not {there[name]}" for name in there if here.get(name) != there[name]]
    return f"the committed hashes are of other versions: here is {', '.join(other)}" if other else None


def why_no_control() -> str | None:
    """Why the control could agree by right: without the pins a CPU with AVX2 alone takes much the same kernels."""
    wide = "avx512f" in portable.cpu()[1].split()
    return None if wide else "this CPU has no AVX-512: without the pins it may take Haswell's kernels by right"


def table(result: dict) -> str:
    """The page's table, in Markdown: hashes by launcher and process count, and after two steps by CPU."""
    few = lambda digest: f"`{digest[:8]}`"  # noqa: E731
    rows, launched = result["launchers"], result["launched"]
    counts = " | ".join("1 process" if w == 1 else f"{w} processes" for w in PROCESSES)
    lines = [f"| {launched['recipe']}, {launched['steps']} steps | {counts} |", f"| --- |{' --- |' * len(PROCESSES)}"]
    for launcher, some in groupby(rows, key=lambda row: row["launcher"]):
        found = {row["processes"]: few(row["weights_sha256"]) for row in some}
        lines.append(f"| {launcher} | {' | '.join(found.get(w, '') for w in PROCESSES)} |")
    names = list(dict.fromkeys(row["cpu"] for row in result["two_steps"]))
    told = {"native": result["cpu"]}
    shown = [told.get(name, f"{name}, emulated") for name in names]
    lines += ["", f"| two steps | {' | '.join(shown)} |", f"| --- |{' --- |' * len(names)}"]
    rows = [*result["two_steps"], *result["control"]]
    for (recipe, pinned), some in groupby(rows, key=lambda row: (row["recipe"], row["pinned"])):
        found = {row["cpu"]: few(row["weights_sha256"]) for row in some}
        name = recipe if pinned else f"{recipe}, nothing pinned"
        lines.append(f"| {name} | {' | '.join(found.get(cpu, '') for cpu in names)} |")
    return "\n".join(lines) + "\n"


def measure(folder: Path) -> dict:
    """Everything that portable.json holds."""
    if reason := portable.excluded():
        raise SystemExit(f"error: nothing here can be portable: {reason}")
    data = small_data(folder / "data")
    cpus = ("native", *EMULATED) if shutil.which(QEMU) else ("native",)

    def tell(row: dict) -> dict:
        print(json.dumps(row), flush=True)
        return row

    def row(recipe: str, cpu: str, pinned: bool) -> dict:
        found = two_steps(recipe, cpu, data, folder / f"{recipe}-{cpu}-{pinned}", pinned=pinned)
        assert found["reproducibility"] == ("portable" if pinned else "bitwise"), found["reproducibility"]
        facts = {"recipe": recipe, "cpu": cpu, "pinned": pinned, "seconds": found["seconds"]}
        return tell({**facts, "weights_sha256": found["weights_sha256"]})

    launchers = []
    for launcher, processes in cells():
        found = launch(launcher, processes, STEPS, data, folder / f"{launcher}-{processes}")
        assert (found["reproducibility"], found["world_size"]) == ("portable", processes), found
        facts = {"launcher": launcher, "processes": processes, "weights_sha256": found["weights_sha256"]}
        launchers.append(tell(facts))
    few = launch("bare", 1, FEW, data, folder / "few")
    wanted = [(recipe, cpu, True) for recipe in RECIPES for cpu in cpus] + [(RECIPE, cpu, False) for cpu in cpus[:2]]
    with ThreadPoolExecutor(2) as two:
        rows = list(two.map(lambda which: row(*which), wanted))
    return {
        "cpu": portable.cpu()[0],
        "commit": commit(),
        "versions": portable.versions(),
        "launched": {"recipe": RECIPE, "steps": STEPS},
        "launchers": launchers,
        "few_steps": {"steps": FEW, "weights_sha256": few["weights_sha256"]},
        "pixels": pixels_on("native"),
        "two_steps": [row for row in rows if row["pinned"]],
        "control": [row for row in rows if not row["pinned"]],
    }


def faults(result: dict) -> list[str]:
    """What in a portable.json contradicts the promise."""
    found = []
    if len({row["weights_sha256"] for row in result["launchers"]}) != 1:
        found.append("the launchers do not agree")
    if [(row["launcher"], row["processes"]) for row in result["launchers"]] != cells():
        found.append("cells are missing")
    for recipe in RECIPES:
        if len({row["weights_sha256"] for row in result["two_steps"] if row["recipe"] == recipe}) != 1:
            found.append(f"the CPUs do not agree about {recipe}")
    cpus = [(recipe, cpu) for recipe in RECIPES for cpu in ("native", *EMULATED)]
    if [(row["recipe"], row["cpu"]) for row in result["two_steps"]] != cpus:
        found.append("CPUs are missing")
    if len({row["weights_sha256"] for row in result["control"]}) != 2:
        found.append("without the pins the CPUs agree, so the comparison shows nothing")
    return found


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        result = measure(Path(folder))
    FILE.write_text(json.dumps(result, indent=1) + "\n")
    text = PAGE.read_text()
    start, end = (text.index(mark) for mark in TABLE)
    PAGE.write_text(text[: start + len(TABLE[0])] + table(result) + text[end:])
    print(table(result))
    for fault in (found := faults(result)):
        print(f"FAIL: {fault}", file=sys.stderr)
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
