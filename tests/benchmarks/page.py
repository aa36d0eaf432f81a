"""`python -m tests.benchmarks.page`: docs/speed.md, from the committed results of `make bench`."""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
PAGE = HERE.parents[1] / "docs/speed.md"
NAMES = {"ours": "this repository", "timm": "timm's way", "torchvision": "torchvision's", "accelerate": "accelerate's"}
HEAD = """# How fast is it, and what does the promise cost?

Written by `python -m tests.benchmarks.page` from the results of `make bench` that are committed in `tests/benchmarks/`.
Each comparison was made within one run on one machine, rivals in turns. More images a second are better, fewer
milliseconds are. The loader's table stands in [lars/data/README.md](../lars/data/README.md).
"""
TAIL = """## Where it is not ahead, and what stands in the way

- **The start.** A run imports `datasets` and counts the memory it will take before its first step; the others do
  neither. `accelerate launch` imports torch and accelerate for itself before it starts a process. At 83b5480 all three
  others were started by `torchrun`, which starts our run too, with the same bits and sooner.
- **Memory.** The order-free sum keeps 12 bytes for each weight. On a CPU freed memory is kept for the next step,
  which is what makes the steps faster, and `datasets` brings pandas along.
- **The evaluation of few images.** Each evaluation begins with a loader of its own, and a process takes whole chunks
  of `micro_batch` images. Images are resized by Pillow's bicubic filter, as timm's models are evaluated; at 83b5480
  all three others took the bilinear one, which costs less.
- **LARS beside SGD.** Both norms have to be known before the first weight moves, so weights and gradients are read
  twice.
- **Decoding.** Whole images are decoded where the crop is a part of them. libjpeg-turbo can skip the rest, but no
  package that is kept well offers its calls, and a library of the system's may give other pixels than the packaged
  one: pixels are part of the promise.
"""


def table(head: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines) + "\n"


def median(rounds: list[dict[str, float]], key: str) -> float:
    return statistics.median(told[key] for told in rounds)


def whole_runs(found: dict[str, Any]) -> str:
    machine = found["machine"]
    rows = []
    for row in found["rows"]:
        rounds = row["rounds"]
        best = max(median(told, "images_per_second") for who, told in rounds.items() if who != "ours")
        for who, told in rounds.items():
            speed = median(told, "images_per_second")
            values = [median(told, key) for key in ("cpu_seconds_an_image", "evaluated_per_second", "memory")]
            start = f"{median(told, 'seconds_to_first_step'):.1f} ({median(told, 'cpu_to_first_step'):.1f})"
            ratio = f"{speed:.4g} ({speed / best:.2f})" if who == "ours" else f"{speed:.4g}"
            where = f"{row['case']}, {row['processes']}" if who == "ours" else ""
            cells = f"{values[0]:.3g}", f"{values[1]:.4g}", f"{values[2] / 2**20:,.0f}"
            rows.append((where, NAMES[who], ratio, *cells, start))
    number = len(found["rows"][0]["rounds"]["ours"])
    head = "model and pixels, processes", "", "images/s (to the fastest rival)", "CPU s an image", "evaluated/s"
    told = f"""## A whole run, clocked from outside

`recipes/train.py` with its default keys beside small loops that do what timm's train.py, torchvision's references and
accelerate's example do with the parts that are in their packages: the same photographs, augmentation, batch, precision,
processes and decoding processes, one thread each. {machine["cpu"]}, {machine["cores"]} cores, torch {machine["torch"]};
load before it {machine["load"][0]:.2f}, commit {found["commit"][:7]}. Medians of {number} rounds.

"""
    return told + table((*head, "memory of all processes, MiB", "seconds (CPU s) to the first step"), rows)


def step(found: dict[str, Any]) -> str:
    parts = list(dict.fromkeys(part for loops in found["steps"].values() for loop in loops.values() for part in loop))
    parts.sort(key=lambda part: part == "step")
    rows = [
        (name if who == "plain" else "", who, *(f"{loop[part]:,.1f}" if part in loop else "" for part in parts))
        for name, loops in found["steps"].items()
        for who, loop in loops.items()
    ]
    told = f"""## A step by part, CPU milliseconds

One process of one thread ({found["machine"]["cpu"]}, torch {found["machine"]["torch"]}). "plain" is a loop of plain
PyTorch with standard batch norm and torch's fused SGD, whose pixels come normalised; "no kernels" is what an
installation without a C compiler does.

"""
    return told + table(("", "", *parts), rows)


def order_free_sum(found: dict[str, Any], rates: dict[str, dict[str, float]]) -> str:
    rows = [
        (name, world, *(f"{row['ms'][loop]:,.0f} ({row['ratio'][loop]:.2f})" for loop in row["ms"]))
        for name, worlds in found["steps"].items()
        for world, row in worlds.items()
    ]
    ways = found["ways"]
    alone = [
        (world, *(f"{ways[way]['ms'][world]:,.0f} ({ways[way]['ratio'][world]:.2f})" for way in ways))
        for world in ways["float"]["ms"]
    ]
    exchange = list(found["exchange"]["2"])
    wire = [(world, *(f"{ms[way]:,.0f}" for way in exchange)) for world, ms in found["exchange"].items()]
    slow = [(f"2, {rate}/s between them", *(f"{ms[way]:,.0f}" for way in exchange)) for rate, ms in rates.items()]
    loops = "one hash", "`runtime.deterministic=false`", "DDP's own loop"
    return f"""## The order-free sum

A whole step of 8 passes of 32 images, data included, in milliseconds (ratio to DDP's own loop):

{table(("model", "processes", *loops), rows)}
The sum of {found["elements"]:,} elements alone, {found["passes"]} passes, in milliseconds (ratio to floats that are
added in place, with one all-reduce):

{table(("processes", "floats", "integers, ours", "a tree of floats"), alone)}
The exchange alone, in milliseconds. Six bytes an element instead of eight were tried, between processes of one machine
and between two network namespaces whose wire `tc` holds to a rate:

{table(("processes", *exchange), [*wire, *slow])}"""


def page() -> str:
    """The text of docs/speed.md."""
    names = ("end_to_end", "step", "reduction", "wire")
    found = {name: json.loads((HERE / f"{name}.json").read_text()) for name in names}
    exchange = order_free_sum(found["reduction"], found["wire"]["rates"])
    parts = HEAD, whole_runs(found["end_to_end"]), step(found["step"]), exchange, TAIL
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
