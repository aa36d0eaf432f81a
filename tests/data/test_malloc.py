"""Freed memory: kept where the next step takes it again, given back where a reader's images were."""

from __future__ import annotations

import platform
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO, ROOT

from lars.data import processes
from lars.engine import base
from lars.engine.plain import Plain
from lars.recipe import config
from lars.recipe.launched import Launched

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc's options are glibc's")

FAULTS = """
import resource, sys, torch
from lars.data.malloc import keep_freed
torch.set_num_threads(1)
if "keep" in sys.argv:
    keep_freed()
def step():  # as a forward makes tensors and a backward frees them
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones((37 + 5 * n) << 18) for n in range(8)]
    while kept:
        kept.pop()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
step()
print(sum(step() for _ in range(2)))
"""

HELD = """
import random, sys, psutil
from lars.data.malloc import keep_freed, return_freed
keep_freed()  # as the process that the reader is forked from
if "return" in sys.argv:
    return_freed()
images = [bytes(100_000) + bytes([n % 256]) for n in range(1000)]
last = images[::50]
before = psutil.Process().memory_info().rss
images.clear()
print((before - psutil.Process().memory_info().rss) / 1e6)
"""


def number(script: str, *words: str) -> float:
    done = subprocess.run([sys.executable, "-c", script, *words], cwd=ROOT, capture_output=True, text=True, check=True)
    return float(done.stdout)


def test_tensors_of_a_step_take_the_pages_of_the_last_one() -> None:
    """Not all, since an aligned piece needs a larger gap than it leaves behind; the control has every fault anew."""
    assert number(FAULTS, "keep") < number(FAULTS) / 2


def test_a_reader_gives_back_what_its_images_took() -> None:
    """A twentieth of the images are still held, each between others that are not."""
    assert number(HELD, "return") > 80 > number(HELD)


@pytest.mark.parametrize(("device", "kept"), [("cpu", 1), ("cuda", 0)])
def test_an_engine_on_a_cpu_keeps_it(device: str, kept: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    accelerator = SimpleNamespace(device=torch.device(device), process_index=0)
    monkeypatch.setattr(base, "Accelerator", lambda **_: accelerator)
    monkeypatch.setattr(base, "_assert_processes", lambda *_: None)
    monkeypatch.setattr(base, "keep_freed", lambda: calls.append(1))
    monkeypatch.setattr(base.Engine, "pin_arithmetic", lambda self: None)  # it would pin this process
    Plain(config.load(DEMO / "alexnet.yaml", []), Launched("plain", 1))
    assert len(calls) == kept


def test_a_reader_begins_with_giving_it_back(monkeypatch: pytest.MonkeyPatch) -> None:
    class Called(Exception):
        pass

    def called() -> None:
        raise Called

    monkeypatch.setattr(processes, "return_freed", called)
    with pytest.raises(Called):
        processes.Serving.run(SimpleNamespace())
