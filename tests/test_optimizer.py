"""LARS against the paper's equations in float64 and against another author's implementation."""

from __future__ import annotations

import copy
import subprocess
import sys

import pytest
import pytorch_optimizer
import torch
from torch import nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lars import LARS, ShardingError
from lars.optim.lars import _update_foreach
from lars.optim.norms import tensor_norms

U = 2.0**-24  # float32's unit roundoff
RATES = (0.5, 2.0, 8.0, 8.0, 4.0, 0.1)  # a rate that changes: the two momentum modes part


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Flatten(), nn.Linear(5 * 36, 7)).train()


def gradients(model: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=generator) * 10.0 ** (step % 3 - 2)


def take_step(model: nn.Module, optimizer: torch.optim.Optimizer, step: int, lr: float) -> None:
    gradients(model, step)
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.step()


def roundings(weights, velocities, old, errors, mode: str, lr: float) -> None:
    """Add to `errors` (of each velocity, of each weight; largest element) what float32 leaves in one `reference_step`.

    The norms of up to 5 * 36 * 7 elements are off by (sqrt(1260 / 8 + 9) / 2 + 1) u = 7.5 u each (see below), the ratio
    takes five operations, its product with gradient and decayed weight four: 24 u of what is added. A velocity is
    rounded twice when it is made, a weight once, and once where the rate is outside.
    """
    for i, (w, v) in enumerate(zip(weights, velocities)):
        added = (v - 0.9 * old[i]).abs().max()
        errors[0][i] = 0.9 * errors[0][i] + 24 * U * added + 2 * U * v.abs().max()
        outside = 1.0 if mode == "paper" else lr
        errors[1][i] = errors[1][i] + outside * (errors[0][i] + U * v.abs().max()) + U * w.abs().max()


def reference_step(weights, velocities, grads, lr, m, decay, eta, eps, mode, caffe=False) -> None:
    """The paper's equations, tensor by tensor, in float64.

    With `caffe` those of the authors' Caffe fork (nvcaffe, sgd_solver.cpp).
    """
    for i, (w, g) in enumerate(zip(weights, grads)):
        w, g = w.double(), g.double()
        ratio, beta = 1.0, 0.0
        if caffe or w.ndim > 1:
            beta = decay
            if w.norm() > 0 and g.norm() > 0:
                ratio = eta * w.norm() / (g.norm() + (0.0 if caffe else beta * w.norm()) + eps)
        inside, outside = (lr, 1.0) if mode == "paper" else (1.0, lr)
        velocities[i] = m * velocities[i] + inside * ratio * (g + beta * w)
        weights[i] = w - outside * velocities[i]


@pytest.mark.parametrize("caffe", [False, True], ids=["paper's rule", "Caffe's rule"])
@pytest.mark.parametrize("mode", ["paper", "torch"])
@pytest.mark.parametrize("foreach", [False, True])
def test_follows_the_equations_in_float64(
    mode: str, foreach: bool, caffe: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if foreach:  # the path that GPUs take
        monkeypatch.setattr("lars.optim.lars._update_fused", _update_foreach)
    model = network()
    common = {
        "momentum": 0.9,
        "weight_decay": 5e-3,
        "trust_coefficient": 0.02,
        "eps": 1e-3,
        "momentum_mode": mode,
        "decay_in_norm": not caffe,
    }
    every = [{"params": model.parameters(), "adapt": True, "weight_decay": 5e-3}]
    optimizer = LARS(every if caffe else model.parameters(), lr=1.0, **common)
    weights = [p.detach().double() for p in model.parameters()]
    velocities = [torch.zeros_like(w) for w in weights]
    errors = [[0.0] * len(weights), [0.0] * len(weights)]
    for step, lr in enumerate(RATES):
        take_step(model, optimizer, step, lr)
        old = list(velocities)
        reference_step(
            weights, velocities, [p.grad for p in model.parameters()], lr, 0.9, 5e-3, 0.02, 1e-3, mode, caffe
        )
        roundings(weights, velocities, old, errors, mode, lr)
    for p, w, error in zip(model.parameters(), weights, errors[1]):
        assert (p - w).abs().max() <= error


def test_the_rules_differ() -> None:
    ends = []
    for decay_in_norm in (True, False):
        model = network()
        optimizer = LARS(model.parameters(), lr=1.0, weight_decay=1.0, decay_in_norm=decay_in_norm)
        gradients(model, 0)
        optimizer.step()
        ends.append(model[4].weight.detach().clone())
    assert (ends[0] - ends[1]).norm() > 0.01 * (ends[0] - network()[4].weight).norm()


def test_modes_differ_when_the_rate_changes() -> None:
    ends = []
    for mode in ("paper", "torch"):
        model = network()
        optimizer = LARS(model.parameters(), lr=1.0, momentum_mode=mode)
        for step, lr in enumerate(RATES):
            take_step(model, optimizer, step, lr)
        ends.append(model[0].weight.detach().clone())
    assert (ends[0] - ends[1]).norm() > 0.01 * ends[0].norm()


def test_agrees_with_pytorch_optimizer() -> None:
    ours, theirs = network(), network()
    a = LARS(ours.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-3, trust_coefficient=0.01, momentum_mode="torch")
    b = pytorch_optimizer.LARS(theirs.parameters(), lr=1.0, momentum=0.9, weight_decay=1e-3, trust_coefficient=0.01)
    weights = [p.detach().double() for p in ours.parameters()]
    velocities, errors = [torch.zeros_like(w) for w in weights], [[0.0] * len(weights), [0.0] * len(weights)]
    for step, lr in enumerate(RATES):
        for model, optimizer in ((ours, a), (theirs, b)):
            take_step(model, optimizer, step, lr)
        old = list(velocities)
        reference_step(weights, velocities, [p.grad for p in ours.parameters()], lr, 0.9, 1e-3, 0.01, 0.0, "torch")
        roundings(weights, velocities, old, errors, "torch", lr)
    for p, q, error in zip(ours.parameters(), theirs.parameters(), errors[1]):
        # theirs has torch's own norms, at most sqrt(1260) / 2 + 1 = 19 u off and not 7.5 u: twice our error, and ours
        assert (p - q).abs().max() <= 3 * error


def test_without_adaptation_it_is_torchs_sgd() -> None:
    ours, theirs = network(), network()
    a = LARS(
        [{"params": ours.parameters(), "adapt": False, "weight_decay": 1e-3}],
        lr=0.1,
        momentum=0.9,
        momentum_mode="torch",
    )
    b = torch.optim.SGD(theirs.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    largest = 0.0  # velocity
    for step in range(5):
        for model, optimizer in ((ours, a), (theirs, b)):
            gradients(model, step)
            optimizer.step()
        largest = max(largest, *(float(state["momentum_buffer"].abs().max()) for state in a.state.values()))
    for p, q in zip(ours.parameters(), theirs.parameters()):
        # five steps of two evaluations: four roundings of a velocity that remembers them all, and two of the weight
        assert (p - q).abs().max() <= 2 * 5 * U * (5 * 4 * 0.1 * largest + 2 * p.abs().max())


@pytest.mark.parametrize("zero", ["weight", "gradient"])
def test_ratio_is_one_where_a_norm_is_zero(zero: str) -> None:
    p = nn.Parameter(torch.zeros(3, 4) if zero == "weight" else torch.ones(3, 4))
    p.grad = torch.ones(3, 4) if zero == "weight" else torch.zeros(3, 4)
    before = p.detach().clone()
    LARS([p], lr=0.5, momentum=0.0, weight_decay=0.1).step()
    # numbers below 1: decay, sum, rate and difference are rounded here and there
    torch.testing.assert_close(p.detach(), before - 0.5 * (p.grad + 0.1 * before), rtol=0, atol=2 * 4 * U)


def test_groups_follow_dimension_and_may_say_otherwise() -> None:
    model = network()
    optimizer = LARS(model.parameters(), lr=1.0, weight_decay=0.1)
    told = [(g["adapt"], g["weight_decay"], [p.ndim for p in g["params"]]) for g in optimizer.param_groups]
    assert told == [(True, 0.1, [4, 2]), (False, 0.0, [1, 1, 1, 1])]
    everything = LARS([{"params": model.parameters(), "adapt": True, "weight_decay": 0.2}], lr=1.0)
    assert [(g["adapt"], g["weight_decay"], len(g["params"])) for g in everything.param_groups] == [(True, 0.2, 6)]


def test_a_parameter_without_gradient_is_left_alone() -> None:
    p, q = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    p.grad = torch.ones(2, 2)
    LARS([p, q], lr=1.0, weight_decay=0.1).step()
    assert torch.equal(q, torch.ones(2, 2)) and not torch.equal(p, torch.ones(2, 2))


def test_state_dict_round_trip() -> None:
    model = network()
    optimizer = LARS(model.parameters(), lr=1.0, weight_decay=0.1)
    gradients(model, 0)
    optimizer.step()
    other_model = copy.deepcopy(model)
    other = LARS(other_model.parameters(), lr=3.0)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for m, o in ((model, optimizer), (other_model, other)):
        gradients(m, 1)
        o.step()
    for p, q in zip(model.parameters(), other_model.parameters()):
        assert torch.equal(p, q)


def test_a_copy_goes_on() -> None:
    model = network()
    optimizer = LARS(model.parameters(), lr=1.0)
    model_2, copied = copy.deepcopy((model, optimizer))
    for m, o in ((model, optimizer), (model_2, copied)):
        gradients(m, 0)
        o.step()
    for p, q in zip(model.parameters(), model_2.parameters()):
        assert torch.equal(p, q)


@pytest.mark.parametrize(
    "wrong",
    [
        {"lr": -1.0},
        {"lr": float("nan")},
        {"momentum": 1.0},
        {"weight_decay": -0.1},
        {"trust_coefficient": 0.0},
        {"eps": -1.0},
        {"momentum_mode": "nesterov"},
    ],
)
def test_bad_arguments_raise(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        LARS([nn.Parameter(torch.ones(2, 2))], **{"lr": 1.0, **wrong})


def test_flat_slices_raise_instead_of_training_wrongly() -> None:
    model = network()
    optimizer = LARS(model.parameters(), lr=1.0)
    # what DeepSpeed's ZeRO does: one flat fp32 partition in place of a group's tensors
    flat = torch.cat([p.detach().reshape(-1) for p in optimizer.param_groups[0]["params"]])[:100].requires_grad_()
    flat.grad = torch.ones_like(flat)
    optimizer.param_groups[0]["params"] = [flat]
    before = flat.detach().clone()
    with pytest.raises(ShardingError, match="flat slices"):
        optimizer.step()
    assert torch.equal(flat, before)


def test_registered_in_timms_factory() -> None:
    import timm.optim

    import lars

    lars.register_with_timm()
    lars.register_with_timm()  # harmless twice
    optimizer = timm.optim.create_optimizer_v2(network(), "exact_lars", lr=1.0, weight_decay=0.1, momentum=0.8)
    assert isinstance(optimizer, LARS)
    assert {(g["weight_decay"], g["adapt"]) for g in optimizer.param_groups} == {(0.1, True), (0.0, False)}
    assert not isinstance(timm.optim.create_optimizer_v2(network(), "lars", lr=1.0), LARS)


def test_import_needs_torch_alone_and_not_before_it_is_used() -> None:
    code = (
        "import sys\n"
        "import lars\n"
        "assert 'torch' not in sys.modules\n"
        "import lars.exact.portable\n"
        "assert 'torch' not in sys.modules\n"
        "lars.LARS, lars.bind, lars.ShardingError\n"
        "absent = {'accelerate', 'deepspeed', 'datasets', 'pyarrow', 'timm', 'torchvision'}\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & absent))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.parametrize("elements", [1, 1000, 100_000, 524_287, 2_359_297, 37_748_736])
def test_norms_keep_float32_s_precision_at_any_size(elements: int) -> None:
    """torch's own float32 norm on a CPU is 0.2 % off for AlexNet's largest weight (the last size here)."""
    w = torch.randn(elements, generator=torch.Generator().manual_seed(0)) + 0.5
    exact = w.double().norm()
    # n elements of a row go to at least 8 lanes (32 bytes, torch's narrowest vector): n / 8 additions, 8 more over the
    # lanes and the rounding of the product are sqrt(n / 8 + 9) u of the square, half of it of the norm (Higham and Mary
    # 2019); the root of a row and the result are rounded, u / 2 each. Rows are combined in float64.
    roundings = min(elements, 2**12) / 8 + 9
    assert abs(float(tensor_norms([w], [w])[0, 0].double() / exact) - 1) <= (roundings**0.5 / 2 + 1) * U


class Watched(TorchDispatchMode):
    """Counts the bytes of new tensors, and refuses what makes a GPU's host wait."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default), func
        before = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage()._cdata not in before:
                self.bytes += tensor.numel() * tensor.element_size()
        return out


@pytest.mark.parametrize("mode", ["paper", "torch"])
def test_the_path_of_a_gpu_never_waits_and_allocates_nothing_of_the_model_s_size(mode: str) -> None:
    """On a pretended GPU operations are dispatched and none runs, so a value cannot be read.

    The second step makes nothing big.
    """
    with FakeTensorMode():
        params = [
            torch.nn.Parameter(torch.empty(1 << 20, 2, device="cuda")),
            torch.nn.Parameter(torch.empty(1 << 20, device="cuda")),
        ]
        rule = LARS(params, lr=1.0, weight_decay=1e-4, momentum_mode=mode)
        for _ in range(2):
            for p in params:
                p.grad = torch.empty_like(p)
            with Watched() as watched:
                rule.step()
        assert 0 < watched.bytes < 4096, watched.bytes


def test_the_path_of_a_cpu_allocates_nothing_of_the_model_s_size() -> None:
    w = torch.nn.Parameter(torch.randn(1 << 11, 1 << 10))
    rule = LARS([w], lr=1.0, weight_decay=1e-4)
    for _ in range(2):
        w.grad = torch.randn_like(w)
        with torch.profiler.profile(profile_memory=True) as profile:
            rule.step()
    assert max(event.self_cpu_memory_usage for event in profile.key_averages()) < 1 << 16


def test_the_ratios_told_are_those_of_the_last_step() -> None:
    model = network()
    optimizer = LARS(model.parameters(), lr=0.1, weight_decay=1e-2, trust_coefficient=0.02)
    assert optimizer.applied_ratios() == {}
    for step in range(2):
        gradients(model, step)
        before = [p.detach().double() for p in model.parameters() if p.ndim > 1]
        optimizer.step()
    told = optimizer.applied_ratios()
    adapted = [p for p in model.parameters() if p.ndim > 1]
    assert set(told) == set(adapted)
    for p, w in zip(adapted, before):
        exact = 0.02 * w.norm().item() / (p.grad.double().norm().item() + 1e-2 * w.norm().item())
        assert told[p] == pytest.approx(exact, rel=24 * U)  # see `roundings`
