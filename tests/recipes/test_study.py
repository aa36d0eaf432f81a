"""The study: its rules against numbers worked out by hand, its data, and its pages against the committed runs."""

from __future__ import annotations

import json
import re
import statistics
import sys
import time
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import DEMO, ROOT
from omegaconf import OmegaConf
from scipy import stats

from lars.recipe import config

sys.path.insert(0, str(ROOT / "recipes/study"))
import study
import summary

GRID = yaml.safe_load((ROOT / "recipes/study/grid.yaml").read_text())
RESULTS = ROOT / "recipes/study/results"


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_rates_follow_the_rules() -> None:
    assert study.rates(GRID, "sgd-linear", 256, 0.0) == [0.05, 0.1, 0.2, 0.4]
    assert study.rates(GRID, "sgd-linear", 4096, 0.4) == pytest.approx(
        [0.8, 1.6, 3.2, 6.4]
    )  # 0.4 x 16, a half, a quarter, an eighth
    assert study.rates(GRID, "sgd-sqrt", 16384, 0.4) == pytest.approx([0.4, 0.8, 1.6, 3.2])  # 0.4 x 8
    assert study.rates(GRID, "lars", 1024, 10.0) == pytest.approx([2.5, 5.0, 10.0, 20.0])
    assert study.label_of(GRID, "sgd-linear", 4096, 1.6) == study.label_of(
        GRID, "sgd-sqrt", 4096, 1.6
    )  # one run serves both


def test_all_methods_have_the_same_budget() -> None:
    for batch in (4096, 16384):
        assert len({len(study.rates(GRID, method, batch, 1.0)) for method in GRID["methods"]}) == 1
    assert len(GRID["base_rates"]["sgd"]) == len(GRID["base_rates"]["lars"])
    assert GRID["tuning_seed"] not in GRID["test_seeds"] and len(set(GRID["test_seeds"])) >= 3


@pytest.mark.parametrize("model", ["resnet", "alexnet"])
def test_runs_differ_from_the_recipe_in_batch_rate_and_optimizer_only(model: str) -> None:
    file = ROOT / "recipes/study" / f"{model}.yaml"
    usual = config.trajectory(config.load(file, []))
    for method in GRID["methods"]:
        changed = config.trajectory(config.load(file, study.overrides_of(GRID, method, 16384, 0.5, 0.1)))
        keys = {key for key in usual if key in changed and usual[key] != changed[key]}
        rate = {"global_batch", "optimizer.lr", "schedule.warmup_lr"}
        assert keys == rate | ({"optimizer.name"} if method != "lars" else set())
    for overrides in GRID["ablations"].values():
        if model == "resnet":
            changed = config.trajectory(config.load(file, overrides))
            assert len([key for key in usual if usual[key] != changed[key]]) == 1


def test_a_run_in_the_ledger_is_not_trained_again_unless_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(study, "RUNS", tmp_path)
    committed = json.loads((RESULTS / "resnet/lars-b256-lr10/seed-1/result.json").read_text())
    assert study.train("resnet", "lars-b256-lr10", 1, "test", []) == committed
    assert study.tune(GRID, "resnet", "lars", 4096, 10.0) == 20.0  # from four committed runs
    monkeypatch.setattr(study, "use_ledger", False)
    with pytest.raises(RuntimeError, match="ended with status 2"):  # it starts, and finds no such data
        study.train("resnet", "lars-b256-lr10", 1, "test", ["data.path=./nothing"])


def test_the_ledger_lacks_no_run_of_the_design(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(study, "RUNS", tmp_path)
    monkeypatch.setattr(study.subprocess, "run", lambda command, **_: pytest.fail(f"would train {command}"))
    look_up, wanted = study.train, set()
    monkeypatch.setattr(study, "train", lambda *call: wanted.add(call[:3]) or look_up(*call))
    study.study(GRID, jobs=1)
    assert len(wanted) >= 110


def test_after_a_run_that_fails_no_other_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def fail(*call: object) -> None:
        begun.append(call)
        if len(begun) == 1:
            raise RuntimeError("a run ended with status 75")
        time.sleep(0.5)  # a run

    monkeypatch.setattr(study, "tune", lambda *call: 1.0)
    monkeypatch.setattr(study, "entry", fail)
    with pytest.raises(RuntimeError, match="status 75"):
        study.study(GRID, jobs=1)
    assert len(begun) <= 2  # of seven: the one that failed, and one that the pool may have taken before it was stopped


def test_data_that_are_not_there_are_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    monkeypatch.setattr(study, "RUNS", tmp_path)
    monkeypatch.setattr("sys.argv", ["study.py", "--data", "./nothing"])
    assert study.main() == 2
    assert capsys.readouterr().err == "error: data.path=./nothing: no such folder\n"


def test_the_held_back_images_are_the_last_ones_and_bytes_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "source", tmp_path / "out"
    source.mkdir()
    for name, rows in (("train-00000-of-00001", 60), ("validation-00000-of-00001", 20)):
        file = next((DEMO / "data").glob(f"{name.split('-')[0]}-00000-*.parquet"))
        pq.write_table(pq.read_table(file).slice(0, rows), source / f"{name}.parquet")
    monkeypatch.setattr(study, "_HELD_BACK", 10)
    study.write_data(str(source), out)

    def bytes_of(folder: Path, split: str, column: str) -> list[bytes]:
        return [
            r["bytes"]
            for file in sorted(folder.glob(f"{split}-*.parquet"))
            for r in pq.read_table(file)[column].to_pylist()
        ]

    whole = bytes_of(source, "train", "image")
    assert bytes_of(out, "train", "img") == whole[:50] and bytes_of(out, "validation", "img") == whole[50:]
    assert bytes_of(out, "test", "img") == bytes_of(source, "validation", "image")


def test_the_pages_are_what_make_tables_would_write() -> None:
    for file, text in summary.pages(GRID):
        assert file.read_text() == text, f"{file}: run make tables"


def top1_of(runs: Path) -> list[float]:
    top1 = [json.loads(file.read_text())["top1"] for file in sorted(runs.glob("seed-*/result.json"))]
    assert len(top1) == 3
    return top1


@pytest.mark.parametrize("model", ["resnet", "alexnet"])
def test_figures_on_the_page_are_the_committed_runs(model: str) -> None:
    """A row, computed without the study's code: the only LARS rate with test runs at a batch is the chosen one."""
    text = (ROOT / "recipes/study/README.md").read_text()
    for batch in (256, 4096, 16384):
        (runs,) = (
            f for f in (RESULTS / model).glob(f"lars-b{batch}-lr*") if re.fullmatch(r"lars-b\d+-lr[\d.]+", f.name)
        )
        top1 = top1_of(runs)
        assert f"{statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f} ({runs.name.split('lr')[-1]})" in text


def test_what_the_page_says_in_words_are_the_committed_runs() -> None:
    """Where a new run changes a figure of the prose, the prose has to be written anew."""
    text, front = ((ROOT / file).read_text() for file in ("recipes/study/README.md", "README.md"))
    lars = {
        batch: top1_of(RESULTS / f"alexnet/lars-b{batch}-lr{rate}")
        for batch, rate in ((256, 5), (4096, 10), (16384, 10))
    }
    sgd = {
        batch: top1_of(RESULTS / f"alexnet/sgd-b{batch}-lr{rate}")
        for batch, rate in ((256, 0.05), (4096, 0.1), (16384, 0.2))
    }
    gaps = {batch: round(statistics.mean(lars[batch]) - statistics.mean(sgd[batch]), 2) for batch in lars}
    p = {batch: stats.ttest_ind(lars[batch], sgd[batch], equal_var=False).pvalue for batch in lars}
    assert f"(by {gaps[4096]} points, p = {p[4096]:.2f})" in text and f"({gaps[16384]}, p = {p[16384]:.3f})" in text
    assert f"ahead by {-gaps[256]}" in text and f"fell to {min(top1_of(RESULTS / 'alexnet/sgd-b16384-lr0.4'))}" in text
    for words in (
        f"{gaps[4096]:.1f} points more at 4,096 (p = {p[4096]:.2f})",
        f"{gaps[16384]:.1f} at 16,384 (p = {p[16384]:.2f})",
    ):
        assert words in front
    assert f"{-gaps[256] + 1e-9:.1f} fewer at 256" in front
    usual = top1_of(RESULTS / "resnet/lars-b4096-lr20")
    changed = [top1_of(RESULTS / f"resnet/lars-b4096-lr20-{name}") for name in GRID["ablations"]]
    assert f"(the smallest p is {min(stats.ttest_ind(c, usual, equal_var=False).pvalue for c in changed):.2f})" in text
    seconds = [row["seconds"] for row in json.loads((ROOT / "tests/benchmarks/wall_clock.json").read_text())["rows"]]
    assert f"{min(seconds):.0f} to {max(seconds):.0f} at every batch" in text


def test_a_run_is_what_its_folder_says() -> None:
    runs = sorted(RESULTS.rglob("config.yaml"))
    assert len(runs) >= 110
    for file in runs:
        written = OmegaConf.load(file)
        optimizer, batch, rate = re.match(r"(sgd|lars)-b(\d+)-lr([\d.]+)", file.parents[1].name).groups()
        assert (written.optimizer.name, written.global_batch, written.seed) == (
            optimizer,
            int(batch),
            int(file.parent.name.removeprefix("seed-")),
        )
        assert written.optimizer.lr == pytest.approx(float(rate))
        assert written.data.val_split == (
            "validation" if "tuning" in file.parts else "test"
        )  # test images never chose a rate
