"""Mixup, cutmix, RandAugment and erasing: statistics of the field's own, and nothing but their keys decides."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from conftest import DEMO
from data.test_images import encoded
from timm.data.auto_augment import rand_augment_transform
from timm.data.random_erasing import RandomErasing

from lars.data.augment import Draw, check_policy, draws_of, training_image
from lars.data.mix import _beta, mix
from lars.exact.keyed import uniform
from lars.recipe import config
from lars.recipe.batch import BatchPlan
from lars.recipe.refusal import RecipeError


@pytest.mark.parametrize(
    "keys", [["augment.mixup=0.2"], ["augment.cutmix=1.0"], ["augment.mixup=0.8", "augment.cutmix=1.0"]]
)
def test_groups_are_mixed_the_same_in_any_pass(keys: list[str]) -> None:
    recipe = config.load(DEMO / "resnet50.yaml", [*keys, "bn_group=4"])
    images, labels = torch.randn(32, 3, 28, 28), torch.arange(32) % 10
    pixels, targets = mix(images, labels, recipe, 5, 64)
    for size in (4, 16):
        parts = [mix(images[a : a + size], labels[a : a + size], recipe, 5, 64 + a) for a in range(0, 32, size)]
        assert torch.equal(torch.cat([p for p, _ in parts]), pixels) and torch.equal(
            torch.cat([t for _, t in parts]), targets
        )
    assert not torch.equal(mix(images, labels, recipe, 6, 64)[0], pixels)
    # each of two shares is rounded to float32, and their sum: 2^-24 (share + rest) + 2^-24
    torch.testing.assert_close(targets.sum(1), torch.ones(32), rtol=0, atol=2 * 2.0**-24)


def test_the_share_of_the_target_is_the_share_of_the_pixels() -> None:
    recipe = config.load(DEMO / "resnet50.yaml", ["augment.cutmix=1.0", "bn_group=2"])
    images = torch.stack([torch.zeros(3, 28, 28), torch.ones(3, 28, 28)])
    for step in range(50):
        pixels, targets = mix(images, torch.tensor([0, 1]), recipe, step, 0)
        # ones are counted exactly; the mean (a division, or 1 / n and a product) and the share are rounded
        assert (pixels.mean((1, 2, 3)) - targets[:, 1]).abs().max() <= 3 * 2.0**-24


@pytest.mark.parametrize("alpha", [0.2, 1.0, 2.0])
def test_shares_are_spread_like_numpys_beta(alpha: float) -> None:
    ours = np.sort([_beta(alpha, uniform(128, 9, i).tolist()) for i in range(4000)])
    theirs = np.sort(np.random.default_rng(0).beta(alpha, alpha, 4000))
    both = np.concatenate([ours, theirs])
    apart = np.abs(np.searchsorted(ours, both, "right") - np.searchsorted(theirs, both, "right")).max() / 4000
    # Kolmogorov and Smirnov: further apart once in a million, 2 exp(-2 d^2 n / 2) = 1e-6
    assert apart < (np.log(2e6) / 4000) ** 0.5


def test_pairs_without_batch_norm_need_an_even_pass() -> None:
    keys = ["augment.mixup=0.2", "bn_group=null", "global_batch=768"]
    BatchPlan.of(config.load(DEMO / "resnet50.yaml", [*keys, "runtime.micro_batch=8"]), 10_007, 1)
    with pytest.raises(RecipeError, match="runtime.micro_batch=3 must be even"):
        BatchPlan.of(config.load(DEMO / "resnet50.yaml", [*keys, "runtime.micro_batch=3"]), 10_007, 1)


def views(keys: list[str], count: int = 200) -> list[np.ndarray]:
    recipe = config.load(DEMO.parent / "resnet50/lars-b32k-90ep.yaml", keys)
    draws = draws_of(0, np.zeros(count, np.int64), np.arange(count))
    data = encoded(size=(80, 60))
    return [training_image(data, recipe.augment, 48, row) for row in draws]


def test_randaugment_is_timms_and_only_its_key_decides() -> None:
    from PIL import Image

    policy = "rand-m9-mstd0.5-inc1"
    plain, augmented = views([], 20), views([f"augment.randaugment={policy}"], 20)
    random.seed(1), np.random.seed(1)
    assert all(np.array_equal(a, b) for a, b in zip(augmented, views([f"augment.randaugment={policy}"], 20)))
    draws = draws_of(0, np.zeros(20, np.int64), np.arange(20))
    theirs = rand_augment_transform(policy, {"translate_const": int(48 * 0.45), "img_mean": (124, 116, 104)})
    for before, after, row in zip(plain, augmented, draws):
        drawn = row[Draw.RANDAUGMENT]
        random.seed(int(drawn * 2**53)), np.random.seed(int(drawn * 2**32))
        assert np.array_equal(np.asarray(theirs(Image.fromarray(before))), after)


def test_erasing_is_spread_like_timms() -> None:
    plain, erased = views([]), views(["augment.erase=0.5"])
    changed = np.array([(a != b).any(-1).mean() for a, b in zip(plain, erased)])
    assert abs((changed > 0).mean() - 0.5) < 5 * 0.5 / 200**0.5  # five standard errors, here and below
    random.seed(0)
    torch.manual_seed(0)
    theirs = RandomErasing(1.0, mode="const", device="cpu")
    areas = [float((theirs(torch.ones(3, 48, 48)) == 0).float().mean()) for _ in range(400)]
    ours = changed[changed > 0]
    assert abs(ours.mean() - np.mean(areas)) < 5 * np.hypot(ours.std() / len(ours) ** 0.5, np.std(areas) / 400**0.5)


def test_a_policy_that_is_none_is_refused() -> None:
    with pytest.raises(RecipeError, match="rand-m9"):
        check_policy("augmix")
