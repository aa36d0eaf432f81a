"""`lars.commands.verify` on real runs: the same, a changed one, one of another environment, and its command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import DEMO, ROOT

from lars.commands.verify import compare, main, overrides_of
from lars.report.report import committed_results
from lars.run.reading import read_lines, read_result


@pytest.fixture
def altered(tmp_path: Path, tiny_runs: dict[int, Path]) -> Callable[..., Path]:
    """A copy of the run at 3 processes with keys of result.json, or the loss of one step, changed."""

    def alter(step: int = 1, loss_factor: float = 1.0, last: int = 24, **keys: object) -> Path:
        copy = tmp_path / "altered"
        copy.mkdir()
        written = (tiny_runs[3] / "config.yaml").read_text()
        assert "max_steps: 24" in written
        (copy / "config.yaml").write_text(written.replace("max_steps: 24", f"max_steps: {last}"))
        lines = [line for line in read_lines(tiny_runs[3] / "metrics.jsonl") if line["step"] <= last]
        for line in lines:
            if (line["kind"], line["step"]) == ("train", step):
                line["loss"] *= loss_factor
        (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        (copy / "result.json").write_text(json.dumps({**read_result(tiny_runs[3]), "steps": last, **keys}))
        return copy

    return alter


def test_the_same_run_and_its_prefix(tiny_runs: dict[int, Path], altered: Callable[..., Path]) -> None:
    good, lines = compare(tiny_runs[1], tiny_runs[5])
    assert good and lines == [
        f"SAME RUN: 24 steps, bit for bit, weights {read_result(tiny_runs[1])['weights_sha256'][:16]}"
    ]
    assert compare(tiny_runs[1], altered(last=9)) == (True, ["SAME RUN: the first 9 of 24 steps, bit for bit"])


def test_a_log_with_a_hole_proves_nothing(tiny_runs: dict[int, Path], altered: Callable[..., Path]) -> None:
    again = altered(last=9, steps=10)
    lines = [f"NO PROOF: {again / 'metrics.jsonl'} does not have each of 10 steps once"]
    assert compare(tiny_runs[1], again) == (False, lines)


@pytest.mark.parametrize(
    ("forge", "said"),
    [
        (lambda lines: [line for line in lines if line["kind"] != "eval" or line["step"] == 24], "at step 11"),
        (lambda lines: [*lines, {**lines[-1], "kind": "eval", "step": 9}], "at step 9"),
        (lambda lines: [*lines, next(line for line in lines if line["kind"] == "eval")], "at step 11"),
        (lambda lines: [line for line in lines if line["kind"] != "eval" or line["step"] != 24], "at step 24"),
        (lambda lines: [lines[0], *lines], "does not have each of 24 steps once"),
        (lambda lines: [line for line in lines if line["step"] != 7], "does not have each of 24 steps once"),
        (lambda lines: [{**line, "step": 8} if line["step"] == 7 else line for line in lines], "does not have each"),
        (lambda lines: [*lines, {**lines[0], "step": 25}], "does not have each of 24 steps once"),
    ],
    ids=["an evaluation less", "one more", "one twice", "no last one", "a step twice", "a step less"]
    + ["a step in another's place", "a step more"],
)
def test_a_log_that_was_cut_or_mended_is_another(
    forge: Callable[[list[dict]], list[dict]], said: str, tiny_runs: dict[int, Path], altered: Callable[..., Path]
) -> None:
    run = altered()
    assert compare(run, tiny_runs[1])[0]
    lines = forge(read_lines(run / "metrics.jsonl"))
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    good, lines = compare(run, tiny_runs[1])
    assert not good and lines[0].startswith("NO PROOF: ") and said in lines[0]


def with_lines(run: Path, change: Callable[[dict], dict]) -> Path:
    """The run with each line of its log changed."""
    lines = [change(line) for line in read_lines(run / "metrics.jsonl")]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def with_key(run: Path, old: str, new: str) -> Path:
    """The run with a key of its config.yaml changed."""
    written = (run / "config.yaml").read_text()
    assert old in written
    (run / "config.yaml").write_text(written.replace(old, new))
    return run


def test_a_prefix_may_be_evaluated_at_its_end(tiny_runs: dict[int, Path], altered: Callable[..., Path]) -> None:
    """The run itself is not evaluated there."""
    again = altered(last=9)
    with open(again / "metrics.jsonl", "a") as log:
        log.write(json.dumps({"kind": "eval", "step": 9, "epoch": 0.8, "loss": 2.0, "top1": 9.0, "top5": 50.0}) + "\n")
    assert compare(tiny_runs[1], again) == (True, ["SAME RUN: the first 9 of 24 steps, bit for bit"])


def test_evaluations_are_compared(tiny_runs: dict[int, Path], altered: Callable[..., Path]) -> None:
    run = with_lines(altered(), lambda line: {**line, "top5": 1.0} if line["kind"] == "eval" else line)
    good, lines = compare(run, tiny_runs[1])
    assert not good and lines[0].startswith("DIFFERENT RUN: ") and "step 11" in lines[0]


def test_where_evaluation_was_overridden_its_steps_are_no_difference(
    tiny_runs: dict[int, Path], altered: Callable[..., Path]
) -> None:
    again = with_key(altered(), "every_epochs: null", "every_epochs: 2")
    lines = [line for line in read_lines(again / "metrics.jsonl") if (line["kind"], line["step"]) != ("eval", 11)]
    (again / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    good, lines = compare(tiny_runs[1], again)
    assert good and lines[0].startswith("SAME RUN: 24 steps")


def test_speed_is_no_difference(tiny_runs: dict[int, Path], altered: Callable[..., Path]) -> None:
    assert compare(tiny_runs[1], with_lines(altered(), lambda line: {**line, "images_per_second": 1.0}))[0]


def test_a_run_that_was_killed_may_have_logged_more_than_it_told(
    tiny_runs: dict[int, Path], altered: Callable[..., Path]
) -> None:
    killed = altered(last=9, steps=7, status="running")
    assert compare(killed, tiny_runs[1])[1][-1] == "SAME RUN: the first 7 of 7 steps, bit for bit"


def test_a_run_that_claims_more_steps_than_its_recipe_has(
    tiny_runs: dict[int, Path], altered: Callable[..., Path]
) -> None:
    """The repetition was let go on to the claimed end, as the command lets it, and ended before."""
    again = altered(last=9)
    (again / "config.yaml").write_text((again / "config.yaml").read_text().replace("max_steps: 9", "max_steps: 24"))
    lines = ["DIFFERENT RUN: it claims 24 steps, its repetition ended after 9"]
    assert compare(tiny_runs[1], again) == (False, lines)


def test_the_end_of_a_run_that_did_not_finish_is_not_compared(
    tiny_runs: dict[int, Path], altered: Callable[..., Path]
) -> None:
    good, lines = compare(altered(status="preempted", top1=99.0), tiny_runs[1])
    assert good and lines == [
        "the run is preempted: its end is not compared",
        "SAME RUN: the first 24 of 24 steps, bit for bit",
    ]


def test_of_a_repetition_that_did_not_finish_the_end_is_not_compared(
    tiny_runs: dict[int, Path], altered: Callable[..., Path]
) -> None:
    assert "SAME RUN: the first 24 of 24 steps" in compare(tiny_runs[1], altered(status="preempted", top1=99.0))[1][-1]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"step": 5, "loss_factor": 1 + 2**-50}, "step 5"),
        ({"weights_sha256": "0" * 64}, "weights_sha256 differ"),
        ({"samples_hash": "0" * 16}, "samples_hash differ"),
        ({"top1": 99.0}, "top1 differ"),
        ({"top5": 99.0}, "top5 differ"),
        ({"data_fingerprint": "0" * 64}, "DIFFERENT DATA"),
        ({"content_fingerprint": "0" * 64}, "DIFFERENT DATA: other bytes under equal footers"),
        ({"content_fingerprint": 5}, "DIFFERENT DATA: other bytes under equal footers"),  # of no run
    ],
)
def test_one_changed_bit_is_another_run(
    change: dict, said: str, tiny_runs: dict[int, Path], altered: Callable[..., Path]
) -> None:
    good, lines = compare(tiny_runs[1], altered(**change))
    assert not good and lines[0].startswith("DIFFERENT") and said in lines[0]


def elsewhere() -> dict[str, dict]:
    return {
        "environment": {**committed_results("demo/resnet50")[0]["environment"], "device": "another"},
        "weights_sha256": "0" * 64,
    }


def test_elsewhere_rounding_passes_and_more_fails(
    tiny_runs: dict[int, Path], altered: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
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
    failed = {
        name: [line.split("  ")[2] for line in lines if line.startswith("  FAIL")]
        for name, (_, lines) in verdicts.items()
    }
    assert failed == {
        "rounding": [],
        "first loss": ["loss from the same weights"],
        "one update": ["loss after one update"],
        "whole": ["samples", "top-1"],
    }
    assert {name: good for name, (good, _) in verdicts.items()} == {
        "rounding": True,
        "first loss": False,
        "one update": False,
        "whole": False,
    }
    assert (
        "device: " in verdicts["rounding"][1][0]
        and verdicts["rounding"][1][-1] == "PASS up to rounding: the first 9 of 24 steps"
    )


@pytest.mark.parametrize("key", ["lr", "images"])
def test_elsewhere_rates_and_samples_are_the_same(
    key: str, tiny_runs: dict[int, Path], altered: Callable[..., Path]
) -> None:
    copy = altered(last=9, **elsewhere())
    fifth = ("train", 5)
    with_lines(copy, lambda line: {**line, key: 2 * line[key]} if (line["kind"], line["step"]) == fifth else line)
    good, lines = compare(tiny_runs[1], copy)
    assert not good and [line for line in lines if line.startswith("  FAIL")] == ["  FAIL  rates"]


def test_another_way_to_compute_is_a_reason(tiny_runs: dict[int, Path], altered: Callable[..., Path]) -> None:
    copy = with_key(altered(last=9, step=5, loss_factor=1 + 2**-50), "channels_last: false", "channels_last: true")
    good, lines = compare(tiny_runs[1], copy)
    assert good and "runtime.channels_last: False -> True" in lines[0]


def test_a_numeric_run_promises_no_bits_even_to_itself(altered: Callable[..., Path], tmp_path: Path) -> None:
    shutil.copytree(altered(reproducibility="numeric"), tmp_path / "first")
    shutil.rmtree(tmp_path / "altered")
    copy = altered(last=9, step=5, loss_factor=1 + 2**-50, reproducibility="numeric")
    good, lines = compare(tmp_path / "first", copy)
    assert good and "reproducibility: numeric -> bitwise" in lines[0]


def environment(run: Path, *without: str, **changed: object) -> dict[str, object]:
    """A run's numeric environment, less some keys, with others changed."""
    return {k: v for k, v in {**read_result(run)["environment"], **changed}.items() if k not in without}


@pytest.fixture
def portable_run(tmp_path: Path, tiny_runs: dict[int, Path]) -> Path:
    """The run at one process, as if it had been portable on another maker's CPU."""
    run = tmp_path / "portable"
    run.mkdir()
    for name in ("config.yaml", "metrics.jsonl"):
        shutil.copy(tiny_runs[1] / name, run)
    there = environment(tiny_runs[1], device="another maker's CPU", cpu_flags="avx avx2 fma")
    result = {**read_result(tiny_runs[1]), "reproducibility": "portable", "environment": there}
    (run / "result.json").write_text(json.dumps(result))
    return run


def test_the_cpu_is_no_excuse_between_two_portable_runs(portable_run: Path, altered: Callable[..., Path]) -> None:
    assert compare(portable_run, altered(last=9, reproducibility="portable"))[0]
    shutil.rmtree(portable_run.parent / "altered")
    good, lines = compare(portable_run, altered(step=5, loss_factor=1 + 2**-50, reproducibility="portable"))
    assert (
        not good and lines[0].startswith("DIFFERENT RUN: the numeric environment is the same") and "step 5" in lines[0]
    )


def test_other_versions_are_a_reason_between_portable_runs_too(
    tiny_runs: dict[int, Path], portable_run: Path, altered: Callable[..., Path]
) -> None:
    there = environment(tiny_runs[1], torch="1.0")
    _, lines = compare(
        portable_run, altered(step=5, loss_factor=1 + 2**-50, reproducibility="portable", environment=there)
    )
    assert "torch: " in lines[0] and "device: " not in lines[0] and "cpu_flags: " not in lines[0]


def test_a_bitwise_run_on_another_cpu_stays_one_up_to_rounding(
    portable_run: Path, altered: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Control: only two portable runs are compared as if they had one CPU.

    The line says why this one is not portable.
    """
    monkeypatch.setattr("lars.commands.verify.portable.excluded", lambda: None)  # whatever machine this is
    good, lines = compare(portable_run, altered(last=9, step=5, loss_factor=1 + 2**-50))
    assert good and lines[0].startswith("the run is portable, this repetition is not: it ran with ")
    assert "device: " in lines[1] and "reproducibility: portable -> bitwise" in lines[1]


def test_a_variable_that_stands_in_the_way_is_named(
    portable_run: Path, altered: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lars.commands.verify.portable.excluded", lambda: "MKL_CBWR=AVX2 is set")
    good, lines = compare(portable_run, altered(last=9))
    assert good and lines[0] == "the run is portable, this repetition is not: MKL_CBWR=AVX2 is set"
    assert lines[1] == "SAME RUN: the first 9 of 24 steps, bit for bit"


def test_what_older_versions_did_not_write_is_no_difference(
    tiny_runs: dict[int, Path], altered: Callable[..., Path]
) -> None:
    """Neither the CPU's flags nor `runtime.portable`, whose neutral value such a run had."""
    old = altered(environment=environment(tiny_runs[3], "cpu_flags"))
    lines = [line for line in (old / "config.yaml").read_text().splitlines() if "portable:" not in line]
    (old / "config.yaml").write_text("\n".join(lines) + "\n")
    changed = tiny_runs[1].parent / "changed"
    shutil.copytree(tiny_runs[1], changed)
    text = (changed / "metrics.jsonl").read_text().replace('"loss": ', '"loss": 1', 1)
    (changed / "metrics.jsonl").write_text(text)
    good, said = compare(old, changed)
    shutil.rmtree(changed)
    assert not good and said[0].startswith("DIFFERENT RUN: the numeric environment is the same")


@pytest.mark.parametrize("name", ["demo/alexnet", "demo/resnet50"])
def test_the_committed_seeds_say_what_they_ran(name: str) -> None:
    """What a stranger needs to verify a row: recipe and runtime keys, no path of the machine that trained it."""
    for folder in sorted((ROOT / "recipes" / name.replace("/", "/results/")).glob("seed-*")):
        seed = int(folder.name.removeprefix("seed-"))
        assert overrides_of(folder, ROOT / "recipes" / f"{name}.yaml") == ([f"seed={seed}"] if seed else [])
        assert (
            "path" not in (folder / "config.yaml").read_text()
            and len(read_lines(folder / "metrics.jsonl", "train")) == read_result(folder)["steps"]
        )


@pytest.mark.long
def test_the_command_trains_the_runs_own_recipe_again(
    tiny: tuple[str, ...], tiny_runs: dict[int, Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    """The run's overrides are found in its config.yaml, its data are given; one process verifies what two did."""
    monkeypatch.chdir(ROOT)
    shutil.rmtree(ROOT / "runs/verify/demo", ignore_errors=True)
    from_here = ["--recipe", str(DEMO / "resnet50.yaml"), "--data", tiny[0].removeprefix("data.path=")]
    assert main([str(tiny_runs[2]), *from_here, "--steps", "2", "--launch", "cpu-1", "trackers=[]"]) == 0
    assert "SAME RUN: the first 2 of 24 steps, bit for bit" in capfd.readouterr().out
    shutil.rmtree(ROOT / "runs/verify/demo")


def test_what_is_no_run_is_told(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    assert main([str(tmp_path)]) == 2
    assert "holds no run" in capsys.readouterr().err


def test_a_hole_is_told_before_hours_of_training(
    altered: Callable[..., Path], capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lars.commands.verify.reproduce", lambda *_: pytest.fail("it trains"))
    assert main([str(altered(last=9, steps=10))]) == 2
    assert "does not have each of 10 steps once" in capsys.readouterr().err
