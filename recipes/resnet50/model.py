"""ResNet-50 with the first weights of MLPerf's reference code, registered with timm as `resnet50_mlperf`.

mlcommons/training, image_classification/tensorflow2, and NVIDIA's MXNet code: the last layer is drawn from N(0, 0.01)
and has no bias at first, convolutions from N(0, 2 / fan-in), and every gamma begins with 1. timm's own `resnet50` draws
convolutions by fan-out and begins with 0 in the last gamma of each block. (Keras cuts its normal distribution off at
two standard deviations, and MXNet does not; here it is not cut off.)
"""

from __future__ import annotations

from typing import Any

import timm
from timm.models import register_model
from torch import nn


@register_model
def resnet50_mlperf(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """timm's `resnet50`, whose arguments it takes; there are no pretrained weights of it."""
    if pretrained:
        raise ValueError("resnet50_mlperf has no pretrained weights")
    own = {key: value for key, value in kwargs.items() if not key.startswith("pretrained")}
    model = timm.create_model("resnet50", zero_init_last=False, **own)
    for layer in model.modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, mode="fan_in", nonlinearity="relu")
    nn.init.normal_(model.fc.weight, std=0.01)
    nn.init.zeros_(model.fc.bias)
    return model
