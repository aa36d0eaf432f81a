"""The study: its settings against numbers worked out by hand, its choices on planted runs, its pages."""

from __future__ import annotations

import json
import math
import re
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import yaml
from conftest import DEMO, ROOT

from lars.recipe import config
from lars.recipe.model_file import import_model_file

sys.path.insert(0, str(ROOT / "recipes/study"))
import design
import figure
import study
import summary
from design import FIXED, METHODS, TARGET, Setting

RESULTS = ROOT / "recipes/study/results"
ONE_CORE = 1


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def test_rates_by_hand() -> None:
    assert Setting("sgd", 256, 3, 0.9, 2.0).rate == pytest.approx(0.5 * 8 * (1 - 0.9))
    assert Setting("nesterov", 4096, 3, 0.7, 0.5).rate == pytest.approx(0.5 * 8 * 4 * (1 - 0.7))
    assert Setting("lars", 4096, 0, 0.9, 2.0).rate == pytest.approx(12.5 * 2 * (1 - 0.9))
    assert Setting("lamb", 4096, 1, 0.9, 0.5).rate == pytest.approx(0.00125 * 2 * 2)  # a mean, not a sum, of gradients


@pytest.mark.parametrize("part", [FIXED, TARGET], ids=["fixed", "target"])
def test_all_methods_have_the_same_budget_and_see_every_momentum_and_warm_up(part: dict) -> None:
    for batch in part["rates"]:
        tried = {method: design.settings(part, method, batch) for method in METHODS}
        assert len({len(found) for found in tried.values()}) == 1
        for found in tried.values():
            assert len(set(found)) == len(found) >= 12
            assert {(s.momentum, s.warmup) for s in found} == {(m, w) for m in (0.7, 0.9) for w in (0.5, 2.0)}
            assert all(sum(s.k == k for s in found) == 2 for k in {s.k for s in found})
    seeds = [FIXED["tuning_seed"], *FIXED["final_seeds"], *FIXED["test_seeds"]]
    assert len(set(seeds)) == len(seeds) and len(FIXED["test_seeds"]) >= 5


def test_runs_change_batch_rate_momentum_and_warm_up_of_a_recipe_and_nothing_else() -> None:
    import_model_file(ROOT / "recipes/study")
    for method in METHODS:
        file = ROOT / f"recipes/study/{method}.yaml"
        usual = config.trajectory(config.load(file, []))
        changed = config.trajectory(config.load(file, Setting(method, 256, 1, 0.7, 0.5).overrides()))
        keys = {key for key in usual if usual[key] != changed[key]}
        momentum = "optimizer.beta1" if method == "lamb" else "optimizer.momentum"
        assert keys == {"global_batch", "optimizer.lr", momentum, "schedule.warmup_epochs"}


def test_the_recipes_differ_in_the_optimizer_alone() -> None:
    texts = [(ROOT / f"recipes/study/{method}.yaml").read_text() for method in METHODS]
    shared = {re.sub(r"(?s)^#.*?\nname: \S+|optimizer:.*?(?=schedule:)", "", text) for text in texts}
    assert len(shared) == 1


@pytest.fixture
def ledger(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An empty one that the study's own code reads and fills."""
    for module in (design, study, summary, figure):
        monkeypatch.setattr(module, "RESULTS", tmp_path / "results")
    return tmp_path / "results"


def plant(ledger: Path, curve: Callable[[Setting, int, float], float], monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """Let `train` write what a run would: `curve(setting, seed, epochs)` is its top-1. Returns the calls to come."""
    calls = []

    def train(place: str, setting: Setting, seed: int, overrides: list[str] = ()) -> dict:
        calls.append((place, setting, seed, tuple(overrides)))
        keys = dict(key.split("=") for key in overrides)
        epochs = float(keys["epochs"])
        whole = round(epochs * design.TRAINED / setting.batch)  # as BatchPlan has it
        steps = min(int(keys.get("max_steps", whole)), whole)
        folder = ledger / place / setting.label / f"seed-{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        by_epoch = [(s, s * setting.batch / design.TRAINED) for s in range(1, steps + 1)]
        evaluated = [by_epoch[n] for n in range(len(by_epoch)) if n == steps - 1 or by_epoch[n][0] % 4 == 0]
        lines = [{"kind": "train", "step": s, "epoch": e, "loss": 2.0, "lr": 0.1, "images": s} for s, e in by_epoch]
        lines += [{"kind": "eval", "step": s, "epoch": e, "top1": curve(setting, seed, e)} for s, e in evaluated]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        result = {"status": "finished", "steps": steps, "top1": lines[-1]["top1"], "seconds": 1.0}
        (folder / "result.json").write_text(json.dumps(result))
        return result

    monkeypatch.setattr(study, "train", train)
    return calls


def together(call: Callable, runs: list[tuple]) -> None:
    for run in runs:
        call(*run)


def test_the_best_of_three_finalists_by_new_seeds_is_tested(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first seed flatters k = 1; the new ones say k = 3 with momentum 0.7, and that is what is tested, once."""

    def curve(setting: Setting, seed: int, epochs: float) -> float:
        lucky = 9.0 * (setting.k == 1 and seed == 0)
        return 60 - 2 * abs(setting.k - 3) + 0.5 * (setting.momentum == 0.7) + lucky + 0.1 * (seed % 3)

    calls = plant(ledger, curve, monkeypatch)
    study.fixed_epochs(16384, together)
    for method in METHODS:
        setting = design.chosen(method, 16384)
        assert (setting.k, setting.momentum) == (3, 0.7)
        assert 1 in {finalist.k for finalist in design.finalists(method, 16384)}  # it was among those tried again
        assert len(design.tested(method, 16384)) == 5
    tests = [call for call in calls if call[0] == "test"]
    assert {call[1] for call in tests} == {design.chosen(method, 16384) for method in METHODS}
    assert len(calls) == 4 * (12 + 9 + 5)
    study.fixed_epochs(16384, together)
    assert len(calls) == 4 * (12 + 9 + 5)  # what the ledger has is not trained again


def test_a_choice_at_the_edge_of_its_rates_is_not_tested(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = plant(ledger, lambda setting, seed, epochs: 60.0 + setting.k, monkeypatch)
    with pytest.raises(RuntimeError, match=r"lamb-b256-k5-\S+: at the edge of its rates; widen fixed.rates.256"):
        study.fixed_epochs(256, together)
    assert not [call for call in calls if call[0] == "test"]


def test_steps_to_the_target_are_those_of_the_fastest_setting(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A setting gains `speed` points an epoch from 10 on: the target is met at (target - 10) / speed epochs."""

    def speed(setting: Setting, seed: int) -> float:
        return 4.0 - abs(setting.k - 2) - 0.5 * (setting.momentum == 0.7) - 0.25 * (seed == 22)

    calls = plant(ledger, lambda s, seed, epochs: min(99.0, 10 + max(0.1, speed(s, seed)) * epochs), monkeypatch)
    study.steps_to_target("lars", 4096, together)
    fastest = design.fastest("lars", 4096)
    assert (fastest.k, fastest.momentum) == (2, 0.9)
    steps = design.steps_to_target("lars", 4096)
    for seed, found in zip(
        TARGET["seeds"], steps
    ):  # a line from one evaluation to the next: exact for a straight curve
        assert found == pytest.approx((TARGET["top1"] - 10) / speed(fastest, seed) * design.TRAINED / 4096)
    steps_by_hand = {2: 22, 4: 44, 8: 88, 16: 176, 40: 439}  # 40 epochs of 45,000 are 439.45 steps of 4,096
    by_rung = [sum(f"max_steps={n}" in call[3] and call[2] == 21 for call in calls) for n in steps_by_hand.values()]
    assert by_rung == [12, 12, 12, 6, 0]  # in 16 epochs the fastest is there: none runs longer
    made = len(calls)
    study.steps_to_target("lars", 4096, together)
    assert len(calls) == made  # what the ledger has is not trained again


def test_a_search_that_was_stopped_in_a_rung_finishes_the_rung(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first setting of the rung is there after 4 epochs; a later one of it is faster, and has to have its turn."""
    speeds = {0: 9.0, 1: 5.0, 2: 5.0, 3: 11.0, 4: 5.0, 5: 5.0}
    calls = plant(ledger, lambda setting, seed, epochs: min(99.0, 10 + speeds[setting.k] * epochs), monkeypatch)

    def stopped(call: Callable, runs: list[tuple]) -> None:
        for run in runs:
            if len(calls) == 13:  # the whole first rung, and one run of the second
                raise KeyboardInterrupt
            call(*run)

    with pytest.raises(KeyboardInterrupt):
        study.steps_to_target("sgd", 1024, stopped)
    assert design.steps_to_target("sgd", 1024) == [] and design.fastest("sgd", 1024) is None
    study.steps_to_target("sgd", 1024, together)
    assert design.fastest("sgd", 1024).k == 3


def test_a_range_that_is_widened_has_its_new_settings_tried(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(ledger, lambda setting, seed, epochs: min(99.0, 10 + (20 - abs(setting.k - 6)) * epochs), monkeypatch)
    with pytest.raises(RuntimeError, match=r"lamb-b256-k5-\S+: at the edge of its rates; widen target.rates.256"):
        study.steps_to_target("lamb", 256, together)
    monkeypatch.setitem(TARGET["rates"], 256, [0, 7])
    study.steps_to_target("lamb", 256, together)
    assert design.fastest("lamb", 256).k == 6


def test_never_is_neither_not_yet_nor_an_empty_cell(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = plant(ledger, lambda setting, seed, epochs: 12.0 + setting.k, monkeypatch)
    study.steps_to_target("sgd", 16384, together)
    assert design.steps_to_target("sgd", 16384) == [math.inf] * 3
    assert "| 16,384 | never (never to never) |  |  |  |" in summary.target_table()
    assert sum("max_steps=110" in call[3] for call in calls) == 3  # the better half of the better half, to the end
    seeds = {21: 30.0, 22: 30.0, 23: 0.1}  # of one setting: the third seed never gets there
    plant(ledger, lambda setting, seed, epochs: min(99.0, 10 + (setting.k == 2) * seeds[seed] * epochs), monkeypatch)
    study.steps_to_target("sgd", 4096, together)
    assert math.isinf(design.steps_to_target("sgd", 4096)[2])
    last = ledger / "target" / design.fastest("sgd", 4096).label / "seed-23/result.json"
    last.write_text(json.dumps(json.loads(last.read_text()) | {"steps": 176}))
    assert design.steps_to_target("sgd", 4096) == []  # not yet


def test_fresh_takes_nothing_before_the_data_are_there(
    ledger: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    plant(ledger, lambda setting, seed, epochs: 60.0, monkeypatch)
    monkeypatch.setattr(study, "RUNS", tmp_path / "runs")
    study.fixed_run("tuning", Setting("sgd", 256, 3, 0.9, 2.0), 0)
    (tmp_path / "runs/tuning").mkdir(parents=True)
    monkeypatch.setattr("sys.argv", ["study.py", "--fresh", "--data", "./nothing"])
    assert study.main() == 2 and (ledger / "tuning").exists()
    monkeypatch.setattr(study, "write_data", lambda source, out: None)
    monkeypatch.setattr(study, "study", lambda jobs: None)
    assert study.main() == 0 and not (ledger / "tuning").exists() and not (tmp_path / "runs/tuning").exists()


def test_the_figures_are_drawn_from_what_is_there(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(ledger, lambda setting, seed, epochs: 60.0 - abs(setting.k - 2) + 0.1 * (seed % 5), monkeypatch)
    ledger.mkdir()
    figure.draw(ledger)
    assert not list(ledger.glob("*.png"))
    first, *others = FIXED["rates"]
    study.fixed_epochs(first, together)
    assert " | +0.00 |" in summary.accuracy_table() and "p =" not in summary.accuracy_table()
    for batch in others:
        study.fixed_epochs(batch, together)
    assert " | +0.00 (p = 1) |" in summary.accuracy_table()
    study.steps_to_target("sgd", 16384, together)
    figure.draw(ledger)
    assert {file.name for file in ledger.glob("*.png")} == {"accuracy.png", "target.png", "stability.png"}
    p_values = summary.comparisons()
    assert len(p_values) == 9 and set(p_values.values()) == {1.0}  # all methods are planted alike


def test_the_front_page_says_what_the_comparisons_say(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: at 256 LARS is five points above SGD and Nesterov and five below LAMB; elsewhere all are alike."""
    better = {"lars": 5.0, "lamb": 10.0}

    def top1(setting: Setting, seed: int, epochs: float) -> float:
        apart = better.get(setting.method, 0.0) if setting.batch == 256 else 0.0
        return 40.0 + apart - abs(setting.k - 2) + 0.1 * (seed % 5)

    plant(ledger, top1, monkeypatch)
    first, *others = FIXED["rates"]
    study.fixed_epochs(first, together)
    assert summary.findings() == ""
    for batch in others:
        study.fixed_epochs(batch, together)
    at_256, *elsewhere = [line for line in summary.findings().splitlines() if line.startswith("- ")]
    reached = "SGD 40.2, Nesterov 40.2, LARS 45.2, LAMB 50.2"  # seeds 11 to 15
    assert at_256 == f"- batch 256: {reached}. LARS is above SGD, Nesterov; below LAMB."
    assert [line.rpartition(". LARS is ")[2] for line in elsewhere] == ["not told apart from SGD, Nesterov, LAMB."] * 2


def test_the_front_page_says_how_many_steps_each_batch_took(ledger: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: SGD needs 2 epochs at 256 and 1,024 and never gets there at 16,384; the others are twice as fast."""

    def top1(setting: Setting, seed: int, epochs: float) -> float:
        speed = (17.5 if setting.method == "sgd" else 35.0) - 5 * abs(setting.k - 2) - setting.momentum - seed / 100
        return min(99.0, 10 + max(0.1, 0.0 if (setting.method, setting.batch) == ("sgd", 16384) else speed) * epochs)

    plant(ledger, top1, monkeypatch)
    for batch in TARGET["rates"]:
        assert summary.scaling() == ""
        for method in METHODS:
            study.steps_to_target(method, batch, together)
    by_hand = {}
    for method, full in (("sgd", 17.5), ("lars", 35.0)):
        speed = full - 0.7 - 0.22  # the median of seeds 21, 22 and 23; momentum 0.7 is the faster one
        by_hand[method] = [round((TARGET["top1"] - 10) / speed * design.TRAINED / batch) for batch in TARGET["rates"]]
    numbers = ", ".join(map(str, by_hand["sgd"][:3]))
    assert f"SGD {numbers}, never; Nesterov " in summary.scaling()
    assert f"; LARS {', '.join(map(str, by_hand['lars']))}; LAMB " in summary.scaling()
    assert summary.scaling_table().splitlines()[2:] == [
        "| 256 to 1,024 | 4.0 | 4.0 | 4.0 | 4.0 |",
        "| 1,024 to 4,096 | 4.0 | 4.0 | 4.0 | 4.0 |",
        "| 4,096 to 16,384 |  | 4.0 | 4.0 | 4.0 |",
    ]
    table = [line.split(" | ") for line in summary.search_table().splitlines()]
    bold = [line for line in table if "**" in line[-1]]
    assert len(table) == 2 + sum(2 * (k[1] - k[0] + 1) for k in TARGET["rates"].values()) * len(METHODS)
    assert len(bold) == len(METHODS) * len(TARGET["rates"]) - 1  # none for SGD at 16,384
    figure.draw(ledger)
    assert (ledger / "target.png").is_file()  # without that point


def test_where_a_method_becomes_unstable(monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand, of losses by rate: momentum 0.7 is worse by 0.1, one that guesses too early is not the edge."""

    def loss(label: str) -> float:
        method, batch, k, momentum, _ = label.split("-")
        by_rate = {"sgd": [1.9, 1.5, 1.6, 1.7, 1.8, 1.9], "lars": [1.9, 9, 1.6, 1.7, 9, 9], "lamb": [9] * 6}
        if (method, batch) == ("nesterov", "b256") and int(k[1:]) == 2:
            return math.nan  # one that was not run
        losses = by_rate.get(method, [1.0, 1.1, 0.5, 1.3, 1.4, 1.5])
        return min(math.log(10), [*losses, 9][int(k[1:])] + 0.1 * (momentum == "m0.7"))

    monkeypatch.setattr(figure, "final_loss", loss)
    cells = summary.stability_table().splitlines()[2].strip("| ").split(" | ")
    assert cells[:3] == ["256", "1; none", "0.5; none"]
    assert cells[3:] == ["50; 200", "0.00125; 0.00125"]


def test_holm_by_hand() -> None:
    assert summary.holm({(1, "a"): 0.01, (1, "b"): 0.04, (1, "c"): 0.03}) == pytest.approx(
        {(1, "a"): 0.03, (1, "c"): 0.06, (1, "b"): 0.06}
    )


def test_a_run_that_fails_is_named_and_no_other_begins(monkeypatch: pytest.MonkeyPatch) -> None:
    begun = []

    def fail(*call: object) -> None:
        begun.append(call)
        if len(begun) == 1:
            raise RuntimeError("a run ended with status 75")
        time.sleep(0.5)  # a run

    monkeypatch.setattr(study, "fixed_run", fail)
    with pytest.raises(RuntimeError, match="status 75"):
        study.study(ONE_CORE)
    assert len(begun) <= 2  # the one that failed, and one that the pool may have taken before it was stopped


def test_a_recipe_that_cannot_start_is_no_result(ledger: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(study, "RUNS", tmp_path)
    with pytest.raises(RuntimeError, match="ended with status 2"):  # it starts, and finds no such data
        study.train("tuning", Setting("sgd", 256, 3, 0.9, 2.0), 0, ["data.path=./nothing"])
    assert not ledger.exists()


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
    for file, text in summary.pages():
        assert file.read_text() == text, f"{file}: run make tables"


def test_the_committed_ledger_lacks_no_run_of_the_design(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole study again, with training forbidden; and every point of its tables is there."""
    monkeypatch.setattr(study, "train", lambda *call: pytest.fail(f"it would train {call}"))
    study.study(ONE_CORE)
    assert all(design.steps_to_target(method, batch) for method in METHODS for batch in TARGET["rates"])
    assert len(summary.comparisons()) == 9 and summary.scaling()


def test_every_committed_run_is_what_its_folder_says() -> None:
    """And a row of the page is computed without the study's code: the runs of "test" at a batch are of one setting."""
    page = (ROOT / "recipes/study/README.md").read_text()
    tested: dict[tuple[str, str], list[float]] = {}
    for file in sorted(RESULTS.rglob("config.yaml")):
        written, place = yaml.load(file.read_text(), yaml.CSafeLoader), file.parents[2].name
        if place == "pilot":
            continue
        pattern = r"(sgd|nesterov|lars|lamb)-b(\d+)-k-?\d+-m([\d.]+)-w([\d.]+)"
        method, batch, momentum, warmup = re.fullmatch(pattern, file.parents[1].name).groups()
        assert (written["name"], written["global_batch"]) == (f"study/{method}", int(batch))
        assert written["seed"] == int(file.parent.name.removeprefix("seed-"))
        kept = written["optimizer"]["beta1" if method == "lamb" else "momentum"]
        assert (kept, written["schedule"]["warmup_epochs"]) == (float(momentum), float(warmup))
        split = "test" if place == "test" else "validation"  # test images chose nothing
        assert written["data"]["val_split"] == split
        assert written["runtime"]["portable"] is True
        if place == "test":
            top1 = json.loads((file.parent / "result.json").read_text()).get("top1", design.GUESSING)
            tested.setdefault((method, batch), []).append(top1)
    for (_, batch), top1 in tested.items():
        if len(top1) == len(FIXED["test_seeds"]):
            assert f"| {int(batch):,} |" in page
            assert f"{statistics.mean(top1):.2f} ± {statistics.stdev(top1):.2f}" in page
