"""AlexNet as published: layers in order, sizes, first weights; ResNet-50 as the recipes spell it."""

from __future__ import annotations

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT
from scipy import ndimage
from torch import nn

import recipes.alexnet.model
import recipes.resnet50.model  # noqa: F401
from lars.engine.build import build_model
from lars.recipe import config


def layers(model: nn.Module) -> str:
    short = {"Conv2d": "conv", "ReLU": "relu", "MaxPool2d": "pool", "BatchNorm2d": "bn", "LocalResponseNorm": "lrn"}
    return " ".join(short[type(m).__name__] for m in model.features)


@pytest.mark.parametrize(
    ("name", "parameters", "order"),
    [
        ("alexnet", 60_965_224, "conv relu pool lrn conv relu pool lrn conv relu conv relu conv relu pool"),
        # without 1,376 conv biases, with 2 x 1,376 scales and shifts
        (
            "alexnet_bn",
            60_965_224 + 1_376,
            "conv bn relu pool conv bn relu pool conv bn relu conv bn relu conv bn relu pool",
        ),
        ("alexnet_bn_post", 60_965_224, "conv relu pool bn conv relu pool bn conv relu bn conv relu bn conv relu pool"),
    ],
)
def test_layers_and_parameter_counts(name: str, parameters: int, order: str) -> None:
    model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) == parameters
    assert layers(model) == order
    convolutions = [m for m in model.features if isinstance(m, nn.Conv2d)]
    assert [(c.out_channels, c.kernel_size[0], c.stride[0], c.padding[0], c.groups) for c in convolutions] == [
        (96, 11, 4, 0, 1),
        (256, 5, 1, 2, 2),
        (384, 3, 1, 1, 1),
        (384, 3, 1, 1, 2),
        (256, 3, 1, 1, 2),
    ]
    assert model.fc6.in_features == 256 * 6 * 6
    for norm in (m for m in model.features if isinstance(m, nn.BatchNorm2d)):
        assert (norm.eps, norm.momentum, norm.affine) == (1e-4, 0.1, name == "alexnet_bn")


@pytest.mark.parametrize(
    ("name", "conv_biases", "last_bias"),
    [("alexnet", [0, 0.1, 0, 0.1, 0.1], 0), ("alexnet_bn_post", [0.01] * 5, 0.01), ("alexnet_bn", [None] * 5, 0)],
)
def test_first_weights(name: str, conv_biases: list, last_bias: float) -> None:
    torch.manual_seed(0)
    model = timm.create_model(name).requires_grad_(False)
    convolutions = [m for m in model.features if isinstance(m, nn.Conv2d)]
    for layer, std in [*((c, 0.01) for c in convolutions), (model.fc6, 0.005), (model.fc7, 0.005), (model.fc8, 0.01)]:
        n = layer.weight.numel()
        assert abs(float(layer.weight.mean())) < 5 * std / n**0.5
        assert float(layer.weight.std()) == pytest.approx(std, rel=5 / (2 * n) ** 0.5)
    biases = [None if c.bias is None else c.bias.unique().tolist() for c in convolutions]
    assert biases == [None if b is None else pytest.approx([b]) for b in conv_biases]
    assert model.fc6.bias.unique().tolist() == model.fc7.bias.unique().tolist() == pytest.approx([0.1])
    assert model.fc8.bias.unique().tolist() == pytest.approx([last_bias])


def test_width_image_size_and_classes_are_arguments() -> None:
    model = timm.create_model("alexnet_bn", num_classes=7, width=0.125, image_size=67)
    assert model(torch.zeros(2, 3, 67, 67)).shape == (2, 7)
    with pytest.raises(ValueError, match="67 or more"):
        timm.create_model("alexnet", image_size=66)


def test_local_response_norm_is_the_published_formula() -> None:
    from recipes.alexnet.model import LocalResponseNorm

    x = torch.randn(2, 9, 4, 5) * 100
    expected = torch.empty_like(x)
    for c in range(9):
        neighbours = x[:, max(0, c - 2) : c + 3].double()
        expected[:, c] = x[:, c] / (1 + 1e-4 / 5 * (neighbours**2).sum(1)) ** 0.75
    # u = 2^-24: a square, four sums, the factor and the 1 + are 7 u of what is raised to 0.75; the power 2 u, the
    # division u, and u where `expected` was stored
    torch.testing.assert_close(LocalResponseNorm()(x), expected, rtol=10 * 2.0**-24, atol=0)


def test_resnet50_is_built_as_the_recipe_spells_it() -> None:
    model, ghosts = build_model(config.load(ROOT / "recipes/resnet50/lars-b32k-90ep.yaml", []))
    assert sum(p.numel() for p in model.parameters()) == 25_557_032
    assert len(ghosts) == 53 and {g.bn_group for g in ghosts} == {64}
    block = model.layer2[0]
    assert block.bn3.weight.unique().tolist() == [0.0] and block.bn2.weight.unique().tolist() == [1.0]
    assert (block.conv1.stride, block.conv2.stride) == ((1, 1), (2, 2))


def test_strides_behind_the_first_see_every_pixel() -> None:
    """Control: scipy's binomial filter in front of timm's own convolution; names and weights are timm's."""
    torch.manual_seed(0)
    blurred = timm.create_model("resnet50_blurpool")
    torch.manual_seed(0)
    plain = timm.create_model("resnet50")
    own, theirs = blurred.state_dict(), plain.state_dict()
    assert list(own) == list(theirs) and all(torch.equal(own[name], theirs[name]) for name in own)
    strided = {n: m for n, m in blurred.named_modules() if isinstance(m, torch.nn.Conv2d) and m.stride == (2, 2)}
    behind = [f"layer{stage}.0.{layer}" for stage in (2, 3, 4) for layer in ("conv2", "downsample.0")]
    assert list(strided) == ["conv1", *behind]
    images = torch.randn(2, 128, 7, 7, dtype=torch.float64)
    weights = np.outer([1, 2, 1], [1, 2, 1]) / 16
    smooth = ndimage.correlate(images.numpy(), weights[None, None], mode="constant")
    for name in behind[:1]:
        ours, theirs = strided[name].double(), plain.get_submodule(name).double()
        assert torch.allclose(ours(images), theirs(torch.from_numpy(smooth)), rtol=0, atol=1e-12)


def test_first_weights_are_drawn_from_the_seed_alone() -> None:
    recipe = config.load(ROOT / "recipes/demo/resnet50.yaml", [])
    first, again = build_model(recipe)[0], build_model(recipe)[0]
    recipe.seed = 1
    other = build_model(recipe)[0]
    assert torch.equal(first.conv1.weight, again.conv1.weight) and not torch.equal(
        first.conv1.weight, other.conv1.weight
    )
