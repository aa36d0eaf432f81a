"""Does every mend have a test that would miss it? Takes each back alone, in a copy of the tree, and sees its test fail.

    python -m tests.hostile.reverts [words of a mend ...]

`reverts/*.yaml` lists them: `mend` (what it is), `file`, `mended` and `broken` (a piece of that file, which stands
there once, and what takes its place), `test` (a pytest node). Without the change the test must pass. An entry with
`fuzz` (the kinds of trials) instead of `test` is a planted bug, which `make fuzz` must find within MOST_MINUTES.

It takes an hour, so it goes on where it was stopped: a line of the committed log, reverts.log, stands as long as the
mend, the mended file and the file of its test are the ones that it was written for (their digest is its second word).
"""

from __future__ import annotations

import hashlib
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from pathlib import Path
from queue import SimpleQueue

import yaml

ROOT = Path(__file__).parents[2]
LOG = ROOT / "tests/reverts.log"
PASSED, FAILED = 0, 1  # exit statuses of pytest, and of the fuzz
MOST_MINUTES = 15
AT_ONCE = 2  # each in a tree of its own

CHILDREN = multiprocessing.get_context("forkserver")
CHILDREN.set_forkserver_preload(
    ["torch", "timm", "accelerate", "datasets", "deepspeed", "pytest"]
)  # never lars, nor its tests


def digest(mend: dict[str, str]) -> str:
    """Of the mend, the mended file and the file of its test."""
    test = mend["test"].partition("::")[0] if "test" in mend else "tests/hostile/fuzz.py"
    parts = [repr(sorted(mend.items())).encode(), *((ROOT / file).read_bytes() for file in (mend["file"], test))]
    return hashlib.sha256(b"".join(hashlib.sha256(part).digest() for part in parts)).hexdigest()[:12]


def line(found: str, mend: dict[str, str], sources: str) -> str:
    """A mend's line of the log; `sources` is its digest."""
    return f"{found:8}  {sources}  {mend['mend']}  [{mend.get('test') or 'fuzz of ' + mend['fuzz']}]"


def run(mend: dict[str, str], tree: Path) -> int:
    """The exit status of a mend's test with the sources of `tree`."""
    if "fuzz" in mend:
        fuzz = ["tests.hostile.fuzz", "--until-found", "--minutes", str(MOST_MINUTES), "--kinds", *mend["fuzz"].split()]
        variables = {**os.environ, "PYTHONPATH": str(tree)}
        return subprocess.run([sys.executable, "-m", *fuzz], cwd=tree, env=variables, capture_output=True).returncode
    child = CHILDREN.Process(target=_pytest, args=(str(tree), mend["test"]))
    child.start()
    child.join(60 * MOST_MINUTES)
    with suppress(ProcessLookupError):  # what a test that failed has left running, and itself if it has not ended
        os.killpg(child.pid, signal.SIGKILL)
    child.join()
    return child.exitcode


def _pytest(tree: str, test: str) -> None:
    os.setsid()
    os.chdir(tree)
    os.environ["PYTHONPATH"] = tree
    sys.path.insert(0, tree)
    multiprocessing.set_start_method("fork", force=True)  # as in a pytest that nobody started so
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):
        os.dup2(nowhere, stream)
    import pytest

    # not sys.exit, which would wait for the ranks that a test without its mend may leave behind
    os._exit(pytest.main(["-q", "-x", "-p", "no:cacheprovider", "--no-header", test]))


def passes(mend: dict[str, str], tree: Path, known: dict[str, bool]) -> bool:
    """Whether a mend's test passes while nothing is taken back."""
    if mend["test"] not in known:
        known[mend["test"]] = run(mend, tree) == PASSED
    return known[mend["test"]]


def taken_back(mend: dict[str, str], trees: SimpleQueue[Path], known: dict[str, bool]) -> str:
    """What a mend's test says without it: "red", or why that shows nothing."""
    tree = trees.get()
    try:
        file = tree / mend["file"]
        text = file.read_text()
        if text.count(mend["mended"]) != 1:
            return f"the mended piece stands {text.count(mend['mended'])} times in {mend['file']}"
        if "test" in mend and not passes(mend, tree, known):
            return "its test does not pass with the mend"
        file.write_text(text.replace(mend["mended"], mend["broken"]))
        status = run(mend, tree)
        file.write_text(text)
        return "red" if status == FAILED else f"NOT RED (status {status})"
    finally:
        trees.put(tree)


def main(words: list[str]) -> int:
    mends = [
        mend
        for file in sorted(Path(__file__).parent.glob("reverts/*.yaml"))
        for mend in yaml.safe_load(file.read_text())
    ]
    logged = set(LOG.read_text().splitlines()) if LOG.is_file() and not words else set()
    chosen = [(m, digest(m)) for m in mends if all(word in m["mend"] for word in words)]
    known: dict[str, bool] = {}
    kept = sorted(logged & {line("red", *one) for one in chosen})
    left = [one for one in chosen if line("red", *one) not in logged]
    with tempfile.TemporaryDirectory() as temporary, ThreadPoolExecutor(AT_ONCE) as pool:
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(AT_ONCE):
            tree = Path(temporary) / str(number)
            leave = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", "*.egg-info")
            trees.put(shutil.copytree(ROOT, tree, ignore=leave))
        under_way = {pool.submit(taken_back, mend, trees, known): (mend, sources) for mend, sources in left}
        for done in as_completed(under_way):  # as they end: what is stopped has kept all that were seen
            kept.append(line(done.result(), *under_way[done]))
            print(kept[-1], flush=True)
            if not words:
                LOG.write_text("\n".join(sorted(kept)) + "\n")
    red = sum(told.startswith("red ") for told in kept)
    print(f"{len(chosen)} mends taken back, {red} of their tests fail without them")
    return 0 if chosen and red == len(chosen) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
