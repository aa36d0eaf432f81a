"""How long a recipe takes on a cluster and how much memory: `lars plan` prints it, `make tables` writes it."""

from __future__ import annotations

import itertools
import math
import operator
import os
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lars.engine.build import build_model, sums_order_free
from lars.engine.memory import kept_in, state_bytes
from lars.plan.cluster import USABLE, Cluster
from lars.plan.cost import (
    FLOAT_BYTES,
    INTEGER_BYTES,
    INTERVAL,
    VIEW,
    Counts,
    Step,
    Work,
    count,
    count_operations,
    evaluation_seconds,
    step_of,
)
from lars.recipe.batch import BatchPlan
from lars.recipe.keys import Recipe
from lars.recipe.refusal import RecipeError
from lars.recipe.schedule import evaluation_epochs, training_sizes

KNOWN_DATA = {"ILSVRC/imagenet-1k": (1_281_167, 50_000, 110_000)}
"""Training and validation samples, bytes of an encoded image (140 GB in all, remembered); it need not be opened."""


@dataclass(frozen=True)
class Plan:
    """One recipe on one cluster."""

    recipe: Recipe
    cluster: Cluster
    batch: BatchPlan
    work: Work
    step: Step
    state_bytes: int
    activation_bytes: int
    fits: bool

    @property
    def steps(self) -> int:
        return min(self.batch.steps, self.recipe.max_steps or self.batch.steps)

    @property
    def evaluations(self) -> int:
        return len({min(step, self.steps) for step in self.batch.evaluation_steps(evaluation_epochs(self.recipe))})

    @property
    def evaluation_seconds(self) -> float:
        """Of all evaluations."""
        return self.evaluations * evaluation_seconds(self.work, self.cluster)

    @property
    def seconds(self) -> float:
        """Steps and evaluations; start-up and checkpoints are not in it."""
        return self.steps * self.step.seconds + self.evaluation_seconds

    @property
    def seconds_interval(self) -> tuple[float, float]:
        """Where 19 of the 25 runs lay that the model was judged by."""
        return self.seconds * INTERVAL[0], self.seconds * INTERVAL[1]

    @property
    def images_per_second(self) -> float:
        """Of the steps, as metrics.jsonl counts it."""
        return self.recipe.global_batch / self.step.seconds

    @property
    def bottleneck(self) -> str:
        return self.step.bottleneck if self.fits else "memory"

    @property
    def cost(self) -> float | None:
        price = self.cluster.price_per_device_hour
        return None if price is None else self.seconds / 3600 * self.cluster.devices * price

    def command(self, file: Path, overrides: list[str]) -> str:
        """What starts it; on several machines it is started on each."""
        if self.cluster.launch is None:
            return f"nothing here runs on {self.cluster.device.name}"
        nodes, where, machines = self.cluster.nodes, "", ""
        if nodes > 1:
            where = f"on each of {nodes} machines: "
            machines = f" --num_machines {nodes} --machine_rank RANK --main_process_ip HOST --main_process_port 29500"
        given = [key for key in overrides if not key.startswith("runtime.micro_batch=")]
        keys = [*given, f"runtime.micro_batch={self.batch.micro_batch}", *self.cluster.device.settings]
        return (
            f"{where}accelerate launch --config_file launch/{self.cluster.launch}.yaml"
            f" --num_processes {self.cluster.devices}{machines} recipes/train.py --config {file} {' '.join(keys)}"
        )

    def as_dict(self) -> dict[str, Any]:
        """The six numbers that scripts rely on, and `details`."""
        return {
            "seconds": self.seconds,
            "steps": self.steps,
            "passes_per_device": self.batch.passes_per_process,
            "images_per_second": self.images_per_second,
            "memory_bytes_per_device": self.state_bytes + self.activation_bytes,
            "bottleneck": self.bottleneck,
            "details": {
                "seconds_interval": self.seconds_interval,
                "devices": self.cluster.devices,
                "micro_batch": self.batch.micro_batch,
                "launch": self.cluster.launch,
                "step_seconds": self.step.seconds,
                "compute_seconds": self.step.compute,
                "update_seconds": self.step.update,
                "summing_seconds": self.step.summing,
                "communication_seconds": self.step.communication,
                "data_seconds": self.step.data,
                "evaluation_seconds": self.evaluation_seconds,
                "cost": self.cost,
            },
        }


def make_plan(recipe: Recipe, cluster: Cluster, sweep: Iterable[int] = ()) -> Plan:
    """Count the model, choose the passes (one micro_batch for all numbers of devices in `sweep`), add up.

    Raises:
        RecipeError: the devices cannot share the passes, whatever the micro_batch; the data cannot be looked at.
    """
    samples, validation, image_bytes = data_of(recipe)
    model, _ = build_model(recipe)
    if recipe.runtime.activation_checkpointing and hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing()
    group, evaluated = recipe.bn_group or 1, recipe.model.image_size
    sizes = {size: count(model, group, size) for size in {*training_sizes(recipe), evaluated}}
    largest = max((sizes[size] for size in training_sizes(recipe)), key=lambda counts: counts.kept_bytes)
    state = state_bytes(recipe, cluster.devices) * largest.weights
    room = USABLE * cluster.device.memory_bytes - state
    an_image = kept_in(recipe.precision, largest.kept_bytes)
    batch = choose_passes(recipe, samples, cluster.devices, int(room // an_image), sweep)
    operations = count_operations(model, batch.micro_batch, evaluated)
    order_free = sums_order_free(recipe, cluster.devices)
    work = Work(
        counts=replace(_mean(recipe, sizes), operations=operations),
        evaluated=replace(sizes[evaluated], operations=operations),
        validation=validation,
        global_batch=batch.passes_per_process * batch.micro_batch * batch.processes,
        micro_batch=batch.micro_batch,
        precision=recipe.precision,
        order_free=order_free,
        wire_bytes=INTEGER_BYTES if order_free else FLOAT_BYTES,
        image_bytes=image_bytes,
        view=VIEW[recipe.augment.resampling],
    )
    activations = round(an_image * batch.micro_batch)
    return Plan(recipe, cluster, batch, work, step_of(work, cluster), state, activations, activations <= room)


def _mean(recipe: Recipe, sizes: dict[int, Counts]) -> Counts:
    """Of an image of the whole training: each size counts for as long as it lasts."""
    trained = [sizes[size] for size in training_sizes(recipe)]
    edges = [0.0, *recipe.augment.size_epochs, recipe.epochs]
    shares = [(end - begin) / recipe.epochs for begin, end in itertools.pairwise(edges)]
    flops, kept = (
        sum(map(operator.mul, shares, column)) for column in zip(*((c.flops, c.kept_bytes) for c in trained))
    )
    return replace(trained[0], flops=flops, kept_bytes=kept)


def choose_passes(
    recipe: Recipe, samples: int, devices: int, images_that_fit: int, sweep: Iterable[int] = ()
) -> BatchPlan:
    """The recipe's micro_batch, or the one that `devices`, and all numbers of devices of a sweep, share best.

    Of several it is the largest. A sweep has one, since the passes decide a run's bits: whoever follows it keeps one
    hash. It is a multiple of bn_group that fits; where not even the smallest fits, that one: the plan then says so.
    """
    group, batch, even = recipe.bn_group or 1, recipe.global_batch, not sums_order_free(recipe, devices)
    counts = {devices, *sweep}
    most = batch // max(counts) if batch <= samples else 0  # a larger batch is refused below
    allowed = [m for m in range(group, most + 1, group) if batch % m == 0]
    if even:
        allowed = [m for m in allowed if not any(batch % (m * count) for count in counts)]

    def busiest(micro: int) -> float:
        """Images of the device with most passes, in units of its share; the largest of all counts."""
        return max(math.ceil(batch / micro / count) * micro * count / batch for count in counts)

    if recipe.runtime.micro_batch is None:
        fitting = [m for m in allowed if m <= images_that_fit] or allowed[:1] or [group]
        best = max(fitting, key=lambda micro: (-busiest(micro), micro))
        recipe = replace(recipe, runtime=replace(recipe.runtime, micro_batch=best))
    return BatchPlan.of(recipe, samples, devices, even)


def data_of(recipe: Recipe) -> tuple[int, int, float]:
    """Training and validation samples, mean bytes of an encoded training image."""
    if (place := recipe.data.place) in KNOWN_DATA:
        return KNOWN_DATA[place]
    if not os.path.isdir(place):
        known = f"the plan knows {', '.join(KNOWN_DATA)} and local folders"
        raise RecipeError(f"data.path={recipe.data.path}: {known}, give data.path=FOLDER")
    from lars.data.index import build_indexes

    train, val = build_indexes(recipe.data, recipe.model.num_classes)
    return train.samples, val.samples, sum(map(os.path.getsize, train.files)) / train.samples


def with_devices(cluster: Cluster, devices: int) -> Cluster:
    """As many devices of the same kind, in nodes of the same kind."""
    size = cluster.node.devices
    if devices < 1 or devices > size and devices % size:
        full = max(1, devices // size) * size
        raise RecipeError(f"{devices} devices do not fill nodes of {size}: use {full} or {full + size}")
    return replace(cluster, devices=devices, name=f"{devices:,} x {cluster.device.name}")
