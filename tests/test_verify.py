"""`lars.verify` on real runs: the same, a changed one, one of another environment, and its command."""
from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from conftest import DEMO, ROOT
from lars.report import committed_results
from lars.run import read_lines, read_result
from lars.verify import compare, main, overrides_of


@pytest.fixture
def altered(tmp_path: Path, tiny_runs: dict[int, Path]) -> Callable[..., Path]:
    """A copy of the run at 3 processes with keys of result.json, or the loss of one step, changed."""

    def alter(step: int = 1, loss_factor: float = 1.0, last: int = 24, **keys: object) -> Path:
        copy = tmp_path / "altered"
        copy.mkdir()
        shutil.copy(tiny_runs[3] / "config.yaml", copy)
        lines = [line for line in read_lines(tiny_runs[3] / "metrics.jsonl") if line["step"] <= last]
        for line in lines:
            if (line["kind"], line["step"]) == ("train", step):
                line["loss"] *= loss_factor
        (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (copy / "result.json").write_text(json.dumps({**read_result(tiny_runs[3]), "steps": last, **keys}))
        return copy

    return alter


def test_the_same_run_and_its_prefix(tiny_runs: dict[int, Path], altered: Callable[..., Path]) -> None:
    good, lines = compare(tiny_runs[1], tiny_runs[4])
    assert good and lines == [f"SAME RUN: 24 steps, bit for bit, weights {read_result(tiny_runs[1])['weights_sha256'][:16]}"]
    assert compare(tiny_runs[1], altered(last=9)) == (True, ["SAME RUN: the first 9 of 24 steps, bit for bit"])


def test_a_log_with_a_hole_proves_nothing(tiny_runs: dict[int, Path], altered: Callable[..., Path]) -> None:
    assert compare(tiny_runs[1], altered(last=9, steps=10)) == (False, ["NO PROOF: metrics.jsonl has 9 of the 10 steps"])


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": 5, "loss_factor": 1 + 2**-50}, "step 5"),
        ({"weights_sha256": "0" * 64}, "weights_sha256 differ"),
        ({"samples_hash": "0" * 16}, "samples_hash differ"),
        ({"top1": 99.0}, "top1 differ"),
        ({"data_fingerprint": "0" * 64}, "DIFFERENT DATA"),
    ],
)
def test_one_changed_bit_is_another_run(change: dict, said: str, tiny_runs: dict[int, Path], altered: Callable[..., Path]) -> None:
    good, lines = compare(tiny_runs[1], altered(**change))
    assert not good and lines[0].startswith("DIFFERENT") and said in lines[0]


def elsewhere() -> dict[str, dict]:
    return {"environment": {**committed_results("demo/resnet50")[0]["environment"], "device": "another"}, "weights_sha256": "0" * 64}


def test_elsewhere_rounding_passes_and_more_fails(tiny_runs: dict[int, Path], altered: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    verdicts = {}
    for name, change in {
        "rounding": {"last": 9, "loss_factor": 1 + 1e-6},
        "first loss": {"last": 9, "loss_factor": 1 + 1e-4},
        "one update": {"last": 9, "step": 2, "loss_factor": 1 + 1e-4},
        "whole": {"samples_hash": "0" * 16},  # 24 steps reach no top-1 that a whole demo run would
    }.items():
        copy = altered(**change, **({} if "samples_hash" in change else {}), **elsewhere())
        verdicts[name] = compare(tiny_runs[1], copy)
        shutil.rmtree(copy)
    failed = {name: [line.split("  ")[2] for line in lines if line.startswith("  FAIL")] for name, (_, lines) in verdicts.items()}
    assert failed == {"rounding": [], "first loss": ["loss from the same weights"], "one update": ["loss after one update"], "whole": ["samples", "top-1"]}
    assert {name: good for name, (good, _) in verdicts.items()} == {"rounding": True, "first loss": False, "one update": False, "whole": False}
    assert "device: " in verdicts["rounding"][1][0] and verdicts["rounding"][1][-1] == "PASS up to rounding: the first 9 of 24 steps"


@pytest.mark.parametrize("name", ["demo/alexnet", "demo/resnet50"])
def test_the_committed_seeds_say_what_they_ran(name: str) -> None:
    """What a stranger needs to verify a row: recipe and runtime keys, no path of the machine that trained it."""
    for folder in sorted((ROOT / "recipes" / name.replace("/", "/results/")).glob("seed-*")):
        seed = int(folder.name.removeprefix("seed-"))
        assert overrides_of(folder, ROOT / "recipes" / f"{name}.yaml") == ([f"seed={seed}"] if seed else [])
        assert "path" not in (folder / "config.yaml").read_text() and len(read_lines(folder / "metrics.jsonl", "train")) == read_result(folder)["steps"]


@pytest.mark.long
def test_the_command_trains_the_runs_own_recipe_again(tiny_runs: dict[int, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture) -> None:
    """The run's overrides are found in its config.yaml; one process verifies what two did."""
    monkeypatch.chdir(ROOT)
    shutil.rmtree(ROOT / "runs/verify/demo", ignore_errors=True)
    assert main([str(tiny_runs[2]), "--recipe", str(DEMO / "resnet50.yaml"), "--steps", "2", "--launch", "cpu-1", "trackers=[]"]) == 0
    assert "SAME RUN: the first 2 of 24 steps, bit for bit" in capfd.readouterr().out
    shutil.rmtree(ROOT / "runs/verify/demo")


def test_what_is_no_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err
