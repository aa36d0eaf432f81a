"""`report.html`: its figures are the runs', it needs nothing but itself and survives whatever is in a run folder."""

from __future__ import annotations

import base64
import json
import re
import shutil
import statistics
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import DEMO, ROOT

from lars.report import elements
from lars.report.groups import grouped
from lars.report.report import main as report_main

RUNS = [DEMO / "results" / model / f"seed-{seed}" for model in ("alexnet", "resnet50") for seed in range(4)]
VOID = {"meta", "img", "source", "br", "hr", "link", "input"}


class Page(HTMLParser):
    """A page's text, attributes and tables; tags that do not close in order are an error."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.attributes, self.headings = "", [], []
        self.tables: list[list[list[str]]] = []  # rows of cells, each table's
        self.feed(file.read_text(encoding="utf-8"))
        self.close()
        assert self.open == [], "tags left open"

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.attributes += [(tag, name, value or "") for name, value in attributes]
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in ("td", "th"):
            self.tables[-1][-1].append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.tables[-1][-1][-1] += data
        if self.open and self.open[-1] in ("h1", "h2"):
            self.headings.append(data)

    def table(self, first: str) -> list[dict[str, str]]:
        """The rows below the head of the table whose first column is called `first`."""
        head, *rows = next(t for t in self.tables if t[0][0] == first)
        return [dict(zip(head, row)) for row in rows]


@pytest.fixture(autouse=True)
def in_the_repository(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def page_of(runs: list[Path], folder: Path, monkeypatch: pytest.MonkeyPatch, status: int = 0) -> Page:
    """What `lars report` writes beside a picture in `folder`."""
    monkeypatch.setattr("sys.argv", ["report", *map(str, runs), "--picture", str(folder / "curves.png")])
    assert report_main() == status
    return Page(folder / "report.html")


def copy(source: Path, target: Path, config: dict[str, Any] | None = None, **result: Any) -> Path:
    """A run folder like `source`, with changed keys (flat ones) and results, without its trust ratios."""
    shutil.copytree(source, target)
    lines = (target / "metrics.jsonl").read_text().splitlines(keepends=True)
    (target / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["kind"] != "trust"))
    keys = yaml.safe_load((target / "config.yaml").read_text())
    for key, value in (config or {}).items():
        section, _, inner = key.rpartition(".")
        (keys[section] if section else keys)[inner] = value
    (target / "config.yaml").write_text(yaml.safe_dump(keys))
    (target / "result.json").write_text(json.dumps({**result_of(source), **result}))
    return target


def result_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "result.json").read_text())


def last_loss(run: Path) -> float:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if line["kind"] == "train"][-1]


def add_trust(run: Path, ratios: dict[str, float]) -> None:
    with open(run / "metrics.jsonl", "a") as stream:
        for step in (2, 100, 208):
            grown = {layer: ratio * (1 + step / 100) for layer, ratio in ratios.items()}
            stream.write(
                json.dumps({"kind": "trust", "step": step, "epoch": step * 768 / 10_007, "ratios": grown}) + "\n"
            )


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Page]:
    """The page of all eight committed runs, and its folder."""
    folder = tmp_path_factory.mktemp("committed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        monkeypatch.chdir(ROOT)
        return folder, page_of(RUNS, folder, monkeypatch)


def test_verdicts_and_hashes_are_those_of_the_results(committed: tuple[Path, Page]) -> None:
    page = committed[1]
    verdicts, hashes = [t for t in page.tables if t[0][0] == "run"]
    assert verdicts[0] == ["run", "recipe", "engine", "processes", "top-1 %", "expected", "seconds", "verdict"]
    for run, verdict, row in zip(RUNS, verdicts[1:], hashes[1:], strict=True):
        r = result_of(run)
        assert verdict[:5] == [
            f"{run.parent.name}/{run.name}",
            r["recipe"],
            "plain",
            str(r["world_size"]),
            f"{r['top1']:.2f}",
        ]
        assert verdict[6:] == [f"{r['seconds']:.0f}", "PASS"]
        assert row[1:] == [r[key] for key in ("weights_sha256", "samples_hash", "source_sha256", "data_fingerprint")]
    assert page.headings[0] == "demo/alexnet, demo/resnet50" and "not finished" not in page.text


def test_mean_and_spread_over_seeds(committed: tuple[Path, Page]) -> None:
    rows = committed[1].table("group")
    for row, runs in zip(rows, (RUNS[:4], RUNS[4:]), strict=True):
        losses, results = [last_loss(run) for run in runs], [result_of(run) for run in runs]
        assert row["group"] == results[0]["recipe"] and row["seeds"] == "4"
        for column, key in (("top-1 %", "top1"), ("top-5 %", "top5")):
            values = [r[key] for r in results]
            assert row[column] == f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
        assert row["training loss"] == f"{statistics.mean(losses):.4g} ± {statistics.stdev(losses):.4g}"


def test_the_differing_keys_are_shown_and_no_others(committed: tuple[Path, Page]) -> None:
    ours, theirs = (yaml.safe_load((run / "config.yaml").read_text()) for run in (RUNS[0], RUNS[4]))
    expected = {}
    for key in ours.keys() | theirs.keys():
        if key in ("name", "seed", "runtime"):
            continue
        a, b = ours[key], theirs[key]
        pairs = {f"{key}.{k}": (a[k], b[k]) for k in a} if isinstance(a, dict) else {key: (a, b)}
        expected |= {k: pair for k, pair in pairs.items() if pair[0] != pair[1]}
    shown = {row["key"]: (row["demo/alexnet"], row["demo/resnet50"]) for row in committed[1].table("key")}
    assert {k: tuple(yaml.safe_load(text) for text in pair) for k, pair in shown.items()} == expected and len(shown) > 5


def test_the_page_needs_nothing_but_itself(committed: tuple[Path, Page]) -> None:
    folder, page = committed
    text = (folder / "report.html").read_text(encoding="utf-8")
    links = [
        value for _, name, value in page.attributes if name in ("src", "srcset", "href", "data", "action", "poster")
    ]
    assert links and all(link.startswith("data:image/png;base64,") for link in links)
    assert not re.search(r"url\(|@import|https?:|<script|<link|<iframe|\son\w+=", text)
    assert len(text) < 1_000_000
    embedded = [base64.b64decode(link.split(",")[1]) for link in links]
    assert all(png.startswith(b"\x89PNG") for png in embedded) and (folder / "curves.png").read_bytes() in embedded
    assert (
        ("meta", "name", "viewport") in page.attributes
        and "prefers-color-scheme: dark" in text
        and "overflow-x: auto" in text
    )


def test_one_group_shows_its_whole_trajectory_and_one_seed_has_no_spread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    page = page_of(RUNS[:1], tmp_path, monkeypatch)
    assert not any("Differences" in heading for heading in page.headings)
    rows = {row["key"]: row["value"] for row in page.table("key")}
    assert rows["optimizer.lr"] == "16.0" and rows["seed"] == "0" and "runtime.micro_batch" not in rows
    assert page.table("group")[0]["top-1 %"] == f"{result_of(RUNS[0])['top1']:.2f}"


def test_a_group_is_one_trajectory_but_for_the_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What only says where and how fast a run was is no difference; other data and an earlier end are."""
    runs = [
        *RUNS[:2],
        copy(RUNS[2], tmp_path / "faster", {"runtime.channels_last": True, "run_dir": "elsewhere"}, world_size=4),
        copy(RUNS[0], tmp_path / "again", seconds=1.0),  # the same seed: no further sample
        copy(RUNS[3], tmp_path / "rate", {"optimizer.lr": 8.0}),
        copy(RUNS[3], tmp_path / "short", {"max_steps": 20}),
        copy(RUNS[3], tmp_path / "data", data_fingerprint="0" * 64),
    ]
    groups = grouped(runs)
    assert [[run.path for run in g.runs] for g in groups] == [
        [RUNS[0], runs[3], RUNS[1], runs[2]],
        [runs[4]],
        [runs[5]],
        [runs[6]],
    ]
    assert len({g.label for g in groups}) == 4 and "lr=8.0" in groups[1].label and "max_steps=20" in groups[2].label
    assert [run.path for run in groups[0].seeds()] == [RUNS[0], RUNS[1], runs[2]]
    page = page_of(runs, tmp_path, monkeypatch)
    assert {row["key"] for row in page.table("key")} == {"optimizer.lr", "max_steps", "data_fingerprint"}


def test_a_run_of_before_a_key_came_is_a_further_seed(tmp_path: Path) -> None:
    """What a version did not write yet is neutral: null, or the key's own value."""
    lately = copy(RUNS[1], tmp_path / "lately", {"model.weights_sha256": None, "augment.erase": 0.0})
    config = yaml.safe_load((lately / "config.yaml").read_text())
    before = copy(RUNS[0], tmp_path / "before")
    older = {**config, "seed": 0, "augment": {k: v for k, v in config["augment"].items() if k != "erase"}}
    del older["model"]["weights_sha256"]
    (before / "config.yaml").write_text(yaml.safe_dump(older))
    assert len(grouped([lately, before])) == 1


def test_trust_ratios(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lars = [copy(RUNS[seed], tmp_path / f"lars-{seed}") for seed in (1, 0)]
    add_trust(lars[0], {"conv1.weight": 0.01, "fc.weight": 0.0002})
    add_trust(lars[1], {"conv1.weight": 0.01, "conv2.weight": 0.1, "fc.weight": 0.0002})
    sgd = copy(RUNS[0], tmp_path / "sgd", {"optimizer.name": "sgd"})
    drawn = {}
    from lars.report import page as module

    monkeypatch.setattr(module, "trust_curves", lambda runs, draw=module.trust_curves: drawn.update(runs) or draw(runs))
    page = page_of([*lars, sgd, copy(RUNS[4], tmp_path / "without")], tmp_path, monkeypatch)
    assert [run.path for run in drawn.values()] == [lars[1]] and "seed\xa00" in next(
        iter(drawn)
    )  # the group's first seed
    png = (tmp_path / "trust.png").read_bytes()
    assert png.startswith(b"\x89PNG") and base64.b64encode(png).decode() in (tmp_path / "report.html").read_text(
        encoding="utf-8"
    )
    assert (
        "optimizer=sgd: no trust ratios: not a LARS run" in page.text
        and "demo/resnet50: no trust ratios: none in its log" in page.text
    )


def test_a_line_a_layer_on_a_logarithmic_axis(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    from lars.report.page import trust_curves

    run = copy(RUNS[0], tmp_path / "run")
    add_trust(run, {"conv1.weight": 0.01, "conv2.weight": 0.0, "fc.weight": 0.0002})  # a ratio of 0 has no logarithm
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    trust_curves({"$\\frac{": grouped([run])[0].runs[0]})
    axis = figures[0].axes[0]
    assert (
        axis.get_yscale() == "log"
        and len(axis.lines) == 3
        and axis.lines[2].get_ydata() == pytest.approx([0.000204, 0.0004, 0.000616])
    )
    colours = [line.get_color() for line in axis.lines]
    assert len(set(colours)) == 3 and colours[0][0] < colours[2][0]  # dark first, light last


def test_curves_share_a_colour_within_a_group(monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.figure import Figure

    from lars.report.page import curves

    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *args, **kwargs: figures.append(self))
    curves(grouped(RUNS), stacked=False)
    for axis in figures[0].axes:
        colours = [line.get_color() for line in axis.lines]
        assert len(colours) == 8 and len(set(colours[:4])) == len(set(colours[4:])) == 1 and colours[0] != colours[4]
    assert [text.get_text() for text in figures[0].legends[0].get_texts()] == ["demo/alexnet", "demo/resnet50"]
    assert list(figures[0].axes[2].lines[0].get_ydata())[-1] == result_of(RUNS[0])["top1"]


def test_the_environment_has_a_cell_for_each_run_where_they_differ(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    r = result_of(RUNS[1])
    other = copy(RUNS[1], tmp_path / "run", environment={**r["environment"], "device": "H100"}, commit="abc+")
    table = next(t for t in page_of([RUNS[0], other], tmp_path, monkeypatch).tables if t[0][0] == "")
    rows = {row[0]: row[1:] for row in table[1:]}
    assert rows["environment.device"] == [r["environment"]["device"], "H100"] and rows["versions.torch"] == ["2.14.1"]
    assert rows["commit"][0] in result_of(RUNS[0])["commit"] and rows["commit"][1] == "abc+"


def test_unfinished_runs_are_shown_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    running = copy(RUNS[1], tmp_path / "running", status="running", steps=7)
    lines = (running / "metrics.jsonl").read_text().splitlines(keepends=True)
    (running / "metrics.jsonl").write_text("".join(lines[:7]) + lines[7][:20])  # a line that is still being written
    failed = copy(RUNS[2], tmp_path / "failed", status="failed", error="FloatingPointError: step 3 <b>")
    without = copy(RUNS[3], tmp_path / "without")
    (without / "result.json").unlink()
    (tmp_path / "nothing").mkdir()
    (tmp_path / "nothing/lock").touch()  # all that is there of a run before its first step
    page = page_of([RUNS[0], running, failed, without, tmp_path / "nothing"], tmp_path, monkeypatch, status=1)
    said = (
        "running, 7 steps",
        "failed, 208 steps): FloatingPointError: step 3 <b>",
        "without is not finished (not",
        "nothing is not",
    )
    assert all(text in page.text for text in said)
    verdicts = [row["verdict"] for row in page.table("run")]
    assert verdicts == ["PASS", "FAIL (running)", "FAIL (failed)", "FAIL (not started)", "FAIL (not started)"]
    row = page.table("group")[0]
    assert row["seeds"] == "1 (2 not finished)" and row["top-1 %"] == f"{result_of(RUNS[0])['top1']:.2f}"
    page = page_of([tmp_path / "nothing"], tmp_path / "alone", monkeypatch, status=1)
    assert "not started" in page.text and "No run has begun" in page.text


def test_names_cannot_break_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    evil = "$\\frac{$<script>\"'&[/b]</script>"  # also no formula and no mark-up of the console
    names = {"name": evil, "model.name": evil, "model.kwargs": {evil: evil}}
    run = copy(
        RUNS[0],
        tmp_path / "<script>run",
        names,
        recipe=evil,
        engine=evil,
        weights_sha256=evil,
        versions={evil: evil},
        commit=evil,
    )
    add_trust(run, {evil: 0.1})
    broken = copy(run, tmp_path / "<b>2", {"optimizer.lr": 1.0, "data.val_split": evil}, status=evil, error=evil)
    sgd = copy(
        RUNS[1], tmp_path / "sgd", {"optimizer.name": "sgd", "data.val_split": evil}, recipe=evil
    )  # without trust ratios
    page = page_of([run, broken, sgd], tmp_path, monkeypatch, status=1)
    text = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and "<b>" not in text and page.text.count(evil) > 10


def test_minutes_to_mlperfs_target(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = copy(RUNS[0], tmp_path / "run")
    events = [("run_start", 0, {}), ("run_stop", 90_000, {"status": "success"})]
    log = "".join(f":::MLLOG {json.dumps({'key': k, 'time_ms': t, 'metadata': m})}\n" for k, t, m in events)
    (run / "mllog.txt").write_text(log + ':::MLLOG {"ke')
    rows = page_of([run, RUNS[1]], tmp_path, monkeypatch).table("run")
    assert [row["minutes to 75.9 %"] for row in rows] == ["1.5", ""]


@pytest.mark.parametrize(
    ("file", "content"),
    [
        ("result.json", b"{"),
        ("result.json", b"[]"),
        ("result.json", b"\xff"),
        ("config.yaml", b"a: ["),
        ("config.yaml", b"- a"),
        ("metrics.jsonl", b'{"kind"\n{"kind": "train"}\n'),
    ],
)
def test_a_damaged_file_is_one_line_and_status_2(
    file: str, content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = copy(RUNS[0], tmp_path / "run")
    (run / file).write_bytes(content)
    monkeypatch.setattr("sys.argv", ["report", str(run), str(RUNS[1])])
    assert report_main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1 and f"{run / file}" in error and "damaged" in error


def test_the_command_says_where_the_page_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = copy(RUNS[0], tmp_path / "seed-0")
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["report", str(run)])
    assert report_main() == 0 and f"page: {run}/plots/report.html" in capsys.readouterr().out
    assert (
        (run / "plots/report.html").is_file()
        and (run / "plots/curves.png").is_file()
        and not (run / "plots/trust.png").exists()
    )


def test_a_picture_is_a_png(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr("sys.argv", ["report", str(RUNS[0]), "--picture", "curves.pdf"])
    assert report_main() == 2 and capsys.readouterr().err == "error: --picture curves.pdf must end in .png\n"


EVALUATION = {
    "model": "demo/alexnet, step 208",
    "split": "validation",
    "top1": 50.0,
    "top5": 100.0,
    "images": 12,
    "weights_sha256": "another",
    "names": ["a $x$ <b>", "b"],
    "confusion": [[2, 6], [0, 4]],
    "classes": [
        {"class": "b", "images": 4, "top1": 100.0},
        {"class": "a $x$ <b>", "images": 8, "top1": 25.0, "taken_for": "b", "times": 6},
    ],
}


def evaluated(folder: Path, found: object) -> Path:
    run = copy(RUNS[0], folder / "run")
    (run / "evaluation").mkdir()
    (run / "evaluation/evaluation.json").write_text(json.dumps(found))
    (run / "evaluation/mistakes.png").write_bytes(elements.png(elements.figure(1, 1)))
    return run


def test_what_evaluate_found_stands_in_the_page_class_by_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = page_of([evaluated(tmp_path, EVALUATION)], tmp_path, monkeypatch)
    assert page.table("class") == [
        {"class": "a $x$ <b>", "images": "8", "top-1 %": "25.00", "mostly taken for": "b (6)"},
        {"class": "b", "images": "4", "top-1 %": "100.00", "mostly taken for": "-"},
    ]
    assert "top-1 50.00 % and top-5 100.00 % of 12 images of validation" in page.text
    assert "not the weights that the run ended with" in page.text
    pictures = [value for tag, name, value in page.attributes if (tag, name) == ("img", "alt")]
    assert {"predictions of each class", "images that were taken for another class"} <= set(pictures)


@pytest.mark.parametrize(
    "broken",
    [
        [],
        {"model": "x"},
        {**EVALUATION, "confusion": [[1]]},
        {**EVALUATION, "confusion": "text"},
        {**EVALUATION, "confusion": [[-1, 0], [0, 1]]},
        {**EVALUATION, "classes": [{"class": "b"}]},
        {**EVALUATION, "top1": []},
        {**EVALUATION, "top1": 10**310},  # beyond every float
    ],
)
def test_a_damaged_evaluation_is_one_line(
    broken: object, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    run = evaluated(tmp_path, broken)
    monkeypatch.setattr("sys.argv", ["report", str(run), "--picture", str(tmp_path / "curves.png")])
    assert report_main() == 2
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1
        and "evaluation.json is damaged (" in error
        and "`lars evaluate` writes it again" in error
    )
    assert not (tmp_path / "report.html").exists()
