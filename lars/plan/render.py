"""A plan for people: in words, or as a table over numbers of devices."""

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
    """One line for each number of devices; efficiency is the first one's device hours to theirs."""
    lines = [
        "devices  micro_batch  passes  time       interval              images/s   efficiency  exchange  bottleneck"
    ]
    first = plans[0].seconds * plans[0].cluster.devices
    for plan in plans:
        efficiency = first / (plan.seconds * plan.cluster.devices)
        exchange = (plan.step.communication + plan.step.summing) / plan.step.seconds
        lines.append(
            f"{plan.cluster.devices:<8,} {plan.batch.micro_batch:<12,} {plan.batch.passes_per_process:<7,} "
            f"{duration(plan.seconds):<10} {interval(plan):<21} {plan.images_per_second:<10,.0f} {efficiency:<11.0%} "
            f"{exchange:<9.1%} {plan.bottleneck}"
        )
    return "\n".join(lines)
