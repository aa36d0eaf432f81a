"""The typed description of a cluster (launch/clusters/*.yaml): what the plan has to know of devices, links and data."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import MISSING, OmegaConf

from lars.recipe import strict_yaml
from lars.recipe.config import flatten
from lars.recipe.refusal import RecipeError

USABLE = 0.85  # of a device's memory, assumed: libraries, workspaces and fragments take the rest


@dataclass
class Device:
    """What one process trains on: a GPU, a TPU chip, a processor or a core of one."""

    name: str = MISSING
    decodes: bool = MISSING  # it also decodes the images, as a CPU does; a GPU leaves that to the cores of its node
    peak: dict[str, float] = MISSING  # precision: flop/s of the datasheet; a precision that is not there runs as fp32
    efficiency: float = MISSING  # share of the peak that convolutions reach
    memory_bandwidth: float = MISSING  # bytes/s
    memory_passes: float = MISSING  # how often training moves each byte that the forward keeps, beside its convolutions
    images_per_second: float | None = None  # ResNet-50, 224 pixels, one device; beats what the four above say
    seconds_per_operation: float = MISSING  # what a tensor operation costs however small it is
    memory_bytes: int = MISSING
    settings: list[str] = field(default_factory=list)  # runtime keys that the rate needs


@dataclass
class Node:
    devices: int = MISSING
    cores: int = MISSING
    decode_bytes_per_second: float = MISSING  # encoded bytes that one core decodes and crops
    seconds_per_image: float = MISSING  # of one core, however small the image
    storage_bytes_per_second: float = MISSING  # encoded images, read by the whole node


@dataclass
class Link:
    bytes_per_second: float = MISSING  # in each direction
    seconds: float = MISSING  # latency of one message


@dataclass
class Cluster:
    name: str = MISSING
    devices: int = MISSING
    launch: str | None = MISSING  # a file of launch/, by name; null where nothing here runs
    device: Device = field(default_factory=Device)
    node: Node = field(default_factory=Node)
    link: Link = field(default_factory=Link)  # of one device, inside a node
    network: Link = field(default_factory=Link)  # of one node
    # Standard deviation of a device's time for a step, over its mean: the slowest of p normal ones is later than the
    # mean by at most sqrt(2 ln p) of it. Fitted, see launch/clusters/README.md.
    straggling: float = 0.0548
    price_per_device_hour: float | None = None

    @property
    def nodes(self) -> int:
        return -(-self.devices // self.node.devices)


def load_cluster(path: Path, changes: list[str] | None = None) -> Cluster:
    """Read a description, apply `key=value` changes.

    Raises:
        RecipeError: no such file, an unknown or missing key, a wrong type, a number that is not positive.
    """
    config = OmegaConf.structured(Cluster)
    written, lines = strict_yaml.read(path, "cluster", path.parent.glob("*.yaml"))
    if not written.keys() & config.keys():
        raise RecipeError(
            f"{path} describes no cluster: give a file of launch/clusters/, or one of your own like those"
        )
    with strict_yaml.explained(str(path), lines, list(flatten(Cluster())), "device.peak"):
        config.merge_with(written, OmegaConf.from_dotlist(changes or []))
        cluster = strict_yaml.complete(config, path)
    _check(cluster, path)
    return cluster


def _check(cluster: Cluster, path: Path) -> None:
    numbers = {**flatten(cluster), **{f"device.peak.{k}": v for k, v in cluster.device.peak.items()}}
    for key, value in numbers.items():
        may_be_zero = key.endswith(("decodes", "seconds", "straggling")) or "seconds_per" in key
        if isinstance(value, (int, float)) and not (value > 0 or value == 0 and may_be_zero):
            raise RecipeError(f"{path}: {key}={value} must be positive")
    if "fp32" not in cluster.device.peak:
        raise RecipeError(f"{path}: device.peak needs fp32: a precision that is not listed runs as fp32")
    if cluster.devices > cluster.node.devices and cluster.devices % cluster.node.devices:
        raise RecipeError(f"{path}: devices={cluster.devices} do not fill nodes of node.devices={cluster.node.devices}")
