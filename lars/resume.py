"""What a run goes on from: the newest checkpoint that any node sees, read once and given to the others."""
from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from torch import Tensor, nn

from lars import checkpoint, pretrained
from lars.agreement import Peers
from lars.config import Recipe, RecipeError, fixing, flatten_run
from lars.run import read_result


class Found(NamedTuple):
    """The checkpoint that all processes go on from."""

    holder: int  # the process that has read it
    path: Path
    state: checkpoint.State
    held_by_writer: bool  # whether rank 0, which writes the run folder, sees it too


def newest_checkpoint(peers: Peers, run: Path) -> Found | None:
    """The newest checkpoint that any node sees and that is what was written; one process reads it, nobody else.

    Raises:
        RecipeError: two nodes hold different checkpoints of the same step, or all there are are damaged.
    """
    damaged: set[Path] = set()
    while True:
        claims = [c for c in checkpoint.claims(run) if c.path not in damaged] if peers.leads_node else []
        offered = peers.gather((claims[-1].step, claims[-1].digest) if claims else None)
        if not any(offered):
            if any(peers.gather(peers.leads_node and bool(checkpoint.saved(run)))):
                raise RecipeError(f"all checkpoints in {run} are damaged: FRESH=1 or another run_dir=... starts over")
            return None
        step = max(offer[0] for offer in offered if offer)
        holders: dict[str, int] = {}
        for rank, offer in enumerate(offered):
            if offer and offer[0] == step:
                holders.setdefault(offer[1], rank)
        mine = claims[-1].path if peers.rank in holders.values() else None
        state = checkpoint.verified(mine) if mine else None
        if mine and state is None:
            damaged.add(mine)
        whole = peers.gather(state is not None)
        if not all(whole[rank] for rank in holders.values()):
            continue
        if len(holders) > 1:
            (one, first), (other, second) = list(holders.items())[:2]
            raise RecipeError(
                f"{peers.name(first)} and {peers.name(second)} hold different checkpoints of step {step} ({one[:12]} and "
                f"{other[:12]}): remove the one of another run, or give this run its own run_dir=..."
            )
        (digest, holder), = holders.items()
        path, state = peers.broadcast((mine, state), holder)
        return Found(holder, path, state, offered[0] == (step, digest))


def resume(
    peers: Peers, run: Path, recipe: Recipe, data_fingerprint: str, model: nn.Module
) -> tuple[checkpoint.State | None, dict[str, Tensor]]:
    """Load the newest checkpoint's weights into a plain model on all processes; its numbers and its momentum.

    Raises:
        RecipeError: from `newest_checkpoint`, or the checkpoint is of another run.
    """
    found = newest_checkpoint(peers, run)
    if found is None:
        peers.together(partial(pretrained.require, recipe.model.kwargs, recipe.run_dir))
        return None, {}
    state, holder = found.state, found.holder
    then = state.trajectory | {"data fingerprint": state.data_fingerprint}
    checkpoint.check_same_run(then, recipe, data_fingerprint)
    weights, momentum = checkpoint.read(found.path) if peers.rank == holder else (None, None)
    checkpoint.load_weights(peers.broadcast_tensors(weights, holder), state, model)
    for name in () if found.held_by_writer else ("metrics.jsonl", "ledger.jsonl", "mllog.txt"):
        peers.copy_file(run / name, holder, 0)
    if peers.rank == 0:
        print(f"{recipe.name}: resuming after step {state.step} from {found.path}", flush=True)
    return state, peers.broadcast_tensors(momentum, holder)


def finished_steps(peers: Peers, run: Path, recipe: Recipe, data_fingerprint: str, last_step: int) -> int | None:
    """The steps of this run if a node holds its end, so that nobody trains it again; decided once, for all.

    Raises:
        RecipeError: the folder holds the end of another run, or its `result.json` is damaged.
    """

    def look() -> int | None:
        before = read_result(run) if peers.leads_node else {}
        if before.get("status") != "finished":
            return None
        then = fixing(flatten_run(run)) | {"data fingerprint": before.get("data_fingerprint")}
        checkpoint.check_same_run(then, recipe, data_fingerprint)
        return before["steps"] if before["steps"] >= last_step else None

    return max(filter(None, peers.gather(peers.together(look))), default=None)
