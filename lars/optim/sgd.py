"""Momentum SGD: LARS with no tensor adapted, so that both have the same groups and momentum modes."""

from __future__ import annotations

from dataclasses import asdict

import torch

from lars.optim.lars import LARS, MomentumKeys
from lars.optim.registry import register


@register("sgd", MomentumKeys)
def build(keys: MomentumKeys, trained: list[torch.nn.Parameter], kind: type[LARS] = LARS) -> LARS:
    rule = {key: value for key, value in asdict(keys).items() if key != "name"}
    return kind([{"params": trained, "adapt": False}], **rule)
