"""Expected intervals, the table's verdicts, and what becomes of an earlier run."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import DEMO, ROOT, play, start_ranks
from omegaconf import OmegaConf
from rich.console import Console

from lars.commands.reproduce import launch_command, prepare_folder
from lars.commands.reproduce import main as reproduce_main
from lars.recipe import config
from lars.recipe.refusal import RecipeError
from lars.report.groups import grouped
from lars.report.page import curves
from lars.report.report import Expectation, committed_results, committed_top1, expectation, expected_interval, report
from lars.run.reading import read_result
from lars.run.sources import sources


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def run_with(folder: Path, **result) -> Path:
    folder.mkdir(parents=True)
    (folder / "result.json").write_text(
        json.dumps({"recipe": "demo/resnet50", "engine": "plain", "world_size": 2, "seconds": 1.0, **result})
    )
    return folder


def verdict(run: Path) -> tuple[bool, str]:
    text = io.StringIO()
    good = report([run], None, Console(file=text, width=120))
    return good, text.getvalue()


def test_the_interval_is_students_for_one_more_seed() -> None:
    assert expected_interval([80.0, 81.0]) is None
    low, high = expected_interval([80.0, 81.0, 82.0])  # mean 81, s = 1, t = 9.925, sqrt(4/3)
    assert (low, high) == pytest.approx((81 - 11.460, 81 + 11.460), abs=0.0005)


@pytest.mark.parametrize("name", ["demo/alexnet", "demo/resnet50"])
def test_the_committed_seeds_are_whole_runs_of_one_data_set(name: str) -> None:
    results = committed_results(name)
    assert len(results) >= 3
    assert {r["status"] for r in results} == {"finished"}
    assert len({r["data_fingerprint"] for r in results}) == 1 and len({r["weights_sha256"] for r in results}) == len(
        results
    )
    low, high = expected_interval([r["top1"] for r in results])
    assert 50 < low < high < 100


def test_the_ledger_holds_seeds_alone() -> None:
    """Whatever calls `lars.commands.ledger` for a test must not leave its run among those that were really trained."""
    runs = [file.parent for file in (ROOT / "recipes").rglob("result.json")]
    assert runs and [run for run in runs if not run.name.startswith("seed-")] == []


def test_verdicts(tmp_path: Path) -> None:
    low, high = expected_interval([r["top1"] for r in committed_results("demo/resnet50")])
    good, text = verdict(run_with(tmp_path / "good", status="finished", top1=(low + high) / 2))
    assert good and "PASS" in text
    good, text = verdict(run_with(tmp_path / "low", status="finished", top1=low - 0.1))
    assert not good and "FAIL" in text
    good, text = verdict(run_with(tmp_path / "dead", status="failed", top1=None))
    assert not good and "FAIL (failed)" in text
    good, text = verdict(tmp_path / "nothing")
    assert not good and "FAIL (not started)" in text


@pytest.mark.parametrize(
    ("recipe", "expected", "passes", "fails"),
    [
        ("resnet50/lars-b32k-90ep", "76.25 ... 78.75", 76.25, 76.24),  # NUS-HPC 76.75 - 0.5 and + 2
        ("resnet50/lars-b32k-64ep", "74.4 ... 76.9", 76.9, 90.0),  # You et al. 74.9; other images, or another recipe
        ("resnet50/sgd-b32k-90ep", "73.7 or less", 60.0, 76.0),  # the control: 71.7 + 2
    ],
)
def test_without_committed_seeds_a_run_is_judged_by_what_is_published(
    tmp_path: Path, recipe: str, expected: str, passes: float, fails: float
) -> None:
    good, text = verdict(run_with(tmp_path / "good", recipe=recipe, status="finished", top1=passes))
    assert good and "PASS" in text and expected in text and "published" in text
    good, text = verdict(run_with(tmp_path / "bad", recipe=recipe, status="finished", top1=fails))
    assert not good and "FAIL" in text


def test_a_reference_point_is_judged_by_the_epoch_at_which_it_reaches_the_target(tmp_path: Path) -> None:
    """MLPerf at 32,768: ten seeds at 55 to 57, mean 56, s = 0.4714; 56 + 3.250 x 0.4714 x sqrt(1.1) = 57.6."""
    batch, n = 32_768, 1_281_167
    for first, top1, good in (
        (55, 76.5, True),
        (57, 76.5, True),
        (58, 76.5, False),
        (None, 75.8, False),
        (55, 90, False),
    ):
        run = run_with(tmp_path / f"{first} {top1}", recipe="resnet50/mlperf-b32k", status="finished", top1=top1)
        steps = [-(-e * n // batch) for e in range(1, 59)]  # evaluation e comes after step ceil(e N / B)
        lines = [
            {"kind": "eval", "step": s, "epoch": s * batch / n, "top1": 76.0 if first and e >= first else 75.8}
            for e, s in enumerate(steps, 1)
        ]
        lines[-1]["top1"] = top1
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        told, text = verdict(run)
        assert told == good and "75.9 by epoch 57, 77.9 or less" in " ".join(text.split()), text
        assert ("PASS" if good else "FAIL") in text


def test_a_run_that_changes_its_recipe_is_not_judged_by_what_that_reaches(tmp_path: Path) -> None:
    """It would pass with a smaller batch than the recipe is about."""
    recipe = ROOT / "recipes/resnet50/lars-b32k-90ep.yaml"
    for number, (changed, judged) in enumerate(
        (([], True), (["seed=3"], True), (["global_batch=256", "optimizer.lr=0.1"], False))
    ):
        run = run_with(tmp_path / str(number), recipe="resnet50/lars-b32k-90ep", status="finished", top1=76.7)
        OmegaConf.save(config.load(recipe, changed), run / "config.yaml")
        told, text = verdict(run)
        assert told and ("PASS" in text) == judged, text
        assert ("is not judged: global_batch=256, optimizer.lr=0.1" in text) != judged, text


@pytest.mark.parametrize(
    ("keys", "result", "told"),
    [
        (["max_steps=9"], {"steps": 9, "epochs": 0.23}, "is not judged: ended after 0.23 of 90 epochs (max_steps=9)"),
        ([], {"steps": 1760, "epochs": 45.0}, "is not judged: ended after 45 of 90 epochs"),
        ([], {"steps": 3519, "epochs": 90.001}, ""),  # the last epoch ends within a step
        (["max_steps=3519"], {"steps": 3519, "epochs": 90.001}, ""),
    ],
)
def test_a_run_that_ended_early_is_not_judged(keys: list[str], result: dict, told: str, tmp_path: Path) -> None:
    name = "resnet50/lars-b32k-90ep"
    run = run_with(tmp_path / "run", recipe=name, status="finished", top1=76.7, **result)
    OmegaConf.save(config.load(ROOT / f"recipes/{name}.yaml", keys), run / "config.yaml")
    good, text = verdict(run)
    assert good and ("PASS" in text) == (not told) and told in text, text


def test_a_result_that_is_not_the_logs_is_refused(tmp_path: Path) -> None:
    run = run_with(tmp_path / "run", status="finished", top1=81.0)
    (run / "metrics.jsonl").write_text('{"kind": "eval", "step": 9, "epoch": 1.0, "top1": 80.0}\n')
    with pytest.raises(RecipeError, match="result.json says top-1 81.0, the last evaluation in metrics.jsonl 80.0"):
        verdict(run)


def test_a_failed_seed_widens_no_interval(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a diverged run reached is in the table, and is no accuracy that a seed could have."""
    monkeypatch.setattr("lars.report.report.RECIPES", tmp_path)
    for seed, (status, top1) in enumerate((("finished", 80.0), ("failed", 10.0), ("finished", 81.0))):
        run_with(tmp_path / f"demo/results/resnet50/seed-{seed}", status=status, top1=top1)
    assert committed_top1("demo/resnet50") == [80.0, 81.0]


def test_an_epoch_that_is_no_number_meets_nothing() -> None:
    wanted = Expectation("", "", low=75.9, epoch=57)
    assert wanted.met_by(76.0, [{"epoch": 56.9, "top1": 76.0}])
    assert not wanted.met_by(76.0, [{"epoch": math.nan, "top1": 76.0}])


def test_a_recipe_that_nobody_published_has_no_verdict(tmp_path: Path) -> None:
    assert expectation("mine/lars-b32k-90ep") is None
    good, text = verdict(run_with(tmp_path / "run", recipe="mine/lars-b32k-90ep", status="finished", top1=1.0))
    assert good and "PASS" not in text and "FAIL" not in text


def test_the_picture_is_drawn(tiny_runs: dict[int, Path]) -> None:
    picture = curves(grouped(list(tiny_runs.values())[:2]), stacked=False)
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


@pytest.mark.long
def test_a_broken_optimizer_fails_the_table(
    tmp_path: Path, tiny: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The right rule passes, one with its sign flipped fails: trained by the real loop, judged by the real report."""
    recipe = tmp_path / "recipes/mine/resnet50.yaml"
    recipe.parent.mkdir(parents=True)
    # under a name of its own: a run that changes a recipe is not judged by what that reaches
    recipe.write_text((DEMO / "resnet50.yaml").read_text().replace("name: demo/", "name: mine/"))
    overrides = (*tiny, "bn_group=24", "runtime.micro_batch=48", "epochs=8")
    play(2, recipe, *overrides, f"run_dir={tmp_path / 'right'}", log=tmp_path / "log")
    top1 = read_result(tmp_path / "right")["top1"]
    monkeypatch.setattr(
        "lars.report.report.committed_results",
        lambda name: [{"status": "finished", "top1": top1 + d} for d in (-0.5, 0.0, 0.5)],
    )
    (recipe.parent / "model.py").write_text(
        "import torch\nfrom lars.optim.lars import LARS\n"
        "right = LARS.step\n"
        "def wrong(self, closure=None):\n"
        "    torch._foreach_neg_([p.grad for g in self.param_groups for p in g['params']])\n"
        "    return right(self, closure)\n"
        "LARS.step = wrong\n"
    )
    start_ranks(2, recipe, *overrides, f"run_dir={tmp_path / 'wrong'}", log=tmp_path / "log").wait()
    assert read_result(tmp_path / "wrong")["steps"] > 0
    assert verdict(tmp_path / "right")[0] and "PASS" in verdict(tmp_path / "right")[1]
    assert not verdict(tmp_path / "wrong")[0] and "FAIL" in verdict(tmp_path / "wrong")[1], top1


def test_a_launch_that_ends_with_an_error_is_never_a_pass(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old finished run stands in the folder, the new start is refused."""
    low, high = expected_interval([r["top1"] for r in committed_results("demo/resnet50")])
    run = run_with(tmp_path / "run", status="finished", top1=(low + high) / 2)
    refused = lambda *args, **kwargs: subprocess.Popen([sys.executable, "-c", "raise SystemExit(1)"])  # noqa: E731
    monkeypatch.setattr("lars.commands.reproduce.start", refused)
    checked = subprocess.CompletedProcess([], 0)  # test_engines.py has the real check
    monkeypatch.setattr("lars.commands.reproduce.subprocess.run", lambda *args, **kwargs: checked)
    monkeypatch.setattr("sys.argv", ["reproduce", "recipes/demo/resnet50.yaml", f"run_dir={run}"])
    (run / "sources.json").write_text(json.dumps(sources(DEMO / "resnet50.yaml")))
    assert reproduce_main() == 1
    assert "ended with an error" in capsys.readouterr().out


def test_the_model_file_of_another_folder_is_a_source() -> None:
    from lars.recipe.model_file import import_model_file

    import_model_file(DEMO)
    assert "alexnet/model.py" in sources(DEMO / "alexnet.yaml")
    assert "alexnet/model.py" not in sources(ROOT / "recipes/resnet50/lars-b32k-90ep.yaml")


def test_a_finished_run_of_other_sources_is_set_aside_an_unfinished_one_resumes(tmp_path: Path) -> None:
    recipe = DEMO / "resnet50.yaml"
    for status, error, changed, fresh, moved in [
        ("finished", "", False, False, False),
        ("finished", "", True, False, True),
        ("finished", "", False, True, True),
        ("preempted", "", True, False, False),
        ("failed", "FloatingPointError: step 3", True, False, True),
        ("failed", "OSError: disk full", True, False, False),
    ]:
        run, said = run_with(tmp_path / str(len(list(tmp_path.iterdir()))), status=status, error=error), []
        then = {**sources(recipe), **({"lars/optim/lars.py": "0"} if changed else {})}
        (run / "sources.json").write_text(json.dumps(then))
        prepare_folder(run, recipe, fresh, said.append)
        assert run.exists() != moved
        assert bool(said) == (moved or changed)
        assert not changed or fresh or "lars/optim/lars.py" in said[0]


def test_the_printed_line_is_the_contracts() -> None:
    line = launch_command(Path("launch/cpu-2.yaml"), 2, Path("recipes/demo/alexnet.yaml"), ["seed=3"])
    assert " ".join(line) == (
        "accelerate launch --config_file launch/cpu-2.yaml --num_processes 2 "
        "recipes/train.py --config recipes/demo/alexnet.yaml seed=3"
    )


def test_a_run_folder_holds_what_the_contract_says(tiny_runs: dict[int, Path]) -> None:
    result = read_result(tiny_runs[2])
    assert set(result) >= set(
        "recipe status heartbeat reproducibility top1 top5 steps epochs images seconds images_per_second world_size "
        "engine weights_sha256 samples_hash source_sha256 data_fingerprint versions environment".split()
    )
    lines = [json.loads(line) for line in (tiny_runs[2] / "metrics.jsonl").read_text().splitlines()]
    assert set(lines[0]) == {"kind", "step", "epoch", "loss", "lr", "images", "images_per_second"}
    assert set(lines[-1]) == {"kind", "step", "epoch", "loss", "top1", "top5", "images"}
    assert lines[0]["images"] == 96 and lines[0]["epoch"] == round(96 / 1009, 4)
