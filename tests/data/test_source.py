"""Reads from a real server that misbehaves: what passes is waited for, what does not ends in one clear line."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from data.server import serve

from lars.data.source import DataError, Source, _bare


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "file.bin").write_bytes(bytes(range(256)) * 40)
    return tmp_path


@pytest.mark.parametrize("fault", ["429", "500", "503", "403", "404", "reset", "short", "slow"])
def test_faults_that_pass_cost_time_and_nothing_else(fault: str, folder: Path) -> None:
    with serve(folder, lambda path, number: fault if number < 2 else None) as (address, log):
        source = Source(f"{address}/file.bin", 30)
        assert source.read(f"{address}/file.bin", 100, 5_000) == (folder / "file.bin").read_bytes()[100:5_000]
    assert [f for _, f in log] == ([fault] if fault == "slow" else [fault, fault, None])


def test_a_stalled_answer_is_given_up_and_asked_for_again(folder: Path) -> None:
    with serve(folder, lambda path, number: "stall" if number == 0 else None) as (address, log):
        started = time.time()
        assert len(Source(f"{address}/file.bin", 8).read(f"{address}/file.bin", 0, 10_000)) == 10_000
    assert time.time() - started < 8 and len(log) == 2


def test_a_rate_limit_is_waited_for_as_long_as_it_says(folder: Path) -> None:
    with serve(folder, lambda path, number: "429" if number == 0 else None) as (address, _):
        started = time.time()
        Source(f"{address}/file.bin", 30).read(f"{address}/file.bin", 0, 10)
    assert time.time() - started >= 1


@pytest.mark.parametrize(
    ("fault", "words"),
    [("503", "503"), ("403", "hf auth login"), ("404", "FileNotFoundError"), ("reset", "data.retry_seconds=2")],
)
def test_faults_that_stay_end_in_one_line_without_secrets(
    fault: str, words: str, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with serve(folder, lambda path, number: fault) as (address, log), caplog.at_level(logging.WARNING):
        source = Source(f"{address}/file.bin", 2)
        with pytest.raises(DataError, match=words) as error:
            source.read(f"{address}/file.bin?Signature=secret", 0, 10)
    assert "secret" not in str(error.value) + caplog.text and "\n" not in str(error.value)
    assert 2 <= len(log) <= 8 and "trying again" in caplog.text


def test_a_local_file_that_is_not_there_is_told_at_once(tmp_path: Path) -> None:
    started = time.time()
    with pytest.raises(DataError, match="nothing.parquet cannot be read: FileNotFoundError"):
        Source(str(tmp_path), 60).read(str(tmp_path / "nothing.parquet"), 0, 1)
    assert time.time() - started < 1


def test_the_state_of_a_file_changes_with_its_content(folder: Path) -> None:
    with serve(folder) as (address, _):
        for place in (f"{address}/file.bin", str(folder / "file.bin")):
            source = Source(place, 5)
            before = source.state(place)
            (folder / "file.bin").write_bytes(b"x" * 10_240)
            assert before.startswith("10240 ") and source.state(place) not in (before, "10240")


def test_addresses_are_told_without_what_may_be_secret() -> None:
    assert _bare("GET https://me:pw@host/a?token=1 failed\nbadly") == "GET https://…@host/a?… failed badly"
