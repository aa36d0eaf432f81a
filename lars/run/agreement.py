"""What all processes of a run must share, asked before anything is trained, written or loaded.

A node with another rate, an edited source or other data would train to the end and leave weights that no recipe made.
So the processes compare what fixes the run at the start, and the weights before every checkpoint.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lars.data.content import content_fingerprint
from lars.data.index import Index, fingerprint, on_this_node
from lars.data.reader import check_memory
from lars.data.source import DataError
from lars.exact import portable
from lars.recipe import config
from lars.recipe.keys import Data, Recipe
from lars.recipe.launched import Launched, uses_cpu
from lars.recipe.refusal import short
from lars.run.folder import weights_sha256
from lars.run.peers import Peers
from lars.run.sources import environment, versions

if TYPE_CHECKING:  # these two know this file
    from lars.engine.base import Engine
    from lars.run.checkpoint import State


def same_run(peers: Peers, recipe: Recipe, launched: Launched, data_fingerprint: str, files: dict[str, str]) -> None:
    """Recipe, launch file, data, sources and versions are those of rank 0.

    Raises:
        RecipeError: on all processes; names the first node that differs, the key and both values.
    """
    where = {"the launch file's engine": launched.engine, "data fingerprint": data_fingerprint}
    peers.agree({**where, **config.shared(recipe), **files, **versions()})


def same_data(peers: Peers, indexes: tuple[Index, Index], data: Data) -> tuple[Index, Index]:
    """Rank 0's indexes for the files of this node.

    Raises:
        RecipeError: on all processes; a file is not there, or has other contents than rank 0's.
    """
    return peers.together(lambda: tuple(here(peers, index, data) for index in indexes))


def here(peers: Peers, index: Index, data: Data) -> Index:
    """Rank 0's index for the files of this node, as in `same_data`, on this process alone."""
    found = index if peers.rank == 0 else on_this_node(index, data, verify=peers.leads_node)
    check_memory(found)
    return found


def same_content(peers: Peers, indexes: tuple[Index, Index], before: Sequence[str] = ()) -> dict[str, str | None]:
    """Let all processes know which bytes each of them has read; the result's fingerprints of the data.

    Args:
        before: what a checkpoint kept, of each split.

    Raises:
        DataError: on all processes; two of them have read other bytes of the same row group.
    """
    nothing = np.iinfo(np.int64).min
    for index, kept in zip(indexes, before):
        index.content.recall(kept)
    for index in indexes:
        mine = index.content.read()
        unread = mine[:, :1] == 0
        # ~ turns the largest into the smallest.
        most = peers.largest(np.where(unread, nothing, np.stack([mine, ~mine])))
        high, low = most[0], ~most[1]
        read = high[:, 0] != nothing
        for group in np.flatnonzero(read & (high != low).any(1))[:1]:
            everybody = enumerate(peers.gather(mine[group].tolist()))
            first, *others = [(rank, value) for rank, value in everybody if value[0]]
            other = next(rank for rank, value in others if value != first[1])
            raise DataError(
                f"{index.place(group)} has other bytes for {peers.name(other)} than for {peers.name(first[0])}: all "
                "nodes need the same data; nothing since the last checkpoint is saved"
            )
        index.content.learn(np.where(read[:, None], high, 0))
    content = content_fingerprint([index.content for index in indexes])
    return {"data_fingerprint": fingerprint(*indexes), "content_fingerprint": content}


def same_weights(peers: Peers, weights: dict[str, Tensor], step: int) -> str:
    """The SHA-256 of weights that all processes share.

    Raises:
        RuntimeError: on all processes; they do not.
    """
    digests = peers.gather(weights_sha256(weights))
    different = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
    if different:
        raise RuntimeError(f"step {step}: {peers.name(different[0])} has other weights than rank 0; they are not saved")
    return digests[0]


def strength(peers: Peers, engine: Engine, recipe: Recipe, resumed: State | None) -> tuple[dict[str, Any], str]:
    """What the result says of a run's promise and of where it was made; the promise with a reason, if it is weaker.

    Args:
        engine: built, so that its numeric environment is the one that will train.
        resumed: what the run goes on from; a promise is no stronger than the steps so far allow.
    """
    everybody = peers.gather(environment(engine.device))
    others = [{"rank": rank, **other} for rank, other in enumerate(everybody) if other not in everybody[:rank]][1:]
    now, why = _strength_from_here(peers, engine.reproducibility, recipe, everybody[0], others)
    if resumed and now != "numeric" and not now == resumed.made.get("reproducibility") == "portable":
        then = {"reproducibility": now} if not resumed.made and now == "bitwise" else resumed.made
        before = {"the promise": then.get("reproducibility"), **then.get("environment", everybody[0])}
        for key, value in {"the promise": now, **everybody[0]}.items():
            if key != "python" and before.get(key) != value:
                now = "numeric"
                why = f"its steps so far were made with {key} {short(before.get(key))}, not {short(value)}"
                break
    made = {"world_size": peers.processes, "engine": engine.name, "reproducibility": now}
    return {**made, "environment": everybody[0], "other_environments": others}, f"{now} ({why})" if why else now


def _strength_from_here(
    peers: Peers, promised: str, recipe: Recipe, ours: dict[str, Any], others: list[dict[str, Any]]
) -> tuple[str, str]:
    if promised == "numeric":
        return promised, ""
    hindered = [None] * peers.processes
    if recipe.runtime.portable:
        hindered = peers.gather(portable.obstacle() if uses_cpu() else "it runs on a GPU")
    of_the_cpu = {"device", "cpu_flags"} if recipe.runtime.portable and not any(hindered) else set()
    for other in others:
        for key in sorted(other.keys() - {"rank", "python", *of_the_cpu}):
            if other[key] != ours.get(key):
                why = f"{peers.name(other['rank'])} has {key} {short(other[key])}, not {short(ours.get(key))}"
                return "numeric", why
    if of_the_cpu:
        return "portable", ""
    for rank, why in enumerate(hindered):
        if why:
            return promised, f"not portable on {peers.name(rank)}: {why}"
    return promised, ""
