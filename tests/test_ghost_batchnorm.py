"""Batch norm in groups, against torch's own batch norm on each group."""

from __future__ import annotations

import pytest
import timm
import torch
from torch import nn

from lars.exact.ghost_batchnorm import GhostBatchNorm2d, convert, update_running


def test_each_group_is_normalised_by_itself() -> None:
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(5)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    x = torch.randn(12, 5, 3, 3) * 3 + 1
    expected, means, variances = [], [], []
    for group in x.split(4):
        expected.append(nn.functional.batch_norm(group, None, None, norm.weight, norm.bias, training=True))
        means.append(group.double().mean((0, 2, 3)))
        variances.append(group.double().var((0, 2, 3), unbiased=True))
    ghost = GhostBatchNorm2d(norm, 4).train()
    assert torch.equal(ghost(x), torch.cat(expected))  # the same kernel on the same numbers
    # float32 sums over 4 * 9 elements: sqrt(36) u of the root mean square, twice that of the mean square; both rounded
    squares = [m * m + v for m, v in zip(means, variances)]
    off = 7 * 2.0**-24 * torch.stack([sum(s.sqrt() for s in squares), sum(2 * s for s in squares)])
    assert ((ghost.group_sums - torch.stack([sum(means), sum(variances)])).abs() <= off).all()
    assert torch.equal(ghost.running_mean, torch.zeros(5))  # a forward moves nothing
    other = GhostBatchNorm2d(nn.BatchNorm2d(2, momentum=0.5), 4)  # none of its two channels is like another
    update_running([other, ghost], torch.cat([torch.tensor([1.0, 2.0, 3.0, 5.0]), ghost.group_sums.reshape(-1) / 3]))
    assert (other.running_mean.tolist(), other.running_var.tolist()) == ([0.5, 1.0], [2.0, 3.0])
    running = (ghost.running_mean, 0.1 * sum(means) / 3), (ghost.running_var, 0.9 + 0.1 * sum(variances) / 3)
    for (ours, exact), error in zip(running, off):
        # what is averaged in, and three roundings of the running average (0.1 itself, product, sum)
        assert ((ours - exact).abs() <= 0.1 * error / 3 + 3 * 2.0**-24 * exact.abs()).all()
    assert int(ghost.num_batches_tracked) == 1


def test_groups_do_not_depend_on_the_size_of_the_pass() -> None:
    ghost = GhostBatchNorm2d(nn.BatchNorm2d(5), 4).train()
    x = torch.randn(12, 5, 3, 3)
    together, apart = ghost(x), torch.cat([ghost(part) for part in x.split(4)])
    torch.testing.assert_close(together, apart, rtol=0, atol=0)


def test_activations_inside_the_norm_are_kept() -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 64, 64)
    # timm's densenet is made of BatchNormAct2d
    plain, ghost = timm.create_model("densenet121", num_classes=3), timm.create_model("densenet121", num_classes=3)
    ghost.load_state_dict(plain.state_dict())
    found = convert(ghost, 4)
    assert len(found) > 100
    assert torch.equal(ghost.train()(x), plain.train()(x))  # one group: the same kernels on the same numbers
    assert list(ghost.state_dict()) == list(plain.state_dict())


def test_what_cannot_be_grouped_is_refused() -> None:
    with pytest.raises(ValueError, match="BatchNorm1d cannot be cut"):
        convert(nn.Sequential(nn.BatchNorm1d(3)), 4)
    with pytest.raises(ValueError, match="bn_group=32"):
        convert(nn.Sequential(nn.BatchNorm2d(3)), None)
    with pytest.raises(ValueError, match="bn_group=null"):
        convert(nn.Sequential(nn.Conv2d(3, 3, 1)), 4)
