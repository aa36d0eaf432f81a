"""Every engine through `recipes/train.py` and its launch file, against the plain engine in one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from pathlib import Path

import pytest
import torch
from conftest import ROOT, accelerate_line, play, start_ranks
from distributed.parity import BUILT, RECIPE, bounds, differences, one_step, told, weights_after
from safetensors.torch import load_file

from lars.commands.reproduce import main as reproduce_main
from lars.recipe.launched import environment_of
from lars.run.folder import weights_sha256
from lars.run.reading import read_lines, read_result
from recipes.train import main

SHARDED = ("zero0", "zero1", "zero2", "zero3", "fsdp2")


@pytest.fixture(scope="module")
def control(tmp_path_factory: pytest.TempPathFactory, tiny: tuple[str, ...]) -> Path:
    """Four steps of the plain engine in one process, all checkpoints kept."""
    folder = tmp_path_factory.mktemp("control")
    more = ("max_steps=4", "checkpoint.every_steps=1", "checkpoint.keep=9", f"run_dir={folder / 'run'}")
    play(1, RECIPE, *tiny, *more, log=folder / "log")
    return folder / "run"


def assert_same_step(weights: dict[str, torch.Tensor], control: Path, step: int, tiny: tuple[str, ...]) -> None:
    found, allowed = differences(weights, control, step), bounds(control, step, tiny)
    worst = max(found, key=lambda name: found[name] / allowed[name])
    assert found[worst] <= allowed[worst], (worst, found[worst], allowed[worst])


@pytest.mark.parametrize(
    ("engine", "processes"),
    [
        *((engine, 2) for engine in SHARDED[2:]),
        *(pytest.param(engine, 2, marks=pytest.mark.long) for engine in SHARDED[:2]),
        *(pytest.param(engine, w, marks=pytest.mark.long) for engine in (*SHARDED, "ddp") for w in (1, 3)),
    ],
)
def test_one_step_from_the_same_state_is_the_control_s(
    engine: str, processes: int, control: Path, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    weights, printed = one_step(engine, processes, control, 2, tiny, run)
    assert_same_step(weights, control, 2, tiny)
    momentum, theirs = (load_file(r / "checkpoints/step-00000003/momentum.safetensors") for r in (run, control))
    allowed = bounds(control, 2, tiny)  # relative to the step, which is the velocity
    for name, velocity in theirs.items():
        assert (momentum[name] - velocity).norm() <= allowed[name] * velocity.norm(), name
    if engine != "ddp" or processes > 1:
        assert [tuple(built) for built in told(printed, "built")] == [BUILT[engine]] * processes
    assert "built successfully" not in printed  # DeepSpeed says so of what it compiles
    expected = 0 if engine in ("ddp", "zero0") else 1  # one all-reduce in all, whatever the number of parameter groups
    assert sum(told(printed, "collectives")) == expected * processes
    result = read_result(run)
    assert (result["engine"], result["reproducibility"], result["world_size"]) == (
        engine if processes > 1 or engine != "ddp" else "plain",
        "numeric",
        processes,
    )
    assert result["weights_sha256"] == weights_sha256(load_file(run / "checkpoints/step-00000003/model.safetensors"))
    ratios, control_ratios = (
        next(x for x in read_lines(r / "metrics.jsonl", "trust") if x["step"] == 3)["ratios"] for r in (run, control)
    )
    # four digits are logged, so the last may differ by one: 1e-3 of a number that begins with 1000
    assert ratios == pytest.approx(control_ratios, rel=1e-3 + 1e-9) and len(ratios) > 10  # all layers
    assert (
        read_lines(run / "metrics.jsonl", "eval")[-1]["images"] == 199
    )  # 25 chunks: not the same number on each process


def tie() -> None:
    """Registers a ResNet-50 two of whose convolutions have one weight."""
    import timm

    def tied_resnet50(pretrained: bool = False, **kwargs) -> torch.nn.Module:
        own = {key: kwargs[key] for key in ("num_classes", "channels", "layers", "zero_init_last") if key in kwargs}
        model = timm.create_model("resnet50", **own)
        model.layer1[1].conv2.weight = model.layer1[0].conv2.weight
        return model

    if not timm.is_model("tied_resnet50"):
        timm.models.register_model(tied_resnet50)


@pytest.mark.long
@pytest.mark.parametrize(
    "more", [(), ("runtime.channels_last=true",), ("model.name=tied_resnet50", "model.kwargs.layers=[2,1,1,1]")]
)
def test_a_run_goes_on_over_changes_of_engine(more: tuple[str, ...], tiny: tuple[str, ...], tmp_path: Path) -> None:
    """plain -> ZeRO-2 -> ZeRO-3 -> FSDP2 -> plain, one step each, every one within rounding of the plain engine's."""
    tie()  # for `bounds` in this process
    run, keys = tmp_path / "run", (*tiny, *more)
    play(1, RECIPE, *keys, "max_steps=1", "checkpoint.keep=9", f"run_dir={run}", log=tmp_path / "log", first=tie)
    for step, engine in enumerate(("zero2", "zero3", "fsdp2", "")):
        beside = tmp_path / f"control-{step}"  # what the plain engine makes of the same checkpoint
        one_step("plain", 1, run, step + 1, keys, beside, first=tie)
        last = (f"max_steps={step + 2}", "checkpoint.keep=9", f"run_dir={run}")
        play(2, RECIPE, *keys, *last, log=tmp_path / "log", where=engine, first=tie)
        assert_same_step(weights_after(run, step + 2), beside, step + 1, keys)
    stored = load_file(run / "checkpoints/step-00000005/momentum.safetensors")
    assert "layer1.0.conv2.weight" in stored and "layer1.1.conv2.weight" not in stored  # tied: under its first name


@pytest.mark.parametrize(
    "engine", [pytest.param("zero1", marks=pytest.mark.long), "zero2", pytest.param("zero3", marks=pytest.mark.long)]
)
def test_without_bind_a_sharded_run_ends_with_one_line(engine: str, tiny: tuple[str, ...], tmp_path: Path) -> None:
    ranks = start_ranks(
        2,
        RECIPE,
        *tiny,
        "max_steps=1",
        f"run_dir={tmp_path / 'run'}",
        log=tmp_path / "log",
        where=engine,
        first=patch_bind_away,
    )
    assert ranks.wait() == [2, 2], ranks.output
    assert "error: a parameter group holds other tensors" in ranks.output and "lars.bind" in ranks.output
    assert read_result(tmp_path / "run")["status"] == "failed" and not (tmp_path / "run/checkpoints").exists()


def patch_bind_away() -> None:
    from recipes import train

    train.bind = lambda model, optimizer: None


@pytest.mark.long
@pytest.mark.parametrize("engine", ["zero2", "zero3", "fsdp2"])
def test_bf16_is_autocast_over_float32_weights(engine: str, tiny: tuple[str, ...], tmp_path: Path) -> None:
    """12 passes on 3 processes: each pass has the plain engine's bits, as bf16 divides the loss by 4 exactly."""
    plain = tmp_path / "plain"
    more = ("precision=bf16", "checkpoint.every_steps=1", "checkpoint.keep=9")
    play(1, RECIPE, *tiny, *more, "max_steps=2", f"run_dir={plain}", log=tmp_path / "log")
    weights, _ = one_step(engine, 3, plain, 1, (*tiny, "precision=bf16"), tmp_path / "run")
    assert_same_step(weights, plain, 1, tiny)


def spoil_a_gradient() -> None:
    """In rank 1: the second step's gradient of one layer is infinite, while every loss is finite."""
    if os.environ["RANK"] == "1":
        from recipes import train

        build = train.build_model

        def spoiled(recipe: object) -> tuple:
            model, ghosts = build(recipe)
            layer, calls = model.layer2[0].conv2, []

            def hook(module: object, inputs: tuple, output: torch.Tensor) -> None:
                if output.requires_grad:
                    calls.append(1)
                    output.register_hook(lambda g: g * (float("inf") if len(calls) > 6 else 1))

            layer.register_forward_hook(hook)
            return model, ghosts

        train.build_model = spoiled


@pytest.mark.parametrize(
    "engine", ["zero2", *(pytest.param(e, marks=pytest.mark.long) for e in ("zero0", "zero1", "zero3", "fsdp2", ""))]
)
def test_a_gradient_that_is_not_finite_stops_every_engine(engine: str, tiny: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "run"
    keys = (*tiny, "checkpoint.every_steps=1", f"run_dir={run}")
    ranks = start_ranks(2, RECIPE, *keys, log=tmp_path / "log", where=engine, first=spoil_a_gradient)
    assert ranks.wait() == [1, 1], ranks.output
    assert "FloatingPointError: step 2: not finite or beyond range, first in gradient" in ranks.output
    assert read_result(run)["status"] == "failed" and [p.name for p in (run / "checkpoints").glob("step-*")] == [
        "step-00000001"
    ]
    assert all(w.isfinite().all() for w in weights_after(run, 1).values())


@pytest.mark.parametrize(
    "engine", ["fsdp2", *(pytest.param(e, marks=pytest.mark.long) for e in ("zero1", "zero2", "zero3"))]
)
def test_a_signal_saves_the_last_finished_step_and_the_run_resumes(
    engine: str, tiny: tuple[str, ...], tmp_path: Path
) -> None:
    run = tmp_path / "run"
    keys = (*tiny, "max_steps=30", f"run_dir={run}")
    ranks = start_ranks(2, RECIPE, *keys, log=tmp_path / "log", where=engine)
    while '"step": 3,' not in ((run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""):
        assert ranks.processes[0].is_alive(), ranks.output
    os.kill(ranks.processes[1].pid, signal.SIGTERM)
    assert ranks.wait() == [75, 75], ranks.output
    stopped = read_result(run)
    assert stopped["status"] == "preempted" and 3 <= stopped["steps"] < 30
    printed = play(
        2, RECIPE, *tiny, f"max_steps={stopped['steps'] + 1}", f"run_dir={run}", log=tmp_path / "log", where=engine
    )
    assert f"resuming after step {stopped['steps']}" in printed and read_result(run)["status"] == "finished"


@pytest.mark.long
@pytest.mark.parametrize("where", ["zero0", "zero1", "zero2", "zero3", "fsdp2"])
def test_the_launch_file_works_with_accelerate_launch(where: str, tiny: tuple[str, ...], tmp_path: Path) -> None:
    train = ["recipes/train.py", "--config", str(RECIPE), *tiny, "max_steps=2", f"run_dir={tmp_path / 'run'}"]
    command = [*accelerate_line(2, where), *train]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stdout + done.stderr
    result = read_result(tmp_path / "run")
    assert (result["status"], result["engine"], result["world_size"], result["steps"]) == ("finished", where, 2, 2)
    assert "untested optimizer" not in done.stdout + done.stderr


ZERO2 = json.loads((ROOT / "launch/zero2.json").read_text())


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"gradient_clipping": 1.0}, ['"gradient_clipping": 0.0', "accelerate clips"]),
        ({"gradient_clipping": None}, ['"gradient_clipping": 0.0']),
        ({"train_batch_size": 64}, ["'train_batch_size'", "the recipe alone decides"]),
        ({"optimizer": {"type": "Adam"}}, ["'optimizer'"]),
        ({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}, ["'offload_optimizer'"]),
        ({"zero_optimization": {"stage": 2, "zero_quantized_gradients": True}}, ["'zero_quantized_gradients'"]),
        ({"zero_optimization": {"stage": "two"}}, ["stage 0, 1, 2 or 3"]),
        ({"zero_optimization": {"stage": True}}, ["stage 0, 1, 2 or 3"]),
        ({"zero_optimization": {"stage": [2]}}, ["stage 0, 1, 2 or 3"]),
        ({"zero_optimization": [2]}, ["stage 0, 1, 2 or 3"]),
        ({"bf16": True}, ["'bf16'"]),
        ({"data_types": ["fp32"]}, ["'data_types'"]),
        ({"fp16": {"enabled": True}}, ["'fp16'"]),
        ({"bf16": {"enabled": True}}, ["'bf16'", "the recipe alone decides", "give precision=bf16"]),
        ({"communication_data_type": "bf16"}, ["communication_data_type must be fp32"]),
        ({"data_types": {"grad_accum_dtype": "bf16"}}, ["'data_types'"]),
    ],
)
def test_a_deepspeed_file_that_would_change_the_run_is_refused(
    change: dict, words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    file = tmp_path / "changed.json"
    file.write_text(json.dumps({**ZERO2, **change}))
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setenv("ACCELERATE_DEEPSPEED_CONFIG_FILE", str(file))
    for precision in ("fp32", "bf16"):  # DeepSpeed's own bf16 rounds the weights, the recipe's leaves them float32
        keys = ("--processes", "2", f"precision={precision}")
        assert main(["--config", str(RECIPE), "--check", *keys]) == 2
        lines = capsys.readouterr().err.strip().splitlines()
        assert len(lines) == 1 and lines[0].startswith("error: ") and all(word in lines[0] for word in words), lines


def test_other_settings_of_a_launch_file_that_would_change_the_run_are_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    for variables, words in (
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "mixed_precision"),
        ({"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"}, "dynamo_config"),
        ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ({"ACCELERATE_USE_DEEPSPEED": "true"}, "deepspeed_config_file"),
    ):
        with monkeypatch.context() as patch:
            for name, value in variables.items():
                patch.setenv(name, value)
            assert main(["--config", str(RECIPE), "--check"]) == 2
        assert words in capsys.readouterr().err


def reproduced(monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """The exit status of `lars reproduce` in the repository's root, through which `make reproduce-*` goes."""
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("sys.argv", ["reproduce", *words])
    return reproduce_main()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("num_processes: [", "cannot be read"),
        ("\xff", "cannot be read"),
        ("[" * 5000, "cannot be read"),
        ("- cpu", "is no launch file"),
        ("", "is no launch file"),
        ("num_processes: 2\ndeepspeed_config: zero2.json", "is no launch file"),
        ("num_processes: two", "num_processes: 'two', which is no number of processes"),
        ("num_processes: 0", "num_processes: 0, which is no number"),
        ("use_cpu: true", "num_processes: None, which is no number"),
    ],
)
def test_a_damaged_launch_file_is_one_line(
    text: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "launch.yaml").write_text(text, encoding="latin-1")
    assert reproduced(monkeypatch, "--launch", str(tmp_path / "launch.yaml"), str(RECIPE)) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said, said


@pytest.mark.parametrize(
    ("section", "words"), [("", "no deepspeed_config_file"), ("{deepspeed_config_file: NESTED}", "cannot be read from")]
)
def test_a_launch_file_without_a_deepspeed_file_is_one_line(
    section: str, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    (tmp_path / "nested.json").write_text("[" * 100_000)
    text = f"num_processes: 2\ndistributed_type: DEEPSPEED\ndeepspeed_config: {section}"
    (tmp_path / "launch.yaml").write_text(text.replace("NESTED", str(tmp_path / "nested.json")))
    for name, value in environment_of(tmp_path / "launch.yaml").items():
        monkeypatch.setenv(name, value)
    assert main(["--config", str(RECIPE), "--check"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said, said


def test_a_launch_without_a_recipe_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    assert reproduced(monkeypatch, "epochs=1") == 2 and "no recipe is given" in capsys.readouterr().err


def test_make_checks_a_launch_file_before_it_starts_anything(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "bad.json").write_text(json.dumps({**ZERO2, "gradient_clipping": 1.0}))
    (tmp_path / "bad.yaml").write_text(
        (ROOT / "launch/zero2.yaml").read_text().replace("launch/zero2.json", str(tmp_path / "bad.json"))
    )
    words = ("--launch", str(tmp_path / "bad.yaml"), str(RECIPE), f"run_dir={tmp_path / 'run'}")
    assert reproduced(monkeypatch, *words) == 2
    said = capfd.readouterr()
    why, then = said.err.splitlines()
    assert why.startswith("error: ") and '"gradient_clipping": 0.0' in why
    assert then.endswith("resnet50.yaml was not started") and "accelerate launch" not in said.out
