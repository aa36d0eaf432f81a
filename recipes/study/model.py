"""The study's net: timm's residual blocks for images of 24 pixels, of a size that one CPU core can train."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from timm.models import register_model
from timm.models.resnet import BasicBlock
from torch import Tensor, nn

_WIDTHS = (16, 32, 64)
# A run at batch 16,384 has 22 steps: running averages with torch's 0.1 would still hold the first ones at its end.
_norm = partial(nn.BatchNorm2d, momentum=0.3)


class StudyResNet(nn.Module):
    """Images (N, 3, 24, 24) to logits (N, num_classes): a stem with stride 3, three of timm's basic blocks.

    It has 78,810 weights. The last batch norm of each block starts at 0, so that the net starts as its shortcuts.
    """

    def __init__(self, num_classes: int = 10) -> None:
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
        for block in self.blocks:
            block.zero_init_last()

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(F.relu(self.bn1(self.conv1(x))))
        return self.fc(x.mean((2, 3)))


@register_model
def study_resnet(pretrained: bool = False, num_classes: int = 10, **kwargs) -> StudyResNet:
    """Three residual blocks; timm's factory passes more, about pretrained weights, and there are none."""
    return StudyResNet(num_classes)
