"""The order-free sum: one result for every order, as near to float64 as float32 can be, and nothing wraps around."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lars.exact.kernels import kernels
from lars.exact.reduction import RANGE_BITS, OrderFreeSum

PASSES = 12


def passes(scale: float = 1e-3) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    sizes = 10.0 ** torch.randint(-4, 1, (1000,), generator=generator)
    return [torch.randn(1000, generator=generator) * sizes * scale for _ in range(PASSES)]


def summed(gradients: list[torch.Tensor]) -> torch.Tensor:
    p = nn.Parameter(torch.zeros(1000))
    total = OrderFreeSum([("p", p)], PASSES, floats=0, counts=0, device=p.device)
    for g in gradients:
        p.grad = g.clone()
        total.add_gradients()
    assert not total.finish().bad_gradients
    return p.grad.clone()


def test_any_order_gives_the_same_bits_where_floats_do_not() -> None:
    forward, backward = passes(), passes()[::-1]
    assert torch.equal(summed(forward), summed(backward))
    assert not torch.equal(sum(forward), sum(backward))


@pytest.mark.parametrize("scale", [1e-5, 1e-3, 1.0, 100.0])
def test_no_further_from_float64_than_float32_accumulation(scale: float) -> None:
    gradients = passes(scale)
    exact = torch.stack(gradients).double().mean(0)
    plain = torch.zeros(1000)
    for g in gradients:
        plain += g / PASSES
    ours, theirs = (summed(gradients) - exact).norm(), (plain - exact).norm()
    assert ours <= theirs


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 2.0**RANGE_BITS, -1e30])
def test_what_is_out_of_range_is_named_and_enters_no_step(bad: float) -> None:
    p, q = nn.Parameter(torch.zeros(10)), nn.Parameter(torch.zeros(10))
    total = OrderFreeSum([("first", p), ("second", q)], 2, floats=1, counts=0, device=p.device)
    for value in (0.0, bad):
        p.grad, q.grad = torch.ones(10), torch.full((10,), value)
        total.add_gradients()
        total.add_floats(torch.tensor([value if abs(value) != 2.0**RANGE_BITS else 0.0]))
    sums = total.finish()
    assert sums.bad_gradients == ["second"]
    assert sums.bad_floats == (0 if abs(bad) == 2.0**RANGE_BITS else 1)
    assert p.grad is None and q.grad is None


def test_the_largest_gradients_do_not_wrap_around() -> None:
    p = nn.Parameter(torch.zeros(10))
    total = OrderFreeSum([("p", p)], PASSES, floats=0, counts=0, device=p.device)
    largest = 2.0**RANGE_BITS * (1 - 2**-24)
    for _ in range(PASSES):
        p.grad = torch.full((10,), largest)
        total.add_gradients()
    assert total.finish().bad_gradients == []
    assert torch.equal(p.grad, torch.full((10,), largest))


def test_a_parameter_nobody_had_a_gradient_for_stays_without() -> None:
    p, q = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.zeros(3))
    total = OrderFreeSum([("p", p), ("q", q)], 2, floats=0, counts=0, device=p.device)
    for _ in range(2):
        p.grad = torch.ones(3)
        total.add_gradients()
    total.finish()
    assert torch.equal(p.grad, torch.ones(3)) and q.grad is None


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_the_kernels_give_the_plain_path_bits(memory_format: torch.memory_format) -> None:
    """Of gradients of every size: halves that are rounded to even, subnormals, zeros of both signs, none at all."""
    if kernels() is None:
        pytest.skip("the kernels are not built here: there was no C compiler")
    shapes = [(7, 5, 3, 3), (4099, 1, 1, 1), (1, 1, 1, 1), (64, 3, 7, 7)]
    generator = torch.Generator().manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(shape).to(memory_format=memory_format)) for shape in shapes]
    both = [OrderFreeSum([(str(n), p) for n, p in enumerate(parameters)], 3, 0, 0, torch.device("cpu")) for _ in "12"]
    both[1].kernels = None
    unit = 1 / both[0].scale
    for number in range(3):
        grads = [10.0 ** torch.randint(-45, 4, shape, generator=generator) for shape in shapes]
        grads = [g * torch.randn(g.shape, generator=generator) for g in grads]
        grads[0].view(-1)[:6] = torch.tensor([0.5, 1.5, -0.5, -2.5, 0.0, -0.0]) * unit
        grads[1].view(-1)[number] = 2.0**RANGE_BITS * (1 - 2**-24)
        for total in both:
            for p, g in zip(parameters, grads):
                p.grad = g.to(memory_format=memory_format)
            parameters[2].grad = None if number < 2 else parameters[2].grad
            total.add_gradients()
    assert torch.equal(both[0].total, both[1].total) and both[0].gradients.any()
    means = []
    for total in both:
        assert total.finish().bad_gradients == []
        means.append([p.grad for p in parameters])
    assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(*means))


def test_nothing_of_a_step_is_left_in_the_next() -> None:
    """A step's first pass is stored over the step before; a process without a pass has nothing to add."""
    p = nn.Parameter(torch.zeros(3))
    total = OrderFreeSum([("p", p)], 2, floats=0, counts=0, device=p.device)
    for value in (1.0, 3.0):
        for _ in range(2):
            p.grad = torch.full((3,), value)
            total.add_gradients()
        total.finish()
        assert torch.equal(p.grad, torch.full((3,), value))
    total.finish()
    assert p.grad is None and not total.gradients.any()


def test_statistics_and_counts_ride_along() -> None:
    total = OrderFreeSum([], 1, floats=3, counts=2, device=torch.device("cpu"))
    values = torch.tensor([1e-9, 1.1e6, -7.3], dtype=torch.float64)
    for _ in range(3):
        total.add_floats(values)
        total.add_counts([2**64 - 1, 5])
    sums = total.finish()
    # three roundings to 2^-48, and float64's own where high and low parts are added and where 3 * values is
    torch.testing.assert_close(sums.floats, 3 * values, rtol=2 * 2.0**-53, atol=3 * 2.0**-49)
    assert abs(float(sums.floats[0]) - 3e-9) <= 3 * 2.0**-49
    assert sums.counts == [2**64 - 3, 15]


def test_channels_last_parameters_get_gradients_in_their_own_layout() -> None:
    p = nn.Parameter(torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last))
    g = torch.randn(4, 3, 2, 2).to(memory_format=torch.channels_last)
    total = OrderFreeSum([("p", p)], 1, floats=0, counts=0, device=p.device)
    p.grad = g.clone()
    total.add_gradients()
    total.finish()
    assert p.grad.stride() == p.stride()
    torch.testing.assert_close(p.grad, g, rtol=0, atol=2.0**-49)  # one pass, rounded to 2^-48
