"""Recipes, their overrides, `model.py`, weights, run folders and trackers that are wrong, or want to be."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from conftest import DEMO, ROOT, start_ranks
from promises import promised
from safetensors.torch import save_file

from lars.commands import plan
from lars.data.source import DataError, Source
from lars.engine.build import build_model
from lars.recipe import config, pretrained, refusal, strict_yaml
from lars.recipe.batch import BatchPlan
from lars.recipe.keys import differing
from lars.recipe.refusal import RecipeError
from recipes.train import Training, main

RECIPE = DEMO / "resnet50.yaml"
TEXT = RECIPE.read_text().replace("./data", str(DEMO / "data"))
LAST = len(TEXT.splitlines())


def line_of(key: str) -> int:
    """The line of TEXT on which a key stands."""
    return next(number for number, line in enumerate(TEXT.splitlines(), 1) if line.startswith(f"{key}:"))


LAUGHS = "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\n" + "".join(
    f"{this}: &{this} [{', '.join([f'*{last}'] * 10)}]\n" for last, this in zip("abcdefgh", "bcdefghi")
)


def complaint(capsys: pytest.CaptureFixture, *overrides: str, recipe: Path = RECIPE) -> str:
    """The one line that `--check` prints on stderr."""
    status = main(["--config", str(recipe), "--check", *overrides])
    lines = capsys.readouterr().err.strip().splitlines()
    assert status == 2 and len(lines) == 1 and lines[0].startswith("error: "), (status, lines)
    return lines[0]


@promised(
    "Recipes",
    (
        "an override of a section's key without the section, `lr=3`",
        "refused, with the whole key",
        "lr=3",
        "did you mean 'optimizer.lr'?",
    ),
    ("`runtime=null`", "refused: a section is no value", "runtime=null", "runtime: field 'runtime' is not Optional"),
    (
        "a list in a list, `trackers=[[a]]`",
        "refused, with the key",
        "trackers=[[a]]",
        "trackers: Cannot convert 'list'",
    ),
    ("a list of words for numbers", "refused, with the key", "augment.mean=[a,b,c]", "augment.mean: Value 'a'"),
    (
        "an override that is no YAML",
        "refused, with the reason",
        "seed=[",
        "cannot read 'seed=[': expected the node content",
    ),
    ("an alias without end in an override", "refused, not expanded", "seed=&a [*a]", "nests them without end"),
    (
        "`epochs=1e12`",
        "refused, with the number of steps and the limit",
        "epochs=1e12",
        "1.303e+13 steps of global_batch=768: a run has fewer than 100,000,000",
    ),
    (
        "`epochs=1e308`",
        "refused, with the number of steps and the limit",
        "epochs=1e308",
        "a run has fewer than 100,000,000",
    ),
    (
        "more samples in a batch than there are",
        "refused, with the largest batch that works",
        "global_batch=12288",
        "the largest that works on 1 processes is 9984",
    ),
    (
        "a mean of pixels in 0 ... 1",
        "refused: it belongs to pixels of 0 ... 255",
        "augment.mean=[0.485,0.456,0.406]",
        "0 ... 255",
    ),
    ("a mean above 255", "refused", "augment.mean=[300,1,1]", "0 ... 255"),
    (
        "a standard deviation of pixels in 0 ... 1",
        "refused: it belongs to pixels of 0 ... 255",
        "augment.std=[0.229,0.224,0.225]",
        "0 ... 255",
    ),
    ("a run's `name` that leaves `runs/`", "refused", "name=a/../../b", "without .."),
    ("an absolute `name`", "refused", "name=/etc/x", "a relative path"),
    ("an empty `name`", "refused", "name=''", "a relative path"),
    ("a NUL in `name`", "refused", 'name="a\\0b"', "a relative path"),
    ("a NUL in `run_dir`", "refused", 'run_dir="a\\0b"', "is no path"),
    (
        "an environment variable in a key that is not `data.path`",
        "refused: its value would be written down",
        "name=${oc.env:HOME}",
        "may stand in data.path alone",
    ),
    (
        "an environment variable in `model.kwargs`",
        "refused",
        "model.kwargs.x=${oc.env:HOME}",
        "may stand in data.path alone",
    ),
    (
        "another resolver of OmegaConf in `data.path`",
        "refused",
        "data.path=${oc.decode:1}",
        "may stand in data.path alone",
    ),
    (
        "an environment variable that is not set",
        "refused, with its name",
        "data.path=${oc.env:LARS_NOT_SET}",
        "the environment variable LARS_NOT_SET is not set",
    ),
    ("a key that refers to itself", "refused", "name=${name}", "Recursive interpolation"),
    (
        "a tracker that is not installed",
        "refused, with the command that installs it",
        "trackers=[clearml]",
        "`pip install clearml`",
    ),
    (
        "a model of another size than its images",
        "refused, with model and size",
        "model.kwargs={}",
        "vit_tiny_patch16_224 cannot be trained on images of model.image_size=28: Input height",
    ),
    (
        "a model that gives no logits",
        "refused, with the shapes",
        "model.kwargs.features_only=true",
        "its output has the shape (), not (32, 10)",
    ),
    (
        "`pretrained=true`, weights from the Hub",
        "refused, with the way to fix their content",
        "model.kwargs.pretrained=true",
        "may change behind a name: save them as FILE.safetensors",
    ),
    (
        "`pretrained=true` with an overlay whose file is null, for which timm takes the Hub's",
        "refused likewise",
        "model.kwargs={pretrained: true, pretrained_cfg_overlay: {file: null}}",
        "may change behind a name: save them as FILE.safetensors",
    ),
    ("a line break in an override", "refused in one line, with the break as \\n", "epochs=a\nb", "a\\nb"),
    ("a whole number of 310 digits", "refused, with the key", f"epochs={'9' * 310}", "epochs"),
    ("weights as a pickle", "refused: it can run code", "model.kwargs.checkpoint_path=weights.pth", "only safetensors"),
    (
        "weights that are not there",
        "refused where no checkpoint holds them",
        "model.kwargs.checkpoint_path=/none.safetensors",
        "/none.safetensors, which is not there",
    ),
    (
        "weights whose name is too long",
        "refused",
        f"model.kwargs.checkpoint_path={'x' * 300}.safetensors",
        "which is not there",
    ),
    ("a hash of weights, and no weights", "refused", "model.weights_sha256=abc", "names no file of weights"),
    arguments="override, words",
)
def test_an_override_is_refused_in_one_line(
    override: str, words: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    new = f"run_dir={tmp_path / 'run'}"  # the recipe's own may hold the run of `make reproduce-demo`
    vit = ("model.name=vit_tiny_patch16_224", "bn_group=null") if override.startswith("model.kwargs={") else ()
    if override.startswith("trackers=[c"):
        assert importlib.util.find_spec("clearml") is None, "this test needs a tracker that is not installed"
    assert words in complaint(capsys, new, *vit, override)


def test_a_word_that_is_near_no_key_is_told_what_there_is(capsys: pytest.CaptureFixture) -> None:
    for key, words in {
        "nesterov": "; the top level has global_batch, bn_group, ",
        "clip_grad": "clip_norm, ",
        "learning_rate": "model, data, augment, optimizer, schedule, ",
        "optimizer.nesterov": "; optimizer has name, lr, ",
        "optimizer.learning_rate": "momentum_mode, ",
    }.items():
        said = complaint(capsys, f"{key}=1")
        assert f"unknown key {key!r}; " in said and words in said and "did you mean" not in said


@promised(
    "Recipes",
    (
        "a key that stands twice",
        "refused, with its line",
        TEXT + "seed: 1\n",
        f"line {LAST + 1} is not valid YAML: found duplicate key seed",
    ),
    (
        "a tab",
        "refused, with its line",
        TEXT.replace("  lr:", "\tlr:"),
        f"line {line_of('  lr')} is not valid YAML: found character '\\t'",
    ),
    (
        "an unknown key",
        "refused, with its line",
        TEXT.replace("  lr:", "  lrr:"),
        f"line {line_of('  lr')}: unknown key 'optimizer.lrr'; did you mean 'optimizer.lr'?",
    ),
    (
        "a wrong type",
        "refused, with key and line",
        TEXT.replace("lr: 16.0", "lr: fast"),
        f"line {line_of('  lr')}: optimizer.lr: Value 'fast'",
    ),
    (
        "a section without values",
        "refused, with key and line",
        TEXT.replace("optimizer:", "optimizer: null\nx:"),
        f"line {line_of('optimizer')}: optimizer",
    ),
    ("a ${...} that is none", "refused, with key and line", TEXT.replace("name: demo", "name: ${demo"), "line 7"),
    (
        "a ${...} that leads nowhere",
        "refused, with key and line",
        TEXT.replace("seed: 0", "seed: ${nowhere}"),
        f"line {line_of('seed')}: seed: Interpolation key 'nowhere'",
    ),
    (
        "an environment variable as a seed",
        "refused, with key and line",
        TEXT.replace("seed: 0", "seed: ${oc.env:HOME}"),
        f"line {line_of('seed')}: seed=",
    ),
    (
        "a tag that runs code",
        "refused, nothing runs",
        TEXT.replace("seed: 0", "seed: !!python/object/apply:os.getpid []"),
        f"line {line_of('seed')} is not valid YAML: could not determine a constructor",
    ),
    ("aliases that grow to 10^9 values", "refused at once, not expanded", LAUGHS + TEXT, "more than 10,000 values"),
    ("an alias that holds itself", "refused", "a: &a {b: *a}\n" + TEXT, "nests them without end"),
    ("5,000 brackets", "refused", "a: " + "[" * 5000 + "]" * 5000 + "\n" + TEXT, "not valid YAML"),
    (
        "two documents in one file",
        "refused, with the line",
        TEXT + "---\n" + TEXT,
        f"line {LAST + 1} is not valid YAML: but found another document",
    ),
    ("a file of 2 MB", "refused before it is parsed", TEXT + "#" + "x" * 2**21, "more than 1,048,576 bytes"),
    ("a NUL byte", "refused", TEXT + "\0", "not valid YAML"),
    ("bytes that are no text", "refused", b"\xff\xfe\xfa" + TEXT.encode(), "not valid YAML: 'utf-8' codec"),
    arguments="text, words",
)
def test_a_yaml_file_is_refused_with_its_line(
    text: str | bytes, words: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
    assert words in complaint(capsys, recipe=tmp_path / "recipe.yaml")


def test_the_values_of_a_file_are_counted_before_they_are_made() -> None:
    """The page's row of 10^9 values, small enough to be refused late as well."""
    text = "\n".join(LAUGHS.splitlines()[:5])
    with pytest.raises(RecipeError, match="more than 10,000 values"):
        strict_yaml.key_lines(yaml.compose(text, Loader=yaml.SafeLoader), "recipe.yaml")


@promised(
    "Recipes",
    (
        "a syntax error in `model.py`",
        "refused, with file and line",
        "x = 1\ndef f(:\n",
        "model.py, line 2: SyntaxError",
    ),
    (
        "any exception in `model.py`",
        "refused, with file and line",
        "import timm\ntimm.nothing()\n",
        "model.py, line 2: AttributeError",
    ),
    (
        "a `model.py` that ends the process",
        "refused, with file and line",
        "import sys\n\nsys.exit(0)\n",
        "model.py, line 3: SystemExit",
    ),
    ("a `model.py` that is no text", "refused", "\0", "model.py: "),
    arguments="text, words",
)
def test_a_model_file_is_refused_with_its_line(
    text: str, words: str, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    (tmp_path / "recipe.yaml").write_text(TEXT)
    (tmp_path / "model.py").write_text(text)
    assert words.rstrip() in complaint(capsys, recipe=tmp_path / "recipe.yaml")
    assert words.rstrip() in complaint(capsys, recipe=tmp_path / "recipe.yaml"), "the second time too"


@promised(
    "Recipes",
    ("a `run_dir` that is a file", "refused, also by `--check`", "file"),
    ("a `run_dir` below a file", "refused, also by `--check`", "file/run"),
    ("a `run_dir` that is a link to itself", "refused, also by `--check`", "loop"),
    ("a `run_dir` below a link to itself", "refused, also by `--check`", "loop/run"),
    ("a `run_dir` whose name is too long", "refused, also by `--check`", "x" * 300),
    ("a `run_dir` whose path is too long", "refused, also by `--check`", "/".join(["x" * 200] * 30)),
    ("a `run_dir` on a file system that takes no files", "refused, also by `--check`", "/proc/run"),
    ("`run_dir=/proc`", "refused, also by `--check`", "/proc"),
    arguments="place",
)
def test_a_run_folder_that_cannot_be(place: str, capsys: pytest.CaptureFixture, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    assert "cannot be written" in complaint(capsys, f"run_dir={tmp_path / place}")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "loop"], "what was made to find out is gone"


@promised("Recipes", ("a good recipe, `--check`", "nothing is left behind, not even an empty run folder"))
def test_check_leaves_nothing_behind(tmp_path: Path) -> None:
    assert main(["--config", str(RECIPE), "--check", f"run_dir={tmp_path / 'a' / 'b'}"]) == 0
    assert not list(tmp_path.iterdir())


@promised("Recipes", ("`model.kwargs={}` on the command line", "clears them; it does not add to those of the recipe"))
def test_an_override_of_all_model_kwargs_sets_them() -> None:
    assert config.load(RECIPE, ["model.kwargs={}"]).model.kwargs == {}
    assert config.load(RECIPE, ["model.kwargs={channels: [1]}"]).model.kwargs == {"channels": [1]}
    assert set(config.load(RECIPE, ["model.kwargs.x=1"]).model.kwargs) == {"channels", "zero_init_last", "x"}


@promised(
    "Recipes",
    ("a batch of 10^26 images", "refused at once, no divisor of it is looked for", f"global_batch={10**26}"),
    ("a batch of which no part suits the processes", "refused, and says that none works", "runtime.micro_batch=6000"),
    arguments="override",
)
def test_a_batch_that_the_data_cannot_fill(override: str) -> None:
    says = "none works on 4 processes" if "micro" in override else "works on 4 processes is 9984"
    with pytest.raises(RecipeError, match=says):
        BatchPlan.of(config.load(RECIPE, ["global_batch=12000", "bn_group=8", override]), 10_007, 4)


@promised(
    "Recipes",
    (
        "`lars plan` with a launch file as its cluster",
        "refused: a description as in launch/clusters/ is wanted",
        "launch/cpu-2.yaml",
        "give a file of launch/clusters/",
    ),
    (
        "`lars plan` with a recipe as its cluster",
        "refused, with the line",
        "recipes/demo/resnet50.yaml",
        "line 8: unknown key 'model'",
    ),
    arguments="file, words",
)
def test_a_plan_wants_a_cluster(file: str, words: str, capsys: pytest.CaptureFixture) -> None:
    assert plan.main([str(RECIPE), str(ROOT / file)]) == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error


@promised("Recipes", ("`lars plan` for a model of another size than its images", "refused, with the size"))
def test_a_plan_of_a_model_that_cannot_take_the_images(capsys: pytest.CaptureFixture) -> None:
    keys = ["model.name=vit_tiny_patch16_224", "bn_group=null", "model.kwargs={}"]
    assert plan.main([str(RECIPE), str(ROOT / "launch/clusters/cpu-2.yaml"), *keys]) == 2
    assert "on images of 28 pixels: Input height" in capsys.readouterr().err


@promised(
    "Secrets",
    (
        "an environment variable in `data.path`, and an error that names the place",
        "the message has the variable's name, not its value",
    ),
    (
        "an environment variable in `data.path`, and a warning of a library that names the place",
        "the log has the variable's name",
    ),
    (
        "an environment variable in `data.path`, and an error that nobody expected",
        "its traceback, `result.json` and the other processes' lines have the variable's name",
    ),
)
def test_the_value_of_a_variable_stands_in_no_message(
    capsys: pytest.CaptureFixture, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    data = tmp_path / "token-3f9c"
    shutil.copytree(DEMO / "data", data)
    monkeypatch.setenv("LARS_TEST_PLACE", str(data))
    monkeypatch.setattr(sys, "excepthook", sys.__excepthook__)
    monkeypatch.setattr(refusal, "_names", {})  # as in a process that has met no variable yet
    recipe = config.load(RECIPE, ["data.path=${oc.env:LARS_TEST_PLACE}"])
    assert recipe.data.place == str(data) and recipe.data.path == "${oc.env:LARS_TEST_PLACE}"
    logging.getLogger("fsspec").warning("cannot read %s/x", data)
    assert caplog.messages == ["cannot read ${oc.env:LARS_TEST_PLACE}/x"]
    sys.excepthook(OSError, OSError(f"{data} is gone"), None)
    assert capsys.readouterr().err == "OSError: ${oc.env:LARS_TEST_PLACE} is gone\n"
    told: list[str] = []
    folder = SimpleNamespace(end=lambda status, error: told.append(error))
    run = SimpleNamespace(watchdog=SimpleNamespace(leave=told.append), folder=folder)
    Training.ended(run, f"OSError: {data} is gone")
    assert told == ["OSError: ${oc.env:LARS_TEST_PLACE} is gone"] * 2, "what the other processes print, and result.json"
    (data / "train-00002-of-00005.parquet").write_bytes(b"no Parquet")
    line = complaint(capsys, "data.path=${oc.env:LARS_TEST_PLACE}")
    assert "${oc.env:LARS_TEST_PLACE}/train-00002-of-00005.parquet" in line and "3f9c" not in line
    shutil.rmtree(data)
    assert "3f9c" not in complaint(capsys, "data.path=${oc.env:LARS_TEST_PLACE}")
    with pytest.raises(DataError) as lost:
        Source(str(data / "train.parquet"), 1.0).read(str(data / "train.parquet"), 0, 8)
    assert "${oc.env:LARS_TEST_PLACE}/train.parquet cannot be read" in str(lost.value)
    other = config.load(RECIPE, ["data.path=${oc.env:LARS_TEST_PLACE}", "data.revision=${data.path}"])
    assert "3f9c" not in str(other), "by way of another key"


def _with_trackers_that_fail() -> None:
    """In a process that trains: a variable for `data.path`, and trackers of which two do not work."""
    from accelerate.tracking import GeneralTracker, register_tracker_class

    os.environ["LARS_TEST_PLACE"] = os.environ.pop("LARS_TEST_SECRET")

    class Late(GeneralTracker):
        name, requires_logging_directory, tracker = "late", False, None

        def __init__(self, run_name: str) -> None:
            super().__init__()
            print(f"project {run_name}")

        def store_init_configuration(self, values: dict) -> None:
            print(f"recipe {values['data.path']}")

        def log(self, values: dict, step: int | None = None, **kwargs: object) -> None:
            raise ConnectionError("no server")

    class Never(Late):
        name = "never"

        def start(self) -> None:
            raise PermissionError("no login")

    class Works(Late):
        name = "works"

        def log(self, values: dict, step: int | None = None, **kwargs: object) -> None:
            print(f"{sorted(values)} of step {step}")

        def finish(self) -> None:
            raise RuntimeError("too late")

    for tracker in (Late, Never, Works):
        register_tracker_class(tracker)


@promised(
    "Secrets",
    (
        "a run whose `data.path` holds an environment variable",
        "no file of the run folder, tracker or output has its value; `config.yaml` has its name",
    ),
)
@promised(
    "Trackers",
    (
        "a tracker that cannot start, and one that loses its server",
        "each is warned of once; the run and the other trackers go on",
    ),
)
def test_trackers_that_fail_and_a_secret_place(tiny: tuple[str, ...], tmp_path: Path) -> None:
    place, run = tmp_path / "token-77zq", tmp_path / "run"
    shutil.copytree(tiny[0].removeprefix("data.path="), place)
    keys = [*tiny, "data.path=${oc.env:LARS_TEST_PLACE}", f"run_dir={run}", "max_steps=2"]
    keys.append("trackers=[never,tensorboard,late,works]")
    ranks = start_ranks(1, RECIPE, *keys, log=tmp_path / "log", first=_Start(str(place)))
    assert ranks.wait() == [0], ranks.output
    for name in ("never", "late"):
        assert ranks.output.count(f"the tracker {name} failed") == 1, ranks.output
    assert "['eval/images', 'eval/loss', 'eval/top1', 'eval/top5'] of step 2" in ranks.output, "after others failed"
    assert "the tracker works failed and gets nothing more (RuntimeError: too late)" in ranks.output, "at the end too"
    assert "project demo-resnet50" in ranks.output and "recipe ${oc.env:LARS_TEST_PLACE}" in ranks.output
    assert json.loads((run / "result.json").read_text())["status"] == "finished"
    (hparams,) = (run / "logs").rglob("hparams.yml")
    told = yaml.safe_load(hparams.read_text())
    assert (told["name"], told["optimizer.lr"]) == ("demo/resnet50", 16.0)
    assert told["data.path"] == "${oc.env:LARS_TEST_PLACE}"
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["path"] == "${oc.env:LARS_TEST_PLACE}"
    for file in (*filter(Path.is_file, run.rglob("*")), tmp_path / "log"):
        assert b"77zq" not in file.read_bytes(), file


class _Start:
    """`_with_trackers_that_fail` with a value for the variable; it is sent to the process that trains."""

    def __init__(self, secret: str) -> None:
        self.secret = secret

    def __call__(self) -> None:
        os.environ["LARS_TEST_SECRET"] = self.secret
        _with_trackers_that_fail()


@promised(
    "Weights from a file",
    ("other weights in the file at a resume", "refused, with the key model.weights_sha256"),
    ("the file is gone, and the run has a checkpoint", "the run goes on to the same weights"),
    ("the file is gone, and the run's checkpoints too", "refused"),
)
def test_weights_that_a_run_begins_with(tiny: tuple[str, ...], tmp_path: Path) -> None:
    file, whole, run = tmp_path / "start.safetensors", tmp_path / "whole", tmp_path / "run"

    def train(folder: Path, steps: int) -> tuple[int, str]:
        keys = (*tiny, f"model.kwargs.checkpoint_path={file}", f"run_dir={folder}", f"max_steps={steps}")
        ranks = start_ranks(1, RECIPE, *keys, log=tmp_path / "log")
        return ranks.wait()[0], ranks.output

    def write(seed: int) -> None:
        model = build_model(config.load(RECIPE, [*tiny, f"seed={seed}"]))[0]
        save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, file)

    write(seed=5)
    assert train(whole, 2)[0] == 0 and train(run, 1)[0] == 0
    write(seed=6)
    status, output = train(run, 2)
    assert status == 2 and "model.weights_sha256: " in output and "holds another run" in output, output
    file.unlink()
    assert train(run, 2)[0] == 0
    ends = [json.loads((folder / "result.json").read_text())["weights_sha256"] for folder in (whole, run)]
    assert ends[0] == ends[1]
    shutil.rmtree(run / "checkpoints")
    status, output = train(run, 3)
    assert status == 2 and "which is not there" in output, output


@promised(
    "Weights from a file",
    ("a recipe without such weights", "has the trajectory that it always had"),
    ("a recipe that names the weights' hash, and other weights", "refused, with both"),
)
def test_the_content_of_weights_is_part_of_the_trajectory(tmp_path: Path) -> None:
    usual = config.trajectory(config.load(RECIPE, []))
    # A run of before the key came.
    before = {key: value for key, value in usual.items() if key != "model.weights_sha256"}
    assert differing(before, usual) == []
    file = tmp_path / "w.safetensors"
    file.write_bytes(b"one")
    named = f"model.kwargs={{pretrained: true, pretrained_cfg_overlay: {{file: {file}}}}}"
    one = config.trajectory(config.load(RECIPE, [named]))["model.weights_sha256"]
    file.write_bytes(b"other")
    assert config.trajectory(config.load(RECIPE, [named]))["model.weights_sha256"] != one
    with pytest.raises(RecipeError, match="other weights than"):
        config.load(RECIPE, [named, f"model.weights_sha256={one}"])
    with pytest.raises(RecipeError, match="may change behind a name"):
        pretrained.weights_file({"pretrained": True, "pretrained_cfg_overlay": {"file": str(file), "source": "hf-hub"}})
