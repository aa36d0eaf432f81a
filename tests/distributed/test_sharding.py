"""Exact norms under real DeepSpeed engines and FSDP2 over gloo, against LARS in one process on the whole batch."""
from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

import lars
from conftest import RANKS

STEPS, BATCH = 3, 24
RATES = (4.0, 8.0, 2.0)
# float32 keeps 2^-24 of a number; a gradient here is a sum of up to 24 * 49 products, and engines add them in another
# order: 2^-24 * sqrt(1176) = 2e-6 of the gradient, and three steps of it
BOUND = 1e-5


class Odd(nn.Module):
    """No size divides by 2 or 3; one layer frozen, two sharing a weight, a bias and a norm without adaptation."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 5, 3, bias=True)
        self.norm = nn.GroupNorm(1, 5)
        self.frozen = nn.Linear(5 * 25, 37)
        self.first = nn.Linear(37, 37)
        self.second = nn.Linear(37, 37, bias=False)
        self.second.weight = self.first.weight
        self.head = nn.Linear(37, 11)
        self.frozen.requires_grad_(False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.frozen(F.relu(self.norm(self.conv(x))).flatten(1))
        return self.head(F.relu(self.second(F.relu(self.first(x)))))


def model() -> Odd:
    torch.manual_seed(0)
    return Odd()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 1, 7, 7, generator=generator), torch.randint(0, 11, (BATCH,), generator=generator)


def optimizer(net: nn.Module, several_groups: bool = False) -> lars.LARS:
    trained = [p for p in net.parameters() if p.requires_grad]
    groups = [{"params": trained[:3]}, {"params": trained[3:], "weight_decay": 1e-2}] if several_groups else trained
    return lars.LARS(groups, lr=1.0, momentum=0.9, weight_decay=1e-3, trust_coefficient=0.01)


def control(several_groups: bool = False) -> list[dict[str, torch.Tensor]]:
    """The weights after every step, in one process."""
    net = model()
    rule, states = optimizer(net, several_groups), []
    for step in range(STEPS):
        for group in rule.param_groups:
            group["lr"] = RATES[step]
        x, y = batch(step)
        F.cross_entropy(net(x), y).backward()
        rule.step()
        rule.zero_grad()
        states.append({n: p.detach().clone() for n, p in net.named_parameters()})
    return states


def count_all_reduces(counts: list[int]) -> None:
    """Count the calls of `all_reduce` that LARS makes, at the process group."""
    real = lars.sharding.dist.all_reduce

    class Counted:
        def __getattr__(self, name: str):
            return getattr(dist, name)

        def all_reduce(self, *args, **kwargs):
            counts[0] += 1
            return real(*args, **kwargs)

    lars.sharding.dist = Counted()


def _deepspeed_rank(rank: int, world: int, port: int, config: dict, several_groups: bool, bind: bool, out: str) -> None:
    _join(rank, world, port)
    import deepspeed

    net = model()
    accumulation = config.get("gradient_accumulation_steps", 1)
    micro = BATCH // world // accumulation
    config = {"train_micro_batch_size_per_gpu": micro, "gradient_clipping": 0.0, "zero_allow_untested_optimizer": True, **config}
    engine, wrapped, _, _ = deepspeed.initialize(model=net, optimizer=optimizer(net, several_groups), config=config)
    counts = [0]
    if bind:
        lars.bind(engine, wrapped)
        count_all_reduces(counts)
    states = []
    try:
        for step in range(STEPS):
            for group in engine.optimizer.param_groups:
                group["lr"] = RATES[step]
            x, y = batch(step)
            x, y = x.chunk(world)[rank], y.chunk(world)[rank]
            for part_x, part_y in zip(x.split(micro), y.split(micro)):
                engine.backward(F.cross_entropy(engine(part_x), part_y))
                engine.step()
            names = dict(net.named_parameters())
            if config["zero_optimization"]["stage"] == 3:
                with deepspeed.zero.GatheredParameters(list(names.values())):
                    states.append({n: p.detach().clone() for n, p in names.items()})
            else:
                states.append({n: p.detach().clone() for n, p in names.items()})
        answer = {"states": states, "engine": type(engine.optimizer).__name__, "all_reduces": counts[0] / STEPS}
    except lars.ShardingError as error:
        answer = {"refused": str(error)}
    if rank == 0:
        torch.save(answer, out)
    dist.destroy_process_group()


def _fsdp2_rank(rank: int, world: int, port: int, config: dict, several_groups: bool, bind: bool, out: str) -> None:
    _join(rank, world, port)
    from torch.distributed.fsdp import fully_shard

    net = model()
    fully_shard(net)
    rule = optimizer(net, several_groups)
    counts, states = [0], []
    if bind:
        lars.bind(net, rule)
        count_all_reduces(counts)
    for step in range(STEPS):
        for group in rule.param_groups:
            group["lr"] = RATES[step]
        x, y = (part.chunk(world)[rank] for part in batch(step))
        F.cross_entropy(net(x), y).backward()
        rule.step()
        rule.zero_grad()
        states.append({n: p.full_tensor().detach().clone() for n, p in net.named_parameters()})
    if rank == 0:
        torch.save({"states": states, "engine": type(next(net.parameters())).__name__, "all_reduces": counts[0] / STEPS}, out)
    dist.destroy_process_group()


def _join(rank: int, world: int, port: int) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world), DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)


def run(target, world: int, tmp_path: Path, config: dict | None = None, several_groups: bool = False, bind: bool = True) -> dict:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "answer.pt"
    ranks = [RANKS.Process(target=target, args=(r, world, port, config or {}, several_groups, bind, str(out))) for r in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(240)
    assert [rank.exitcode for rank in ranks] == [0] * world
    return torch.load(out)


def worst(states: list[dict], several_groups: bool = False) -> float:
    """The largest error of a layer's weights relative to how far it has moved, over all steps."""
    start, errors = {n: p.detach() for n, p in model().named_parameters()}, []
    for ours, theirs in zip(states, control(several_groups), strict=True):
        for name, w in theirs.items():
            moved = (w - start[name]).norm()
            error = (ours[name].float() - w).norm()
            errors.append(float(error / moved) if moved > 0 else float(error))
    return max(errors)


ENGINES = {1: "DeepSpeedZeroOptimizer", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}


WORLDS = [2, *(pytest.param(world, marks=pytest.mark.long) for world in (1, 3))]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_is_exact_with_one_all_reduce(stage: int, world: int, tmp_path: Path) -> None:
    answer = run(_deepspeed_rank, world, tmp_path, {"zero_optimization": {"stage": stage}})
    assert answer["engine"] == ENGINES[stage]
    assert worst(answer["states"]) < BOUND
    assert answer["all_reduces"] == 1


@pytest.mark.parametrize("stage", [1, pytest.param(2, marks=pytest.mark.long), 3])
def test_unbound_slices_are_refused(stage: int, tmp_path: Path) -> None:
    assert "lars.bind" in run(_deepspeed_rank, 2, tmp_path, {"zero_optimization": {"stage": stage}}, bind=False)["refused"]


@pytest.mark.parametrize(
    "zero",
    [
        pytest.param({"stage": 1, "round_robin_gradients": True}, marks=pytest.mark.long),
        {"stage": 2, "round_robin_gradients": True, "reduce_bucket_size": 500, "allgather_bucket_size": 500},
        pytest.param({"stage": 2, "overlap_comm": True, "contiguous_gradients": False}, marks=pytest.mark.long),
        {"stage": 3, "reduce_bucket_size": 500, "stage3_param_persistence_threshold": 0},
    ],
    ids=["round robin", "round robin, small buckets", "overlap", "stage 3, small buckets"],
)
def test_layouts(zero: dict, tmp_path: Path) -> None:
    answer = run(_deepspeed_rank, 2, tmp_path, {"zero_optimization": zero, "gradient_accumulation_steps": 2}, several_groups=True)
    assert worst(answer["states"], several_groups=True) < BOUND


@pytest.mark.long
def test_stage_3_sub_groups_are_exact_at_one_all_reduce_each(tmp_path: Path) -> None:
    answer = run(_deepspeed_rank, 2, tmp_path, {"zero_optimization": {"stage": 3, "sub_group_size": 300}})
    assert worst(answer["states"]) < BOUND
    assert answer["all_reduces"] > 1


@pytest.mark.long
def test_stage_0_needs_no_collective(tmp_path: Path) -> None:
    answer = run(_deepspeed_rank, 2, tmp_path, {"zero_optimization": {"stage": 0}})
    assert worst(answer["states"]) < BOUND and answer["all_reduces"] == 0


def test_optimizer_offload_is_refused() -> None:
    with pytest.raises(lars.ShardingError, match="offload"):
        zero = type("DeepSpeedZeroOptimizer", (), {"cpu_offload": True, "optimizer": optimizer(model())})()
        engine = type("Engine", (nn.Module,), {"zero_optimization_stage": lambda self: 2})()
        engine.optimizer = zero
        lars.bind(engine, zero)


@pytest.mark.parametrize("world", WORLDS)
def test_fsdp2_is_exact_with_one_all_reduce(world: int, tmp_path: Path) -> None:
    answer = run(_fsdp2_rank, world, tmp_path)
    assert answer["engine"] == "DTensor"
    assert worst(answer["states"]) < BOUND
    assert answer["all_reduces"] == 1


def test_bind_on_a_plain_module_changes_nothing_and_wants_a_lars() -> None:
    net = model()
    rule = optimizer(net)
    lars.bind(net, rule)
    lars.bind(net, rule)
    assert rule.layout is None
    with pytest.raises(TypeError, match="lars.LARS"):
        lars.bind(net, torch.optim.SGD(net.parameters(), lr=0.1))
