"""What `lars export` writes is what plain timm loads, in a Python that has never heard of this project."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import timm
import torch
from conftest import DEMO, ROOT

from lars.commands import evaluate, predict
from lars.commands.export import main, model_card, write_export
from lars.commands.subject import pixels_of, subject
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

    of = subject(Namespace(subject=str(run), recipe=DEMO / "resnet50.yaml", data=str(data), best=False, ema=False))
    pixels = [pixels_of(row["image"]["bytes"], of.recipe) for row in pq.read_table(images).to_pylist()]
    with torch.no_grad():
        ours = of.model(torch.cat(pixels))
    # timm normalises pixels of 0 ... 1, which rounds each once more (2^-24); no net enlarges that a thousandfold
    assert torch.allclose(ours, theirs["logits"], atol=1e-4)


@pytest.mark.parametrize(
    ("way", "timms", "back"),
    [("mixed", "bicubic", "mixed"), ("bilinear", "bilinear", "bilinear"), ("area", "bilinear", "bilinear")],
)
def test_timm_resizes_as_the_run_did_or_the_card_says_that_it_cannot(
    way: str, timms: str, back: str, tmp_path: Path
) -> None:
    recipe = config.load(DEMO / "resnet50.yaml", [f"augment.resampling={way}"])
    write_export(timm.create_model("resnet18", num_classes=10), recipe, None, tmp_path / "none", tmp_path / "out")
    assert json.loads((tmp_path / "out/config.json").read_text())["pretrained_cfg"]["interpolation"] == timms
    of = subject(Namespace(subject=f"local-dir:{tmp_path / 'out'}", recipe=None, data=None, best=False, ema=False))
    assert of.recipe.augment.resampling == back
    assert ("timm does not have it" in model_card(of._replace(recipe=recipe), {}, "")) == (way == "area")


def test_a_run_without_a_checkpoint_is_refused_in_a_line(
    tiny_runs: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    for name in ("config.yaml", "result.json"):
        (tmp_path / name).write_bytes((tiny_runs[1] / name).read_bytes())
    assert main([str(tmp_path), "--recipe", str(DEMO / "resnet50.yaml")]) == 2
    assert "has no checkpoint that is whole: train it again" in capsys.readouterr().err
    assert main([str(tmp_path / "nowhere")]) == 2


def test_evaluate_gives_the_run_s_numbers_class_by_class_and_so_does_its_export(
    tiny: tuple[str, ...], tiny_runs: dict[int, Path], tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    run, data = tiny_runs[2], data_of(tiny)
    of = [str(run), "--recipe", str(DEMO / "resnet50.yaml"), "--data", str(data)]
    assert evaluate.main([*of, "--out", str(tmp_path / "run")]) == 0
    found = json.loads((tmp_path / "run/evaluation.json").read_text())
    line = read_lines(run / "metrics.jsonl", "eval")[-1]
    assert (found["top1"], found["top5"], found["images"]) == (line["top1"], line["top5"], line["images"])
    assert found["loss"] == line["loss"]  # the same chunks and threads, so the same bits
    labels = pq.read_table(data / "validation-00000-of-00001.parquet")["label"].to_pylist()
    assert [sum(row) for row in found["confusion"]] == [labels.count(label) for label in range(10)]
    right = sum(row[label] for label, row in enumerate(found["confusion"]))
    assert 100 * right / len(labels) == pytest.approx(line["top1"])
    assert sum(x["top1"] * x["images"] for x in found["classes"]) / len(labels) == pytest.approx(line["top1"], abs=0.01)
    assert found["classes"][0]["class"] == found["names"][0] == "T-shirt / top"
    assert all((tmp_path / f"run/{name}.png").stat().st_size > 10_000 for name in ("confusion", "mistakes"))
    shares = [mistake["share"] for mistake in found["mistakes"]]
    assert len(shares) == 12 and shares == sorted(shares, reverse=True) and 0.1 < shares[-1] <= shares[0] <= 1
    for mistake in found["mistakes"]:  # the split's labels by another road, and the confusion counts that mistake
        label, prediction = (found["names"].index(mistake[of]) for of in ("label", "prediction"))
        assert labels[mistake["id"]] == label != prediction and found["confusion"][label][prediction]

    assert main([*of, "--out", str(tmp_path / "export")]) == 0
    model = ["local-dir:" + str(tmp_path / "export"), "--data", str(data), "--out", str(tmp_path / "model")]
    assert evaluate.main(model) == 0
    exported = json.loads((tmp_path / "model/evaluation.json").read_text())
    assert (exported["top1"], exported["confusion"]) == (found["top1"], found["confusion"])
    assert exported["weights_sha256"] == found["weights_sha256"] == read_result(run)["weights_sha256"]

    row = pq.read_table(data / "validation-00000-of-00001.parquet").to_pylist()[0]
    (tmp_path / "one.png").write_bytes(row["image"]["bytes"])
    capsys.readouterr()
    assert predict.main([*of, str(tmp_path / "one.png"), "--json", "--top", "10"]) == 0
    told = json.loads(capsys.readouterr().out)["classes"]
    assert (
        len(told) == 10
        and sum(told.values()) == pytest.approx(1)
        and list(told.values()) == sorted(told.values())[::-1]
    )


@pytest.mark.parametrize(
    ("command", "words"),
    [
        (["evaluate", "nowhere"], "neither the folder of a run nor a model of timm"),
        (["evaluate", "local-dir:nowhere"], "local-dir:nowhere cannot be loaded"),
        (["evaluate", "RUN", "--ema"], "keeps no moving average"),
        (["evaluate", "RUN", "--data", "/nowhere"], "data.path=/nowhere: no such folder"),
        (["evaluate", "RUN", "--split", "test"], "has no split 'test'"),
        (["predict", "RUN", "nowhere.jpg"], "nowhere.jpg: no such file"),
        (["predict", "RUN", "TEXT"], "is no image that can be read"),
        (["predict", "resnet50", "TEXT", "--ema"], "leave them out for resnet50"),
    ],
)
def test_what_cannot_be_is_a_line(
    command: list[str],
    words: str,
    tiny: tuple[str, ...],
    tiny_runs: dict[int, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "text.jpg").write_text("no image")
    verb, *given = (str({"RUN": tiny_runs[1], "TEXT": tmp_path / "text.jpg"}.get(word, word)) for word in command)
    if given[0] == str(tiny_runs[1]):
        given += ["--recipe", str(DEMO / "resnet50.yaml"), *(["--data", str(data_of(tiny))] * ("--data" not in given))]
    assert {"evaluate": evaluate, "predict": predict}[verb].main(given) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and words in said


@pytest.mark.long
def test_evaluate_is_the_same_on_two_processes(
    tiny: tuple[str, ...], tiny_runs: dict[int, Path], tmp_path: Path
) -> None:
    of = [str(tiny_runs[1]), "--recipe", str(DEMO / "resnet50.yaml"), "--data", str(data_of(tiny))]
    assert evaluate.main([*of, "--out", str(tmp_path / "one")]) == 0
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", "launch/cpu-2.yaml"]
    done = subprocess.run(
        [*launch, "-m", "lars", "evaluate", *of, "--out", str(tmp_path / "two")],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    one, two = (json.loads((tmp_path / name / "evaluation.json").read_text()) for name in ("one", "two"))
    assert one == two


@pytest.mark.parametrize("command, name", [(evaluate.main, "evaluation"), (main, "export")])
@pytest.mark.parametrize("inside", [None, "a link", "a pipe"])
def test_a_link_in_a_stranger_s_run_is_not_written_through(
    command: Callable,
    name: str,
    inside: str | None,
    tiny: tuple[str, ...],
    tiny_runs: dict[int, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture,
) -> None:
    run, mine = tmp_path / "run", tmp_path / "mine"
    shutil.copytree(tiny_runs[2], run, ignore=shutil.ignore_patterns(name))
    mine.mkdir()
    (mine / "README.md").write_text("mine")
    if inside:
        (run / name).mkdir()
        if inside == "a pipe":
            os.mkfifo(run / name / "README.md")
        else:
            (run / name / "README.md").symlink_to(mine / "README.md")
    else:
        (run / name).symlink_to(mine)
    assert command([str(run), "--recipe", str(DEMO / "resnet50.yaml"), "--data", str(data_of(tiny))]) == 2
    assert "is a link or a pipe, and what is written there goes elsewhere" in capsys.readouterr().err
    assert [(file.name, file.read_text()) for file in mine.iterdir()] == [("README.md", "mine")]
