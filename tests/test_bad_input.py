"""Every mistake ends in one line with the remedy and exit status 2, in `--check` without a launcher."""

from __future__ import annotations

import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import DEMO, ROOT, launch
from omegaconf import OmegaConf

from lars.data import index
from lars.optim.key import CORE
from lars.recipe import config
from lars.recipe.keys import declared, differing, neutral
from recipes.train import main

RECIPE = DEMO / "resnet50.yaml"


def complaint(capsys: pytest.CaptureFixture, *overrides: str, recipe: Path = RECIPE, processes: int = 2) -> str:
    """The one line that `--check` prints on stderr."""
    status = main(["--config", str(recipe), "--check", "--processes", str(processes), *overrides])
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), (status, lines)
    return lines[0]


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("optimiser.lr=3", ["optimiser", "did you mean 'optimizer"]),
        ("optimizer.learning_rate=3", ["optimizer.learning_rate", "unknown key"]),
        ("global_bach=3", ["'global_bach'", "did you mean 'global_batch'"]),
        ("optimizer.lr=fast", ["optimizer.lr", "fast"]),
        ("epochs=[1]", ["epochs"]),
        ("seed", ["key=value"]),
        ("model.name=resnet_50", ["timm has no model 'resnet_50'", "did you mean 'resnet"]),
        ("model.kwargs.widht=2", ["model.kwargs", "widht"]),
        ("optimizer.name=adagrad", ["optimizer.name=adagrad", "lars or ", " or sgd"]),
        ("optimizer.momentum_mode=papper", ["did you mean 'paper'"]),
        ("optimizer.adapt_1d=null", ["optimizer.adapt_1d may not be null"]),
        ("seed=99999999999999999999999", ["seed", "63 bits"]),
        ("name=${nowhere}", ["nowhere"]),
        ("model.kwargs.channels=[-8,16,32,64]", ["cannot be built", "model.kwargs"]),
        ("trackers=[tensorbord]", ["tensorbord", "tensorboard"]),
        ("precision=fp16", ["fp32 or tf32 or bf16"]),
        ("optimizer.lr=-1", ["optimizer.lr=-1", "positive"]),
        ("optimizer.lr=.inf", ["not finite"]),
        ("optimizer.lr=.nan", ["not finite"]),
        ("optimizer.momentum=1.0", ["[0, 1)"]),
        ("optimizer.eps=null", ["optimizer.eps"]),
        ("epochs=0", ["epochs=0", "positive"]),
        ("schedule.warmup_epochs=8", ["below epochs=8"]),
        ("augment.scale=[0.9,0.1]", ["augment.scale", "smaller first"]),
        ("augment.scale=[0.9,1.5]", ["1.0"]),
        ("augment.std=[0,1,1]", ["augment.std"]),
        ("augment.eval_resize=20", ["smaller than model.image_size"]),
        ("runtime.micro_batch=0", ["positive"]),
        ("runtime.compile=true", ["makes kernels for this CPU, which runtime.portable=true excludes"]),
        ("bn_group=null", ["53 batch norms", "bn_group=32"]),
        ("bn_group=36", ["use 32 or 48"]),
        ("runtime.micro_batch=100", ["use 96 or 128"]),
        ("global_batch=12288", ["10007 samples, fewer than global_batch=12288"]),
        ("model.num_classes=9", ["labels 0 ... 9", "model.num_classes=10"]),
        ("data.path=/no/such/folder", ["/no/such/folder: no such folder"]),
        ("data.path=https://me:secret@host/data", ["holds credentials"]),
        ("data.path=./nowhere", ["./nowhere: no such folder"]),
        ("data.val_split=test", ["no split 'test'", "train, validation"]),
        ("data.image_column=img", ["data.image_column=img", "image, label"]),
        ("data.label_column=image", ["not a class number"]),
        ("data.image_column=label", ["not an image"]),
    ],
)
def test_one_line_that_names_the_remedy(override: str, words: list[str], capsys: pytest.CaptureFixture) -> None:
    line = complaint(capsys, override)
    assert all(word in line for word in words), line


def test_processes_that_do_not_divide(capsys: pytest.CaptureFixture) -> None:
    assert "use 24 processes" in complaint(capsys, processes=25)
    assert "use 4 or 6 processes" in complaint(capsys, "runtime.deterministic=false", processes=5)
    assert "at least one" in complaint(capsys, processes=0)


def test_a_recipe_that_does_not_exist_or_is_none(
    capsys: pytest.CaptureFixture, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert "did you mean 'recipes/demo/resnet50.yaml'" in complaint(capsys, recipe=Path("recipes/demo/resnet5.yaml"))
    assert "no recipe at xxx" in complaint(capsys, recipe=Path(f"{'x' * 300}.yaml"))  # no file system has such a name
    assert "no recipe at xxx" in complaint(capsys, recipe=Path(f"{'x' * 300}/resnet50.yaml"))
    (tmp_path / "bad.yaml").write_text("a: [1\n")
    assert "not valid YAML" in complaint(capsys, recipe=tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1\n")
    assert "not a recipe" in complaint(capsys, recipe=tmp_path / "list.yaml")


def test_every_missing_core_key_is_refused(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    recipe = config.load(RECIPE, [])
    keys = [key for key, one in declared(type(recipe.optimizer)).items() if neutral(one) == CORE]
    assert len(keys) > 20
    for key in keys:
        written = OmegaConf.load(RECIPE)
        written.data.path = str(DEMO / "data")
        parent, _, leaf = key.rpartition(".")
        del (OmegaConf.select(written, parent) if parent else written)[leaf]
        OmegaConf.save(written, tmp_path / "recipe.yaml")
        assert f" lacks {key}" in complaint(capsys, recipe=tmp_path / "recipe.yaml")


def test_recipes_of_before_keys_had_neutral_values_are_the_same_recipes(tmp_path: Path) -> None:
    """Yesterday's recipes list every key: for sgd null where only LARS has a number, `ledger` for `log_samples`."""
    of_lars = dict.fromkeys(("trust_coefficient", "eps", "decay_in_norm", "adapt_1d"))
    for name, nulls in (("lars", {}), ("sgd", of_lars)):
        new = config.load(RECIPE, [f"optimizer.name={name}", "log_samples=true"])
        old = OmegaConf.to_container(OmegaConf.structured(new))
        old["optimizer"] |= nulls
        old["ledger"] = old.pop("log_samples")
        OmegaConf.save(old, tmp_path / "old.yaml")
        assert config.load(tmp_path / "old.yaml", []) == new
        then = config.trajectory(new) | {f"optimizer.{key}": None for key in nulls}
        assert differing(then, config.trajectory(new)) == []


def test_a_key_that_one_of_two_runs_lacks_is_neutral_there() -> None:
    """So that a checkpoint resumes after a new key came, and not where the key was used."""
    now = config.trajectory(config.load(RECIPE, []))
    then = {key: value for key, value in now.items() if key not in ("augment.erase", "optimizer.decay_in_norm")}
    assert differing(then, now) == differing(now, then) == []
    assert differing(then, now | {"augment.erase": 0.1}) == ["augment.erase"]
    assert differing(now | {"a.key.of.tomorrow": 1}, now) == ["a.key.of.tomorrow"]


def test_folders_that_hold_no_data_set(capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no .parquet file" in complaint(capsys, f"data.path={empty}")
    for content, words in (
        (b"hello, I am no Parquet", "is not a Parquet file"),
        (b"PAR1" + b"x" * 40 + b"\x10\0\0\0PAR1", "not a readable Parquet"),
    ):
        broken = tmp_path / words.replace(" ", "-")
        shutil.copytree(DEMO / "data", broken)
        (broken / "train-00002-of-00005.parquet").write_bytes(content)
        line = complaint(capsys, f"data.path={broken}")
        assert words in line and "train-00002-of-00005.parquet" in line
    none = tmp_path / "none"
    none.mkdir()
    table = pq.read_table(DEMO / "data/validation-00000-of-00001.parquet").slice(0, 0)
    for split in ("train", "validation"):
        pq.write_table(table, none / f"{split}-0.parquet")
    assert "no rows" in complaint(capsys, f"data.path={none}")


def test_a_gated_data_set_says_where_to_accept_and_how_to_log_in(
    capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub cannot be reached from here, so its answer is raised in its place; what follows is the real path."""
    import datasets
    from huggingface_hub.errors import GatedRepoError

    def refuse(*args, **kwargs):
        try:
            raise GatedRepoError.__new__(GatedRepoError, "401 Client Error")
        except GatedRepoError as error:
            raise datasets.exceptions.DatasetNotFoundError("Dataset 'ILSVRC/imagenet-1k' is a gated dataset") from error

    monkeypatch.setattr(datasets, "load_dataset_builder", refuse)
    line = complaint(capsys, "data.path=ILSVRC/imagenet-1k")
    assert "huggingface.co/datasets/ILSVRC/imagenet-1k" in line and "hf auth login" in line and "HF_TOKEN" in line


def test_a_hub_that_cannot_be_reached(capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(
        datasets, "load_dataset_builder", lambda *a, **k: (_ for _ in ()).throw(ConnectionError("Couldn't reach it"))
    )
    assert "the Hub cannot be reached" in complaint(capsys, "data.path=someone/aggregated")


def test_labels_are_checked_from_parquet_statistics(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": b"", "path": ""}] * 3, kind)
    for split in ("train", "validation"):
        pq.write_table(pa.table({"image": images, "label": [0, -1, 2]}), tmp_path / f"{split}-0.parquet")
    data = config.load(RECIPE, [f"data.path={tmp_path}"]).data
    with pytest.raises(config.RecipeError, match="labels -1 ... 2"):
        index.build_indexes(data, 10)


@pytest.mark.long
def test_under_the_launcher_only_rank_0_prints_the_line_and_nobody_waits() -> None:
    """Only rank 0 looks at the data: the other rank is waiting for it and must end at once."""
    done = launch(2, RECIPE, "data.path=/no/such/folder", timeout=40)
    assert done.returncode != 0
    assert len([line for line in done.stdout.splitlines() if line.startswith("error: ")]) == 1


def test_a_good_recipe_prints_its_numbers(capsys: pytest.CaptureFixture) -> None:
    assert main(["--config", str(RECIPE), "--check", "--processes", "3"]) == 0
    assert "768 = 3 processes x 8 passes x micro_batch 32 (1 of bn_group 32)" in capsys.readouterr().out
