"""The study's two nets, for images of 24 pixels: timm's residual blocks and AlexNet's layers.

They have a size that two cores can train.
"""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from timm.models import register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

_WIDTHS = (16, 32, 64)
#                        channels, kernel, stride, groups, pooled afterwards
_ALEXNET_CONVOLUTIONS = (
    (24, 5, 3, 1, True),
    (48, 5, 1, 2, True),
    (64, 3, 1, 1, False),
    (64, 3, 1, 2, False),
    (48, 3, 1, 2, False),
)
_ALEXNET_HIDDEN = 128
# A run at batch 16,384 has 22 steps: running averages with torch's 0.1 would still hold the first ones at its end.
_norm = partial(nn.BatchNorm2d, momentum=0.3)


class StudyResNet(nn.Module):
    """Images (N, 3, 24, 24) to logits (N, num_classes): a stem with stride 3, three of timm's basic blocks.

    It has 78,810 weights.

    zero_init_last: the last batch norm of each block starts at 0, so that the net starts as its shortcuts.
    """

    def __init__(self, num_classes: int = 10, zero_init_last: bool = True) -> None:
        super().__init__()
        self.num_classes, self.num_features = num_classes, _WIDTHS[-1]
        self.conv1 = nn.Conv2d(3, _WIDTHS[0], 5, stride=3, padding=2, bias=False)
        self.bn1 = _norm(_WIDTHS[0])
        blocks, channels = [], _WIDTHS[0]
        for width in _WIDTHS:
            stride = 1 if width == channels else 2
            shortcut = None
            if stride == 2:
                shortcut = nn.Sequential(nn.Conv2d(channels, width, 1, stride, bias=False), _norm(width))
            blocks.append(BasicBlock(channels, width, stride, shortcut, norm_layer=_norm))
            channels = width
        self.blocks = nn.Sequential(*blocks)
        self.fc = nn.Linear(channels, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")  # as timm's ResNet
        for block in self.blocks if zero_init_last else ():
            block.zero_init_last()

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


class StudyAlexNet(nn.Module):
    """Images (N, 3, 24, 24) to logits (N, num_classes): AlexNet's five convolutions and three dense layers.

    Three convolutions are in two groups; batch norm and ReLU follow each of the five, and dropout stands between the
    dense layers. It has 119,106 weights.
    """

    def __init__(self, num_classes: int = 10, drop_rate: float = 0.5) -> None:
        super().__init__()
        self.num_classes, self.num_features, self.drop_rate = num_classes, _ALEXNET_HIDDEN, drop_rate
        layers, channels = [], 3
        for width, kernel, stride, groups, pooled in _ALEXNET_CONVOLUTIONS:
            layers += [
                nn.Conv2d(channels, width, kernel, stride, kernel // 2, groups=groups, bias=False),
                _norm(width),
                nn.ReLU(),
            ]
            layers += [nn.MaxPool2d(3, 2, padding=1)] * pooled
            channels = width
        self.features = nn.Sequential(*layers)
        self.fc6 = nn.Linear(channels * 2 * 2, _ALEXNET_HIDDEN)
        self.fc7 = nn.Linear(_ALEXNET_HIDDEN, _ALEXNET_HIDDEN)
        self.fc8 = nn.Linear(_ALEXNET_HIDDEN, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1)
        for layer in (self.fc6, self.fc7):
            x = F.dropout(F.relu(layer(x)), self.drop_rate, self.training)
        return self.fc8(x)


def _kept(kwargs: dict) -> dict:
    # timm's factory passes these to every model; there are no pretrained weights to configure.
    return {k: v for k, v in kwargs.items() if k not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}


@register_model
def study_resnet(pretrained: bool = False, **kwargs) -> StudyResNet:
    """Three residual blocks."""
    return StudyResNet(**_kept(kwargs))


@register_model
def study_alexnet(pretrained: bool = False, **kwargs) -> StudyAlexNet:
    """AlexNet with batch norm, at a quarter of its width and less."""
    return StudyAlexNet(**_kept(kwargs))
