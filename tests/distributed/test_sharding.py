"""Exact norms under real DeepSpeed engines and FSDP2 over gloo, against LARS in one process on the whole batch."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from conftest import RANKS, ROOT, free_port
from torch import nn

import lars
import lars.optim.sharding
from lars.run.peers import compile_nothing

STEPS, BATCH = 3, 24
RATES = (4.0, 8.0, 2.0)
U = 2.0**-24  # float32's unit roundoff
# What rounding leaves of a gradient (Higham and Mary 2019): an element of the convolution's sums 24 * 25 products,
# on its way back it passes through sums of 11, 37, 37 and 37 products and the group norm's of 125.
ROUNDING = U * (BATCH * 25 + 11 + 3 * 37 + 125) ** 0.5


class Odd(nn.Module):
    """No size divides by 2 or 3; one layer frozen, two sharing a weight, a bias and a norm without adaptation.

    tanh, not ReLU: no unit can stand on a kink, where one rounding decides about a whole term of the gradient.
    """

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
        x = self.frozen(torch.tanh(self.norm(self.conv(x))).flatten(1))
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


class Skips(Odd):
    """Leaves its second layer out of every second step, as stochastic depth does."""

    calls = 0

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        x = torch.tanh(self.norm(self.conv(x))).flatten(1)
        return self.head(self.first(self.frozen(x)) if self.calls % 2 else self.second(self.frozen(x)))


def model(kind: type[Odd] = Odd) -> Odd:
    torch.manual_seed(0)
    return kind()


def batch(step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    return torch.randn(BATCH, 1, 7, 7, generator=generator), torch.randint(0, 11, (BATCH,), generator=generator)


def optimizer(net: nn.Module, several_groups: bool = False, caffe: bool = False) -> lars.LARS:
    trained = [p for p in net.parameters() if p.requires_grad]
    if caffe:  # the rule of the authors' fork: no decay in the ratio, every tensor adapted and decayed
        every = [{"params": trained, "adapt": True, "weight_decay": 0.1}]
        return lars.LARS(every, lr=1.0, momentum=0.9, trust_coefficient=0.01, decay_in_norm=False)
    groups = [{"params": trained[:3]}, {"params": trained[3:], "weight_decay": 1e-2}] if several_groups else trained
    return lars.LARS(groups, lr=1.0, momentum=0.9, weight_decay=1e-3, trust_coefficient=0.01)


def worst(
    states: list[dict],
    several_groups: bool = False,
    kind: type[Odd] = Odd,
    zero_for_none: bool = False,
    caffe: bool = False,
) -> float:
    """The largest error of a layer's weights after a step, as a multiple of what rounding explains.

    The control is LARS in one process, in float64, with the whole batch; a missing gradient is left out, or counts as
    zero. It takes every step from the weights that the engine had before it: over several steps the rule enlarges a
    difference. (With the Caffe fork's rule the norm's weight shrinks tenfold in the first step here, and the
    convolution doubles in the third: 5 units of a gradient's last place became 470 of the way from the start.)

    What a step adds to the velocity has the gradient's error twice, once from the trust ratio; the velocity remembers
    the error, is rounded twice when it is made, and the weight once.
    """
    net = model(kind).double()

    def gradients(step: int) -> None:
        x, y = batch(step)
        F.cross_entropy(net(x.double()), y).backward()
        for p in net.parameters():
            if zero_for_none and p.requires_grad and p.grad is None:
                p.grad = torch.zeros_like(p)

    return largest_error(states, net, optimizer(net, several_groups, caffe), gradients, ROUNDING)


def largest_error(
    states: list[dict], net: nn.Module, rule: lars.LARS, gradients: Callable[[int], None], rounding: float
) -> float:
    """`worst` for a rule on `net`, whose `gradients` are those of the engine up to `rounding`."""
    errors = []
    allowed = {n: torch.zeros(()) for n, _ in net.named_parameters()}  # of the velocity
    for step, ours in enumerate(states):
        for group in rule.param_groups:
            group["lr"] = RATES[step]
        old = {p: state["momentum_buffer"].clone() for p, state in rule.state.items()}
        gradients(step)
        rule.step()
        rule.zero_grad()
        for name, p in net.named_parameters():
            w = p.detach()
            if p in rule.state:
                v = rule.state[p]["momentum_buffer"]
                kept = 0.9 * old[p] if p in old else torch.zeros_like(v)
                allowed[name] = 0.9 * allowed[name] + 2 * rounding * (v - kept).norm() + 2 * U * v.norm()
            if name in ours:  # not the frozen ones of a bf16 engine
                error = (ours[name].double() - w).norm()
                errors.append(float(error / (allowed[name] + U * w.norm())) if error > 0 else 0.0)
                p.data.copy_(ours[name])
    return max(errors)


def worst_bf16(states: list[dict], world: int) -> float:
    """`worst` of float32 masters whose gradients come from a bf16 copy in each process and are averaged in float32.

    The copies' gradients have the engine's bits (the same shapes, one thread). What is left is their sum, rounded once,
    and the norms, sums of up to 37 * 37 squares.
    """
    masters = model().bfloat16().double()  # DeepSpeed's masters are made of weights that it has rounded

    def gradients(step: int) -> None:
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        for p in masters.parameters():
            p.grad = torch.zeros_like(p) if p.requires_grad else None
        for x, y in zip(*(part.chunk(world) for part in batch(step))):
            copy = model().bfloat16()
            copy.load_state_dict(masters.state_dict())
            F.cross_entropy(copy(x.bfloat16()).float(), y).backward()
            for p, q in zip(masters.parameters(), copy.parameters()):
                if p.requires_grad:
                    p.grad += q.grad.double() / world
        torch.set_num_threads(threads)

    return largest_error(states, masters, optimizer(masters), gradients, U * (37 * 37 + 1) ** 0.5)


def count_all_reduces(counts: list[int]) -> None:
    """Count the calls of `all_reduce` that LARS makes, at the process group."""
    real = lars.optim.sharding.dist.all_reduce

    class Counted:
        def __getattr__(self, name: str):
            return getattr(dist, name)

        def all_reduce(self, *args, **kwargs):
            counts[0] += 1
            return real(*args, **kwargs)

    lars.optim.sharding.dist = Counted()


@dataclass
class Play:
    """What processes are asked to train: STEPS steps of a model on an engine."""

    zero: dict = field(default_factory=dict)  # DeepSpeed's zero_optimization
    more: dict = field(default_factory=dict)  # other sections of its configuration
    kind: type[Odd] = Odd
    several_groups: bool = False
    caffe: bool = False
    slices: str = "bound"  # what the rule says of them
    bind: bool = True


def stage(number: int, **how) -> Play:
    return Play({"stage": number}, **how)


def _deepspeed(rank: int, world: int, play: Play) -> dict:
    """Rank 0's answer counts: the weights after each step, the engine's type, LARS's all-reduces in a step."""
    compile_nothing()
    import deepspeed

    net, bf16 = model(play.kind), "bf16" in play.more
    micro = BATCH // world // play.more.get("gradient_accumulation_steps", 1)
    config = {
        "train_micro_batch_size_per_gpu": micro,
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": play.zero,
        **play.more,
    }
    if bf16 and play.zero["stage"]:
        config |= {"communication_data_type": "fp32", "data_types": {"grad_accum_dtype": "fp32"}}
    rule = optimizer(net, play.several_groups, play.caffe)
    rule.slices = play.slices
    engine, wrapped, _, _ = deepspeed.initialize(model=net, optimizer=rule, config=config)
    counts = [0]
    states = []
    try:
        if play.bind:
            lars.bind(engine, wrapped)
            count_all_reduces(counts)
        for step in range(STEPS):
            for group in engine.optimizer.param_groups:
                group["lr"] = RATES[step]
            x, y = batch(step)
            x, y = x.chunk(world)[rank].to(next(net.parameters()).dtype), y.chunk(world)[rank]
            for part_x, part_y in zip(x.split(micro), y.split(micro)):
                engine.backward(F.cross_entropy(engine(part_x).float(), part_y))
                engine.step()
            if hasattr(net, "calls") and hasattr(engine.optimizer, "grad_partitions_flat_buffer"):
                engine.optimizer.grad_partitions_flat_buffer.zero_()  # DeepSpeed leaves the step before there
            names = dict(net.named_parameters())
            if bf16:
                steps_own = counts[0]
                masters = dict(_lars(wrapped).layout.gather(lambda t: t.detach()))
                counts[0] = steps_own
                shapes = {n: p.shape for n, p in model().named_parameters()}
                states.append({n: masters[p].view(shapes[n]) for n, p in names.items() if p in masters})
            elif play.zero["stage"] == 3:
                with deepspeed.zero.GatheredParameters(list(names.values())):
                    states.append({n: p.detach().clone() for n, p in names.items()})
            else:
                states.append({n: p.detach().clone() for n, p in names.items()})
        answer = {"states": states, "engine": type(engine.optimizer).__name__, "all_reduces": counts[0] / STEPS}
        if play.bind and play.zero["stage"]:
            answer["layout"] = {
                n: w for p, w in _lars(wrapped).layout.gather(lambda t: t.detach()) for n, q in names.items() if p is q
            }
            _scatter_and_gather_again(_lars(wrapped))
    except lars.ShardingError as error:
        answer = {"refused": str(error)}
    return answer


def _lars(wrapped: object) -> lars.LARS:
    while not isinstance(wrapped, lars.LARS):
        wrapped = wrapped.optimizer
    return wrapped


def _scatter_and_gather_again(rule: lars.LARS) -> None:
    """Whole velocities, cut up and put together again, have the same bits; also -0.0 and NaN."""
    velocity = lambda t: rule.state[t]["momentum_buffer"]  # noqa: E731
    whole = {}
    for p, size in zip(rule.layout.parameters, rule.layout.sizes):
        whole[p] = torch.randn(size, generator=torch.Generator().manual_seed(size))
        whole[p][:2] = torch.tensor([-0.0, float("nan")])
    rule.layout.scatter(whole.get, velocity)
    for p, again in rule.layout.gather(velocity):
        assert torch.equal(again.view(torch.int32), whole[p].view(torch.int32))


def _fsdp2(rank: int, world: int, play: Play) -> dict:
    from torch.distributed.fsdp import fully_shard

    net = model(play.kind)
    fully_shard(net)
    rule = optimizer(net, play.several_groups, play.caffe)
    counts, states = [0], []
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
    return {"states": states, "engine": type(next(net.parameters())).__name__, "all_reduces": counts[0] / STEPS}


def _rank(rank: int, world: int, port: int, engine: Callable[[int, int, Play], dict], plays: tuple, out: Path) -> None:
    os.environ.update(
        RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_SIZE=str(world), DS_ACCELERATOR="cpu"
    )
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    answers = [engine(rank, world, play) for play in plays]
    if rank == 0:
        torch.save(answers, out)
    dist.destroy_process_group()


def run(engine: Callable[[int, int, Play], dict], world: int, tmp_path: Path, *plays: Play) -> list[dict]:
    """What processes answer that play one after the other: to start them takes longer than to play."""
    port = free_port()
    out = tmp_path / "answers.pt"
    ranks = [RANKS.Process(target=_rank, args=(r, world, port, engine, plays, out)) for r in range(world)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(480)
    assert [rank.exitcode for rank in ranks] == [0] * world
    return torch.load(out)


ENGINES = {1: "DeepSpeedZeroOptimizer", 2: "DeepSpeedZeroOptimizer", 3: "DeepSpeedZeroOptimizer_Stage3"}


ROUND_ROBIN = {"round_robin_gradients": True}
SMALL = {"reduce_bucket_size": 500}
OFFLOAD = {"offload_optimizer": {"device": "cpu"}}
UNFORCED = {"zero_force_ds_cpu_optimizer": False}
GROUPS = {"several_groups": True, "more": {"gradient_accumulation_steps": 2}}
QUICK = {  # what two processes play in `make test`; those that end with an error are the last
    **{f"stage {number}": stage(number) for number in (1, 2, 3)},
    "caffe": stage(3, caffe=True),
    "layout": Play({"stage": 3, **SMALL, "stage3_param_persistence_threshold": 0}, **GROUPS),
    "whole tensors": stage(2, slices="refused"),
    "offload": Play({"stage": 2, **OFFLOAD}, UNFORCED),
    "unbound": stage(3, bind=False),
}


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict]:
    return dict(zip(QUICK, run(_deepspeed, 2, tmp_path_factory.mktemp("pair"), *QUICK.values())))


def assert_exact(answer: dict, number: int) -> None:
    assert answer["engine"] == ENGINES[number]
    assert worst(answer["states"]) <= 1
    assert answer["all_reduces"] == 1


@pytest.mark.parametrize("number", [1, 2, 3])
def test_zero_is_exact_with_one_all_reduce(number: int, pair: dict[str, dict]) -> None:
    assert_exact(pair[f"stage {number}"], number)


@pytest.mark.long
@pytest.mark.parametrize("world", [1, 3])
def test_zero_is_exact_on_other_numbers_of_processes(world: int, tmp_path: Path) -> None:
    for number, answer in enumerate(run(_deepspeed, world, tmp_path, *map(stage, (1, 2, 3))), 1):
        assert_exact(answer, number)


def assert_exact_as_in_caffe(answer: dict) -> None:
    assert worst(answer["states"], caffe=True) <= 1 < worst(answer["states"])
    assert answer["all_reduces"] == 1


def test_the_caffe_forks_rule_is_exact_on_slices(pair: dict[str, dict]) -> None:
    assert_exact_as_in_caffe(pair["caffe"])


@pytest.mark.long
def test_the_caffe_forks_rule_is_exact_on_stages_1_and_2_and_under_fsdp2(tmp_path: Path) -> None:
    sharded = run(_deepspeed, 2, tmp_path, stage(1, caffe=True), stage(2, caffe=True))
    for answer in [*sharded, *run(_fsdp2, 2, tmp_path, Play(caffe=True))]:
        assert_exact_as_in_caffe(answer)


def test_unbound_slices_are_refused(pair: dict[str, dict]) -> None:
    assert "lars.bind" in pair["unbound"]["refused"]


@pytest.mark.long
@pytest.mark.parametrize("number", [1, 2])
def test_unbound_slices_are_refused_on_stages_1_and_2(number: int, tmp_path: Path) -> None:
    assert "lars.bind" in run(_deepspeed, 2, tmp_path, stage(number, bind=False))[0]["refused"]


def assert_exact_in_several_groups(answer: dict) -> None:
    assert worst(answer["states"], several_groups=True) <= 1
    for name, whole in answer["layout"].items():  # what checkpoints are made of
        assert torch.equal(whole.view_as(answer["states"][-1][name]), answer["states"][-1][name])


def test_small_buckets(pair: dict[str, dict]) -> None:
    assert_exact_in_several_groups(pair["layout"])


@pytest.mark.long
@pytest.mark.parametrize(
    "zero",
    [
        {"stage": 1, **ROUND_ROBIN},
        {"stage": 2, **ROUND_ROBIN, **SMALL, "allgather_bucket_size": 500},
        {"stage": 2, "overlap_comm": True, "contiguous_gradients": False},
    ],
    ids=["round robin", "round robin, small buckets", "overlap"],
)
def test_layouts(zero: dict, tmp_path: Path) -> None:
    assert_exact_in_several_groups(run(_deepspeed, 2, tmp_path, Play(zero, **GROUPS))[0])


@pytest.mark.long
def test_stage_3_sub_groups_are_exact_at_one_all_reduce_each(tmp_path: Path) -> None:
    (answer,) = run(_deepspeed, 2, tmp_path, Play({"stage": 3, "sub_group_size": 300}))
    assert worst(answer["states"]) <= 1
    assert answer["all_reduces"] > 1


@pytest.mark.long
def test_stage_0_needs_no_collective(tmp_path: Path) -> None:
    (answer,) = run(_deepspeed, 2, tmp_path, stage(0))
    assert worst(answer["states"]) <= 1 and answer["all_reduces"] == 0


@pytest.mark.long
@pytest.mark.parametrize("number", [1, 2, 3])
def test_deepspeed_s_own_bf16_section_is_exact_on_its_masters(number: int, tmp_path: Path) -> None:
    """With `data_types.grad_accum_dtype: fp32` every stage averages and keeps the bf16 gradients in float32."""
    (answer,) = run(_deepspeed, 2, tmp_path, stage(number, more={"bf16": {"enabled": True}}))
    assert answer["engine"] == ("BF16_Optimizer" if number == 1 else ENGINES[number])
    assert worst_bf16(answer["states"], 2) <= 1
    assert answer["all_reduces"] == 1


@pytest.mark.long
def test_deepspeed_s_bf16_section_on_stage_0_is_refused(tmp_path: Path) -> None:
    (answer,) = run(_deepspeed, 2, tmp_path, stage(0, more={"bf16": {"enabled": True}}))
    assert "is not a layout that LARS knows" in answer["refused"]


@pytest.mark.long
@pytest.mark.parametrize("number", [2, 3])
def test_a_layer_without_gradient_counts_as_one_of_zeros_in_flat_slices(number: int, tmp_path: Path) -> None:
    """On stage 3 only if the last step's gradients are cleared: DeepSpeed 0.19.8 would take them for this one's."""
    (answer,) = run(_deepspeed, 2, tmp_path, stage(number, kind=Skips))
    assert worst(answer["states"], kind=Skips, zero_for_none=True) <= 1 < worst(answer["states"], kind=Skips)


@pytest.mark.long
def test_a_layer_without_gradient_is_left_alone_under_fsdp2(tmp_path: Path) -> None:
    assert worst(run(_fsdp2, 2, tmp_path, Play(kind=Skips))[0]["states"], kind=Skips) <= 1


def test_a_rule_that_needs_whole_tensors_is_refused(pair: dict[str, dict]) -> None:
    assert "LARS needs whole tensors: train it with plain data parallel or DDP" in pair["whole tensors"]["refused"]


def test_optimizer_offload_is_refused(pair: dict[str, dict]) -> None:
    assert "offload" in pair["offload"]["refused"]


@pytest.mark.long
@pytest.mark.parametrize("number", [1, 3])
def test_optimizer_offload_is_refused_on_stages_1_and_3(number: int, tmp_path: Path) -> None:
    (answer,) = run(_deepspeed, 2, tmp_path, Play({"stage": number, **OFFLOAD}, UNFORCED))
    assert "offload" in answer["refused"]


ALONE = """
import os, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        absent = ("accelerate", "timm", "datasets", "transformers", "omegaconf", "torchvision", "pyarrow")
        if name.split(".")[0] in absent:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Absent())
import torch, deepspeed, lars
import torch.nn.functional as F
rank, world = int(os.environ["RANK"]), 2
def model():
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Linear(7, 13), torch.nn.Tanh(), torch.nn.Linear(13, 5))
x, y = torch.randn(6, 7, generator=torch.Generator().manual_seed(1)), torch.arange(6) % 5
plain, net = model(), model()
before = [p.detach().clone() for p in plain.parameters()]
rule = lars.LARS(plain.parameters(), lr=10.0, weight_decay=1e-3)
config = {
    "train_micro_batch_size_per_gpu": 3,
    "gradient_clipping": 0.0,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 2},
}
deepspeed.init_distributed("gloo")
inner = lars.LARS(net.parameters(), lr=10.0, weight_decay=1e-3)
engine, optimizer, _, _ = deepspeed.initialize(model=net, optimizer=inner, config=config)
lars.bind(engine, optimizer)
F.cross_entropy(plain(x), y).backward()
rule.step()
engine.backward(F.cross_entropy(engine(x.chunk(world)[rank]), y.chunk(world)[rank]))
engine.step()
# two evaluations, as in parity.py: a gradient element is a sum of 6 products behind sums of 5 and 13; w' = w - v'
u, k = 2.0**-24, 6 + 5 + 13
for p, q, w in zip(plain.parameters(), net.parameters(), before):
    assert (p - q).norm() <= u * ((4 * k**0.5 + 4) * (p - w).norm() + 2 * p.norm()) and not torch.equal(p, w)
assert not {"accelerate", "timm", "datasets", "transformers", "omegaconf"} & set(sys.modules)
torch.distributed.destroy_process_group()
print("EXACT")
"""


@pytest.mark.long
def test_deepspeed_without_accelerate_needs_torch_deepspeed_and_this_package(tmp_path: Path) -> None:
    (tmp_path / "alone.py").write_text(ALONE)
    port = free_port()
    common = {
        "WORLD_SIZE": "2",
        "LOCAL_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "DS_ACCELERATOR": "cpu",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "alone.py")],
            env={**os.environ, **common, "RANK": str(r), "LOCAL_RANK": str(r), "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for r in range(2)
    ]
    printed = [rank.communicate(timeout=240)[0] for rank in ranks]
    for left in Path("/dev/shm").glob(f"deepspeed_*_127.0.0.1_{port}_*"):
        left.unlink(missing_ok=True)  # 64 MiB a process
    assert all("EXACT" in text for text in printed), printed


@pytest.mark.parametrize("world", [2, *(pytest.param(world, marks=pytest.mark.long) for world in (1, 3))])
def test_fsdp2_is_exact_with_one_all_reduce(world: int, tmp_path: Path) -> None:
    (answer,) = run(_fsdp2, world, tmp_path, Play())
    assert answer["engine"] == "DTensor"
    assert worst(answer["states"]) <= 1
    assert answer["all_reduces"] == 1


def test_bind_on_a_plain_module_changes_nothing_and_wants_a_lars() -> None:
    net = model()
    rule = optimizer(net)
    lars.bind(net, rule)
    lars.bind(net, rule)
    assert rule.layout is None
    with pytest.raises(TypeError, match="lars.LARS"):
        lars.bind(net, torch.optim.SGD(net.parameters(), lr=0.1))
