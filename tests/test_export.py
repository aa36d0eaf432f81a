"""What `lars export` writes is what plain timm loads, in a Python that has never heard of this project."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch
from conftest import DEMO

from lars.commands.export import main, trained_model
from lars.data.augment import evaluation_image
from lars.recipe import config
from lars.run.reading import read_lines, read_result

PLAIN_TIMM = """
import io, json, sys
import pyarrow.parquet as pq, timm, torch
from PIL import Image
assert not any(name.split(".")[0] in ("lars", "recipes") for name in sys.modules)
folder, images, out = sys.argv[1:]
model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
assert "lars" not in sys.modules
transform = timm.data.create_transform(**timm.data.resolve_data_config(model=model), is_training=False)
rows = pq.read_table(images).to_pylist()
pixels = torch.stack([transform(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows])
with torch.no_grad():
    logits = model(pixels)
right = logits.argmax(1) == torch.tensor([row["label"] for row in rows])
torch.save({"logits": logits, "top1": 100 * right.double().mean().item()}, out)
"""


def data_of(tiny: tuple[str, ...]) -> Path:
    return Path(next(key for key in tiny if key.startswith("data.path=")).removeprefix("data.path="))


def test_plain_timm_gives_the_run_s_logits_and_top1(
    tiny: tuple[str, ...], tiny_runs: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, data, out = tiny_runs[1], data_of(tiny), tmp_path / "export"
    assert main([str(run), "--recipe", str(DEMO / "resnet50.yaml"), "--data", str(data), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert read_result(run)["weights_sha256"][:16] in said and "the run's own result" in said
    assert json.loads((out / "config.json").read_text())["label_names"][0] == "T-shirt / top"
    images = data / "validation-00000-of-00001.parquet"
    command = [sys.executable, "-I", "-c", PLAIN_TIMM, str(out), str(images), str(tmp_path / "theirs")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    theirs = torch.load(tmp_path / "theirs", weights_only=True)
    assert theirs["top1"] == pytest.approx(read_lines(run / "metrics.jsonl", "eval")[-1]["top1"])

    recipe = config.load(DEMO / "resnet50.yaml", list(tiny))
    model, _ = trained_model(run, recipe)
    pixels = [
        torch.from_numpy(evaluation_image(row["image"]["bytes"], recipe.augment, recipe.model.image_size).copy())
        for row in pq.read_table(images).to_pylist()
    ]
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (recipe.augment.mean, recipe.augment.std))
    with torch.no_grad():
        ours = model((torch.stack(pixels).permute(0, 3, 1, 2).float() - mean) / std)
    # timm normalises pixels of 0 ... 1, which rounds each once more (2^-24); no net enlarges that a thousandfold
    assert torch.allclose(ours, theirs["logits"], atol=1e-4)


def test_a_run_without_a_checkpoint_is_refused_in_a_line(
    tiny_runs: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("config.yaml", "result.json"):
        (tmp_path / name).write_bytes((tiny_runs[1] / name).read_bytes())
    assert main([str(tmp_path), "--recipe", str(DEMO / "resnet50.yaml")]) == 2
    assert "has no checkpoint that is whole: train it again" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2
