"""What processes tell each other: the simulation agrees with what the kernel counts, and nobody is in a full mesh."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import scale
from conftest import DEMO, ROOT


@pytest.mark.long
@pytest.mark.parametrize("processes", [2, 3, 8, 32])
def test_a_real_run_sends_what_the_simulation_says(processes: int, tiny: tuple[str, ...], tmp_path: Path) -> None:
    keys = (*tiny, *scale.TINY)
    told = scale.counted(processes, keys, tmp_path)
    expected = scale.simulate(processes, DEMO / "resnet50.yaml", (*keys, f"run_dir={tmp_path / 'simulated'}"))
    for phase in ("start", "step", "checkpoint", "resume"):
        for whose in ("most", "all"):
            there, here = told[phase][whose], getattr(expected[phase], whose)
            assert there == pytest.approx(here, rel=0.1), (phase, whose)
    assert told["sockets"] == pytest.approx(scale.sockets(processes), rel=0.1)


def test_sockets_and_votes_grow_with_the_logarithm() -> None:
    assert scale.sockets(2048) - scale.sockets(1024) == 2  # one more distance, both ways
    assert scale.vote(2048).hops == 11 and scale.all_reduce(8, 2048).hops == 4094


def test_the_page_shows_the_committed_figures() -> None:
    found = json.loads(Path(scale.__file__).with_suffix(".json").read_text())
    assert scale.table(found["simulated"]) in (ROOT / "docs/clusters.md").read_text()
    for processes, told in found["counted"].items():
        for phase in ("start", "step", "checkpoint", "resume"):
            assert told[phase]["all"] == pytest.approx(told["simulated"][phase]["all"], rel=0.03), (processes, phase)
