"""Whole runs on data that misbehave: a real server with faults, and files with every kind of damage."""

from __future__ import annotations

import io
import os
import random
import shutil
import signal
import struct
import time
import zlib
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from conftest import DEMO, play, start_ranks, without_speed
from data.server import serve
from PIL import Image

from lars.run.peers import Peers
from lars.run.reading import read_result
from lars.run.resume import newest_checkpoint

RECIPE = DEMO / "resnet50.yaml"


def test_a_run_against_a_misbehaving_server_is_the_same_run(
    tmp_path: Path, tiny: tuple[str, ...], tiny_runs: dict[int, Path]
) -> None:
    """Every third request fails in one of seven ways; files are found by a pattern, indexed and read over HTTP."""
    folder, faults = Path(tiny[0].removeprefix("data.path=")), random.Random(0)
    kinds = ["429", "500", "503", "reset", "short", "slow", "404"]

    def fault(path: str, number: int) -> str | None:
        return "stall" if number == 9 else faults.choice(kinds) if number % 3 == 2 else None

    with serve(folder, fault) as (address, log):
        keys = (
            f"data.path={address}",
            *tiny[1:],
            "data.retry_seconds=40",
            "max_steps=24",
            f"run_dir={tmp_path / 'run'}",
        )
        play(2, RECIPE, *keys, log=tmp_path / "log")
    result, whole = read_result(tmp_path / "run"), read_result(tiny_runs[1])
    for key in ("weights_sha256", "samples_hash", "data_fingerprint", "top1"):
        assert result[key] == whole[key]
    assert {f for _, f in log} == {None, "stall", *kinds}


@pytest.mark.parametrize(
    ("fault", "words"), [pytest.param(*row, marks=pytest.mark.long) for row in (("503", "503"), ("403", "credentials"))]
)
def test_data_that_stay_away_stop_the_run_with_a_checkpoint_and_it_goes_on_later(
    fault: str, words: str, tmp_path: Path, tiny: tuple[str, ...], tiny_runs: dict[int, Path]
) -> None:
    folder, away = (
        Path(tiny[0].removeprefix("data.path=")),
        {"from": 60},
    )  # two processes read 66 row groups ahead and between evaluations
    with serve(folder, lambda path, number: fault if number >= away["from"] else None) as (address, _):
        keys = (
            f"data.path={address}",
            *tiny[1:],
            "data.retry_seconds=3",
            "max_steps=24",
            "log_samples=true",
            f"run_dir={tmp_path / 'run'}",
        )
        ranks = start_ranks(2, RECIPE, *keys, log=tmp_path / "log")
        assert ranks.wait(60) == [1, 1], ranks.output
        errors = [line for line in ranks.output.splitlines() if line.startswith("error:")]
        assert len(errors) == 1 and words in errors[0] and "Traceback" not in ranks.output, ranks.output
        result = read_result(tmp_path / "run")
        assert result["status"] == "failed" and words in result["error"] and 0 < result["steps"] < 24
        assert (tmp_path / f"run/checkpoints/step-{result['steps']:08d}/state.json").is_file()
        away["from"] = 10**9
        play(1, RECIPE, *keys, log=tmp_path / "log")
    assert read_result(tmp_path / "run")["weights_sha256"] == read_result(tiny_runs[1])["weights_sha256"]
    assert without_speed(tmp_path / "run/ledger.jsonl") == without_speed(tiny_runs[1] / "ledger.jsonl")


def test_a_signal_while_the_data_stall_stops_the_run_within_seconds(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    folder = Path(tiny[0].removeprefix("data.path="))
    with serve(folder, lambda path, number: "stall" if number >= 30 else None) as (address, log):
        keys = (f"data.path={address}", *tiny[1:], "data.retry_seconds=300", f"run_dir={tmp_path / 'run'}")
        ranks = start_ranks(2, RECIPE, *keys, log=tmp_path / "log")
        end = time.time() + 60
        while len(log) < 31:
            assert time.time() < end and ranks.processes[0].is_alive(), ranks.output
            time.sleep(0.05)
        time.sleep(3)
        os.kill(ranks.processes[1].pid, signal.SIGTERM)
        os.kill(ranks.processes[0].pid, signal.SIGTERM)
        told = time.time()
        assert ranks.wait(30) == [75, 75], ranks.output
        assert time.time() - told < 10
    assert read_result(tmp_path / "run")["status"] == "preempted"


def jpeg(**how: object) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (60, 40), (90, 120, 30)).save(buffer, "JPEG", **how)
    return buffer.getvalue()


def bomb() -> bytes:
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 100_000, 100_000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk))


DAMAGE = {
    17: jpeg()[:400],  # truncated
    120: b"garbage that is no image",
    333: b"",
    400: bomb(),
    401: jpeg()[:20] + struct.pack(">HHHB", 0xFFC0, 11, 65_000, 8),  # a JPEG header that promises what is not there
    777: b"\xff\xd8" + os.urandom(2_000),
    900: jpeg() + b"\0" * (33 * 2**20),  # more bytes than any image
}


def damaged(tiny: tuple[str, ...], folder: Path, damage: dict[int, bytes | None]) -> tuple[str, ...]:
    """The tiny data set with other bytes in some training rows."""
    shutil.copytree(tiny[0].removeprefix("data.path="), folder)
    first = 0
    for file in sorted(folder.glob("train-*.parquet")):
        table = pq.read_table(file)
        rows = table["image"].to_pylist()
        for row in range(len(rows)):
            if first + row in damage:
                rows[row]["bytes"] = damage[first + row]
        pq.write_table(
            table.set_column(0, "image", pa.array(rows, table.schema.field("image").type)), file, row_group_size=50
        )
        first += len(rows)
    return (f"data.path={folder}", *tiny[1:])


def test_every_kind_of_damage_is_replaced_counted_and_told_the_same_at_any_number_of_processes(
    tmp_path: Path, tiny: tuple[str, ...]
) -> None:
    keys = (
        *damaged(tiny, tmp_path / "data", {**DAMAGE, 500: None}),
        "data.max_bad_fraction=0.01",
        "runtime.micro_batch=48",
        "max_steps=11",
    )
    for processes in (1, 2):
        said = play(processes, RECIPE, *keys, f"run_dir={tmp_path / str(processes)}", log=tmp_path / f"log{processes}")
        for sample in (*DAMAGE, 500):
            assert f"sample {sample} cannot be decoded" in said, sample
    one, two = (read_result(tmp_path / str(processes)) for processes in (1, 2))
    assert one["weights_sha256"] == two["weights_sha256"] and one["samples_hash"] == two["samples_hash"]
    assert (
        newest_checkpoint(Peers(), tmp_path / "1").state.bad_images == len(DAMAGE) + 1 + 0
    )  # 11 steps of 96 are one epoch and 47 samples


def test_more_damage_than_the_recipe_allows_stops_the_run(tmp_path: Path, tiny: tuple[str, ...]) -> None:
    keys = (
        *damaged(tiny, tmp_path / "data", {n: b"garbage" for n in range(0, 1000, 100)}),
        "data.max_bad_fraction=0.005",
    )
    ranks = start_ranks(2, RECIPE, *keys, f"run_dir={tmp_path / 'run'}", log=tmp_path / "log")
    assert ranks.wait() == [1, 1]
    errors = [line for line in ranks.output.splitlines() if line.startswith("error:")]
    assert (
        len(errors) == 1
        and "6 images could not be decoded" in errors[0]
        and "data.max_bad_fraction=0.006 or more" in errors[0]
    ), ranks.output
    assert "row 0 of row group" in ranks.output and "start the same command again" not in ranks.output
    result = read_result(tmp_path / "run")
    assert result["status"] == "failed" and (tmp_path / f"run/checkpoints/step-{result['steps']:08d}").is_dir()
