"""The pages' tables are what recipes, publications, plan and ledger say; every entry of the ledger is a whole proof."""

from __future__ import annotations

import json
import re
import shutil
import statistics
from pathlib import Path

import pytest
import yaml
from conftest import DEMO, ROOT

from lars.commands import ledger
from lars.commands.ledger import complaint, entries, keep
from lars.commands.tables import (
    DEVICES,
    Prediction,
    folder_table,
    main,
    mean_and_spread,
    predict,
    recipes_of,
    replace_marked,
    results_table,
)
from lars.recipe.refusal import RecipeError

LEDGER = entries(ROOT / "recipes")


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def as_written(model: str) -> dict[str, list[Prediction]]:
    """The predictions that stand in a folder's table."""
    text = Path("recipes", model, "README.md").read_text()
    rows = re.findall(r"^\| \[(.+?)\]\(.*\| (\d+), ([\d.]+) h \| (\d+), ([\d.]+) h \|$", text, re.M)
    return {
        f"{model}/{stem}": [Prediction(int(m), float(h)) for m, h in ((m1, h1), (m8, h8))]
        for stem, m1, h1, m8, h8 in rows
    }


@pytest.mark.parametrize("model", ["alexnet", "resnet50"])
def test_a_folders_table_is_what_make_tables_would_write(model: str) -> None:
    page, written = Path("recipes", model, "README.md").read_text(), as_written(model)
    assert set(written) == {r.name for r in recipes_of(Path("recipes", model))}
    assert replace_marked(page, "rows", folder_table(Path("recipes", model), written)) == page


def test_help_writes_nothing(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lars.commands.tables.pages", lambda _: pytest.fail("pages are written"))
    with pytest.raises(SystemExit) as end:
        main(["--help"])
    assert end.value.code == 0 and "lars tables" in capsys.readouterr().out


EVERY = [r.name for model in ("alexnet", "resnet50") for r in recipes_of(ROOT / "recipes" / model)]
QUICK = ("resnet50/mlperf-b8k",)


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.long) for n in EVERY])
def test_predictions_are_the_plans(name: str) -> None:
    model = name.split("/")[0]
    recipe = next(r for r in recipes_of(Path("recipes", model)) if r.name == name)
    for said, planned in zip(as_written(model)[name], predict(recipe), strict=True):
        half = 0.05 if planned.hours < 10 else 0.5  # of the last digit that `row_of` prints
        assert said.micro_batch == planned.micro_batch and abs(said.hours - planned.hours) <= half + 1e-9
    assert len(DEVICES) == 2


def test_the_readmes_results_are_what_make_tables_would_write() -> None:
    page = Path("README.md").read_text()
    assert replace_marked(page, "results", results_table()) == page
    seeds = [
        json.loads(file.read_text())["top1"] for file in Path("recipes/demo/results/alexnet").glob("seed-*/result.json")
    ]
    row = next(line for line in page.splitlines() if line.startswith("| [demo/alexnet]"))
    assert f"| {statistics.mean(seeds):.1f} ± {statistics.stdev(seeds):.1f} | {len(seeds)} |" in row
    assert all(
        line.endswith("|  |  |  |") for line in page.splitlines() if line.startswith("| [resnet50/")
    )  # not run yet


def test_a_page_without_the_place_for_a_table_is_an_error() -> None:
    with pytest.raises(ValueError):
        replace_marked("no such place", "results", "")


def test_spread_needs_two_seeds() -> None:
    assert (mean_and_spread([]), mean_and_spread([1.0]), mean_and_spread([1.0, 2.0])) == ("", "1.0", "1.5 ± 0.7")


@pytest.mark.parametrize("entry", LEDGER, ids=lambda p: str(p.relative_to(ROOT / "recipes")))
def test_an_entry_of_the_ledger_is_a_whole_proof(entry: Path) -> None:
    assert complaint(entry) is None
    written = (entry / "config.yaml").read_text()
    assert "run_dir:" not in written and "\n  path:" not in written


@pytest.mark.parametrize(
    ("cheat", "words"),
    [
        ({"data": {"val_split": "train"}}, "data.val_split differ from alexnet.yaml"),
        ({"epochs": 32.0, "augment": {"flip": 0.0}}, "augment.flip, epochs differ"),
        ({"model": {"kwargs": {"width": 1.0, "image_size": 67}}}, "model.kwargs differ"),
        ({"ema_decay": 0.9}, "ema_decay differ"),  # a key that was not there when the entries were made
        ({"max_steps": 208}, "stopped early, at max_steps=208"),
        ({"seed": 7}, ""),
    ],
)
def test_a_dressed_up_run_is_no_entry(
    cheat: dict, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    recipes, run = tmp_path / "recipes", tmp_path / "seed-7"
    (recipes / "demo").mkdir(parents=True)
    for name in ("alexnet.yaml", "model.py"):
        shutil.copy(DEMO / name, recipes / "demo")
    shutil.copytree(DEMO / "results/alexnet/seed-0", run)
    written = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in cheat.items():
        written[key] = {**written[key], **value} if isinstance(value, dict) else value
    (run / "config.yaml").write_text(yaml.safe_dump(written))
    monkeypatch.setattr(ledger, "RECIPES", recipes)
    monkeypatch.setattr("sys.argv", ["ledger", str(run)])
    assert ledger.main() == (2 if words else 0)
    assert words in capsys.readouterr().err and (recipes / "demo/results/alexnet/seed-7").is_dir() != bool(words)


def test_what_is_no_proof_stays_out(tmp_path: Path) -> None:
    run = tmp_path / "seed-0"
    keep(DEMO / "results/alexnet/seed-0", run)
    assert complaint(run) is None and {f.name for f in run.iterdir()} == {"config.yaml", "metrics.jsonl", "result.json"}
    result = json.loads((run / "result.json").read_text())
    metrics = (run / "metrics.jsonl").read_text()
    for file, text, words in (
        ("result.json", json.dumps({**result, "status": "preempted"}), "preempted, not finished"),
        ("result.json", json.dumps({**result, "top1": result["top1"] + 1}), "last evaluation"),
        ("result.json", json.dumps({**result, "steps": result["steps"] + 1}), "of its"),
        ("metrics.jsonl", metrics.replace('"step": 7,', '"step": 8,'), "steps"),
    ):
        before = (run / file).read_text()
        (run / file).write_text(text)
        with pytest.raises(RecipeError, match=words):
            keep(run, tmp_path / "entry")
        (run / file).write_text(before)
    assert not (tmp_path / "entry").exists()
