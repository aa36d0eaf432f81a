"""The same pixels everywhere: a decoder or a way to resize whose bytes belong to the CPU would change every hash."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace
from typing import cast

import numpy as np
import pytest
import torch
from conftest import DEMO, ROOT
from distributed import pixels
from distributed import portable as cells
from torch import nn

from lars.engine.base import Engine
from lars.exact.kernels import kernels
from lars.recipe import config

COMMITTED = json.loads(cells.FILE.read_text())


def why_not_here() -> str | None:
    """Pixels depend on no pinned variable and on no CPU; on the versions of what makes them."""
    here = cells.portable.versions()
    other = [name for name, v in COMMITTED["versions"].items() if name != "torch" and here.get(name) != v]
    return f"the committed pixels are of other versions of {', '.join(other)}" if other else None


@pytest.mark.skipif(bool(why_not_here()), reason=why_not_here() or "")
def test_pixels_are_the_committed_ones() -> None:
    found = pixels.hashes()
    assert {name for name in COMMITTED["pixels"] if found.get(name) != COMMITTED["pixels"][name]} == set()
    assert found.keys() == COMMITTED["pixels"].keys()


def test_the_drawn_images_reach_every_way_to_decode_and_to_resize(monkeypatch: pytest.MonkeyPatch) -> None:
    """Control: linear and area resizing, JPEGs at a fraction of their size, and images left to Pillow."""
    import cv2
    import simplejpeg
    from PIL import Image

    seen: set[object] = set()
    resize, decode, bicubic = cv2.resize, simplejpeg.decode_jpeg, Image.Image.resize
    monkeypatch.setattr(cv2, "resize", lambda *a, **k: (seen.add(k["interpolation"]), resize(*a, **k))[1])
    monkeypatch.setattr(simplejpeg, "decode_jpeg", lambda *a, **k: (seen.add(k["fastupsample"]), decode(*a, **k))[1])
    monkeypatch.setattr(Image.Image, "resize", lambda s, e, r, **k: (seen.add(str(r)), bicubic(s, e, r, **k))[1])
    pixels.hashes()
    assert {cv2.INTER_LINEAR, cv2.INTER_AREA, False, True, str(Image.Resampling.BICUBIC)} <= seen
    kinds = [pixels.Encoded(image) for image in pixels.jpegs().values()]
    assert {e.opened is None for e in kinds} == {True, False}
    shapes = {(e.height, e.pixels(scale).shape[0]) for e in kinds for scale in (1, 0.5, 0.25, 0.125)}
    assert {part for part in (1, 2, 4, 8) if any(-(-height // part) == came for height, came in shapes)} == {1, 2, 4, 8}


def test_no_resizing_in_the_loader_depends_on_the_cpu() -> None:
    """OpenCV's cubic and Lanczos resizing give other bytes on other CPUs (field note 28); linear and area do not."""
    files = sorted((ROOT / "lars/data").rglob("*.py"))
    assert len(files) > 5
    used = {(file.name, name) for file in files for name in re.findall(r"cv2\.(INTER_\w+)", file.read_text())}
    assert {name for _, name in used} == {"INTER_LINEAR", "INTER_AREA"}, used
    changing = re.compile(r"cv2\.(resize|warp|remap|pyr|GaussianBlur|cvtColor)")
    assert [file.name for file in files if changing.search(file.read_text())] == ["resample.py"]


@pytest.mark.parametrize("channels_last", ["true", "false"])
def test_the_kernel_makes_the_same_numbers_of_bytes_as_torch(channels_last: str) -> None:
    """Images as the loader delivers them, colours of a pixel side by side; without a compiler torch's way is taken."""
    if kernels() is None:
        pytest.skip("the kernels are not built here: there was no C compiler")
    recipe = config.load(DEMO / "resnet50.yaml", [f"runtime.channels_last={channels_last}", "augment.std=[58,57,0.3]"])
    engine = SimpleNamespace(recipe=recipe, device=torch.device("cpu"), weights_may_be_channels_last=False)
    Engine.prepare(cast(Engine, engine), nn.Identity(), [])
    images = torch.randint(0, 256, (5, 33, 31, 3), dtype=torch.uint8).permute(0, 3, 1, 2)
    ours = Engine.pixels(cast(Engine, engine), images)
    mean, std = (np.array(values, np.float32) for values in (recipe.augment.mean, recipe.augment.std))
    by_hand = torch.from_numpy((images.permute(0, 2, 3, 1).numpy().astype(np.float32) - mean) / std)
    assert torch.equal(ours, by_hand.permute(0, 3, 1, 2))
    assert ours.is_contiguous(memory_format=engine.memory_format)
    engine.kernels = None
    assert torch.equal(ours, Engine.pixels(cast(Engine, engine), images))
