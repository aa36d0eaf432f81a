"""`runtime.portable`: one hash under every launcher, and on every x86-64 CPU with AVX2 as far as qemu emulates them."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import DEMO, ROOT
from distributed import portable as cells

from lars.exact import portable
from lars.recipe import config, launched
from lars.recipe.refusal import RecipeError
from lars.run import agreement
from lars.run.reading import read_result
from lars.run.sources import environment

COMMITTED = json.loads(cells.FILE.read_text())
SIX = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2"}
SIX |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
committed_here = pytest.mark.skipif(bool(cells.why_not_here(COMMITTED)), reason=cells.why_not_here(COMMITTED) or "")
needs_portable = pytest.mark.skipif(bool(portable.excluded()), reason=portable.excluded() or "")
no_qemu = "qemu-x86_64 is not installed (Debian's package qemu-user)"
needs_qemu = pytest.mark.skipif(shutil.which(cells.QEMU) is None, reason=no_qemu)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return cells.small_data(tmp_path_factory.mktemp("demo") / "data")


@committed_here
@pytest.mark.parametrize(
    ("launcher", "processes"),
    [("bare", 1), pytest.param("torchrun", 2, marks=pytest.mark.long), ("one rank a node", 2)],
)
def test_a_launcher_gives_the_committed_hash(launcher: str, processes: int, data: Path, tmp_path: Path) -> None:
    """Without OMP_NUM_THREADS: torchrun sets it to 1, `srun` does not, and accelerate then takes all cores."""
    result = cells.launch(launcher, processes, cells.FEW, data, tmp_path / "run")
    assert (result["status"], result["reproducibility"], result["world_size"]) == ("finished", "portable", processes)
    assert result["environment"]["threads"] == 1
    assert result["weights_sha256"] == COMMITTED["few_steps"]["weights_sha256"]


def test_the_committed_hashes_are_one_for_all_launchers_and_all_cpus() -> None:
    assert cells.faults(COMMITTED) == []


@pytest.mark.parametrize("spoil", ["launchers", "two_steps"])
def test_a_table_with_another_hash_is_a_fault(spoil: str) -> None:
    """Control: the judgement can fail."""
    spoiled = json.loads(cells.FILE.read_text())
    spoiled[spoil][1]["weights_sha256"] = "0" * 64
    assert len(cells.faults(spoiled)) == 1


@pytest.mark.long
@needs_qemu
@needs_portable
@pytest.mark.parametrize("recipe", cells.RECIPES)
def test_emulated_cpus_give_this_one_s_weights(recipe: str, data: Path, tmp_path: Path) -> None:
    """Emulated: their instructions choose the kernels; rsqrt and rcp are exact there and are not in silicon.

    Two passes a step choose the same kernels as the 24 of the whole batch, which `make launchers` runs.
    """
    cpus = ("native", *cells.EMULATED)
    results = {cpu: cells.two_steps(recipe, cpu, data, tmp_path / cpu, "global_batch=64") for cpu in cpus}
    assert {r["reproducibility"] for r in results.values()} == {"portable"}
    assert len({r["weights_sha256"] for r in results.values()}) == 1


@pytest.mark.long
@needs_qemu
@needs_portable
@pytest.mark.skipif(bool(cells.why_no_control()), reason=cells.why_no_control() or "")
def test_without_the_pins_an_emulated_cpu_gives_other_weights(data: Path, tmp_path: Path) -> None:
    """Control: emulation does reach the choice of kernels."""
    cpus = ("native", "Haswell-v4")
    told = ("global_batch=64",)
    results = [cells.two_steps(cells.RECIPE, cpu, data, tmp_path / cpu, *told, pinned=False) for cpu in cpus]
    assert [r["reproducibility"] for r in results] == ["bitwise"] * 2
    assert results[0]["weights_sha256"] != results[1]["weights_sha256"]


@pytest.mark.long
@needs_qemu
@pytest.mark.parametrize("cpu", cells.EMULATED)
def test_emulated_cpus_decode_and_resize_to_the_same_pixels(cpu: str) -> None:
    assert cells.pixels_on(cpu) == cells.pixels_on("native")


@pytest.mark.long
@needs_portable
def test_a_variable_of_the_user_wins_and_the_run_says_that_it_is_not_portable(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, "recipes/train.py", *cells.arguments(cells.RECIPE, 1, data, tmp_path / "run")]
    variables = cells.clean(ATEN_CPU_CAPABILITY="default")
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "plain on cpu, bitwise (not portable on " in done.stdout
    assert "ATEN_CPU_CAPABILITY=default is set)" in done.stdout
    result = read_result(tmp_path / "run")
    assert result["reproducibility"] == "bitwise" and result["environment"]["instructions"].lower() == "default"


def test_all_variables_are_set_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in portable.VARIABLES:
        monkeypatch.setenv(name, "")  # so that what is set below is taken back
        monkeypatch.delenv(name)
    monkeypatch.setenv("MKL_CBWR", "AVX2")
    portable.set_variables()
    assert [os.environ.get(name) for name in portable.VARIABLES] == [None, None, "AVX2"]
    assert portable.excluded() == portable.obstacle() == "MKL_CBWR=AVX2 is set"
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    portable.set_variables()
    assert {name: os.environ[name] for name in portable.VARIABLES} == portable.VARIABLES


@pytest.mark.parametrize(
    ("machine", "flags", "said"),
    [
        ("aarch64", "avx2 fma", "this CPU is aarch64, not x86-64"),
        ("x86_64", "avx fma", "this CPU does not tell that it has avx2"),
        ("x86_64", "avx", "this CPU does not tell that it has avx2 and fma"),
    ],
)
def test_a_cpu_that_cannot_is_named(machine: str, flags: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable.platform, "machine", lambda: machine)
    monkeypatch.setattr(portable, "cpu", lambda: ("a CPU", flags))
    assert portable.excluded() == portable.obstacle() == said


@pytest.mark.long
@needs_portable
@pytest.mark.parametrize("where", ["zero1", "fsdp2"])
def test_zero_and_fsdp2_stay_numeric(where: str, data: Path, tmp_path: Path) -> None:
    told = {**SIX, "RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    told |= {"MASTER_PORT": str(cells.free_port()), **launched.environment_of(ROOT / f"launch/{where}.yaml")}
    command = [sys.executable, "recipes/train.py", *cells.arguments(cells.RECIPE, 1, data, tmp_path / "run")]
    variables = {k: v for k, v in cells.clean(CUDA_VISIBLE_DEVICES="", **told).items() if k != "ACCELERATE_USE_CPU"}
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_result(tmp_path / "run")
    assert (result["engine"], result["reproducibility"]) == (where, "numeric")
    assert result["environment"]["instructions"] == "AVX2"  # nothing else stood in the way


@pytest.mark.parametrize(("promised", "given"), [("bitwise", "portable"), ("numeric", "numeric")])
def test_only_what_is_bitwise_becomes_portable(promised: str, given: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "obstacle", lambda: None)
    monkeypatch.setattr(agreement, "uses_cpu", lambda: True)
    recipe = config.load(DEMO / "alexnet.yaml", ["runtime.portable=true"])
    engine = SimpleNamespace(name="plain", reproducibility=promised, device=torch.device("cpu"))
    assert agreement.strength(agreement.Peers(), engine, recipe, None)[0]["reproducibility"] == given


@pytest.mark.parametrize(
    ("made", "given"),
    [
        ({}, "numeric"),  # a checkpoint of before does not say how its steps were made
        ({"reproducibility": "portable", "environment": {"device": "another CPU"}}, "portable"),
        ({"reproducibility": "bitwise", "environment": {"device": "another CPU"}}, "numeric"),
        ({"reproducibility": "numeric", "environment": {}}, "numeric"),
    ],
)
def test_a_resumed_run_is_no_stronger_than_its_steps_so_far(
    made: dict, given: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portable, "obstacle", lambda: None)
    monkeypatch.setattr(agreement, "uses_cpu", lambda: True)
    engine, before = (
        SimpleNamespace(name="plain", reproducibility="bitwise", device=torch.device("cpu")),
        SimpleNamespace(made=made),
    )
    recipe = config.load(DEMO / "alexnet.yaml", ["runtime.portable=true"])
    assert agreement.strength(agreement.Peers(), engine, recipe, before)[0]["reproducibility"] == given


@pytest.mark.parametrize(("device", "given"), [("another CPU", "numeric"), (None, "bitwise")])
def test_a_bitwise_run_that_changes_its_cpu_becomes_numeric(device: str | None, given: str) -> None:
    engine = SimpleNamespace(name="plain", reproducibility="bitwise", device=torch.device("cpu"))
    here = environment(engine.device)
    before = SimpleNamespace(
        made={"reproducibility": "bitwise", "environment": {**here, "device": device or here["device"]}}
    )
    recipe = config.load(DEMO / "alexnet.yaml", ["runtime.portable=false"])
    found, promise = agreement.strength(agreement.Peers(), engine, recipe, before)
    assert found["reproducibility"] == given and ("another CPU" in promise) == (given == "numeric")


def test_the_pins_come_before_torch() -> None:
    """train.py imports the command line and `lars.recipe.config` first; their imports must leave torch alone."""
    first = "import sys, lars, lars.exact.portable as portable, lars.recipe.config, lars.recipe.command_line"
    code = f"{first}\nportable.excluded()\nassert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], env=cells.clean(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("missing", SIX)
def test_a_missing_variable_of_the_launcher_is_named(missing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launched, "uses_cpu", lambda environment: True)
    assert launched.process_count(SIX) == 2
    with pytest.raises(RecipeError, match=f"set, but not {missing}: a launcher tells each process all six") as refused:
        launched.process_count({name: value for name, value in SIX.items() if name != missing})
    assert "\n" not in str(refused.value)


def test_more_processes_than_gpus_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    """How all processes of such a run end is in tests/hostile/test_broken_processes.py."""
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    assert launched.process_count(SIX) == 2
    three = {**SIX, "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3"}
    with pytest.raises(RecipeError, match="3 processes on this machine share 2 GPUs.*launch/cpu-2.yaml"):
        launched.process_count(three)


def test_portable_is_no_key_of_the_trajectory() -> None:
    recipes = [config.load(DEMO / "alexnet.yaml", [f"runtime.portable={value}"]) for value in ("true", "false")]
    assert config.trajectory(recipes[0]) == config.trajectory(recipes[1])


def test_the_page_shows_the_committed_table() -> None:
    text = cells.PAGE.read_text()
    start, end = (text.index(mark) for mark in cells.TABLE)
    assert text[start + len(cells.TABLE[0]) : end] == cells.table(COMMITTED)
