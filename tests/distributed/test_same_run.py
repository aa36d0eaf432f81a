"""The promise, with real processes over gloo: the same run at any number of them, and after interruptions."""

from __future__ import annotations

import copy
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import torch.nn.functional as F
from conftest import DEMO, ROOT, launch, launch_line, play, start_ranks, wait_until, without_speed
from safetensors.torch import load_file

from lars.data.index import build_indexes
from lars.data.loader import training_batches
from lars.data.order import Order, samples_hash
from lars.recipe import config
from lars.run.folder import weights_sha256
from lars.run.reading import read_lines, read_result


def test_one_hash_at_any_number_of_processes(tiny_runs: dict[int, Path]) -> None:
    results = {w: read_result(run) for w, run in tiny_runs.items()}
    assert {r["status"] for r in results.values()} == {"finished"}
    assert [r["world_size"] for r in results.values()] == [1, 2, 3, 5]
    assert {r["reproducibility"] for r in results.values()} == {"bitwise"}
    assert len({r["weights_sha256"] for r in results.values()}) == 1
    assert len({r["samples_hash"] for r in results.values()}) == 1
    lines = {
        w: [{k: v for k, v in line.items() if k != "images_per_second"} for line in read_lines(run / "metrics.jsonl")]
        for w, run in tiny_runs.items()
    }
    assert lines[1] == lines[2] == lines[3] == lines[5]


def test_the_hash_is_of_the_saved_weights(tiny_runs: dict[int, Path]) -> None:
    for run in tiny_runs.values():
        weights = load_file(run / "checkpoints" / "step-00000024" / "model.safetensors")
        assert weights_sha256(weights) == read_result(run)["weights_sha256"]


def test_every_epoch_is_a_permutation_in_the_same_slots(tiny_runs: dict[int, Path]) -> None:
    streams = []
    for run in tiny_runs.values():
        lines = without_speed(run / "ledger.jsonl")
        assert [line["step"] for line in lines] == list(range(1, 25))
        streams.append([i for line in lines for i in line["ids"]])
        consumed = sum(samples_hash(n, range(96), np.array(line["ids"])) for n, line in enumerate(lines))
        assert f"{consumed % 2**64:016x}" == read_result(run)["samples_hash"]
    assert all(stream == streams[0] for stream in streams)
    assert sorted(streams[0][:1009]) == sorted(streams[0][1009:2018]) == list(range(1009))
    assert streams[0][:1009] != streams[0][1009:2018]


def test_evaluation_counts_every_image_at_any_number_of_processes(tiny_runs: dict[int, Path]) -> None:
    evaluations = [read_lines(run / "metrics.jsonl", "eval") for run in tiny_runs.values()]
    assert all(line["images"] == 199 for lines in evaluations for line in lines)  # 25 chunks of 8, the last one of 7
    assert all(lines == evaluations[0] for lines in evaluations)
    assert len(evaluations[0]) == 3


def test_evaluation_is_what_plain_torch_counts(tiny_runs: dict[int, Path], tiny: tuple[str, ...]) -> None:
    """Control: the exported state dict in an ordinary timm model, pyarrow and Pillow, one batch of everything."""
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    model = timm.create_model("resnet50", num_classes=10, channels=[8, 16, 32, 64], layers=[1, 1, 1, 1]).eval()
    model.load_state_dict(load_file(tiny_runs[2] / "checkpoints/step-00000024/model.safetensors"))
    table = pq.read_table(Path(tiny[0].removeprefix("data.path=")) / "validation-00000-of-00001.parquet")
    pixels = np.stack(
        [np.asarray(Image.open(io.BytesIO(row["bytes"])).convert("RGB")) for row in table["image"].to_pylist()]
    )
    images = (torch.from_numpy(pixels).permute(0, 3, 1, 2).double() - 73.0) / 90.0
    with torch.no_grad():
        logits = model.double()(images)
        rounded = [rounding(model, U, draw)(images) for draw in range(DRAWS)]
    labels = torch.tensor(table["label"].to_pylist())
    last = read_lines(tiny_runs[2] / "metrics.jsonl", "eval")[-1]
    off = torch.stack([(r - logits).abs().amax(1) for r in rounded]).amax(0)  # for each image, of its logits
    others = logits.scatter(1, labels[:, None], -torch.inf).amax(1)
    lead = logits.gather(1, labels[:, None])[:, 0] - others
    assert int((lead > 2 * off).sum()) <= round(last["top1"] * 1.99) <= int((lead >= -2 * off).sum())
    # a cross-entropy moves by at most twice as much as the logit that moves most
    assert abs(float(F.cross_entropy(logits, labels)) - last["loss"]) <= 2 * float(off.mean())


U, DRAWS = 2.0**-24, 4  # float32's unit roundoff
# One step from the first weights. Everything is smooth: where a ReLU or a maximum stands on its kink, one rounding
# decides about a whole term of the gradient. (torch.compile, nearer to float64 than the eager step in its batch norms,
# turned one unit of layer4's last ReLU over on some CPUs, and moved the layers below by up to 3 %.) All blocks have a
# gradient. Groups of 24: with 4 samples at 1 x 1 pixel a dead channel has no variance, and any arithmetic suffers.
MODEL = {"act_layer": "silu", "replace_stem_pool": True, "zero_init_last": False}
STEP = (*(f"model.kwargs.{key}={value}" for key, value in MODEL.items()), "bn_group=24", "runtime.micro_batch=48")
STEP += ("schedule.warmup_lr=4.0", "max_steps=1")


def rounding(model: torch.nn.Module, unit: float, draw: int, autocast: bool = False) -> torch.nn.Module:
    """A copy whose layers' outputs, and the gradients coming back to them, are wrong by what rounding to `unit` leaves.

    That is sqrt(n) `unit` for a sum of n products (Higham and Mary 2019), of its channel's root mean square, times a
    random number with standard deviation 1 for each element. Under `autocast` it is a layer's weights, input and output
    that are rounded to `unit`, the sums are not.
    """
    model, generator = copy.deepcopy(model), torch.Generator().manual_seed(draw)

    def noise(t: torch.Tensor) -> torch.Tensor:
        return torch.randn(t.shape, generator=generator, dtype=t.dtype)

    def wrong(t: torch.Tensor, n: int) -> torch.Tensor:
        size = t.square().mean([d for d in range(t.ndim) if d != 1], keepdim=True).sqrt()
        return t + unit * (2 if autocast else n) ** 0.5 * size * noise(t)

    def round_output(layer: torch.nn.Module, inputs: tuple, output: torch.Tensor) -> torch.Tensor:
        if isinstance(layer, torch.nn.BatchNorm2d):  # statistics over a group, or four operations with given ones
            forward = backward = output[:, 0].numel() if layer.training else 4
        else:
            forward, backward = layer.weight[0].numel(), layer.weight[:, 0].numel()
        if output.requires_grad:
            output.register_hook(lambda gradient: wrong(gradient, backward))
        return wrong(output, forward)

    for layer in model.modules():
        if isinstance(layer, torch.nn.Conv2d | torch.nn.Linear | torch.nn.BatchNorm2d):
            layer.register_forward_hook(round_output)
        if autocast and isinstance(layer, torch.nn.Conv2d | torch.nn.Linear):
            layer.weight.data *= 1 + unit * noise(layer.weight)
    for p in model.parameters():  # a sum over all samples and at most 14 x 14 positions
        p.register_hook(lambda gradient: wrong(gradient[None, None], 24 * 14 * 14)[0, 0])
    return model


def first_model() -> torch.nn.Module:
    torch.manual_seed(0)
    return timm.create_model("resnet50", num_classes=10, channels=[8, 16, 32, 64], layers=[1, 1, 1, 1], **MODEL)


@cache
def step_in_float64(
    keys: tuple[str, ...], unit: float = 0.0, draw: int = 0, autocast: bool = False
) -> dict[str, torch.Tensor]:
    """Ordinary batch norms, one group after the other, the paper's equations; with `unit` as `rounding` says."""
    recipe = config.load(DEMO / "resnet50.yaml", list(keys))
    index, _ = build_indexes(recipe.data, 10)
    batches = training_batches(Order(index, 0, 96, 24), index, recipe, [range(96)], 0, 1)
    batch = next(batches)
    batches.close()
    plain = first_model().double().train()
    model = rounding(plain, unit, draw, autocast) if unit else plain
    images = (batch.images.double() - 73.0) / 90.0
    if autocast:  # exactly as it does: most pixels are one number, and their rounding errors do not average out
        images = images.float().bfloat16().double()
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    after = {name: b.clone() for name, b in buffers.items() if b.is_floating_point()}
    for group in range(4):
        part = slice(24 * group, 24 * group + 24)
        (F.cross_entropy(model(images[part]), batch.labels[part], label_smoothing=0.1) / 4).backward()
        for name, b in model.named_buffers():
            if name in after:
                after[name] += (b - buffers[name]) / 4
                b.data.copy_(buffers[name])
    for (name, p), g in zip(plain.named_parameters(), [p.grad for p in model.parameters()]):
        w = p.detach()
        ratio = 0.001 * w.norm() / (g.norm() + 0.0005 * w.norm()) if w.ndim > 1 else 1.0
        after[name] = w - 4.0 * ratio * (g + 0.0005 * w if w.ndim > 1 else g)
    return after


def assert_one_step(run: Path, tiny: tuple[str, ...], unit: float = U, autocast: bool = False) -> None:
    """A run's first step is the one in float64, up to what rounding makes of it: the largest of a few random ones.

    Weights and velocity are rounded when they are stored; the batch norms' sums over a group are rounded too.
    """
    ours, before = load_file(run / "checkpoints/step-00000001/model.safetensors"), first_model().state_dict()
    exact = step_in_float64((*tiny, *STEP), autocast=autocast)
    others = [step_in_float64((*tiny, *STEP), unit, draw, autocast) for draw in range(DRAWS)]
    for name, w in exact.items():
        moved = (w - before[name]).norm()
        allowed = max((other[name] - w).norm() for other in others) + U * (w.norm() + 2 * moved)
        if "running_" in name:
            mean, var = (exact[name.rpartition("_")[0] + end] for end in ("_mean", "_var"))
            square = 10 * (mean.square() * 10 + (var - 0.9).clamp(min=0))  # of the input; buffers move by a tenth
            summed = square.sqrt() if name.endswith("mean") else 2 * square
            allowed += 0.1 * U * (24 * 14 * 14) ** 0.5 * summed.norm()
        error = (ours[name].double() - w).norm()
        assert moved > 0 and error <= allowed, (name, float(error / moved), float(allowed / moved))


def test_one_step_is_what_plain_torch_computes(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    play(2, DEMO / "resnet50.yaml", *tiny, *STEP, f"run_dir={tmp_path / 'run'}", log=tmp_path / "log")
    assert_one_step(tmp_path / "run", tiny)


@pytest.mark.parametrize("processes", [1, 2])
def test_without_determinism_the_step_is_the_same_up_to_rounding(
    processes: int, tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    """DDP's own float sum with two processes; one process sums by itself."""
    run = tmp_path / "run"
    keys = (*tiny, *STEP, "runtime.deterministic=false", f"run_dir={run}")
    play(processes, DEMO / "resnet50.yaml", *keys, log=tmp_path / "log")
    assert (
        read_result(run)["engine"] == ("ddp" if processes == 2 else "plain")
        and read_result(run)["reproducibility"] == "numeric"
    )
    assert_one_step(run, tiny)


def keep_kernels_of_this_processor() -> None:
    """In the rank: Inductor's cache would give another ATEN_CPU_CAPABILITY the kernels of the processor's own."""
    folder = f"inductor-{torch.backends.cpu.get_cpu_capability()}"
    os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(Path(tempfile.gettempdir(), folder))


@pytest.mark.parametrize(
    "key",
    [
        "runtime.channels_last=true",
        "runtime.activation_checkpointing=true",
        "runtime.micro_batch=96",
        pytest.param("runtime.compile=true", marks=pytest.mark.long),
        pytest.param("precision=bf16", marks=pytest.mark.long),
    ],
)
def test_what_is_for_speed_takes_the_same_step_up_to_rounding(key: str, tmp_path: Path, tiny: tuple[str, ...]) -> None:
    keys = (*tiny, *STEP, key, f"run_dir={tmp_path / 'run'}")
    play(1, DEMO / "resnet50.yaml", *keys, log=tmp_path / "log", first=keep_kernels_of_this_processor)
    autocast = key == "precision=bf16"  # 8 bits
    assert_one_step(tmp_path / "run", tiny, 2.0**-8 if autocast else U, autocast)


def wait_for_step(run: Path, step: int, running: callable) -> None:
    metrics = run / "metrics.jsonl"
    logged = lambda: metrics.exists() and f'"step": {step},' in metrics.read_text()  # noqa: E731
    wait_until(lambda: logged() or not running())
    assert logged(), "the run ended before that step"


def test_killed_and_terminated_runs_resume_as_if_nothing_had_happened(
    tmp_path: Path, tiny: tuple[str, ...], tiny_runs: dict[int, Path]
) -> None:
    """SIGKILL of one of 2 ranks, SIGTERM of 4 ranks, SIGTERM of the launcher of 2, to the end with 1: one hash."""
    run, recipe = tmp_path / "run", DEMO / "resnet50.yaml"
    overrides = (*tiny, "max_steps=24", "log_samples=true", "checkpoint.every_steps=3", f"run_dir={run}")

    ranks = start_ranks(2, recipe, *overrides, log=tmp_path / "log")
    wait_for_step(run, 5, ranks.processes[0].is_alive)
    ranks.processes[1].kill()
    assert ranks.wait()[1] == -signal.SIGKILL and ranks.wait()[0] != 0
    assert read_result(run)["status"] == "failed"

    ranks = start_ranks(4, recipe, *overrides, log=tmp_path / "log")
    wait_for_step(run, 10, ranks.processes[0].is_alive)
    os.kill(ranks.processes[2].pid, signal.SIGTERM)  # one signalled rank stops all
    assert ranks.wait() == [75] * 4, ranks.output
    assert read_result(run)["status"] == "preempted" and "resuming after step" in ranks.output

    with open(tmp_path / "log", "w") as log:
        launcher = subprocess.Popen(launch_line(2, recipe, overrides), stdout=log, stderr=log, cwd=ROOT)
        wait_for_step(run, 16, lambda: launcher.poll() is None)
        launcher.send_signal(signal.SIGTERM)
        assert launcher.wait(60) != 0
    assert read_result(run)["status"] == "preempted", (tmp_path / "log").read_text()
    stopped_at = read_result(run)["steps"]

    assert f"resuming after step {stopped_at}" in play(1, recipe, *overrides, log=tmp_path / "log")
    whole = read_result(tiny_runs[1])
    for key in ("weights_sha256", "samples_hash", "steps", "top1"):
        assert read_result(run)[key] == whole[key]
    assert without_speed(run / "ledger.jsonl") == without_speed(tiny_runs[1] / "ledger.jsonl")
    assert sorted(p.name for p in (run / "checkpoints").iterdir()) == [
        "latest",
        "step-00000021",
        "step-00000024",
    ]  # every third, keep=2


def test_a_finished_run_continues_further_and_refuses_another_recipe(
    tmp_path: Path, tiny: tuple[str, ...], tiny_runs: dict[int, Path]
) -> None:
    run, log, recipe = tmp_path / "run", tmp_path / "log", DEMO / "resnet50.yaml"
    shutil.copytree(tiny_runs[1], run)
    assert "resuming after step 24" in play(
        1, recipe, *tiny, "max_steps=25", "log_samples=true", f"run_dir={run}", log=log
    )
    assert read_result(run)["steps"] == 25
    other = start_ranks(2, recipe, *tiny, "max_steps=26", "optimizer.lr=3.0", f"run_dir={run}", log=log)
    assert other.wait() == [2, 2]
    errors = [line for line in other.output.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and "optimizer.lr: 16.0 -> 3.0" in errors[0] and "run_dir=" in errors[0]
    assert read_result(run)["steps"] == 25 and read_result(run)["status"] == "finished"


def test_a_run_that_died_between_its_last_checkpoint_and_its_end_still_ends(
    tmp_path: Path, tiny: tuple[str, ...], tiny_runs: dict[int, Path]
) -> None:
    run, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(tiny_runs[1], run)
    whole = read_result(run)
    (run / "result.json").write_text(json.dumps({**whole, "status": "running", "top1": None, "weights_sha256": None}))
    (run / "metrics.jsonl").open("a").write('{"kind": "train", "st')  # a line that the crash cut off
    play(2, DEMO / "resnet50.yaml", *tiny, "max_steps=24", "log_samples=true", f"run_dir={run}", log=log)
    for key in ("status", "top1", "weights_sha256", "samples_hash"):
        assert read_result(run)[key] == whole[key]
    assert len(read_lines(run / "metrics.jsonl", "train")) == 24


def test_a_label_that_one_rank_alone_reads_is_told_by_that_rank(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    import pyarrow.parquet as pq

    folder = tmp_path / "data"
    shutil.copytree(tiny[0].removeprefix("data.path="), folder)
    for file in folder.glob("*.parquet"):
        table = pq.read_table(file)
        if file.name.startswith(
            "train-00001"
        ):  # only its last row group has a wrong label; statistics would tell at once
            labels = table["label"].to_pylist()
            table = table.set_column(1, "label", [[*labels[:-1], 10]])
        pq.write_table(table, file, row_group_size=50, write_statistics=False)
    overrides = (f"data.path={folder}", *tiny[1:], "epochs=3", f"run_dir={tmp_path / 'run'}")
    ranks = start_ranks(2, DEMO / "resnet50.yaml", *overrides, log=tmp_path / "log")
    assert ranks.wait() == [2, 2]
    assert "has labels" in ranks.output and "model.num_classes=11" in ranks.output
    assert read_result(tmp_path / "run")["status"] == "failed"


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_step_and_the_layer(
    tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    copy = tmp_path / "recipes"
    shutil.copytree(DEMO, copy / "mine", ignore=shutil.ignore_patterns("results"))
    (copy / "mine/model.py").write_text(
        "import timm, torch\n"
        "class Spoils(torch.nn.Conv2d):\n"
        "    calls = 0\n"
        "    def forward(self, x):\n"
        "        self.calls += 1\n"
        "        return super().forward(x) * (float('nan') if self.calls > 24 else 1)  # from the third step on\n"
        "@timm.models.register_model\n"
        "def spoiled(pretrained=False, **kwargs):\n"
        "    model = timm.create_model('resnet50', num_classes=10, **{k: kwargs[k] for k in ('channels', 'layers')})\n"
        "    conv = Spoils(8, 8, 1, bias=False)\n"
        "    conv.weight = model.layer1[0].conv1.weight\n"
        "    model.layer1[0].conv1 = conv\n"
        "    return model\n"
    )
    ranks = start_ranks(
        1, copy / "mine/resnet50.yaml", *tiny, "model.name=spoiled", f"run_dir={tmp_path / 'run'}", log=tmp_path / "log"
    )
    assert ranks.wait() == [1]
    assert (
        "FloatingPointError: step 3: not finite or beyond range, first in output of layer layer1.0.conv1"
        in ranks.output
    )
    result = read_result(tmp_path / "run")
    assert result["status"] == "failed" and result["steps"] == 2


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.long)])
def test_a_copied_recipe_with_another_model_trains_from_a_copy_of_the_repository(
    processes: int, tmp_path: Path
) -> None:
    """`cp -r recipes/demo recipes/mine`, another timm model, place and overrides; one process without a launcher."""
    place = tmp_path / "elsewhere"
    for part in ("recipes/demo", "recipes/alexnet", "launch"):
        shutil.copytree(ROOT / part, place / part, ignore=shutil.ignore_patterns("results"))
    shutil.copytree(place / "recipes/demo", place / "recipes/mine")
    shutil.copy(ROOT / "recipes/train.py", place / "recipes/mine/train.py")
    recipe = place / "recipes/mine/resnet50.yaml"
    text = (
        recipe.read_text()
        .replace("name: demo/resnet50", "name: mine/first")
        .replace("  name: resnet50\n", "  name: mobilenetv3_small_050\n")
    )
    lines = [line if "kwargs:" not in line else "  kwargs: {}" for line in text.splitlines()]
    recipe.write_text("\n".join(lines) + "\n")
    command = launch_line(processes, recipe, ("max_steps=2", "seed=3", "global_batch=96", "bn_group=8", "trackers=[]"))
    at = command.index(str(place / "recipes/train.py"))
    command[at] = str(place / "recipes/mine/train.py")
    if processes == 1:
        command = [sys.executable, *command[at:]]
    done = subprocess.run(
        command,
        cwd=place,
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "ACCELERATE_USE_CPU": "true"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((place / "runs/mine/first/seed-3/result.json").read_text())
    assert (result["status"], result["steps"], result["world_size"]) == ("finished", 2, processes)


@pytest.mark.long
def test_one_process_where_two_were_asked_for_is_an_error(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    """What accelerate makes of `use_cpu` with two processes in the obvious words: one process."""
    wrong = tmp_path / "wrong.yaml"
    wrong.write_text((ROOT / "launch/cpu-1.yaml").read_text().replace("num_processes: 1", "num_processes: 2"))
    command = launch_line(2, DEMO / "resnet50.yaml", (*tiny, f"run_dir={tmp_path / 'run'}"))
    command[command.index("--config_file") + 1] = str(wrong)
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert done.returncode != 0 and len(errors) == 1 and "launch/cpu-2.yaml" in errors[0]


# 11 passes, which no other number divides. A process that votes less often than the others would stand still.
HANGS = ("runtime.hang_seconds=40", "data.retry_seconds=9")
PRIME = ("global_batch=88", "max_steps=12", "checkpoint.every_steps=2", *HANGS)


@pytest.mark.long
def test_passes_that_nobody_divides_give_one_hash(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    hashes = set()
    for processes in (1, 2, 3, 5, 7, 11):
        run = tmp_path / str(processes)
        play(processes, DEMO / "resnet50.yaml", *tiny, *PRIME, f"run_dir={run}", log=tmp_path / "log")
        result = read_result(run)
        assert (result["world_size"], result["reproducibility"]) == (processes, "bitwise")
        hashes.add((result["weights_sha256"], result["samples_hash"]))
    assert len(hashes) == 1


@pytest.mark.long
def test_a_run_that_loses_one_of_four_goes_on_with_three(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    """Killed while 4 share 11 passes; then 3 share them until a SIGTERM, whose vote comes in one pass of all."""
    recipe, log = DEMO / "resnet50.yaml", tmp_path / "log"
    play(1, recipe, *tiny, *PRIME, f"run_dir={tmp_path / 'whole'}", log=log)
    keys = (*tiny, *PRIME, f"run_dir={tmp_path / 'run'}")
    ranks = start_ranks(4, recipe, *keys, log=log)
    wait_for_step(tmp_path / "run", 3, ranks.processes[0].is_alive)
    ranks.processes[3].kill()
    assert ranks.wait()[3] == -signal.SIGKILL
    ranks = start_ranks(3, recipe, *keys, log=log)
    wait_for_step(tmp_path / "run", 7, ranks.processes[0].is_alive)
    os.kill(ranks.processes[0].pid, signal.SIGTERM)
    assert ranks.wait() == [75] * 3, ranks.output
    play(3, recipe, *keys, log=log)
    for key in ("weights_sha256", "samples_hash", "steps", "top1"):
        assert read_result(tmp_path / "run")[key] == read_result(tmp_path / "whole")[key]


@pytest.mark.long
@pytest.mark.parametrize("name", ["alexnet", "resnet50"])
def test_the_demo_recipes_have_one_hash_at_every_w_that_divides(name: str, tmp_path: Path) -> None:
    hashes = set()
    for processes in (1, 2, 3, 4, 6, 8):
        run = tmp_path / str(processes)
        done = launch(processes, DEMO / f"{name}.yaml", "max_steps=15", "trackers=[]", f"run_dir={run}", timeout=900)
        assert done.returncode == 0, done.stdout
        hashes.add((read_result(run)["weights_sha256"], read_result(run)["samples_hash"]))
    assert len(hashes) == 1
