"""What `make test-gpu` says where there is no GPU, and that its page lists what it asks."""

from __future__ import annotations

import re
import subprocess
import sys

from conftest import ROOT


def test_without_a_gpu_it_says_so_in_one_line() -> None:
    check = [sys.executable, "tests/gpu/check.py"]
    ended = subprocess.run(check, capture_output=True, text=True, cwd=ROOT, env={"CUDA_VISIBLE_DEVICES": ""})
    assert ended.returncode == 2 and ended.stderr.startswith("error: torch finds no GPU here: DEVICE=cpu")
    assert ended.stderr.count("\n") == 1


def test_the_page_has_a_row_for_each_item() -> None:
    parts = re.search(r"^PARTS.*?^}", (ROOT / "tests/gpu/check.py").read_text(), re.DOTALL | re.MULTILINE)[0]
    items = [
        (part, item) for part, line in re.findall(r"(\d): \((.*)\)", parts) for item in re.findall(r"\w+\.(\w+)", line)
    ]
    rows = re.findall(r"^\| (\d) \| (\w+) \|", (ROOT / "docs/gpus.md").read_text(), re.MULTILINE)
    assert rows == items and len(items) > 7
