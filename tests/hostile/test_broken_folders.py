"""Run folders that are damaged, altered or a stranger's: report, ledger, tables, verify and a resume."""

from __future__ import annotations

import json
import logging
import os
import shutil
import stat
import subprocess
import sys
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import DEMO, ROOT, play, start_ranks
from data.server import serve
from promises import promised
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import nn

from lars.commands import ledger, verify
from lars.recipe import config
from lars.recipe.keys import Checkpoint
from lars.recipe.refusal import RecipeError
from lars.report import report
from lars.run import checkpoint, checkpoint_writer
from lars.run.checkpoint import State, saved
from lars.run.checkpoint_writer import CheckpointWriter
from lars.run.folder import RunFolder, _cut_back, write_atomically
from lars.run.mllog import seconds_to_target
from lars.run.peers import Peers
from lars.run.reading import is_name, read_bytes, read_config, read_lines, read_result
from lars.run.resume import finished, resume
from lars.run.sources import source_sha256, sources

COMMITTED = DEMO / "results" / "alexnet" / "seed-0"
ONE_LINE = "refused by report, ledger and verify, which name the file"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A copy of a committed run."""
    return shutil.copytree(COMMITTED, tmp_path / "seed-0")


@pytest.fixture
def ledger_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipes/ that the ledger may write into."""
    folder = tmp_path / "recipes"
    (folder / "demo").mkdir(parents=True)
    monkeypatch.setattr(ledger, "RECIPES", folder)
    return folder


def listing(folder: Path) -> dict[str, int]:
    return {str(p.relative_to(folder)): p.lstat().st_mtime_ns for p in sorted(folder.rglob("*"))}


def changed(**keys: Any) -> bytes:
    """result.json with other values."""
    return json.dumps({**json.loads((COMMITTED / "result.json").read_text()), **keys}).encode()


def with_line(line: str | bytes) -> bytes:
    """metrics.jsonl with a line more, not the last one."""
    lines = (COMMITTED / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    lines.insert(3, (line if isinstance(line, bytes) else line.encode()) + b"\n")
    return b"".join(lines)


def with_keys(text: str) -> bytes:
    return (COMMITTED / "config.yaml").read_bytes() + text.encode()


def sparse(file: Path) -> None:
    with open(file, "wb") as stream:
        stream.truncate(10 << 30)


def link(file: Path) -> None:
    file.symlink_to(COMMITTED / file.name)


BOMB = "a0: &a0 [x, x]\n" + "".join(f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 40))
LINE = {"kind": "train", "step": 1, "epoch": 0.1, "loss": 2.3, "lr": 1.0, "images": 768}

ALTERED = [
    ("result.json: `[]`", ONE_LINE, "result.json", b"[]"),
    ("result.json: `5`", ONE_LINE, "result.json", b"5"),
    ("result.json: `null`", ONE_LINE, "result.json", b"null"),
    ("result.json: a text", ONE_LINE, "result.json", b'"finished"'),
    ("result.json: cut off", ONE_LINE, "result.json", b'{"status": "finis'),
    ("result.json: bytes that are no text", ONE_LINE, "result.json", b"\xff\xfe\x00"),
    ("result.json: 100,000 nested lists", ONE_LINE, "result.json", b"[" * 100_000),
    ("result.json: a number of 5,000 digits", ONE_LINE, "result.json", b'{"steps": ' + b"9" * 5000 + b"}"),
    ("result.json: top-1 as text", ONE_LINE, "result.json", changed(top1="81")),
    ("result.json: top-1 of 1,000 %", ONE_LINE, "result.json", changed(top1=1000)),
    ("result.json: top-1 is NaN", ONE_LINE, "result.json", changed(top1=float("nan"))),
    ("result.json: a list of recipes", ONE_LINE, "result.json", changed(recipe=["demo/alexnet"])),
    ("result.json: a name of a million letters", ONE_LINE, "result.json", changed(recipe="a" * 1_000_000)),
    ("result.json: a name of 300 letters", ONE_LINE, "result.json", changed(recipe="a" * 300)),
    ("result.json: -1 steps", ONE_LINE, "result.json", changed(steps=-1)),
    ("result.json: `true` steps", ONE_LINE, "result.json", changed(steps=True)),
    ("result.json: seconds of 1e300", ONE_LINE, "result.json", changed(seconds=1e300)),
    ("result.json: a list of versions", ONE_LINE, "result.json", changed(versions=["torch"])),
    ("result.json is a link to another file", ONE_LINE, "result.json", link),
    ("result.json is a folder", ONE_LINE, "result.json", Path.mkdir),
    ("result.json is a pipe that nobody writes to", ONE_LINE, "result.json", os.mkfifo),
    ("result.json of 10 GB", ONE_LINE, "result.json", sparse),
    *(
        (f"metrics.jsonl: a line `{line}`", ONE_LINE, "metrics.jsonl", with_line(line))
        for line in (
            "5",
            "null",
            "[]",
            '"train"',
            "true",
            "NaN",
            "{",
            '{"kind": "train"}',
            '{"kind": "eval", "step": 1}',
        )
    ),
    ("metrics.jsonl: a step as text", ONE_LINE, "metrics.jsonl", with_line(json.dumps({**LINE, "step": "1"}))),
    ("metrics.jsonl: a loss as a list", ONE_LINE, "metrics.jsonl", with_line(json.dumps({**LINE, "loss": [2.3]}))),
    ("metrics.jsonl: a loss of 1e300", ONE_LINE, "metrics.jsonl", with_line(json.dumps({**LINE, "loss": 1e300}))),
    ("metrics.jsonl: a rate of null", ONE_LINE, "metrics.jsonl", with_line(json.dumps({**LINE, "lr": None}))),
    (
        "metrics.jsonl: ratios as a list",
        ONE_LINE,
        "metrics.jsonl",
        with_line('{"kind": "trust", "step": 1, "epoch": 1, "ratios": [1]}'),
    ),
    ("metrics.jsonl: a million zero bytes", ONE_LINE, "metrics.jsonl", with_line(bytes(1_000_000))),
    ("metrics.jsonl: a line of 100,000 nested lists", ONE_LINE, "metrics.jsonl", with_line("[" * 100_000)),
    ("metrics.jsonl of 10 GB", ONE_LINE, "metrics.jsonl", sparse),
    ("metrics.jsonl is a link to another file", ONE_LINE, "metrics.jsonl", link),
    ("metrics.jsonl is a pipe that nobody writes to", ONE_LINE, "metrics.jsonl", os.mkfifo),
    ("config.yaml: a list", ONE_LINE, "config.yaml", b"- a"),
    ("config.yaml: no YAML", ONE_LINE, "config.yaml", b"a: ["),
    ("config.yaml: bytes that are no text", ONE_LINE, "config.yaml", b"\xff\x00\x01"),
    (
        "config.yaml: an object of Python",
        ONE_LINE,
        "config.yaml",
        with_keys("evil: !!python/object/apply:os.getpid []\n"),
    ),
    ("config.yaml: aliases that hold 2^40 texts", ONE_LINE, "config.yaml", with_keys(BOMB)),
    ("config.yaml: an alias", ONE_LINE, "config.yaml", with_keys("a: &a [x]\nb: *a\n")),
    ("config.yaml: 300 brackets in a text", ONE_LINE, "config.yaml", with_keys(f"a: '{'[' * 300}'\n")),
    ("config.yaml: 10,000 nested lists", ONE_LINE, "config.yaml", with_keys("a: " + "[" * 10_000 + "]" * 10_000)),
    ("config.yaml: a key that is no text", ONE_LINE, "config.yaml", with_keys("1: 2\n")),
    ("config.yaml: the 99th day of a month", ONE_LINE, "config.yaml", with_keys("day: 2001-99-99\n")),
    (
        "config.yaml: a million keys",
        ONE_LINE,
        "config.yaml",
        with_keys("".join(f"k{n}: 1\n" for n in range(1_000_000))),
    ),
    ("config.yaml of 17,000 bytes", ONE_LINE, "config.yaml", with_keys(f"a: {'x' * 17_000}\n")),
    ("config.yaml is a link to another file", ONE_LINE, "config.yaml", link),
]


@promised("Altered run folders", *ALTERED, arguments="file, content")
def test_an_altered_folder_is_one_line_of_every_command(
    file: str,
    content: bytes | Callable,
    run: Path,
    ledger_of: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (run / file).unlink()
    (run / file).write_bytes(content) if isinstance(content, bytes) else content(run / file)
    before = listing(run.parent)
    for command in (report, ledger, verify):
        monkeypatch.setattr("sys.argv", ["command", str(run)])
        assert command.main() == 2, command.__name__
        said = capsys.readouterr().err
        assert said.startswith("error: ") and said.count("\n") == 1 and file in said and len(said) < 400, said
    assert listing(run.parent) == before


@promised(
    "Altered run folders",
    (
        "result.json without one of its keys, or with null there",
        "report shows what is left; ledger and verify refuse what they need",
    ),
)
def test_a_key_that_is_missing_is_no_traceback(run: Path) -> None:
    whole = json.loads((COMMITTED / "result.json").read_text())
    for key in whole:
        for others in ({k: v for k, v in whole.items() if k != key}, {**whole, key: None}):
            (run / "result.json").write_text(json.dumps(others))
            report.report([run], None, Console(file=open(os.devnull, "w")))
            ledger.complaint(run)
            try:
                verify.compare(run, COMMITTED)
            except RecipeError as error:
                assert f"result.json lacks {key}" in str(error)
    (run / "result.json").write_text(json.dumps({k: v for k, v in whole.items() if k != "steps"}))
    assert "lacks steps" in ledger.complaint(run)


@promised(
    "Altered run folders",
    ("result.json claims 10^15 steps", "the ledger refuses it without counting to them"),
)
def test_a_claim_of_many_steps_costs_no_memory(run: Path) -> None:
    (run / "result.json").write_bytes(changed(steps=10**15))
    assert "of its 1000000000000000 steps" in ledger.complaint(run)


@promised(
    "Altered run folders",
    ("mllog.txt with events of every JSON type", "refused by report in one line"),
    ("mllog.txt of 20 MB", "refused by report in one line"),
)
def test_a_mangled_log_of_mlperf_is_one_line(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for event in (
        "5",
        "[]",
        "null",
        "{",
        "{}",
        '{"key": [], "time_ms": 1}',
        '{"key": "run_stop", "time_ms": "x"}',
        "\xff",
    ):
        (run / "mllog.txt").write_text(f":::MLLOG {event}\n", encoding="latin-1")
        with pytest.raises(RecipeError, match="mllog.txt is damaged"):
            seconds_to_target(run)
    large = shutil.copytree(run, run.with_name("large"))
    os.truncate(large / "mllog.txt", 20_000_000)
    with pytest.raises(RecipeError, match="mllog.txt has more than"):
        seconds_to_target(large)
    monkeypatch.setattr("sys.argv", ["report", str(run)])
    assert report.main() == 2
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "mllog.txt is damaged" in said


@promised(
    "Altered run folders",
    ("numbers at the end of float32, not finite, or negative in metrics.jsonl", "report draws what it can"),
)
def test_odd_numbers_are_drawn(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lines = read_lines(run / "metrics.jsonl")
    for number, value in enumerate((3.4e38, -3.4e38, float("nan"), float("inf"), float("-inf"), 0.0)):
        lines[2 * number].update(loss=value, lr=value)
    lines += [{"kind": "trust", "step": 208, "epoch": 16, "ratios": {"a": float("nan"), "b": -1.0, "c": 3.4e38}}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    monkeypatch.setattr("sys.argv", ["report", str(run), "--picture", str(tmp_path / "curves.png")])
    assert report.main() == 0
    assert (tmp_path / "curves.png").read_bytes().startswith(b"\x89PNG") and (tmp_path / "report.html").is_file()


@promised(
    "Altered run folders",
    ("a name that commands the terminal (ESC) or turns the line around", "shown without those signs"),
)
def test_no_name_commands_the_terminal(run: Path, capsys: pytest.CaptureFixture) -> None:
    (run / "result.json").write_bytes(changed(recipe="demo/\x1b[2J\u202ealexnet", engine="\ud800"))
    assert report.judge(run).row["recipe"] == "demo/ [2J alexnet"
    report.report([run], None, Console())
    assert "\x1b[2J" not in capsys.readouterr().out


@promised(
    "Where report looks",
    ("report called in another working folder", "the same verdict as in the clone"),
)
def test_the_verdict_does_not_depend_on_the_working_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    here = report.judge(COMMITTED)
    monkeypatch.chdir(tmp_path)
    assert report.judge(COMMITTED) == here and here.row["verdict"] == "PASS"


@promised(
    "Where report looks",
    ("a mistyped run folder", "refused, not made", "seed-O"),
    ("a folder that holds runs, but is none", "refused, nothing written", "."),
    ("a file", "refused", "seed-0/result.json"),
    arguments="place",
)
def test_a_folder_that_is_no_run_is_refused_and_not_made(
    place: str, run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    before = listing(run.parent)
    monkeypatch.setattr("sys.argv", ["report", str(run.parent / place)])
    assert report.main() == 2 and "is no run folder" in capsys.readouterr().err
    assert listing(run.parent) == before


@promised(
    "Where report looks",
    ("a stranger's `plots` that is a link to a folder of mine", "refused, nothing written there"),
)
def test_a_linked_plots_is_not_written_into(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "mine").mkdir()
    (run / "plots").symlink_to(tmp_path / "mine")
    monkeypatch.setattr("sys.argv", ["report", str(run)])
    assert report.main() == 2 and "is a link" in capsys.readouterr().err and not list((tmp_path / "mine").iterdir())


@promised(
    "Where report looks",
    (
        "a stranger's plots/report.html that is a link to a file of mine",
        "my file stays, the page takes the link's place",
    ),
)
def test_a_linked_page_is_not_written_through(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (run / "plots").mkdir()
    for name in ("report.html", "curves.png"):
        (run / "plots" / name).symlink_to(mine)
    monkeypatch.setattr("sys.argv", ["report", str(run)])
    assert (
        report.main() == 0
        and mine.read_text() == "mine"
        and (run / "plots/report.html").read_text().startswith("<!doctype")
    )


SPY = """
import os, sys
LOG = os.open(os.environ["SPY_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
WATCHED = (
    "open", "import", "compile", "exec", "socket.connect", "socket.getaddrinfo", "subprocess.Popen", "os.system",
    "pickle.find_class",
)
TRACES = (os.environ["SPY_FOLDER"], os.environ["SPY_PORT"], "stranger")
def spy(event, args):
    if event in WATCHED:
        told = " ".join(
            getattr(arg, "co_filename", None) or str(arg)[:2000] for arg in args if not isinstance(arg, (bytes, list))
        )
        if any(trace in told for trace in TRACES):
            os.write(LOG, f"{event} {told}\\n".replace("\\n", " ").encode(errors="replace") + b"\\n")
sys.addaudithook(spy)
"""
COMMANDS = """
import json, sys
from lars.commands import export, ledger, tables, verify
from lars.report import report
said = {}
for name, main in (
    ("report", report.main), ("ledger", ledger.main), ("verify", verify.main), ("export", export.main)
):
    for folder in sys.argv[1].split(","):
        sys.argv[1:] = [sys.argv[1], folder]
        before, sys.argv = sys.argv, [name, folder]
        print(f"--- {name} {folder}", flush=True)
        said[f"{name} {folder.rpartition('/')[2]}"] = main()
        sys.argv = before
said["tables"] = int(not tables.results_table())
print(json.dumps(said))
"""
SECRET = "a-secret-of-mine"


def strange_folder(place: Path, address: str, recipe: str, **keys: str) -> Path:
    """A run folder that tries to run code, to read a variable and to reach a server."""
    shutil.copytree(COMMITTED, place)
    shout = f"open({str(place / 'executed')!r}, 'w')\n"
    for name in ("model.py", "train.py", "yaml.py", "sitecustomize.py", "conftest.py", "lars.py"):
        (place / name).write_text(shout)
    (place / "evil.yaml").write_text((DEMO / "alexnet.yaml").read_text())
    (place / "evil").mkdir()
    shutil.copy(place / "model.py", place / "evil")
    written = read_config(place)
    written["data"]["path"] = f"{address}/${{oc.env:MY_SECRET}}/stranger"
    written["name"], written["run_dir"] = "../../evil/${oc.env:MY_SECRET}", f"{address}/${{oc.env:MY_SECRET}}"
    for key, value in keys.items():
        written["model"]["kwargs"][key] = value
    (place / "config.yaml").write_text(json.dumps(written))
    (place / "result.json").write_bytes(changed(recipe=recipe, source_sha256=f"{address}/stranger"))
    (place / "sources.json").write_text(json.dumps({"../../model.py": "0", f"{address}/stranger": "1"}))
    (place / "checkpoints/step-00000208").mkdir(parents=True)
    (place / "checkpoints/step-00000208/model.safetensors").write_bytes(b"cposix\nsystem\n(S'true'\ntR.")
    return place


def a_clone(folder: Path) -> Path:
    """What the commands need of this repository, where the ledger may write."""
    for name in ("lars", "launch"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "recipes", folder / "recipes", ignore=shutil.ignore_patterns("__pycache__", "results"))
    return folder


def spied_on(clone: Path, folder: Path, log: Path, port: str, *command: str) -> subprocess.CompletedProcess:
    """A Python that notes what it and its children open, import, run and call in the name of a stranger's folder."""
    hook = clone.parent / "hook"
    hook.mkdir(exist_ok=True)
    (hook / "sitecustomize.py").write_text(SPY)
    spying = {"SPY_LOG": str(log), "SPY_FOLDER": str(folder), "SPY_PORT": port, "MY_SECRET": SECRET}
    where = {**os.environ, **spying, "PYTHONPATH": f"{hook}:{clone}", "PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, *command], cwd=clone, env=where, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


@pytest.fixture(scope="module")
def spied(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, int], str, list[str], list[str], Path]:
    """Statuses by command and folder, output, what the hook saw, what the server saw, and the clone."""
    base = tmp_path_factory.mktemp("spied")
    clone, strange = a_clone(base / "clone"), base / "strange"
    with serve(base) as (address, requests):
        port = address.rpartition(":")[2]
        strange_folder(strange / "named", address, "demo/alexnet")
        strange_folder(strange / "climbing", address, f"../../../{'../' * 20}{strange}/climbing/evil")
        strange_folder(strange / "asking", address, "demo/alexnet", width="${oc.env:MY_SECRET}")
        strange_folder(
            strange / "loading", address, "demo/alexnet", pretrained=True, pretrained_cfg={"url": f"{address}/weights"}
        )
        verified = ("climbing", "asking", "loading")  # the other one would be trained
        commands = COMMANDS.replace(
            'for folder in sys.argv[1].split(","):', "for folder in sys.argv[1].split(\",\")[name == 'verify':]:"
        )
        done = spied_on(
            clone, strange, base / "log", port, "-c", commands, ",".join(str(strange / n) for n in ("named", *verified))
        )
    seen = (base / "log").read_text().splitlines()
    assert done.returncode == 0, done.stdout
    return json.loads(done.stdout.splitlines()[-1]), done.stdout, seen, requests, clone


DATA_FILES = (
    "config.yaml",
    "result.json",
    "metrics.jsonl",
    "mllog.txt",
    "state.json",
    "evaluation.json",
    "mistakes.png",
)


@promised(
    "A stranger's run folder",
    (
        "a model.py, train.py or yaml.py in it",
        "never executed, compiled or imported, by report, ledger, tables, verify or export",
        "execute",
    ),
    (
        "other files of it, checkpoints among them",
        "never opened: only its configuration, result, logs and evaluation, and by export a checkpoint with its hashes",
        "open",
    ),
    ("`${oc.env:...}` anywhere in its config.yaml", "never resolved: the variable appears nowhere", "resolve"),
    ("addresses in its config.yaml, result.json and sources.json", "never contacted", "contact"),
    arguments="what",
)
def test_a_strangers_folder_is_data(what: str, spied: tuple[dict[str, int], str, list[str], list[str], Path]) -> None:
    statuses, output, seen, requests, clone = spied
    assert len(statuses) == 16 and any(line.startswith("open ") for line in seen), (
        statuses,
        output,
    )  # the hook was there
    if what == "execute":
        started = [
            line
            for line in seen
            if line.split()[0] in ("import", "compile", "exec", "subprocess.Popen", "os.system", "pickle.find_class")
        ]
        assert not started and not list(clone.parent.rglob("executed"))
    if what == "open":
        opened = {line.split()[1] for line in seen if line.startswith("open ")}
        assert all(Path(path).name in DATA_FILES or "/plots/" in path for path in opened), opened
    if what == "resolve":
        written = "".join(p.read_text() for p in clone.parent.rglob("*.html")) + "".join(
            p.read_text() for p in clone.rglob("recipes/**/*.yaml")
        )
        assert "<!doctype" in written and SECRET not in output + written
    if what == "contact":
        assert not requests and not [line for line in seen if line.startswith("socket")]


@promised(
    "A stranger's run folder",
    (
        "a recipe's name that leads out of recipes/",
        "no expectation, no entry of the ledger, refused by verify",
        "climbing",
        2,
    ),
    ("an interpolation among what verify takes from a run", "refused by verify and ledger", "asking", 2),
    ("arguments of a model by which timm loads weights", "refused by verify and ledger", "loading", 2),
    arguments="folder, status",
)
def test_verify_takes_code_recipe_and_data_from_here(folder: str, status: int, spied: tuple) -> None:
    statuses, output, *_, clone = spied
    assert statuses[f"verify {folder}"] == status and "--recipe" in output
    assert statuses[f"ledger {folder}"] == 2
    assert (
        not is_name(f"../{folder}")
        and not is_name(f"demo/../{folder}")
        and not is_name("/demo/alexnet")
        and is_name("demo/alexnet")
    )


@promised(
    "A stranger's run folder",
    (
        "a recipe's name that leads to forged results outside recipes/",
        "no name of a recipe: expects nothing, no entry, not verified",
    ),
)
def test_a_recipe_out_of_recipes_is_not_taken(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for seed in range(3):
        shutil.copytree(COMMITTED, tmp_path / f"results/evil/seed-{seed}")
    (tmp_path / "recipes/demo").mkdir(parents=True)
    for module in (report, ledger, verify):
        monkeypatch.setattr(module, "RECIPES", tmp_path / "recipes")
    assert report.committed_results("../evil") == []
    shutil.copy(DEMO / "alexnet.yaml", tmp_path / "evil.yaml")
    with pytest.raises(RecipeError, match="--recipe"):
        verify.recipe_of(run, {"recipe": "../evil"})
    monkeypatch.setattr("sys.argv", ["ledger", str(run)])
    (run / "result.json").write_bytes(changed(recipe="demo/../../../mine"))
    assert (
        ledger.main() == 2
        and "it names 'demo/../../../mine'" in capsys.readouterr().err
        and not (tmp_path / "mine").exists()
    )


@promised(
    "A stranger's run folder",
    (
        "its data's address, interpolations, addresses of weights in its config.yaml",
        "not among what verify takes from it",
    ),
)
def test_what_could_name_something_is_not_taken(run: Path) -> None:
    def taken(section: str, **keys: Any) -> list[str]:
        written = read_config(COMMITTED)
        (written["model"]["kwargs"] if section == "kwargs" else written[section]).update(keys)
        (run / "config.yaml").write_text(json.dumps(written))
        return verify.overrides_of(run, DEMO / "alexnet.yaml")

    assert taken("data", path="http://stranger.invalid/${oc.env:MY_SECRET}", revision="evil") == []
    assert taken("kwargs", width=0.25) == ['model.kwargs={"width": 0.25, "image_size": 67}']
    for keys in (
        {"width": "${oc.env:HOME}"},
        {"pretrained": True},
        {"checkpoint_path": "evil"},
        {"weights": "http://stranger.invalid"},
    ):
        with pytest.raises(RecipeError, match="model.kwargs is not taken from a run folder"):
            taken("kwargs", **keys)
    with pytest.raises(RecipeError, match="data.train_split is not taken"):
        taken("data", train_split="${oc.env:HOME}")


@promised(
    "A stranger's run folder",
    (
        "verify of one that names a recipe of mine, data at an address of his",
        "trains my recipe on my data, says so, contacts nobody",
    ),
    long=True,
)
def test_verify_trains_what_is_here(tmp_path: Path) -> None:
    clone = a_clone(tmp_path / "clone")
    with serve(tmp_path) as (address, requests):
        folder = strange_folder(tmp_path / "strange/named", address, "demo/alexnet")
        port = address.rpartition(":")[2]
        done = spied_on(
            clone,
            folder.parent,
            tmp_path / "log",
            port,
            "-m",
            "lars",
            "verify",
            str(folder),
            "--steps",
            "2",
            "--launch",
            "cpu-1",
            "trackers=[]",
        )
    seen = (tmp_path / "log").read_text().splitlines()
    assert "recipes/demo/alexnet.yaml, its code and its data are those of this machine" in done.stdout, done.stdout
    assert "the first 2 of 208 steps" in done.stdout and SECRET not in done.stdout
    assert not requests and not (folder / "executed").exists()
    assert not [line for line in seen if line.split()[0] in ("import", "compile", "exec") or line.startswith("socket")]


@promised(
    "A stranger's run folder",
    ("a committed result, by its name demo/alexnet/seed-0", "found in recipes/demo/results"),
)
def test_a_committed_result_is_found_by_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert verify._folder(Path("demo/alexnet/seed-0")) == COMMITTED
    assert verify._folder(Path("demo/alexnet/../../../seed-0")) == Path("demo/alexnet/../../../seed-0")


def net(tied: bool = False) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 3, bias=False))
    if tied:
        model[2].weight = model[0].weight
    return model


RECIPE = config.load(DEMO / "resnet50.yaml", [])


def state_of(step: int, model: nn.Module) -> State:
    return State(step, 1, 0, 1.0, {}, "data", config.trajectory(RECIPE), checkpoint.aliases(model))


def write(run: Path, *steps: int, keep: int = 2, may_write: Callable[[], None] = lambda: None) -> CheckpointWriter:
    """Checkpoints of `net`, by one writer."""
    writer, model = CheckpointWriter(run, Checkpoint(keep=keep), may_write), net()
    for step in steps:
        writer.save(
            state_of(step, model),
            model.state_dict(),
            {n: torch.full_like(p, step) for n, p in model.named_parameters()},
        )
    writer.wait()
    return writer


def seal(place: Path, **keys: Any) -> None:
    """Give an altered checkpoint the right hashes again."""
    state = json.loads((place / "state.json").read_text())
    state["files"] = {name: checkpoint.sha256(place / name) for name in state["files"]}
    (place / "state.json").write_text(json.dumps({**state, **keys}))
    (place / "state.sha256").write_text(checkpoint.sha256(place / "state.json"))


def go_on(run: Path, model: nn.Module | None = None) -> tuple[State | None, dict[str, torch.Tensor]]:
    return resume(Peers(), run, config.load(DEMO / "resnet50.yaml", [f"run_dir={run}"]), "data", model or net())


def edit(file: str, change: Callable[[dict], Any]) -> Callable[[Path], None]:
    def apply(place: Path) -> None:
        tensors = load_file(place / file)
        change(tensors)
        save_file(tensors, place / file)

    return apply


MODEL, MOMENTUM = "model.safetensors", "momentum.safetensors"
ALTERED_BY_HAND = "refused, and the tensor is named: no disk did that"


@promised(
    "Altered checkpoints whose hashes are right",
    (
        "weights in bf16",
        ALTERED_BY_HAND,
        edit(MODEL, lambda t: t.update({"0.weight": t["0.weight"].bfloat16()})),
        "weight 0.weight",
    ),
    ("a weight more", ALTERED_BY_HAND, edit(MODEL, lambda t: t.update(more=torch.ones(1))), "weight more"),
    ("a weight less", ALTERED_BY_HAND, edit(MODEL, lambda t: t.pop("2.weight")), "weight 2.weight"),
    (
        "a running mean of another shape",
        ALTERED_BY_HAND,
        edit(MODEL, lambda t: t.update({"1.running_mean": torch.ones(1)})),
        "weight 1.running_mean",
    ),
    (
        "a counter as a float",
        ALTERED_BY_HAND,
        edit(MODEL, lambda t: t.update({"1.num_batches_tracked": torch.tensor(1.0)})),
        "weight 1.num_batches",
    ),
    ("a velocity that is missing", ALTERED_BY_HAND, edit(MOMENTUM, lambda t: t.pop("0.bias")), "velocity 0.bias"),
    ("no velocity at all", ALTERED_BY_HAND, edit(MOMENTUM, lambda t: t.clear()), "velocity 0.bias"),
    (
        "a velocity of a shape that would be repeated",
        ALTERED_BY_HAND,
        edit(MOMENTUM, lambda t: t.update({"0.weight": torch.ones(1)})),
        "velocity 0.weight",
    ),
    (
        "velocities in float64",
        ALTERED_BY_HAND,
        edit(MOMENTUM, lambda t: t.update({"0.bias": t["0.bias"].double()})),
        "velocity 0.bias",
    ),
    (
        "a velocity of nothing",
        ALTERED_BY_HAND,
        edit(MOMENTUM, lambda t: t.update(nothing=torch.ones(1))),
        "velocity nothing",
    ),
    ("a file that is no safetensors", ALTERED_BY_HAND, lambda place: (place / MODEL).write_bytes(bytes(99)), "eader"),
    arguments="alter, named",
)
def test_tensors_that_do_not_fit_are_refused(alter: Callable[[Path], None], named: str, tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    newest, model = saved(tmp_path)[-1], net()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    alter(newest)
    seal(newest)
    assert checkpoint.verified(newest)
    with pytest.raises(RecipeError, match="was altered") as refused:
        go_on(tmp_path, model)
    assert named in str(refused.value) and "\n" not in str(refused.value) and "run_dir=" in str(refused.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items()) and newest.is_dir()


@promised(
    "Altered checkpoints whose hashes are right",
    ("tied weights that the model does not tie", ALTERED_BY_HAND),
)
def test_other_tied_weights_are_refused(tmp_path: Path) -> None:
    write(tmp_path, 1)
    seal(saved(tmp_path)[0], aliases={"2.weight": "0.weight"})
    with pytest.raises(RecipeError, match="tied weights"):
        go_on(tmp_path)
    with pytest.raises(RecipeError, match="tied weights"):
        go_on(tmp_path, net(tied=True)) if not seal(saved(tmp_path)[0], aliases={}) else None


PASSED_OVER = "damaged: passed over with a warning, the one before is taken"


@promised(
    "Altered checkpoints whose hashes are right",
    ("another step than its name", PASSED_OVER, {"step": 7}),
    ("a step that is a text", PASSED_OVER, {"step": "2"}),
    ("a step that is `true`", PASSED_OVER, {"step": True}),
    ("an empty list of files", PASSED_OVER, {"files": {}}),
    ("a list of files that names /dev/zero", PASSED_OVER, {"files": {"/dev/zero": "0", MODEL: "0", MOMENTUM: "0"}}),
    ("a list of files that climbs out", PASSED_OVER, {"files": {f"../{MODEL}": "0", MOMENTUM: "0"}}),
    ("a file's hash that is a number", PASSED_OVER, {"files": {MODEL: 5, MOMENTUM: 5}}),
    ("a trajectory that is a list", PASSED_OVER, {"trajectory": []}),
    ("more bad images than it has read", PASSED_OVER, {"bad_images": 10**30}),
    ("an evaluation that is null", PASSED_OVER, {"evaluation": None}),
    ("an evaluation without top-1", PASSED_OVER, {"evaluation": {"step": 2}}),
    ("an evaluation of texts", PASSED_OVER, {"evaluation": {"step": 2, "top1": "x", "top5": "y"}}),
    ("an environment that is a list", PASSED_OVER, {"made": {"environment": []}}),
    ("a key that no run writes", PASSED_OVER, {"evil": 1}),
    arguments="keys",
)
def test_a_state_that_contradicts_itself_is_passed_over(
    keys: dict, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write(tmp_path, 1, 2)
    seal(saved(tmp_path)[-1], **keys)
    with caplog.at_level(logging.WARNING):
        assert go_on(tmp_path)[0].step == 1
    assert "step-00000002 is damaged" in caplog.text


def state_is(content: bytes) -> Callable[[Path], None]:
    """state.json with this content, and its right hash."""

    def apply(place: Path) -> None:
        (place / "state.json").write_bytes(content)
        (place / "state.sha256").write_text(checkpoint.sha256(place / "state.json"))

    return apply


def replace(name: str, make: Callable[[Path], None]) -> Callable[[Path], None]:
    def apply(place: Path) -> None:
        (place / name).unlink()
        make(place / name)

    return apply


def beside(file: Path) -> None:
    """A link in the place of a file, to what it was."""
    file.rename(file.parents[2] / file.name)
    file.symlink_to(file.parents[2] / file.name)


@promised(
    "Damaged checkpoints",
    *(
        (f"state.json: `{text}`", PASSED_OVER, state_is(text.encode()))
        for text in ("5", "[]", "null", '"step"', "{", "{}", "true")
    ),
    ("state.json: 100,000 nested lists", PASSED_OVER, state_is(b"[" * 100_000)),
    ("state.json: bytes that are no text", PASSED_OVER, state_is(b"\xff\x00")),
    ("state.json of 10 GB", PASSED_OVER, replace("state.json", sparse)),
    ("no state.sha256, where there must be one", PASSED_OVER, lambda place: (place / "state.sha256").unlink()),
    ("a flipped bit in state.sha256", PASSED_OVER, lambda place: (place / "state.sha256").write_text("0" * 64)),
    ("weights that are a link to /dev/zero", PASSED_OVER, replace(MODEL, lambda file: file.symlink_to("/dev/zero"))),
    ("weights that are a link to other weights", PASSED_OVER, lambda place: beside(place / MODEL)),
    ("weights that are a pipe that nobody writes to", PASSED_OVER, replace(MODEL, os.mkfifo)),
    ("momentum that is a folder", PASSED_OVER, replace(MOMENTUM, Path.mkdir)),
    arguments="damage",
)
def test_a_damaged_checkpoint_is_passed_over(damage: Callable[[Path], None], tmp_path: Path) -> None:
    write(tmp_path, 1, 2)
    damage(saved(tmp_path)[-1])
    state, momentum = go_on(tmp_path)
    assert state.step == 1 and momentum["0.bias"].tolist() == [1.0, 1.0, 1.0]


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


@promised("Damaged checkpoints", ("state.json of 20 MB", "damaged: not read, so that it takes no memory"))
def test_a_large_state_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, 1)
    os.truncate(saved(tmp_path)[0] / "state.json", 20_000_000)
    assert "state.json has more than 16,777,216 bytes" in checkpoint.damage(saved(tmp_path)[0])


@promised(
    "Damaged checkpoints",
    ("a damaged one whose step training passes again", "written anew; the damaged one is kept as damaged-step-<n>"),
)
def test_a_damaged_checkpoint_is_written_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 1, 2)
    for _ in range(2):  # a second time there is a damaged one already
        flip(tmp_path / "checkpoints/step-00000002" / MODEL)
        with caplog.at_level(logging.WARNING):
            write(tmp_path, 2)
        assert [p.name for p in saved(tmp_path)] == ["step-00000001", "step-00000002"] and go_on(tmp_path)[0].step == 2
        assert (
            checkpoint.damage(tmp_path / "checkpoints/damaged-step-00000002")
            and "it is kept as damaged-step-00000002" in caplog.text
        )


@promised(
    "Damaged checkpoints",
    ("damaged ones, newer than whole ones, when old ones are removed", "not counted: the newest whole ones stay", 2),
    ("the same with keep=1", "the one just written stays, once it was read back", 1),
    arguments="keep",
)
def test_rotation_counts_whole_checkpoints_only(keep: int, tmp_path: Path) -> None:
    write(tmp_path, 1, 2, 5, 6, keep=4)
    for damaged in (5, 6):
        flip(tmp_path / f"checkpoints/step-{damaged:08d}" / MOMENTUM)
    write(tmp_path, 3, keep=keep)
    assert [p.name for p in saved(tmp_path)] == [f"step-{step:08d}" for step in (2, 3)[-keep:]]
    assert all(checkpoint.verified(path) for path in saved(tmp_path))


@promised(
    "Damaged checkpoints",
    ("a folder of mine called step-best beside them", "taken for no checkpoint, and never touched"),
)
def test_a_folder_of_another_name_stays(tmp_path: Path) -> None:
    write(tmp_path, 1)
    shutil.copytree(saved(tmp_path)[0], tmp_path / "checkpoints/step-best")
    write(tmp_path, 2, 3, keep=1)
    assert [p.name for p in saved(tmp_path)] == ["step-00000003"] and (
        tmp_path / "checkpoints/step-best" / MODEL
    ).is_file()


@promised(
    "Damaged checkpoints",
    (
        "one that is another thing on the disk than was written",
        "an event like a full disk: told, put aside, and nothing older is removed",
    ),
)
def test_a_checkpoint_that_does_not_read_back_removes_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write(tmp_path, 1, 2)

    def disk_loses_a_bit() -> None:
        for file in (tmp_path / "checkpoints").glob(f".step-*/{MODEL}"):
            flip(file)

    with caplog.at_level(logging.WARNING):
        writer = write(tmp_path, 3, keep=1, may_write=disk_loses_a_bit)
    assert (
        "step 3 could not be written, the one before stays: it does not read back" in caplog.text
        and "going on" in caplog.text
    )
    assert [p.name for p in saved(tmp_path)] == ["step-00000001", "step-00000002"] and go_on(tmp_path)[0].step == 2
    assert (tmp_path / "checkpoints/latest").read_text() == "step-00000002\n" and (
        tmp_path / "checkpoints/damaged-step-00000003"
    ).is_dir()
    with pytest.raises(OSError, match="step 3"):
        writer.wait(needed=True)


@promised(
    "Damaged checkpoints",
    ("one whose files hold other tensors than memory did when it was hashed", "an event likewise"),
)
def test_what_was_hashed_is_what_memory_held(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A file system that spoils a file while it is written cannot be made here, so a writer that does stands for it."""
    monkeypatch.setattr(
        checkpoint_writer, "save_file", lambda tensors, file: save_file({n: t * 2 for n, t in tensors.items()}, file)
    )
    with caplog.at_level(logging.WARNING):
        write(tmp_path, 1)
    assert "safetensors holds other tensors" in caplog.text and saved(tmp_path) == []


@promised(
    "Damaged checkpoints",
    ("any umask", "checkpoint files follow it, as all files of a run do"),
)
def test_checkpoint_files_follow_the_umask(tmp_path: Path) -> None:
    for mask, mode in ((0o022, 0o644), (0o007, 0o660)):
        before = os.umask(mask)
        try:
            write(tmp_path / str(mask), 1)
        finally:
            os.umask(before)
        assert {stat.S_IMODE(file.stat().st_mode) for file in saved(tmp_path / str(mask))[0].iterdir()} == {mode}


class HalfUsed(nn.Module):
    """A model with a layer that the loss does not see."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused, self.frozen = nn.Linear(2, 2), nn.Linear(2, 2), nn.Linear(2, 2).requires_grad_(False)


@promised(
    "Damaged checkpoints",
    (
        "a layer that never has a gradient",
        "its velocity is 0 in the checkpoint, so that the run resumes and a missing one is told",
    ),
)
def test_a_layer_without_a_gradient_has_a_velocity(tmp_path: Path) -> None:
    from lars.engine.plain import Plain
    from lars.optim.lars import LARS

    engine, model = Plain.__new__(Plain), HalfUsed()
    engine.model, engine.optimizer = model, LARS([p for p in model.parameters() if p.requires_grad], lr=1.0)
    assert engine.optimizer_state() == {}
    model.used(torch.ones(1, 2)).sum().backward()
    engine.optimizer.step()
    momentum = engine.optimizer_state()
    assert set(momentum) == {f"{layer}.{kind}" for layer in ("used", "unused") for kind in ("weight", "bias")}
    assert not momentum["unused.weight"].any() and momentum["used.weight"].any()
    writer = CheckpointWriter(tmp_path, Checkpoint())
    writer.save(state_of(1, model), model.state_dict(), momentum)
    writer.wait()
    assert go_on(tmp_path, HalfUsed())[0].step == 1


@pytest.fixture(scope="module")
def ended(tiny: tuple[str, ...], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A real run of two steps."""
    run = tmp_path_factory.mktemp("ended") / "run"
    play(1, DEMO / "resnet50.yaml", *tiny, "max_steps=2", f"run_dir={run}", log=run.parent / "log")
    return run


def start_again(run: Path, tiny: tuple[str, ...], *overrides: str) -> tuple[int, str]:
    ranks = start_ranks(
        1, DEMO / "resnet50.yaml", *tiny, "max_steps=2", f"run_dir={run}", *overrides, log=run.parent / "log"
    )
    return ranks.wait()[0], ranks.output


@promised(
    "A finished run folder",
    ("another recipe, the checkpoints removed", "refused with the difference"),
)
def test_another_recipe_is_not_finished(ended: Path, tiny: tuple[str, ...], tmp_path: Path) -> None:
    run = shutil.copytree(ended, tmp_path / "run")
    shutil.rmtree(run / "checkpoints")
    status, said = start_again(run, tiny, "optimizer.lr=3.0")
    assert status == 2 and "holds another run (optimizer.lr: 16.0 -> 3.0)" in said and "Traceback" not in said


@promised(
    "A finished run folder",
    ("other sources", "said, with the names of the files that changed since"),
)
def test_other_sources_are_told(ended: Path, tiny: tuple[str, ...], tmp_path: Path) -> None:
    assert "already finished after 2 steps" in (said := start_again(ended, tiny)[1]) and "other sources" not in said
    run = shutil.copytree(ended, tmp_path / "run")
    then = json.loads((run / "sources.json").read_text())
    (run / "sources.json").write_text(json.dumps({**then, "lars/optim/lars.py": "0"}))
    (run / "result.json").write_text(json.dumps({**read_result(run), "source_sha256": "0" * 64}))
    status, said = start_again(run, tiny)
    assert (
        status == 0
        and "already finished after 2 steps" in said
        and "these have changed since: lars/optim/lars.py" in said
    )


@promised(
    "A finished run folder",
    ("asked by the function that decides: another rate, other data", "refused with the difference"),
)
def test_another_recipe_is_not_the_end(run: Path) -> None:
    recipe = config.load(DEMO / "alexnet.yaml", [f"run_dir={run}", "optimizer.lr=3.0"])
    with pytest.raises(RecipeError, match="optimizer.lr: 16.0 -> 3.0"):
        finished(Peers(), recipe, read_result(run)["data_fingerprint"], 208, {})
    with pytest.raises(RecipeError, match="data fingerprint"):
        finished(Peers(), config.load(DEMO / "alexnet.yaml", [f"run_dir={run}"]), "other", 208, {})


@promised(
    "A finished run folder",
    ("asked by the function that decides: other sources", "its end all the same, and the changed files are named"),
)
def test_other_sources_are_named(run: Path) -> None:
    recipe, then = config.load(DEMO / "alexnet.yaml", [f"run_dir={run}"]), {"a": "1", "b": "2"}
    (run / "sources.json").write_text(json.dumps(then))
    (run / "result.json").write_bytes(changed(source_sha256=source_sha256(then)))
    data = read_result(run)["data_fingerprint"]
    assert "other sources" not in finished(Peers(), recipe, data, 208, then)
    assert "these have changed since: b, c." in finished(Peers(), recipe, data, 208, {"a": "1", "b": "3", "c": "4"})
    assert finished(Peers(), recipe, data, 209, then) is None


@promised(
    "A run folder that is resumed",
    ("lines of every JSON type in metrics.jsonl", "dropped, which is said; the others stay"),
)
def test_damaged_lines_are_dropped_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    file, good = tmp_path / "metrics.jsonl", json.dumps(LINE).encode() + b"\n"
    file.write_bytes(b'5\n[]\nnull\n"x"\n{}\n{"step": "1"}\n\xff\n' + b"[" * 100_000 + b"\n" + good + b'{"kind": "tr')
    with caplog.at_level(logging.WARNING):
        _cut_back(file, 1, evaluated=False)
    assert file.read_bytes() == good and "8 damaged lines are dropped" in caplog.text


@promised(
    "A run folder that is resumed",
    ("a folder in the place of sources.json, config.yaml or result.json", "refused in one line"),
)
def test_a_folder_in_the_place_of_a_file_is_one_line(tmp_path: Path) -> None:
    recipe = config.load(DEMO / "alexnet.yaml", [f"run_dir={tmp_path}"])
    for name in ("sources.json", "config.yaml", "result.json"):
        (tmp_path / name).unlink(missing_ok=True)
        (tmp_path / name).mkdir()
        with pytest.raises(RecipeError, match="cannot be written"):
            RunFolder(recipe, writes=True).open(recipe, sources(DEMO / "alexnet.yaml"), 0, {}, {})
        (tmp_path / name).rmdir()


@promised(
    "A run folder that is resumed",
    ("config.yaml.tmp or result.json.tmp that is a link to a file of mine", "my file stays, the link goes"),
)
def test_no_link_is_written_through(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.write_text("mine")
    (tmp_path / "result.json.tmp").symlink_to(mine)
    write_atomically(tmp_path / "result.json", "{}")
    assert mine.read_text() == "mine" and (tmp_path / "result.json").read_text() == "{}"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mine", "result.json"]


def garbage_lines(run: Path) -> None:
    (run / "metrics.jsonl").write_bytes(
        b'5\n[]\nnull\n"x"\n{}\n{"step": "1"}\n\xff\n' + (run / "metrics.jsonl").read_bytes()
    )


def altered_velocity(run: Path) -> None:
    place = saved(run)[-1]
    edit(MOMENTUM, lambda t: t.pop("fc.bias"))(place)
    seal(place)


@promised(
    "A run folder that is resumed",
    (
        "metrics.jsonl with lines of every JSON type",
        "goes on; they are dropped, which is said",
        garbage_lines,
        0,
        "7 damaged lines are dropped",
    ),
    ("result.json: `[]`", "refused", lambda run: (run / "result.json").write_text("[]"), 2, "result.json is damaged"),
    (
        "metrics.jsonl is a folder",
        "refused",
        lambda run: replace("metrics.jsonl", Path.mkdir)(run),
        2,
        "metrics.jsonl cannot be read",
    ),
    (
        "sources.json is a folder",
        "refused",
        lambda run: replace("sources.json", Path.mkdir)(run),
        2,
        "cannot be written",
    ),
    (
        "config.yaml is a folder",
        "refused",
        lambda run: replace("config.yaml", Path.mkdir)(run),
        2,
        "config.yaml cannot be read",
    ),
    (
        "a checkpoint without one of its velocities",
        "refused",
        altered_velocity,
        2,
        "does not fit the model (velocity fc.bias)",
    ),
    arguments="alter, status, words",
)
def test_a_resume_on_an_altered_folder(
    alter: Callable[[Path], None], status: int, words: str, ended: Path, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    run = shutil.copytree(ended, tmp_path / "run")
    alter(run)
    found, said = start_again(run, tiny, "max_steps=3")
    assert found == status and words in said and "Traceback" not in said, said
    assert len([line for line in said.splitlines() if line.startswith("error: ")]) == (status == 2)


@promised(
    "A run folder that is resumed", ("a short file where a long one is allowed", "takes the memory of its own length")
)
def test_a_short_file_takes_little_memory(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    assert read_bytes(tmp_path / "metrics.jsonl", most=1 << 50) == b"{}\n"


@promised(
    "Altered run folders",
    (
        "metrics.jsonl of many small lists",
        "they take no memory beyond the line in which they stand",
        f'"x": [{",".join(["[]"] * 100_000)}]',
    ),
    (
        "metrics.jsonl of many keys that no run writes",
        "they take no memory beyond the line in which they stand",
        ",".join(f'"{number:x}":{number}' for number in range(50_000)),
    ),
    ("metrics.jsonl with a long text for a number", "it is left out", f'"loss": "{"a" * 200_000}\U0001f600"'),
    arguments="odd",
)
def test_what_no_run_writes_is_not_kept(odd: str, tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text(f'{{"kind": "eval", "step": 1, "epoch": 1, "top1": 1, {odd}}}\n' * 10)
    tracemalloc.start()
    lines = read_lines(file)
    held, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert lines == [{"kind": "eval", "step": 1, "epoch": 1, "top1": 1}] * 10
    assert held < file.stat().st_size / 100  # as objects, lists are 20 times as much, numbers by name 8 times


def test_a_line_is_read_as_it_was_written() -> None:
    """Of every kind, from this repository's own logs: nothing that a run writes is left out."""
    for log in sorted(ROOT.glob("recipes/*/results/**/metrics.jsonl"))[::40]:
        assert read_lines(log) == [json.loads(line) for line in log.read_text().splitlines()]


@promised(
    "A run folder that is resumed",
    ("a long ledger.jsonl", "cut back with one of its lines at a time in memory"),
)
def test_a_long_ledger_is_cut_back_line_by_line(tmp_path: Path) -> None:
    file, ids = tmp_path / "ledger.jsonl", list(range(10_000, 20_000))
    file.write_text("".join(json.dumps({"step": step, "ids": ids}) + "\n" for step in range(1, 201)))
    whole = file.stat().st_size
    tracemalloc.start()
    _cut_back(file, 100, evaluated=True)
    _, most = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert [json.loads(line)["step"] for line in file.read_text().splitlines()] == list(range(1, 101))
    assert most < whole / 10  # a line is a 200th, and as objects about six times its length
