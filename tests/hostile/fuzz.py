"""`make fuzz`: broken recipes, run folders, Parquet files and images, drawn at random for MINUTES.

Each trial runs in a process of its own, from a seed that repeats it: `python -m tests.hostile.fuzz --trial folders:17`.
A finding is a traceback, a hang, a process left behind, more memory than MOST_MEMORY, an error that is not one line, or
a wrong success, which an oracle tells:

- recipes: what was accepted is what a plain YAML parser reads from the same text, and keeps the limits of `lars keys`;
- folders: a run that goes on from a broken folder ends with the weights of an undisturbed one, and the tools that only
  read a folder end in order;
- data: a run on a broken data set either stops or has the weights of one on the whole data;
- images: pixels of the asked size, or BadImage.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import multiprocessing
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import yaml

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import DEMO, RANKS, ROOT, tiny_overrides

RECIPES = [DEMO / "alexnet.yaml", DEMO / "resnet50.yaml", ROOT / "recipes/study/lars.yaml"]
MOST_SECONDS = 300  # of a trial, which takes seconds: what takes so long hangs
MOST_MEMORY = 3 * 2**30  # bytes of a trial's process; an undisturbed one takes a third
NASTY = [
    "", " ", "null", "~", "true", "nan", ".inf", "-.inf", "-1", "0", "1e999", "1e-999", "99999999999999999999", "0x10",
    "1_000", "[]", "{}", "[[]]", "{a: {b: {c: 1}}}", "${seed}", "${oc.env:HOME}", "${nowhere}",
    "!!python/object/apply:os.system [ls]", "&a [*a]", "\x00", "é" * 300, "../../x",
    "/dev/zero", "2024-01-01", "'", '"', "a: b: c", "- x", "%", "@", "\t",
]  # fmt: skip
LIMITS = {  # as `lars keys` says them
    "must be positive": lambda x: x > 0,
    "must not be negative": lambda x: x >= 0,
    "must lie in [0, 1)": lambda x: 0 <= x < 1,
    "must lie in [0, 1]": lambda x: 0 <= x <= 1,
}
EDGES = ["-1", "0", "0.5", "1"]  # of what keys allow; given alone, so that nothing else is refused first
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    2.5,
    float("nan"),
    10**30,
    "",
    "x",
    "../x",
    [],
    [1, "a"],
    {},
    {"a": None},
    "<script>alert(1)</script>",
]


def mutated(data: bytes, dice: random.Random) -> bytes:
    """A few bits, bytes or stretches changed, doubled, lost or moved."""
    content = bytearray(data)
    for _ in range(dice.choice((1, 1, 2, 8))):
        at, length = dice.randrange(len(content) + 1), dice.choice((1, 1, 4, 64, 4096))
        kind = dice.randrange(6)
        if kind == 0 and content:
            content[at % len(content)] ^= 1 << dice.randrange(8)
        elif kind == 1:
            content[at : at + length] = dice.randbytes(length)
        elif kind == 2:
            del content[at : at + length]
        elif kind == 3:
            content[at:at] = content[at : at + length]
        elif kind == 4:
            del content[at:]
        else:
            content[at : at + 4] = dice.choice((b"\0\0\0\0", b"\xff\xff\xff\xff", b"\x7f\xff\xff\xff"))
    return bytes(content)


def mutated_text(text: str, dice: random.Random) -> str:
    """A YAML text with lines lost, doubled, moved or indented, or values replaced."""
    lines = text.splitlines()
    for _ in range(dice.choice((1, 1, 2, 5))):
        at, kind = dice.randrange(len(lines)), dice.randrange(6)
        if kind == 0:
            del lines[at]
        elif kind == 1:
            lines.insert(dice.randrange(len(lines)), lines[at])
        elif kind == 2:
            lines[at] = " " * dice.randrange(4) + lines[at].lstrip()
        elif kind == 3:
            return mutated("\n".join(lines).encode(), dice).decode("utf-8", "surrogateescape")
        else:
            lines[at] = lines[at].partition(":")[0] + ": " + dice.choice(NASTY)
        lines = lines or [""]
    return "\n".join(lines)


def mutated_json(value: Any, dice: random.Random) -> Any:
    """JSON with one value, somewhere, replaced or lost."""
    if isinstance(value, (dict, list)) and value and dice.random() < 0.9:
        key = dice.choice(list(value)) if isinstance(value, dict) else dice.randrange(len(value))
        if dice.random() < 0.15:
            del value[key]
        else:
            value[key] = mutated_json(value[key], dice)
        return value
    return dice.choice(VALUES)


def quietly(main: Callable, arguments: list[str]) -> tuple[int, str]:
    """The exit status of a command and what it said on stderr."""
    told, sys.argv = io.StringIO(), ["", *arguments]
    with contextlib.redirect_stderr(told), contextlib.redirect_stdout(io.StringIO()):
        try:
            status = main(arguments) if main.__code__.co_argcount else main()
        except SystemExit as end:
            status = end.code
    return status, told.getvalue()


def in_order(status: int, told: str, allowed: tuple[int, ...]) -> str | None:
    """What is wrong with how a command ended."""
    errors = [line for line in told.splitlines() if line.startswith("error: ")]
    if "Traceback" in told:
        return f"a traceback:\n{told[-3000:]}"
    if status not in allowed:
        return f"exit status {status}: {told[-1000:]}"
    return (
        None
        if (status in (0, 75)) == (not errors) and len(errors) <= 1
        else f"exit status {status} with {len(errors)} error lines: {told[-1000:]}"
    )


def recipes(dice: random.Random, stage: Path, folder: Path) -> str | None:
    from lars.recipe import config
    from lars.recipe.keys import declared
    from recipes.train import main

    file = folder / "recipe.yaml"
    original = dice.choice(RECIPES)
    text = original.read_text().replace("path: ./data", f"path: {stage / 'data'}")
    overrides = ["trackers=[]"]
    if dice.random() < 0.6:
        text = mutated_text(text, dice)
    else:
        keys = [*config.flatten(config.load(original, [])), "lr", "model", "augment", "x.y", "model.kwargs.z"]
        if dice.random() < 0.5:
            overrides += [f"{dice.choice(keys)}={dice.choice(EDGES)}"]
        else:
            overrides += [f"{dice.choice(keys)}={dice.choice(NASTY)}" for _ in range(dice.randint(1, 3))]
    file.write_text(text, errors="surrogateescape")
    status, told = quietly(
        main, ["--config", str(file), "--check", "--processes", str(dice.choice((1, 2, 3, 0, -1))), *overrides]
    )
    wrong = in_order(status, told, (0, 2))
    if wrong or status:
        return wrong
    recipe = config.load(file, overrides)
    plain, read = config.one_level(yaml.safe_load(text)), config.flatten(recipe)
    limits = {k: one.metadata["limit"] for k, one in declared(type(recipe.optimizer)).items() if one.metadata["limit"]}
    if beyond := [k for k, limit in limits.items() if read[k] is not None and not LIMITS[limit](read[k])]:
        return f"accepted beyond a limit: {[f'{k}={read[k]} {limits[k]}' for k in beyond]}"
    if len(overrides) > 1:
        return None
    skipped = ("data.path", "run_dir")  # made absolute
    differ = [k for k, v in plain.items() if k not in skipped and "${" not in str(v) and read.get(k) != v]
    differ = [
        k for k in differ if not (isinstance(read.get(k), (int, float, list)) and _number(plain[k]) == _number(read[k]))
    ]
    return f"accepted with other values: {differ}" if differ else None


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e9 as text and OmegaConf as a number."""
    try:
        return [float(v) for v in value] if isinstance(value, list) else float(value)
    except (TypeError, ValueError):
        return value


def folders(dice: random.Random, stage: Path, folder: Path) -> str | None:
    from lars.commands import ledger
    from lars.report import report
    from recipes.train import main

    run = folder / "run"
    shutil.copytree(stage / "run", run)
    for _ in range(dice.choice((1, 1, 2))):
        file = dice.choice(sorted(p for p in run.rglob("*") if p.is_file()) or [run / "result.json"])
        kind = dice.randrange(6)
        if kind == 0 or file.suffix not in (".json", ".yaml", ".jsonl") and kind < 4:
            file.write_bytes(mutated(file.read_bytes(), dice) if file.exists() else b"")
        elif kind == 1 and file.suffix == ".json":
            with contextlib.suppress(ValueError):
                file.write_text(json.dumps(mutated_json(json.loads(file.read_text()), dice)))
                if dice.random() < 0.5 and (file.parent / "state.sha256").exists():
                    (file.parent / "state.sha256").write_text(hashlib.sha256(file.read_bytes()).hexdigest() + "\n")
        elif kind == 2:
            file.write_text(json.dumps(dice.choice(VALUES)))
        elif kind == 3:
            file.write_text(mutated_text(file.read_text(errors="replace") or "x", dice), errors="replace")
        else:
            file.unlink(missing_ok=True)
            if kind == 5:
                dice.choice(
                    (
                        file.mkdir,
                        partial(file.symlink_to, file),
                        partial(os.mkfifo, file),
                        partial(file.symlink_to, "/dev/zero"),
                    )
                )()
    kept = folder / "kept"
    with contextlib.suppress(OSError, shutil.Error):
        shutil.copytree(
            run, kept, symlinks=True, ignore=lambda at, names: [n for n in names if (Path(at) / n).is_fifo()]
        )
    ledger.RECIPES = folder / "recipes"  # the ledger writes, and this repository's holds what was really trained
    (ledger.RECIPES / "demo").mkdir(parents=True)
    for tool, arguments in ((report.main, [str(kept)]), (ledger.main, [str(kept)])):
        if wrong := in_order(*quietly(tool, arguments), (0, 1, 2)):
            # a report of a run that failed ends with 1 and a table, not with a line
            if "error lines" not in wrong or "status 1 with 0" not in wrong:
                return f"{tool.__module__}: {wrong}"
    status, told = quietly(main, [*(stage / "arguments").read_text().splitlines(), "max_steps=5", f"run_dir={run}"])
    wrong = in_order(status, told, (0, 2))
    if not wrong and status == 0:
        ours = json.loads((run / "result.json").read_text())["weights_sha256"]
        whole = json.loads((stage / "whole/result.json").read_text())["weights_sha256"]
        wrong = None if ours == whole else "the run went on to other weights"
    return wrong


def data(dice: random.Random, stage: Path, folder: Path) -> str | None:
    from recipes.train import main

    shutil.copytree(stage / "data", folder / "data")
    file = dice.choice(sorted((folder / "data").glob("*.parquet")))
    file.write_bytes(mutated(file.read_bytes(), dice))
    arguments = [a for a in (stage / "arguments").read_text().splitlines() if not a.startswith("data.path=")]
    status, told = quietly(
        main, [*arguments, f"data.path={folder / 'data'}", "max_steps=5", f"run_dir={folder / 'run'}"]
    )
    wrong = in_order(status, told, (0, 1, 2))
    if not wrong and status == 0:
        ours = json.loads((folder / "run/result.json").read_text())
        whole = json.loads((stage / "whole/result.json").read_text())
        wrong = None if ours["weights_sha256"] == whole["weights_sha256"] else "trained on other bytes without a word"
    return wrong


def images(dice: random.Random, stage: Path, folder: Path) -> str | None:
    import numpy as np

    from lars.data.augment import draws_of, evaluation_image, training_image
    from lars.data.decode import BadImage
    from lars.recipe import config

    augment = config.load(DEMO / "alexnet.yaml", []).augment
    seeds = sorted((stage / "images").iterdir())
    for number in range(100):
        file = dice.choice(seeds)
        content = mutated(file.read_bytes(), dice)
        draws = draws_of(0, np.array([0]), np.array([number]))[0]
        for look in (
            partial(evaluation_image, content, augment, 67),
            partial(training_image, content, augment, 67, draws),
        ):
            try:
                view = look()
            except BadImage:
                continue
            except Exception:
                return f"{file.name}, mutation {number}: {traceback.format_exc()[-1500:]}"
            if view.shape != (67, 67, 3) or view.dtype != np.uint8:
                return f"{file.name}, mutation {number}: a view of {view.shape}, {view.dtype}"
    return None


KINDS = {kind.__name__: kind for kind in (recipes, folders, data, images)}


def prepare(stage: Path) -> None:
    """What is mutated: a small data set with content hashes, a run of it after two of three checkpoints, images.

    The images have six formats.
    """
    import numpy as np
    from PIL import Image

    from lars.commands import convert
    from recipes.train import main

    (stage / "plain").mkdir()
    tiny = tiny_overrides(stage / "plain")
    quietly(convert.main, [str(stage / "plain"), str(stage / "data"), "--workers", "1"])
    keys = (
        *(key for key in tiny if not key.startswith("data.path=")),
        f"data.path={stage / 'data'}",
        "checkpoint.every_steps=2",
    )
    arguments = ["--config", str(DEMO / "resnet50.yaml"), *keys]
    (stage / "arguments").write_text("\n".join(arguments))
    for name, steps in (("run", 4), ("whole", 5)):
        status, told = quietly(main, [*arguments, f"max_steps={steps}", f"run_dir={stage / name}"])
        assert status == 0, told
    (stage / "images").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8).repeat(4, 0).repeat(4, 1)
    for ending in ("jpeg", "png", "webp", "gif", "bmp", "tiff"):
        Image.fromarray(pixels).save(stage / f"images/photo.{ending}")
        Image.fromarray(pixels[:, :, 0]).save(stage / f"images/grey.{ending}")
    Image.fromarray(pixels).save(stage / "images/progressive.jpeg", progressive=True)
    Image.fromarray(pixels).convert("CMYK").save(stage / "images/cmyk.jpeg")
    Image.fromarray(pixels).convert("P").save(stage / "images/palette.png")


def _in_child(kind: str, seed: int, stage: str, folder: str) -> None:
    os.setsid()
    resource.setrlimit(resource.RLIMIT_DATA, (2 * MOST_MEMORY, 2 * MOST_MEMORY))
    os.chdir(ROOT)
    os.environ["XDG_CACHE_HOME"] = folder
    os.dup2(os.open(f"{folder}/output", os.O_WRONLY | os.O_CREAT), 2)
    try:
        wrong = KINDS[kind](random.Random(f"{kind} {seed}"), Path(stage), Path(folder))
    except BaseException:
        wrong = f"a traceback:\n{traceback.format_exc()[-3000:]}"
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)) * 1024
    if peak > MOST_MEMORY:
        wrong = f"{peak / 2**30:.1f} GiB of memory"
    (Path(folder) / "wrong").write_text(wrong or "")
    os._exit(0)


def trial(kind: str, seed: int, stage: Path) -> str | None:
    """What is wrong, or None."""
    with tempfile.TemporaryDirectory() as folder:
        child = RANKS.Process(target=_in_child, args=(kind, seed, str(stage), folder))
        child.start()
        child.join(MOST_SECONDS)
        hangs = child.is_alive()
        left = [p for p in psutil.process_iter() if p.pid != child.pid and _session(p.pid) == child.pid]
        if not hangs and left:
            left = psutil.wait_procs(left, timeout=10)[1]  # a child of the run notices within a second that it is alone
        for process in [*left, *([psutil.Process(child.pid)] if hangs else [])]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        child.join()
        if hangs:
            return f"it hangs: {(Path(folder) / 'output').read_text()[-1000:]}"
        if left:
            return f"processes left behind: {left}"
        told = Path(folder) / "wrong"
        return (
            told.read_text() or None
            if told.exists()
            else f"it ended with {child.exitcode}: {(Path(folder) / 'output').read_text()[-1000:]}"
        )


def _session(pid: int) -> int | None:
    try:
        return os.getsid(pid)
    except OSError:
        return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--first", type=int, default=0, help="the first seed")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--trial", metavar="KIND:SEED", help="only this one")
    parser.add_argument("--until-found", action="store_true", help="end at the first finding")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        preparing = multiprocessing.get_context("spawn").Process(target=prepare, args=(Path(folder),))
        preparing.start()
        preparing.join()
        assert preparing.exitcode == 0, "the undisturbed run does not end well"
        if args.trial:
            kind, _, seed = args.trial.partition(":")
            wrong = trial(kind, int(seed), Path(folder))
            print(wrong or "nothing found")
            return 1 if wrong else 0
        done, findings, began, seed = Counter(), 0, time.monotonic(), args.first
        while time.monotonic() - began < 60 * args.minutes and not (args.until_found and findings):
            for kind in args.kinds:
                if wrong := trial(kind, seed, Path(folder)):
                    findings += 1
                    print(f"FOUND {kind}:{seed}: {wrong}", flush=True)
                done[kind] += 1
            seed += 1
    told = ", ".join(f"{count} of {kind}" for kind, count in done.items())
    print(
        f"{sum(done.values())} trials ({told}) in {(time.monotonic() - began) / 60:.1f} minutes, "
        f"seeds from {args.first}: {findings} findings"
    )
    return 1 if findings else 0


if __name__ == "__main__":
    sys.exit(main())
