"""A plan for people: in words, a table over numbers of devices, a picture."""

from __future__ import annotations

from pathlib import Path

from lars.plan.cluster import USABLE
from lars.plan.plan import Plan


def report(plan: Plan, file: Path, overrides: list[str]) -> str:
    """The plan in words; every number of the cluster file that it rests on has its source there."""
    step, batch, cluster = plan.step, plan.batch, plan.cluster
    idle = max(0.0, step.seconds - step.compute - step.summing - step.communication - step.update)
    parts = {
        "compute": step.compute,
        "order-free sum": step.summing,
        "waiting for other devices and their gradients": step.communication,
        "optimizer": step.update,
        "decoding" if step.decodes else "waiting for data": idle,
    }
    shares = [f"{name} {100 * seconds / step.seconds:.1f} %" for name, seconds in parts.items()]
    groups = f" ({batch.micro_batch // batch.bn_group} of bn_group {batch.bn_group})" if batch.bn_group else ""
    shared = f"{batch.processes} devices x {batch.passes_per_process} passes"
    if uneven := batch.passes % batch.processes:
        shared = f"{batch.passes} passes, {batch.passes_per_process} on each of {uneven} of {batch.processes} devices"
    lines = [
        f"{plan.recipe.name} on {cluster.name}: about {duration(plan.seconds)} ({interval(plan)})",
        f"  steps       {plan.steps:,} of {step.seconds:.3g} s, {plan.evaluations} evaluations "
        f"({duration(plan.evaluation_seconds)} of the time)",
        f"  a step      {batch.global_batch:,} images = {shared} x micro_batch {batch.micro_batch}{groups}",
        f"  speed       {plan.images_per_second:,.0f} images/s: {', '.join(shares)}",
        f"  bottleneck  {plan.bottleneck}",
        f"  memory      {plan.state_bytes / 1e9:.2f} GB of state + {plan.activation_bytes / 1e9:.1f} GB of activations "
        f"of {cluster.device.memory_bytes / 1e9:.0f} GB a device ({USABLE:.0%} counted as usable)",
    ]
    if uneven:
        idle_share = 1 - batch.passes / (batch.passes_per_process * batch.processes)
        lines.append(f"  uneven      {idle_share:.1%} of the devices' time is waiting for those with one pass more")
    if not plan.fits:
        lines.append(
            "              does not fit: add runtime.activation_checkpointing=true, or take a device with more memory"
        )
    if plan.cost is not None:
        lines.append(f"  cost        {plan.cost:,.0f} at {cluster.price_per_device_hour:g} a device hour")
    if plan.recipe.precision not in cluster.device.peak:
        lines.append(f"  precision   {plan.recipe.precision} counted as fp32, which is what {cluster.device.name} has")
    if cluster.device.decodes and cluster.node.cores > cluster.node.devices and plan.recipe.runtime.deterministic:
        holds = "this holds for runtime.deterministic=false, or with each core as a device"
        lines.append(f"  threads     a deterministic process uses one CPU thread: {holds}")
    lines.append(f"  start       {plan.command(file, overrides)}")
    return "\n".join(lines)


def duration(seconds: float) -> str:
    """0.22 s, 17 s, 4.2 min, 3.1 h, 2.5 days."""
    for unit, size in (("days", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.0f} s" if seconds >= 10 else f"{seconds:.2g} s"


def interval(plan: Plan) -> str:
    """As in "44.1 min to 1.6 h"."""
    return " to ".join(map(duration, plan.seconds_interval))


def sweep_table(plans: list[Plan]) -> str:
    """One line for each number of devices; efficiency is against the first."""
    lines = [
        "devices  micro_batch  passes  time       interval              images/s   efficiency  exchange  bottleneck"
    ]
    for plan, share in zip(plans, efficiencies(plans)):
        exchange = (plan.step.communication + plan.step.summing) / plan.step.seconds
        lines.append(
            f"{plan.cluster.devices:<8,} {plan.batch.micro_batch:<12,} {plan.batch.passes_per_process:<7,} "
            f"{duration(plan.seconds):<10} {interval(plan):<21} {plan.images_per_second:<10,.0f} {share:<11.0%} "
            f"{exchange:<9.1%} {plan.bottleneck}"
        )
    return "\n".join(lines)


def efficiencies(plans: list[Plan]) -> list[float]:
    """Device hours of the first plan to those of each."""
    used = [plan.seconds * plan.cluster.devices for plan in plans]
    return [used[0] / each for each in used]


def draw(plans: list[Plan], picture: Path) -> None:
    """Strong scaling: time and efficiency against devices."""
    from matplotlib.figure import Figure

    devices = [plan.cluster.devices for plan in plans]
    figure = Figure((10, 3.6), layout="constrained")
    time, efficiency = figure.subplots(1, 2)
    minutes = [plan.seconds / 60 for plan in plans]
    time.loglog(devices, minutes, marker="o", label="planned")
    time.loglog(devices, [minutes[0] * devices[0] / n for n in devices], linestyle=":", color="grey", label="ideal")
    low, high = zip(*(plan.seconds_interval for plan in plans))
    time.fill_between(devices, [s / 60 for s in low], [s / 60 for s in high], alpha=0.2, label="19 of 25 judged runs")
    time.set_title(f"{plans[0].recipe.name}: minutes")
    time.legend()
    efficiency.semilogx(devices, [100 * share for share in efficiencies(plans)], marker="o")
    efficiency.set_ylim(0, 105)
    efficiency.set_title("efficiency, per cent of ideal scaling")
    for axis in (time, efficiency):
        axis.set_xticks(devices, [str(n) for n in devices])
        axis.minorticks_off()
        axis.set_xlabel(plans[0].cluster.device.name)
        axis.grid(alpha=0.3)
    picture.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture, dpi=110)
