"""`python -m tests.benchmarks.memory [--json]`: does memory grow with the passes, and does the start-up line state it?

ResNet-50 at full width on the demo's images (28 pixels), two processes, two steps of V = 8, 64 and 512 passes of 8
images. A process's growth is its highest resident memory, less what it has after the imports, and less what the same
training at an eighth of the width grows beyond its own statement (libraries loaded on the way, encoded images).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import sys
import tempfile
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import DEMO, start_ranks

MICRO_BATCH, PROCESSES, PASSES = 8, 2, (8, 64, 512)


def observe() -> None:
    """In each rank: memory before the training, and the highest when it ends."""
    from recipes.train import Training

    before, cleanup = psutil.Process().memory_info().rss, Training.cleanup

    def tell(self: Training) -> None:
        status = Path("/proc/self/status").read_text()
        highest = 1024 * int(re.search(r"VmHWM:\s+(\d+)", status)[1])
        os.write(1, f"MEMORY {self.rank} {before} {highest}\n".encode())
        cleanup(self)

    Training.cleanup = tell


def measure(passes: int, width: int, folder: Path) -> dict:
    """{"passes", "stated_mib", "growth_mib": one for each rank}.

    `width` is the first stage's channels, 64 in ResNet-50.
    """
    keys = (
        f"global_batch={passes * MICRO_BATCH}",
        f"bn_group={MICRO_BATCH}",
        f"runtime.micro_batch={MICRO_BATCH}",
        "max_steps=2",
    )
    channels = [width, 2 * width, 4 * width, 8 * width]
    more = (f"model.kwargs.channels={channels}", "epochs=16", "trackers=[]", f"run_dir={folder / f'{passes}-{width}'}")
    ranks = start_ranks(PROCESSES, DEMO / "resnet50.yaml", *keys, *more, log=folder / f"{passes}.log", first=observe)
    assert ranks.wait(900) == [0] * PROCESSES, ranks.output
    stated = re.search(r"memory a process: ([\d,]+) MiB of state .* \+ ([\d,]+) MiB of activations", ranks.output)
    found = sorted(re.findall(r"MEMORY (\d+) (\d+) (\d+)", ranks.output))
    growth = [round((int(highest) - int(before)) / 2**20) for _, before, highest in found]
    return {
        "passes": passes,
        "stated_mib": [int(part.replace(",", "")) for part in stated.groups()],
        "growth_mib": growth,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        small = measure(8, 8, Path(folder))
        rows = [measure(passes, 64, Path(folder)) for passes in PASSES]
    aside = [grown - sum(small["stated_mib"]) for grown in small["growth_mib"]]
    for row in rows:
        row["growth_mib"] = [grown - more for grown, more in zip(row["growth_mib"], aside)]
    result = {
        "aside_mib": aside,
        "processes": PROCESSES,
        "micro_batch": MICRO_BATCH,
        "machine": {"cpu": platform.machine(), "cores": os.cpu_count()},
        "rows": rows,
    }
    if args.json:
        print(json.dumps(result, indent=1))
        return
    for row in rows:
        print(
            f"{row['passes']:4d} passes: stated {' + '.join(map(str, row['stated_mib']))} MiB, "
            f"grown by {row['growth_mib']} MiB"
        )


if __name__ == "__main__":
    main()
