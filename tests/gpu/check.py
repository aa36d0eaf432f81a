"""`make test-gpu [DEVICE=cpu] [PART=1]`: does this machine's GPU keep every promise? One line for each item.

What has passed stands in results/<device>.json and is not run again with the same sources and software. On the CPU the
items are the same and small: that tests this script and says nothing about a GPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import DEMO
from gpu import bits, rates
from gpu.played import Skipped

from lars.run.sources import environment, source_sha256, sources

RESULTS = Path(__file__).parent / "results"
PARTS: dict[int, tuple[Callable[[torch.device], dict], ...]] = {
    1: (bits.software, bits.order_free_sum, bits.optimizer_and_norms, bits.shared_gpu),
    2: (bits.same_bits,),
    3: (bits.one_hash, bits.engines),
    4: (rates.no_waiting, rates.memory, rates.speed, rates.from_parquet),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--part", type=int, choices=PARTS)
    args = parser.parse_args()
    if args.device == "cuda" and not torch.cuda.is_available():
        print("error: torch finds no GPU here: DEVICE=cpu tests this script on the processor", file=sys.stderr)
        return 2
    if args.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    os.environ.update(HF_HUB_OFFLINE="1")
    device = torch.device(args.device)
    name = torch.cuda.get_device_name().replace(" ", "-") if args.device == "cuda" else "cpu"
    file = RESULTS / f"{name}.json"
    found = json.loads(file.read_text()) if file.exists() else {}
    made = {"sources": source_sha256(sources(DEMO / "resnet50.yaml")), **environment(device)}
    for part in [args.part] if args.part else PARTS:
        for item in PARTS[part]:
            row = found.get(item.__name__, {})
            kept = row.get("verdict") in ("PASS", "measured") and row.get("made") == made
            if not kept:
                started = time.perf_counter()
                try:
                    row = {"verdict": "PASS", **item(device)}
                except Skipped as reason:
                    row = {"verdict": "skipped", "why": str(reason)}
                except Exception as error:  # whatever goes wrong in an item, the others still run
                    traceback.print_exc()
                    row = {"verdict": "FAIL", "why": f"{type(error).__name__}: {error}"}
                found[item.__name__] = row | {"made": made, "seconds": round(time.perf_counter() - started, 1)}
                file.write_text(json.dumps(found, indent=1) + "\n")
            row = found[item.__name__]
            print(
                f"{part} {item.__name__:20s} {row['verdict']:8s} {row['seconds']:6.1f} s  {row.get('why', '')}"
                f"{' (done before)' if kept else ''}",
                flush=True,
            )
    return int(any(row["verdict"] == "FAIL" for row in found.values()))


if __name__ == "__main__":
    sys.exit(main())
