"""The strength *portable*: the same bits on every x86-64 CPU with AVX2.

torch, oneDNN and MKL choose their kernels by what a CPU can do, and another kernel adds in another order. Three
variables pin the choice. The libraries read them once, torch's own code when it is imported, so they are set before the
first import of torch; a variable that the user has set stays as it is, and the run is then bitwise and says so.

The variables do not reach the functions that torch hands to MKL's vector library (a tensor's sqrt, log10, tan, asin,
acos and atan, pow(0.5), and log in float64) nor NumPy's exp, log and power: their last bit belongs to the CPU, seen on
an EPYC with AVX-512 against an emulated Haswell. No run uses them; Python's `math` takes their place.
"""

from __future__ import annotations

import os
import platform
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

VARIABLES = {
    "ATEN_CPU_CAPABILITY": "avx2",  # torch's own kernels
    "ONEDNN_MAX_CPU_ISA": "AVX2",  # convolutions
    "MKL_CBWR": "COMPATIBLE",  # matrix products; its "AVX2" has other bits on AMD's CPUs than on Intel's
}
PACKAGES = ("torch", "timm", "numpy", "pillow", "simplejpeg", "opencv-python-headless")  # other versions, other bits
_NEEDED = ("avx2", "fma")  # fma: glibc's exp and log use it where it is there
_DISPATCHED = ("avx", "sse4", "fma", "amx", "f16c")  # beginnings of the flags by which libraries choose kernels


def set_variables() -> None:
    """Set all of them, or none where the user has set one to another value or the CPU lacks an instruction."""
    if not excluded():
        os.environ.update(VARIABLES)


def excluded() -> str | None:
    """Why no process that is started from this one can be portable on the CPU; None if it can. Imports no torch."""
    if platform.machine() not in ("x86_64", "AMD64"):
        return f"this CPU is {platform.machine()}, not x86-64"
    if missing := [flag for flag in _NEEDED if flag not in cpu()[1].split()]:
        return f"this CPU does not tell that it has {' and '.join(missing)}"
    for name, value in VARIABLES.items():
        if os.environ.get(name, value) != value:
            return f"{name}={os.environ[name]} is set"
    return None


def obstacle() -> str | None:
    """Why the arithmetic of this process is not portable; None if it is."""
    if reason := excluded():
        return reason
    for name in VARIABLES:
        if name not in os.environ:
            return f"{name} is not set, because torch was imported first"
    import torch

    capability = torch.backends.cpu.get_cpu_capability()
    return None if capability == "AVX2" else f"torch uses {capability}"


def versions(packages: tuple[str, ...] = PACKAGES) -> dict[str, str]:
    """Versions of the packages that decide the bits of a portable run, or of others; absent ones are left out."""
    found = {}
    for package in packages:
        with suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def cpu() -> tuple[str, str]:
    """The CPU's name, and the flags by which libraries choose their kernels; empty where the system does not tell."""
    try:
        lines = [line.partition(":") for line in Path("/proc/cpuinfo").read_text().splitlines()]
    except OSError:
        return platform.processor() or platform.machine(), ""
    first = {key.strip(): value.strip() for key, _, value in reversed(lines)}
    flags = sorted(flag for flag in first.get("flags", "").split() if flag.startswith(_DISPATCHED))
    return first.get("model name", platform.machine()), " ".join(flags)
