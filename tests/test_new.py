"""From a folder of pictures to a model in use, as a new user walks, on pictures that are drawn here."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from conftest import DEMO, ROOT, play
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from test_export import PLAIN_TIMM
from test_readme import commands

from lars.commands import new, show
from lars.engine.build import build_model
from lars.recipe import config
from lars.recipe.keys import declared
from lars.recipe.refusal import RecipeError
from lars.run.folder import weights_sha256
from lars.run.reading import read_result
from recipes import train

CLASSES = ("cross", "disc", "square", "stripes", "triangle")
TO_ONNX = """
import io, json, sys
import numpy as np, onnxruntime, pyarrow.parquet as pq, timm, torch
from PIL import Image
folder, images, out = sys.argv[1:]
config = json.load(open(folder + "/config.json"))
transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config["pretrained_cfg"]))
rows = pq.read_table(images).to_pylist()
pixels = torch.stack([transform(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB")) for row in rows])
session = onnxruntime.InferenceSession(folder + "/model.onnx", providers=["CPUExecutionProvider"])
logits = torch.from_numpy(session.run(None, {"pixels": pixels.numpy()})[0])
right = logits.argmax(1) == torch.tensor([row["label"] for row in rows])
torch.save({"logits": logits, "top1": 100 * right.double().mean().item()}, out)
"""


def draw(folder: Path, each: int) -> Path:
    """`each` JPEGs of every class: its shape, in any colour and place, on a noisy ground."""
    draws = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for number in range(each):
            width, height = (int(side) for side in draws.integers(70, 140, 2))
            ground = draws.integers(0, 120, (height // 8 + 1, width // 8 + 1, 3), dtype=np.uint8)
            image = Image.fromarray(ground).resize((width, height))
            pen, r, ink = ImageDraw.Draw(image), min(width, height) // 3, tuple(map(int, draws.integers(130, 256, 3)))
            x, y = width // 2 + int(draws.integers(-9, 9)), height // 2 + int(draws.integers(-9, 9))
            box = (x - r, y - r, x + r, y + r)
            if name == "cross":
                pen.line((x - r, y, x + r, y), ink, r // 2)
                pen.line((x, y - r, x, y + r), ink, r // 2)
            elif name == "stripes":
                for row in range(y - r, y + r, max(r // 2, 2)):
                    pen.line((x - r, row, x + r, row), ink, max(r // 5, 1))
            elif name == "triangle":
                pen.polygon([(x, y - r), (x - r, y + r), (x + r, y + r)], ink)
            else:
                (pen.ellipse if name == "disc" else pen.rectangle)(box, ink)
            image.save(folder / name / f"{number:03}.jpg", quality=90)
    return folder


@pytest.fixture
def clone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a user has of this repository, and that he stands in it."""
    for name in ("recipes/starter", "launch"):
        shutil.copytree(ROOT / name, tmp_path / "clone" / name)
    shutil.copy(ROOT / "recipes/train.py", tmp_path / "clone/recipes")
    monkeypatch.chdir(tmp_path / "clone")
    return tmp_path / "clone"


def test_a_recipe_for_a_folder_names_every_key(clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    folder = draw(tmp_path / "shapes", 20)
    assert new.main(["shapes", "--data", str(folder)]) == 0
    said = capsys.readouterr().out
    assert "80 training and 20 validation images of 5 classes" in said and "the smallest class, cross, has 16" in said
    assert said.rstrip().endswith("lars reproduce recipes/shapes/resnet18.yaml")
    file = clone / "recipes/shapes/resnet18.yaml"
    recipe = config.load(file, [])
    assert (recipe.model.num_classes, recipe.data.path) == (5, str(tmp_path / "shapes-parquet"))
    # every key of the trajectory stands there, and uncommenting those that are neutral changes nothing
    text = file.read_text()
    fixed = {k for k, one in declared(type(recipe.optimizer)).items() if not one.metadata["free"]}
    body = text.split("name:", 1)[1].split("\n", 1)[1]  # without the header and the name
    uncommented = re.sub(r"(?m)^( *)# (\w+:)", r"\1\2", body)
    keys = yaml.safe_load(uncommented)
    there = {f"{a}.{b}" for a, part in keys.items() if isinstance(part, dict) for b in part} | set(keys)
    assert fixed - {"model.weights_sha256"} <= there
    (clone / "recipes/shapes/all.yaml").write_text("name: shapes/all\n" + uncommented)
    other = config.load(clone / "recipes/shapes/all.yaml", [])
    assert config.trajectory(other) == config.trajectory(recipe)
    assert new.main(["shapes", "--data", str(folder)]) == 2  # and what is there stays
    assert "is there already" in capsys.readouterr().err and file.read_text() == text


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["x", "--data", "nowhere"], "--data nowhere is no folder"),
        (["x", "--data", "FLAT"], "split train has no images"),
        (["x", "--data", "ONE"], "holds 1 images, and two splits need one each"),
        (["../x", "--data", "GOOD"], "NAME=../x is a folder of recipes/"),
        (["x", "--data", "GOOD", "--model", "resnet19"], "timm has no model 'resnet19'; did you mean"),
        (["x", "--data", "GOOD", "--pretrained", "nowhere"], "neither the folder of a run nor a model of timm"),
        (["x", "--data", "GOOD", "--size", "0"], "--size is in pixels"),
        (["elsewhere", "--data", "GOOD"], "run it in the folder that has recipes/"),
    ],
)
def test_what_a_new_user_does_wrong_first_is_a_line(
    words: list[str],
    told: str,
    clone: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    (tmp_path / "flat").mkdir()
    (tmp_path / "flat/notes.txt").write_text("no images")
    places = {"FLAT": tmp_path / "flat", "GOOD": draw(tmp_path / "good", 6), "ONE": draw(tmp_path / "one", 1)}
    if words[0] == "elsewhere":
        monkeypatch.chdir(tmp_path)
    assert new.main([str(places.get(word, word)) for word in words]) == 2
    said = capsys.readouterr().err
    assert told in said and said.startswith("error: ") and said.count("\n") == 1
    assert not (clone / "recipes/x/resnet18.yaml").exists()


@pytest.mark.parametrize("divided", [True, False])
def test_a_folder_of_images_as_data_path_is_packed_once(
    divided: bool, clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("lars.recipe.refusal._names", {})
    folder = draw(tmp_path / "shapes", 10)
    if divided:
        draw(tmp_path / "divided/val", 2)
        folder = folder.rename(tmp_path / "divided/train").parent
    keys = (f"data.path={folder}", "model.num_classes=5", "global_batch=32", f"run_dir={tmp_path / 'run'}")

    def checked(*more: str) -> tuple[int, str]:
        status = train.main(["--config", "recipes/starter/resnet18.yaml", "--check", *keys, *more])
        return status, "".join(capfd.readouterr())

    status, said = checked()
    assert status == 0 and f"packing the images of {folder} into {folder}-parquet, once" in said, said
    samples = 50 if divided else 40
    assert f"of {samples} images" in said or f"{samples} samples" in said, said
    status, said = checked()
    assert status == 0 and "packing" not in said and "convert" not in said, said
    (last,) = folder.parent.glob("*-parquet/validation-*")
    kept = last.read_bytes()
    last.unlink()  # as if it had been stopped: it goes on, and never trains on a part
    status, said = checked()
    assert status == 0 and "packing" in said and last.read_bytes() == kept, said
    shutil.rmtree(last.parent)
    status, said = checked(f"data.path=file://{folder}")
    assert status == 0 and f"packing the images of {folder}" in said, said
    monkeypatch.setenv("PICTURES", str(folder))
    shutil.rmtree(last.parent)
    status, said = checked("data.path=${oc.env:PICTURES}")  # its value stands in no message
    assert status == 0 and "packing" in said and str(folder) not in said, said
    next(folder.rglob("cross/000.jpg")).unlink()
    status, said = checked()
    assert status == 2 and "was begun with images=" in said and "Traceback" not in said, said


def as_others_write_it(folder: Path, nulls: int) -> Path:
    """Parquet files without names of classes; their first row group is empty, and their first images may be null."""
    folder.mkdir()
    images = [file.read_bytes() for file in sorted(draw(folder / "drawn", 6).rglob("*.jpg"))]
    rows = [{"image": {"bytes": b}, "label": number // 6} for number, b in enumerate(images)]
    for row in rows[:nulls]:
        row["image"]["bytes"] = None
    table = pa.Table.from_pylist(rows)
    for split in ("train", "validation"):
        with pq.ParquetWriter(folder / f"{split}.parquet", table.schema) as writer:
            for part in (table.slice(0, 0), table):
                writer.write_table(part)
        assert pq.ParquetFile(folder / f"{split}.parquet").metadata.row_group(0).num_rows == 0
    shutil.rmtree(folder / "drawn")
    return folder


@pytest.mark.parametrize("nulls", [0, 2])
def test_parquet_without_class_names(
    nulls: int, clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    data, recipe = as_others_write_it(tmp_path / "data", nulls), clone / "recipes/mine/resnet18.yaml"
    assert new.main(["mine", "--data", str(data)]) == 0
    assert "30 training and 30 validation images of 5 classes" in capsys.readouterr().out
    assert config.load(recipe, []).model.num_classes == 5
    assert show.main([str(recipe), "--out", str(tmp_path / "sheet.png")]) == (2 if nulls else 0)
    said = capsys.readouterr()
    if nulls:
        assert "training image 0 of " in said.err and said.err.count("\n") == 1 and "remove it" in said.err
    else:
        assert "5 images of 30, a row each" in said.out and (tmp_path / "sheet.png").is_file()


def test_the_footers_are_read_once(clone: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built = []
    monkeypatch.setattr(new, "build_indexes", lambda *told, build=new.build_indexes: built.append(1) or build(*told))
    assert new.main(["mine", "--data", str(as_others_write_it(tmp_path / "data", 0))]) == 0
    assert len(built) == 1


def test_a_class_without_training_images_is_refused(clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Where labels have no names, the training labels say how many classes there are."""
    data = as_others_write_it(tmp_path / "data", 0)
    table = pq.read_table(data / "train.parquet")
    pq.write_table(table.filter(pc.less(table["label"], 3)), data / "train.parquet")
    assert new.main(["mine", "--data", str(data)]) == 2
    said = capsys.readouterr().err
    assert "has labels 0 ... 4, but model.num_classes=3" in said and said.count("\n") == 1


def refused_by_new_and_show(recipe: Path, data: Path, words: str, capsys: pytest.CaptureFixture) -> None:
    for command, arguments in ((new, ["other", "--data", str(data)]), (show, [str(recipe)])):
        capsys.readouterr()
        assert command.main(arguments) == 2
        said = capsys.readouterr().err
        assert words in said and said.count("\n") == 1, said


def test_labels_that_are_null_without_a_word_of_it_in_the_footer(
    clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    data = as_others_write_it(tmp_path / "data", 0)
    assert new.main(["mine", "--data", str(data)]) == 0
    whole = pq.read_table(data / "train.parquet")
    labels = pa.array([None, *whole["label"].to_pylist()[1:]])
    pq.write_table(whole.set_column(1, "label", labels), data / "train.parquet", write_statistics=False)
    refused_by_new_and_show(clone / "recipes/mine/resnet18.yaml", data, "1 labels in row group 0 of", capsys)


def test_damaged_labels_are_one_line(clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    data = as_others_write_it(tmp_path / "data", 0)
    assert new.main(["mine", "--data", str(data)]) == 0
    file = data / "train.parquet"
    whole = pq.read_table(file)
    pq.write_table(whole, file, compression="ZSTD", write_page_checksum=True)
    column = pq.read_metadata(file).row_group(0).column(whole.schema.names.index("label"))
    start, size = column.dictionary_page_offset or column.data_page_offset, column.total_compressed_size
    raw = bytearray(file.read_bytes())
    raw[start : start + size] = bytes(size)
    file.write_bytes(raw)
    refused_by_new_and_show(clone / "recipes/mine/resnet18.yaml", data, "train.parquet cannot be read", capsys)


def test_a_class_name_of_two_lines_is_printed_in_one(
    clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture
) -> None:
    folder = draw(tmp_path / "shapes", 20)
    (folder / "cross").rename(folder / "a\ncross")
    assert new.main(["shapes", "--data", str(folder)]) == 0
    assert "the smallest class, a\\ncross, has 16" in capsys.readouterr().out


def test_parquet_that_is_no_data_set_of_images(clone: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "data").mkdir()
    for split in ("train", "validation"):
        pq.write_table(pa.table({"text": ["a"], "label": [0]}), tmp_path / f"data/{split}.parquet")
    assert new.main(["mine", "--data", str(tmp_path / "data")]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and said.count("\n") == 1 and "image" in said


def in_the_readme() -> list[str]:
    text = (ROOT / "README.md").read_text()
    return commands(text[text.index("## Your images") :].split("```")[1])


@pytest.mark.long
def test_the_readmes_commands_lead_from_pictures_to_a_model_in_use(clone: Path, tmp_path: Path) -> None:
    """600 JPEGs, two processes; its export in plain timm and in onnxruntime, and a run that begins with its weights."""
    shutil.copytree(ROOT / "lars", clone / "lars", ignore=shutil.ignore_patterns("__pycache__"))  # it finds recipes/
    folder = draw(tmp_path / "shapes", 120)
    picture = next((folder / "disc").glob("*.jpg"))
    printed = {}
    assert len(in_the_readme()) == 8
    for command in in_the_readme():
        words = shlex.split(command.replace("FOLDER", str(folder)).replace("PICTURE", str(picture)), comments=True)
        if words[1] == "reproduce":
            words += ["epochs=12" if "flowers" in words[2] else "epochs=2"]
        done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True)
        said = done.stdout + done.stderr
        assert done.returncode == 0 and not re.search("error|warning", said, re.IGNORECASE), (command, said)
        printed[" ".join(words[1:3])] = done.stdout
    run, tuned = Path("runs/flowers/resnet18/seed-0"), Path("runs/tuned/resnet18/seed-0")
    result, found = read_result(run), json.loads((run / "evaluation/evaluation.json").read_text())
    assert result["world_size"] == 2 and f"lars evaluate {run}" in printed["reproduce recipes/flowers/resnet18.yaml"]
    assert found["top1"] == result["top1"] > 3 * 100 / len(CLASSES)
    assert [x["class"] for x in found["classes"]] == sorted(CLASSES)
    assert printed[f"predict {run}"].startswith(f"{picture}: ")

    assert "onnxruntime's logits of 64 validation images" in printed[f"export {run}"]
    card = (run / "export/README.md").read_text()
    assert found["weights_sha256"] in card and result["data_fingerprint"] in card
    images = next((tmp_path / "shapes-parquet").glob("validation-*.parquet"))
    theirs = {}
    for name, program in (("timm", PLAIN_TIMM), ("onnx", TO_ONNX)):
        words = [str(run.resolve() / "export"), str(images), str(tmp_path / name)]
        done = subprocess.run(
            [sys.executable, "-I", "-c", program, *words], cwd=tmp_path, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr
        theirs[name] = torch.load(tmp_path / name, weights_only=True)
        assert theirs[name]["top1"] == pytest.approx(found["top1"])
    assert torch.allclose(theirs["timm"]["logits"], theirs["onnx"]["logits"], atol=1e-4)

    first = load_file("recipes/tuned/resnet18.safetensors")
    assert weights_sha256(first) == result["weights_sha256"] and read_result(tuned)["top1"] > 3 * 100 / len(CLASSES)
    assert config.load("recipes/tuned/resnet18.yaml", []).optimizer.lr == 0.0025  # a tenth, at half the batch
    assert "tuned/resnet18" in printed[f"report {run}"]


def test_frozen_layers_stay(tiny: tuple[str, ...], tmp_path: Path) -> None:
    keys = (*tiny, "model.frozen=[conv1,layer1.0.conv]", "max_steps=2", "checkpoint.every_steps=1", "checkpoint.keep=3")
    shown = play(1, DEMO / "resnet50.yaml", *keys, f"run_dir={tmp_path / 'run'}", log=tmp_path / "log")
    assert "frozen" in shown
    one, two = (load_file(tmp_path / f"run/checkpoints/step-0000000{n}/model.safetensors") for n in (1, 2))
    still = {name for name in one if torch.equal(one[name], two[name]) and name.endswith("weight")}
    assert still == {"conv1.weight", *(f"layer1.0.conv{n}.weight" for n in (1, 2, 3))}
    with pytest.raises(RecipeError, match="no parameter of resnet50 begins with 'stem'"):
        build_model(config.load(DEMO / "resnet50.yaml", [*tiny, "model.frozen=[stem]"]))
