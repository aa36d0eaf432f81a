"""What made a run: its sources and their hash, the versions of libraries, and the machine as far as it decides bits."""

from __future__ import annotations

import hashlib
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from lars.exact import portable
from lars.recipe.model_file import model_files
from lars.run.reading import read_object

_PACKAGES = ("torch", "torchvision", "timm", "accelerate", "deepspeed", "datasets", "pyarrow", "numpy", "pillow")


def sources(config: Path) -> dict[str, str]:
    """{file: SHA-256} of what decides a run besides the recipe's keys: `lars/`, `train.py`, the recipe's own folder."""
    library, folder = Path(__file__).parents[1], config.resolve().parent
    train = folder / "train.py" if (folder / "train.py").is_file() else folder.parent / "train.py"
    files = {f"lars/{p.relative_to(library)}": p for ending in ("py", "c") for p in library.rglob(f"*.{ending}")}
    files.update({f"recipe/{p.name}": p for p in (*folder.glob("*.py"), config)})
    files.update({f"{p.parent.name}/{p.name}": p for p in model_files.get(folder / "model.py", [])})
    if train.is_file():
        files["train.py"] = train
    return {name: hashlib.sha256(file.read_bytes()).hexdigest() for name, file in sorted(files.items())}


def changed_sources(run: Path, now: dict[str, str]) -> list[str]:
    """The files in which `now`, what `sources` gives, differs from what made the steps of a run so far.

    Raises:
        RecipeError: its `sources.json` is damaged.
    """
    then = read_object(run / "sources.json")
    return sorted(name for name in {*now, *then} if now.get(name) != then.get(name))


def source_sha256(files: dict[str, str]) -> str:
    """One SHA-256 over what `sources` gave."""
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()


def commit() -> str | None:
    """The commit that is checked out here, with "+" if its files were changed since; None without git."""
    try:
        git = ["git", "-C", str(Path(__file__).parents[2])]
        head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run([*git, "diff", "--quiet", "HEAD"], capture_output=True).returncode
        return head + "+" * bool(changed)
    except (OSError, subprocess.CalledProcessError):
        return None


def environment(device: torch.device) -> dict[str, Any]:
    """The numeric environment: where these agree, the promise of one hash holds."""
    found = {"threads": torch.get_num_threads(), "torch": torch.__version__}
    found |= {"python": sys.version.split()[0], "system": platform.system()}
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        name = {"device": torch.cuda.get_device_name(device), "instructions": f"sm_{major}{minor}"}
        return {**name, "cudnn": torch.backends.cudnn.version(), "cuda": torch.version.cuda, **found}
    name, flags = portable.cpu()
    return {"device": name, "instructions": torch.backends.cpu.get_cpu_capability(), "cpu_flags": flags, **found}


def versions() -> dict[str, str]:
    """Installed versions of the packages that a run rests on."""
    return portable.versions(_PACKAGES)
