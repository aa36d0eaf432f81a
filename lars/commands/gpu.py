"""One GPU, before it is trusted with a run: how fast it multiplies matrices, and what `nvidia-smi` says of it."""

from __future__ import annotations

import re
import subprocess
import time
from typing import Any

import torch

_SIZE, _TIMES = 8192, 10  # of the matrices, and products that are timed
_ASKED = {
    "driver_version": "driver",
    "ecc.errors.uncorrected.volatile.total": "uncorrected memory errors since the driver was loaded",
    "clocks_throttle_reasons.hw_slowdown": "hardware slowdown",
    "clocks_throttle_reasons.hw_thermal_slowdown": "slowdown by heat",
    "clocks_throttle_reasons.hw_power_brake_slowdown": "slowdown by the power supply",
    "clocks_throttle_reasons.sw_thermal_slowdown": "slowdown by heat, by the driver",
}


def look_at(device: torch.device, precision: str) -> tuple[dict[str, Any], list[str]]:
    """Rows of the table, and faults. The GPU is asked while it is warm."""
    seen: dict[str, Any] = {"matrix product": [peak(device, precision), f"Tflop/s in {precision}"]}
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"
    told, faults = health(uuid)
    links = nvlinks(uuid)
    return seen | {"driver": told.get("driver", "unknown"), "NVLink": links or "none"}, faults


def peak(device: torch.device, precision: str) -> float:
    """Tflop/s of a large matrix product in the recipe's precision."""
    a = torch.randn(_SIZE, _SIZE, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32)
    before, torch.backends.cuda.matmul.allow_tf32 = torch.backends.cuda.matmul.allow_tf32, precision == "tf32"
    for times in (2, _TIMES):  # the first to warm up
        torch.cuda.synchronize(device)
        started = time.perf_counter()
        for _ in range(times):
            a @ a
        torch.cuda.synchronize(device)
    took = time.perf_counter() - started
    torch.backends.cuda.matmul.allow_tf32 = before
    return 2 * _SIZE**3 * _TIMES / took / 1e12


def health(uuid: str) -> tuple[dict[str, str], list[str]]:
    """What `nvidia-smi` says of a GPU, {name: answer}, and what of it is a fault; nothing where it is not there."""
    said = _nvidia_smi("-i", uuid, f"--query-gpu={','.join(_ASKED)}", "--format=csv,noheader,nounits")
    answers = [answer.strip() for answer in said.strip().split(",")]
    if len(answers) != len(_ASKED):
        return {}, []
    told, faults = dict(zip(_ASKED.values(), answers)), []
    for name, answer in told.items():
        if name.startswith("uncorrected") and answer.isdecimal() and int(answer):
            faults.append(f"{uuid} has {answer} {name}: take it out of the run and let it be reset or replaced")
        if "slowdown" in name and answer == "Active":
            faults.append(f"{uuid} is throttled ({name}): look at its cooling and power, or take it out of the run")
    return told, faults


def nvlinks(uuid: str) -> str:
    """How many of a GPU's NVLinks are up, as in "18 of 18"; "" where it has none or `nvidia-smi` does not tell."""
    links = re.findall(r"Link \d+: (.*)", _nvidia_smi("nvlink", "--status", "-i", uuid))
    return f"{sum('GB/s' in link for link in links)} of {len(links)}" if links else ""


def _nvidia_smi(*words: str) -> str:
    try:
        return subprocess.run(["nvidia-smi", *words], capture_output=True, text=True, timeout=10, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return ""
