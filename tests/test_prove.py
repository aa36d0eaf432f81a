"""`lars.commands.prove` against the committed hash: the end of its line, and when another place's hash is a failure."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from conftest import DEMO
from omegaconf import OmegaConf

from lars.commands import prove

OURS, OTHER = "a" * 64, "b" * 64
RAN = {"recipe": "demo/alexnet", "weights_sha256": OURS, "reproducibility": "portable"}


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    """A recipe whose folder may be written to."""
    file = tmp_path / "recipes/demo/alexnet.yaml"
    prove.committed_file(file).parent.mkdir(parents=True)
    return shutil.copy(DEMO / "alexnet.yaml", file)


def judged(recipe: Path, result: dict[str, str] = RAN, steps: int = 30, **changed: object) -> tuple[str, bool]:
    """The verdict on `result` where the committed facts are those of RAN, but for `changed`."""
    committed = {**prove.facts(recipe, 30, RAN), **changed}
    prove.committed_file(recipe).write_text(json.dumps(committed))
    return prove.against_the_committed(recipe, steps, result)


def test_the_committed_run_is_recognised(recipe: Path) -> None:
    assert judged(recipe) == ("SAME RUN, the committed one", True)


def test_another_hash_without_a_reason_fails(recipe: Path) -> None:
    line, good = judged(recipe, weights_sha256=OTHER)
    assert not good and line.startswith("SAME RUN, but not the committed one (and nothing that is known explains it")


def test_changed_sources_are_named_and_fail(recipe: Path) -> None:
    """This environment could have given the committed bits; who changed the sources says whether they were meant to."""
    line, good = judged(recipe, weights_sha256=OTHER, source_sha256=OTHER)
    assert not good and "(sources changed since it was committed;" in line


def test_other_versions_explain_another_hash(recipe: Path) -> None:
    versions = {**prove.portable.versions(), "torch": "1.0"}
    line, good = judged(recipe, weights_sha256=OTHER, versions=versions)
    assert good and "(versions differ: torch 1.0 -> " in line and "numpy" not in line


def test_a_cpu_that_cannot_be_portable_explains_another_hash(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lars.commands.prove.portable.excluded", lambda: "this CPU is aarch64, not x86-64")
    line, good = judged(recipe, {**RAN, "reproducibility": "bitwise"}, weights_sha256=OTHER)
    assert good and "(this CPU cannot be portable: this CPU is aarch64, not x86-64)" in line


def test_another_recipe_and_other_steps_have_nothing_to_be_compared_with(recipe: Path) -> None:
    assert judged(recipe, steps=20) == ("SAME RUN", True)
    assert judged(recipe, {**RAN, "recipe": "demo/resnet50"}) == ("SAME RUN", True)
    prove.committed_file(recipe).unlink()
    assert prove.against_the_committed(recipe, 30, RAN) == ("SAME RUN", True)


def test_too_few_steps_to_kill_a_run_between_them_are_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("sys.argv", ["prove", str(DEMO / "alexnet.yaml"), "--steps", "10"])
    monkeypatch.setattr(prove, "play", lambda *_: pytest.fail("something ran"))
    assert prove.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --steps 10: give 11 or more") and said.count("\n") == 1


def test_a_recipe_that_cannot_be_portable_is_refused_before_anything_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    compiled = tmp_path / "compiled.yaml"
    OmegaConf.save(OmegaConf.merge(OmegaConf.load(DEMO / "alexnet.yaml"), {"runtime": {"compile": True}}), compiled)
    monkeypatch.setattr("sys.argv", ["prove", str(compiled)])
    monkeypatch.setattr(prove, "play", lambda *_: pytest.fail("something ran"))
    assert prove.main() == 2
    said = capsys.readouterr().err
    assert said.startswith("error: runtime.compile=true") and said.count("\n") == 1


def test_the_demo_s_runs_are_portable(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    started: list[list[str]] = []

    class Launcher:
        def wait(self) -> int:
            return 0

    monkeypatch.setattr(prove, "start", lambda command, **_: (started.append(command), Launcher())[1])
    prove.play(DEMO / "alexnet.yaml", 2, 30, tmp_path / "run")
    assert "runtime.portable=true" in started[0] and "max_steps=30" in started[0]
