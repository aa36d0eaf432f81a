"""ResNets-50 that sources train and timm has not, registered with timm: `resnet50_mlperf` and `resnet50_blurpool`.

`resnet50_mlperf` has the first weights of mlcommons/training, image_classification/tensorflow2, and of NVIDIA's MXNet
code: the last layer is drawn from N(0, 0.01) and has no bias at first, convolutions from N(0, 2 / fan-in), and every
gamma begins with 1. timm's own `resnet50` draws convolutions by fan-out and begins with 0 in the last gamma of each
block. (Keras cuts its normal distribution off at two standard deviations, and MXNet does not; here it is not cut off.)

`resnet50_blurpool` is the one of libffcv/ffcv-imagenet.
"""

from __future__ import annotations

from typing import Any

import timm
import torch
import torch.nn.functional as F
from timm.models import register_model
from torch import nn


def _resnet50(name: str, pretrained: bool, **kwargs: Any) -> nn.Module:
    """timm's `resnet50` as a new model begins with it, without what timm's factory says of pretrained weights."""
    if pretrained:
        raise ValueError(f"{name} has no pretrained weights")
    own = {key: value for key, value in kwargs.items() if not key.startswith("pretrained")}
    return timm.create_model("resnet50", **own)


@register_model
def resnet50_mlperf(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's `resnet50`, whose arguments it takes; there are no pretrained weights of it."""
    model = _resnet50("resnet50_mlperf", pretrained, zero_init_last=False, **kwargs)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
    nn.init.normal_(model.fc.weight, std=0.01)
    nn.init.zeros_(model.fc.bias)
    return model


class BlurredConv2d(nn.Conv2d):
    """A strided convolution of smoothed channels, which sees every pixel (Zhang 2019, arXiv 1904.11486), as in FFCV.

    The kernel is the 3 x 3 binomial one, for each channel alone; it is no weight and stands in no checkpoint.
    """

    def __init__(self, of: nn.Conv2d) -> None:
        super().__init__(of.in_channels, of.out_channels, of.kernel_size, of.stride, of.padding, bias=False)
        self.weight = of.weight
        side = torch.tensor([1.0, 2.0, 1.0]) / 4
        kernel = torch.outer(side, side).repeat(of.in_channels, 1, 1, 1)
        self.register_buffer("kernel", kernel, persistent=False)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """(n, in_channels, height, width) to (n, out_channels, height / stride, width / stride)."""
        return super().forward(F.conv2d(images, self.kernel, padding=1, groups=self.in_channels))


@register_model
def resnet50_blurpool(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's `resnet50`, with `BlurredConv2d` for the six strided convolutions behind the first (ffcv-imagenet)."""
    model = _resnet50("resnet50_blurpool", pretrained, **kwargs)
    for name, layer in list(model.named_modules()):
        if isinstance(layer, nn.Conv2d) and layer.stride != (1, 1) and layer.in_channels >= 16:
            model.set_submodule(name, BlurredConv2d(layer))
    return model
