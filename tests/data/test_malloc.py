"""Freed memory: kept where the next step takes it again, given back where a reader's images were."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="malloc's options are glibc's")

FAULTS = """
import resource, sys, torch
from lars.data.malloc import keep_freed
torch.set_num_threads(1)
if "keep" in sys.argv:
    keep_freed()
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(48 << 18)  # 48 MB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(min(faults() for _ in range(3)))
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


def test_a_tensor_that_is_made_anew_in_each_step_takes_the_pages_of_the_last_one() -> None:
    pages = (48 << 20) // (2 << 20)  # at least, where the system gives pages of 2 MiB; 12,288 of 4 KiB
    assert number(FAULTS, "keep") < pages <= number(FAULTS)


def test_a_reader_gives_back_what_its_images_took() -> None:
    """A twentieth of the images are still held, each between others that are not."""
    assert number(HELD, "return") > 80 > number(HELD)
