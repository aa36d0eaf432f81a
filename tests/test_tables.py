"""The pages' tables are what recipes, publications, plan and ledger say; every entry of the ledger is a whole proof."""

from __future__ import annotations

import json
import re
import resource
import shutil
import statistics
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from conftest import DEMO, ROOT
from omegaconf import OmegaConf
from safetensors.torch import save_file

from lars.commands import ledger
from lars.commands.ledger import complaint, keep
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
from lars.recipe import config
from lars.recipe.refusal import RecipeError
from lars.report.report import changed_keys

LEDGER = sorted(file.parent for file in (ROOT / "recipes").rglob("result.json"))


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
QUICK = ("alexnet/sgd-b256-100ep",)


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


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipes/ that the ledger may write into."""
    folder = tmp_path / "recipes"
    (folder / "demo").mkdir(parents=True)
    for name in ("alexnet.yaml", "model.py"):
        shutil.copy(DEMO / name, folder / "demo")
    monkeypatch.setattr(ledger, "RECIPES", folder)
    return folder


def changed(run: Path, keys: dict, result: dict) -> Path:
    """A copy of a committed run with other keys, and another result."""
    shutil.copytree(DEMO / "results/alexnet/seed-0", run)
    written = yaml.safe_load((run / "config.yaml").read_text())
    for key, value in keys.items():
        written[key] = {**written[key], **value} if isinstance(value, dict) else value
    (run / "config.yaml").write_text(yaml.safe_dump(written))
    told = json.loads((run / "result.json").read_text())
    (run / "result.json").write_text(json.dumps({**told, **result}))
    return run


@pytest.fixture
def refusal(recipes: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> Callable[[Path], str]:
    """What `lars ledger RUN` says of a run that it refuses; nothing of one that it takes."""

    def told(run: Path) -> str:
        monkeypatch.setattr("sys.argv", ["ledger", str(run)])
        status, said = ledger.main(), capsys.readouterr().err
        assert status == (2 if said else 0)
        return said

    return told


@pytest.mark.parametrize(
    ("cheat", "words"),
    [
        ({"data": {"val_split": "train"}}, "data.val_split differ from alexnet.yaml"),
        ({"epochs": 32.0, "augment": {"flip": 0.0}}, "augment.flip, epochs differ"),
        ({"model": {"kwargs": {"width": 1.0, "image_size": 67}}}, "model.kwargs differ"),
        ({"ema_decay": 0.9}, "ema_decay differ"),  # a key that was not there when the entries were made
        *(({"seed": seed}, "its config.yaml has seed: ") for seed in ("x/../../../y", None, 1.5, [1], -1)),
        ({"seed": 7}, ""),
    ],
)
def test_a_dressed_up_run_is_no_entry(
    cheat: dict, words: str, tmp_path: Path, recipes: Path, refusal: Callable[[Path], str]
) -> None:
    said = refusal(changed(tmp_path / "any name", cheat, {}))
    assert bool(said) == bool(words) and words in said
    made = [entry.name for entry in (recipes / "demo/results/alexnet").glob("*")]
    assert made == ([] if words else ["seed-7"])  # it is named by its seed


def test_a_run_that_was_cut_at_a_better_evaluation_is_no_entry(tmp_path: Path, refusal: Callable[[Path], str]) -> None:
    """Its log is whole up to there, and its result the last evaluation of that log."""
    run = changed(tmp_path / "seed-0", {}, {})
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if line["kind"] == "eval"][-2]
    kept = [json.dumps(line) + "\n" for line in lines if line["step"] <= last["step"]]
    (run / "metrics.jsonl").write_text("".join(kept))
    told = json.loads((run / "result.json").read_text())
    told.update(steps=last["step"], epochs=last["epoch"], top1=last["top1"], top5=last["top5"])
    (run / "result.json").write_text(json.dumps(told))
    assert complaint(run) is None
    assert "it ended after 15.0423 of 16 epochs" in refusal(run)


@pytest.mark.parametrize(
    ("seed", "other", "words"),
    [
        (7, {"data_fingerprint": "0" * 64}, "its data are not those of"),
        (7, {"content_fingerprint": "0" * 64}, "its data are not those of"),
        (0, {"weights_sha256": "0" * 64}, "has another run of this seed"),
        (0, {}, ""),  # the same run again
    ],
)
def test_a_row_is_of_one_data_set_and_has_a_seed_once(
    seed: int, other: dict, words: str, tmp_path: Path, recipes: Path, refusal: Callable[[Path], str]
) -> None:
    first = changed(tmp_path / "first", {}, {"content_fingerprint": "1" * 64})
    assert refusal(first) == ""
    before = (recipes / "demo/results/alexnet/seed-0/result.json").read_bytes()
    second = changed(tmp_path / "second", {"seed": seed}, {"content_fingerprint": "1" * 64, **other})
    said = refusal(second)
    assert bool(said) == bool(words) and words in said
    assert [entry.name for entry in (recipes / "demo/results/alexnet").glob("*")] == ["seed-0"]
    assert (recipes / "demo/results/alexnet/seed-0/result.json").read_bytes() == before


def test_a_run_from_other_weights_is_not_of_its_recipe(tmp_path: Path) -> None:
    file, recipe, run = tmp_path / "weights.safetensors", tmp_path / "resnet50.yaml", tmp_path / "run"
    shutil.copy(DEMO / "model.py", tmp_path)
    written = yaml.safe_load((DEMO / "resnet50.yaml").read_text())
    written["model"].setdefault("kwargs", {})["checkpoint_path"] = str(file)
    recipe.write_text(yaml.safe_dump(written))
    save_file({"a": torch.zeros(1)}, file)
    run.mkdir()
    OmegaConf.save(config.load(recipe, []), run / "config.yaml")
    assert changed_keys(run, recipe) == []
    save_file({"a": torch.ones(1)}, file)
    assert changed_keys(run, recipe) == ["model.weights_sha256"]


SEEDS = [DEMO / f"results/alexnet/seed-{seed}" for seed in (0, 1)]


def content_of(entry: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in entry.iterdir()}


def test_an_entry_is_replaced_as_a_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """While the new one is written a reader finds the earlier one, and nothing of that stays."""
    entry, seen = tmp_path / "seed-0", []
    keep(SEEDS[0], entry)
    (entry / "mllog.txt").write_text("of another run")
    before = content_of(entry)
    write = ledger.write_atomically
    monkeypatch.setattr(ledger, "write_atomically", lambda *told: write(*told) or seen.append(content_of(entry)))
    keep(SEEDS[1], entry)
    assert len(seen) == 3 and all(there == before for there in seen)
    assert content_of(entry) == content_of(SEEDS[1]) and list(tmp_path.iterdir()) == [entry]


def test_on_a_full_disk_the_earlier_entry_stays(tmp_path: Path) -> None:
    entry = tmp_path / "seed-0"
    keep(SEEDS[0], entry)
    before = content_of(entry)
    room, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["config.yaml"]) + 1, most))
    try:
        with pytest.raises(OSError, match="File too large"):
            keep(SEEDS[1], entry)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))
    assert content_of(entry) == before and list(tmp_path.iterdir()) == [entry]


def test_an_entry_that_a_crash_left_beside_its_place_is_put_back(
    tmp_path: Path, recipes: Path, refusal: Callable[[Path], str]
) -> None:
    """The process died after the first of two renames; the seed has its entry as before, so another run is refused."""
    assert refusal(changed(tmp_path / "first", {}, {})) == ""
    entry = recipes / "demo/results/alexnet/seed-0"
    before, beside = content_of(entry), entry.with_name(".seed-0")
    (beside / "new").mkdir(parents=True)
    entry.rename(beside / "before")
    assert "has another run of this seed" in refusal(changed(tmp_path / "second", {}, {"weights_sha256": "0" * 64}))
    assert content_of(entry) == before and not beside.exists()


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
