"""AlexNet (Krizhevsky, Sutskever, Hinton 2012, two groups) and the two batch-norm variants of the LARS authors.

`import recipes.alexnet.model` registers `alexnet`, `alexnet_bn` and `alexnet_bn_post` with timm. Layers, sizes and
initialisation of the variants: repository borisgin/nvcaffe, `models/alexnet_bn/train_val.prototxt` and
`train_val2.prototxt`. Convolution biases of the plain net: BVLC AlexNet in Caffe (remembered, not read).
"""

from __future__ import annotations

import torch.nn.functional as F
from timm.models import register_model
from torch import Tensor, nn

#            channels, kernel, stride, padding, groups, pooled afterwards
_CONVOLUTIONS = (
    (96, 11, 4, 0, 1, True),
    (256, 5, 1, 2, 2, True),
    (384, 3, 1, 1, 1, False),
    (384, 3, 1, 1, 2, False),
    (256, 3, 1, 1, 2, True),
)
_BVLC_BIASES = (0.0, 0.1, 0.0, 0.1, 0.1)  # of conv1 ... conv5 in the plain net


class LocalResponseNorm(nn.Module):
    """x / (1 + alpha/5 * sum over 5 neighbouring channels of x^2)^0.75, alpha = 1e-4."""

    def forward(self, x: Tensor) -> Tensor:
        # Three dimensions, because torch pools four with avg_pool3d, whose backward is not deterministic on GPUs.
        return F.local_response_norm(x.flatten(2), 5, alpha=1e-4, beta=0.75, k=1.0).view_as(x)


class AlexNet(nn.Module):
    """Images (N, in_chans, image_size, image_size) to logits (N, num_classes); the smallest image_size is 67.

    norm: "lrn" (after pool1 and pool2), "before_relu" (conv, batch norm, ReLU, pool) or "after_pool" (conv, ReLU, pool,
        batch norm without scale and shift, none after conv5: the variant that the authors ran at 8K to 32K).
    width: multiplies every channel count; 1.0 at 227 pixels has 60,965,224 parameters with "lrn".
    """

    def __init__(
        self,
        norm: str,
        num_classes: int = 1000,
        in_chans: int = 3,
        image_size: int = 227,
        width: float = 1.0,
        drop_rate: float = 0.5,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels, size = in_chans, image_size
        for index, (out, kernel, stride, padding, groups, pooled) in enumerate(_CONVOLUTIONS):
            out = 2 * round(out * width / 2)
            conv = nn.Conv2d(channels, out, kernel, stride, padding, groups=groups, bias=norm != "before_relu")
            nn.init.normal_(conv.weight, std=0.01)
            if conv.bias is not None:
                nn.init.constant_(conv.bias, 0.01 if norm == "after_pool" else _BVLC_BIASES[index])
            layers.append(conv)
            if norm == "before_relu":
                layers.append(nn.BatchNorm2d(out, eps=1e-4, momentum=0.1))  # Caffe's moving average 0.9
            layers.append(nn.ReLU(inplace=True))
            size = (size + 2 * padding - kernel) // stride + 1
            if pooled:
                layers.append(nn.MaxPool2d(3, 2))
                size = (size - 3) // 2 + 1
            if size < 1:
                raise ValueError(f"image_size={image_size} is too small for AlexNet: use 67 or more")
            if norm == "lrn" and index < 2:
                layers.append(LocalResponseNorm())
            if norm == "after_pool" and index < 4:
                layers.append(nn.BatchNorm2d(out, eps=1e-4, momentum=0.1, affine=False))
            channels = out
        self.features = nn.Sequential(*layers)
        self.num_features = round(4096 * width)
        self.fc6 = _linear(channels * size * size, self.num_features, std=0.005, bias=0.1)
        self.fc7 = _linear(self.num_features, self.num_features, std=0.005, bias=0.1)
        self.fc8 = _linear(self.num_features, num_classes, std=0.01, bias=0.01 if norm == "after_pool" else 0.0)
        self.drop_rate = drop_rate
        self.num_classes = num_classes

    def forward(self, x: Tensor) -> Tensor:
        x = self.features(x).flatten(1)
        for layer in (self.fc6, self.fc7):
            x = F.dropout(F.relu(layer(x)), self.drop_rate, self.training)
        return self.fc8(x)


def _linear(inputs: int, outputs: int, std: float, bias: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    nn.init.normal_(layer.weight, std=std)
    nn.init.constant_(layer.bias, bias)
    return layer


def _build(norm: str, kwargs: dict) -> AlexNet:
    # timm's factory passes these to every model; there are no pretrained weights to configure.
    return AlexNet(
        norm, **{k: v for k, v in kwargs.items() if k not in ("pretrained_cfg", "pretrained_cfg_overlay", "cache_dir")}
    )


@register_model
def alexnet(pretrained: bool = False, **kwargs) -> AlexNet:
    """The plain net with local response normalisation."""
    return _build("lrn", kwargs)


@register_model
def alexnet_bn(pretrained: bool = False, **kwargs) -> AlexNet:
    """Batch norm in place of local response normalisation, before every ReLU of a convolution."""
    return _build("before_relu", kwargs)


@register_model
def alexnet_bn_post(pretrained: bool = False, **kwargs) -> AlexNet:
    """Batch norm without scale and shift after ReLU and pooling."""
    return _build("after_pool", kwargs)
