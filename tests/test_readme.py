"""Commands that people copy: they name files that exist, parse, and say what they are."""

from __future__ import annotations

import json
import re
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT
from omegaconf import OmegaConf

from lars.__main__ import VERBS
from lars.recipe import config
from lars.recipe.keys import declared, neutral

RECIPES = sorted(file for file in (ROOT / "recipes").glob("*/*.yaml") if file.name != "design.yaml")  # the study's
PAGES = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "lars/data/README.md")] + sorted(
    (ROOT / "docs").glob("*.md")
)
TEXTS = [*PAGES, *sorted((ROOT / "recipes").glob("*/README.md")), *RECIPES]


def commands(text: str) -> list[str]:
    """Lines of code blocks and recipe headers that start with a command of ours; continued lines joined."""
    text = text.replace("\\\n", " ")
    lines = [line.lstrip("#").strip() for line in text.splitlines()]
    return [
        line
        for line in lines
        if re.match(r"(accelerate launch|make|lars(?! [a-z]+:)|python -m|python recipes|cp) ", line)
    ]


def all_commands() -> list[tuple[str, str]]:
    return [(str(file.relative_to(ROOT)), command) for file in TEXTS for command in commands(file.read_text())]


MODULES = sorted([command.split()[2]] for _, command in all_commands() if command.startswith("python -m "))

# `run_module` runs what other tests have imported already; a command line starts without it.
pytestmark = pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")


def run_module(words: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    """`python -m words...` from the repository's root, in this process: a new one would import for six seconds."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as end:
        runpy.run_module(words[0], run_name="__main__", alter_sys=True)
    return end.value.code or 0


@pytest.mark.long
@pytest.mark.parametrize("words", [["lars", verb] for verb in VERBS] + MODULES, ids=" ".join)
def test_a_command_starts_in_a_process_of_its_own(words: list[str]) -> None:
    """With nothing imported before it, which `run_module` cannot tell."""
    shown = subprocess.run([sys.executable, "-m", *words, "--help"], cwd=ROOT, capture_output=True, text=True)
    assert shown.returncode == 0, shown.stderr


def test_there_are_commands() -> None:
    assert len(all_commands()) >= 10


@pytest.mark.parametrize(("file", "command"), all_commands())
def test_a_command_exists_and_parses(file: str, command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(command, comments=True)
    if words[0] == "make":
        dry = subprocess.run(["make", "-n", "PYTHON=python", *words[1:]], cwd=ROOT, capture_output=True, text=True)
        assert dry.returncode == 0, dry.stderr
        named = [word for word in shlex.split(dry.stdout) if word.endswith(".yaml")]
        assert all((ROOT / name).is_file() for name in named), named
    elif words[0] == "cp":
        assert (ROOT / words[-2]).exists()
    elif words[:2] == ["python", "-m"]:
        assert run_module([words[2], "--help"], monkeypatch) == 0
    elif words[0] == "lars":
        assert run_module([*words[:2], "--help"], monkeypatch) == 0
    else:
        if "-m" in words:
            assert words[words.index("-m") + 1] == "lars"
            assert words[words.index("lars") + 1] in VERBS
        else:
            assert (ROOT / "recipes/train.py").is_file() and "recipes/train.py" in words
        if "--config_file" in words:
            assert (ROOT / words[words.index("--config_file") + 1]).is_file()
        recipe = words[words.index("--config") + 1]
        if "/mine/" not in recipe:
            config.load(ROOT / recipe, [word for word in words if "=" in word])


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_a_recipes_header_names_its_own_file_and_its_keys_are_the_trajectory(recipe: Path) -> None:
    header = "".join(line for line in recipe.read_text().splitlines(True) if line.startswith("#"))
    assert f"--config recipes/{recipe.parent.name}/{recipe.name}" in header
    assert "Hardware:" in header and ("Time and accuracy" in header or "Expected time" in header)
    loaded = config.load(recipe, [])
    assert loaded.name == f"{recipe.parent.name}/{recipe.stem}"
    written = OmegaConf.load(recipe)
    keys = {
        k if not OmegaConf.is_dict(v) else f"{k}.{inner}"
        for k, v in written.items()
        for inner in (v if OmegaConf.is_dict(v) else [None])
    }
    flat, known = config.flatten(loaded), declared(type(loaded.optimizer))
    wanted = {k for k, one in known.items() if not one.metadata["free"] and flat[k] != neutral(one)}
    assert keys - {"runtime.portable"} == wanted | {"name", "data.path"}
    sections = "model data augment global_batch bn_group optimizer schedule epochs seed precision".split()
    assert [k for k in written if k in sections] == sections


def test_a_reader_learns_how_long_how_much_memory_and_which_launch_file(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    command = next(c for file, c in all_commands() if file == "README.md" and c.startswith("lars plan"))
    assert "h100-8" in command
    assert run_module(shlex.split(command), monkeypatch) == 0
    said = capsys.readouterr().out
    assert re.search(r"on 8 H100: about [\d.]+ (min|h) \([\d.]+ (min|h) to [\d.]+ (min|h)\)\n", said)
    assert re.search(r"memory +[\d.]+ GB of state \+ [\d.]+ GB of activations of 80 GB a device", said)
    start = next(line for line in said.splitlines() if line.strip().startswith("start"))
    named = re.search(r"--config_file (\S+) --num_processes 8 recipes/train.py --config (\S+)", start)
    assert (ROOT / named[1]).is_file() and (ROOT / named[2]).is_file()


def test_the_tables_of_ways_to_sum_and_of_what_they_cost_are_the_committed_measurement() -> None:
    text = (ROOT / "lars/README.md").read_text()
    ways = json.loads((ROOT / "tests/benchmarks/reduction.json").read_text())["ways"]
    for label, name in (("float `all_reduce`", "float"), ("integer sum (kept)", "integer"), ("fixed tree", "tree")):
        row = next(line for line in text.splitlines() if line.startswith(f"| {label}"))
        ratios = ", ".join(f"{ratio:g}" for ratio in ways[name]["ratio"].values())
        assert ratios in row and f"{ways[name]['error']:.1e}".replace("e-0", "e-") in row
    steps = json.loads((ROOT / "tests/benchmarks/reduction.json").read_text())["steps"]
    for model, worlds in steps.items():
        for processes, row in worlds.items():
            assert (
                f"| {model} | {processes} | {' | '.join(f'{ratio:.2f}' for ratio in row['ratio'].values())} |" in text
            )
    assert len(steps) == 2 and not re.search("@[A-Z_]+@", text)


def test_the_table_of_engines_is_the_committed_measurement_and_every_row_of_ours_passes() -> None:
    from distributed.parity import ENGINES, PROCESSES, TABLE, table

    rows = json.loads((ROOT / "tests/distributed/parity.json").read_text())["rows"]
    text = (ROOT / "docs/engines.md").read_text()
    assert text[text.index(TABLE[0]) + len(TABLE[0]) : text.index(TABLE[1])] == table(rows)
    ours = [row for row in rows if row["optimizer"] == "lars.LARS"]
    assert {row["verdict"] for row in ours} == {"PASS"} and {row["verdict"] for row in rows if row not in ours} == {
        "FAIL"
    }
    expected = {(engine, w) for engine in ENGINES for w in PROCESSES} - {("plain", 1), ("ddp", 1)}
    assert {(row["engine"], row["processes"]) for row in ours} == expected


def test_the_costs_on_the_card_are_the_committed_measurement() -> None:
    text = (ROOT / "lars/README.md").read_text()
    models = json.loads((ROOT / "tests/benchmarks/optimizer_step.json").read_text())["models"]
    rows = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    costs = {row[0]: row[1:] for row in rows if row[0] in models["resnet50"]}
    assert len(costs) == 5
    for rival, cells in costs.items():
        assert cells == [f"{models[model][rival]['ratio']:.2f}" for model in ("resnet50", "alexnet")]


def test_the_tables_of_the_data_card_are_the_committed_measurements() -> None:
    from benchmarks import loader, order

    text = (ROOT / "lars/data/README.md").read_text()
    measured = {name: json.loads((ROOT / f"tests/benchmarks/{name}.json").read_text()) for name in ("order", "loader")}
    tables = {
        "reading": order.reading_table(measured["order"]["reading"]),
        "shuffling": order.shuffling_table(measured["order"]["shuffling"]),
    }
    for name, shown in {**tables, "loader": loader.table(measured["loader"])}.items():
        assert text.split(f"<!-- {name} -->\n")[1].split(f"\n<!-- end of {name} -->")[0] == shown, (
            f"print it anew: python -m tests.benchmarks.{name}"
        )
    assert max(row["worst_rank"] for rows in measured["order"]["reading"].values() for row in rows) <= 1.2
    rate = {rival: row["images_per_second"] for rival, row in measured["loader"]["rivals"].items()}
    assert rate["ours"] >= 2.5 * rate["timm"] and rate["ours"] >= 1.3 * rate[loader.DALI]


def test_the_page_on_speed_is_written_from_the_committed_measurements() -> None:
    from benchmarks import page as speed

    assert speed.PAGE.read_text() == speed.page(), "write it anew: python -m tests.benchmarks.page"


def test_the_tables_of_resizing_are_the_committed_measurement() -> None:
    from benchmarks import resize

    from lars.plan.cost import VIEW

    found, text = json.loads((ROOT / "tests/benchmarks/resize.json").read_text()), resize.PAGE.read_text()
    assert text.split(resize.MARKS[0])[1].split(resize.MARKS[1])[0] == resize.tables(found)
    levels, spent = found["levels"], found["cpu_ms_a_view"]
    exact = ("torchvision (NUS-HPC)", "OpenCV, area (FFCV)")
    assert all(levels[f"{name} with its key"]["training"] == {"mean": 0, "rms": 0} for name in exact)
    assert all(levels[name]["training"]["mean"] > 1 for name in exact)  # "mixed", the control
    # what two runs on a busy machine differ by; `make tables` takes VIEW
    assert VIEW == {way: pytest.approx(ms / spent["mixed"], rel=0.15) for way, ms in spent.items()}


def test_the_messages_of_the_troubleshooting_page_are_the_programs_own() -> None:
    source = "\n".join(file.read_text() for file in (ROOT / "lars").rglob("*.py"))
    source = re.sub(r'"\n\s+f?"', "", source)  # a text over several lines
    rows = [line.split("|")[1] for line in (ROOT / "docs/troubleshooting.md").read_text().splitlines() if "| `" in line]
    quoted = [words for cell in rows for words in re.findall("`(.*?)`", cell)]
    assert len(quoted) > 20
    assert [words for words in quoted if words not in source] == []


def test_the_two_lines_in_the_readme_run() -> None:
    text = (ROOT / "README.md").read_text()
    block = next(b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "lars.LARS" in b)
    names: dict = {}
    exec(
        "import torch\nmodel = torch.nn.Linear(3, 3)\nmodel(torch.ones(1, 3)).sum().backward()\n"
        f"{block}\noptimizer.step()",
        names,
    )


def test_the_hash_check_in_the_readme_is_the_projects(tiny_runs: dict[int, Path]) -> None:
    text = (ROOT / "README.md").read_text()
    block = next(b for b in re.findall(r"```python\n(.*?)```", text, re.S) if "sha256" in b)
    checkpoint = tiny_runs[1] / "checkpoints/step-00000024/model.safetensors"
    done = subprocess.run(
        [sys.executable, "-c", block.replace("model.safetensors", str(checkpoint))], capture_output=True, text=True
    )
    from lars.run.reading import read_result

    assert done.stdout.strip() == read_result(tiny_runs[1])["weights_sha256"], done.stderr
