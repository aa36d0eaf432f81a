"""What a run goes on from: the newest checkpoint that any node sees, read once and given to the others."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError
from torch import Tensor, nn

from lars.engine.average import named_in_checkpoint
from lars.engine.build import build_optimizer
from lars.recipe import pretrained
from lars.recipe.keys import Recipe, fixing
from lars.recipe.refusal import RecipeError, one_line
from lars.run import checkpoint
from lars.run.checkpoint import State
from lars.run.peers import Peers
from lars.run.reading import flatten_run, read_result
from lars.run.sources import changed_sources, source_sha256

Tensors = dict[str, Tensor]  # by plain names


class Found(NamedTuple):
    """The checkpoint that all processes go on from."""

    holder: int  # the process that has read it
    path: Path
    state: State
    held_by_writer: bool  # whether rank 0, which writes the run folder, sees it too


def recall_weights(recipe: Recipe) -> None:
    """Where the file of the model's first weights is gone: their hash, as the run wrote it when it began."""
    if recipe.model.weights_sha256 is None and pretrained.weights_file(recipe.model.kwargs):
        recipe.model.weights_sha256 = flatten_run(Path(recipe.run_dir)).get("model.weights_sha256")


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
                f"{peers.name(first)} and {peers.name(second)} hold different checkpoints of step {step} "
                f"({one[:12]} and {other[:12]}): remove the one of another run, or give this run its own run_dir=..."
            )
        ((digest, holder),) = holders.items()
        path, state = peers.broadcast((mine, state), holder)
        return Found(holder, path, state, offered[0] == (step, digest))


def resume(
    peers: Peers, run: Path, recipe: Recipe, data_fingerprint: str, model: nn.Module
) -> tuple[State | None, Tensors]:
    """Load the newest checkpoint's weights into a plain model on all processes; its numbers and its momentum.

    Raises:
        RecipeError: from `newest_checkpoint`, or the checkpoint is of another run, or was altered.
    """
    found = newest_checkpoint(peers, run)
    if found is None:
        peers.together(partial(pretrained.require, recipe.model.kwargs, recipe.run_dir))
        return None, {}
    state, holder = found.state, found.holder
    then = state.trajectory | {"data fingerprint": state.data_fingerprint}
    checkpoint.check_same_run(then, recipe, data_fingerprint)
    read = partial(read_fitting, found.path, state, recipe, model)
    weights, momentum = peers.together(read if peers.rank == holder else lambda: (None, None))
    checkpoint.load_weights(peers.broadcast_tensors(weights, holder), state, model)
    for name in () if found.held_by_writer else ("metrics.jsonl", "ledger.jsonl", "mllog.txt"):
        peers.copy_file(run / name, holder, 0)
    if peers.rank == 0:
        print(f"{recipe.name}: resuming after step {state.step} from {found.path}", flush=True)
    return state, peers.broadcast_tensors(momentum, holder)


def read_fitting(path: Path, state: State, recipe: Recipe, model: nn.Module) -> tuple[Tensors, Tensors]:
    """A checkpoint's weights and momentum, for a plain model and the optimizer of its parameters.

    Raises:
        RecipeError: they do not fit. The hashes are right, so no disk did it; people have to decide what was meant.
    """
    try:
        tensors = checkpoint.read(path)
        odd = _misfit(state, *tensors, model, recipe)
    except (SafetensorError, OSError) as error:
        odd = one_line(error)
    if odd:
        raise RecipeError(
            f"{path} was altered: its hashes are right, but it does not fit the model ({odd}). Remove it to go "
            "on from the one before, or give this run its own run_dir=..."
        )
    return tensors


def _misfit(state: State, weights: Tensors, momentum: Tensors, model: nn.Module, recipe: Recipe) -> str:
    """The first tensor that is missing, or has another name, shape or type than the model's; empty if all fit."""
    twice = checkpoint.aliases(model)
    if state.aliases != twice:
        return "other tied weights"
    named = {name: tensor for name, tensor in model.state_dict().items() if name not in twice}
    rule = build_optimizer(recipe, model)
    named_p = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trained = {rule.state_key(name, kind): p for name, p in named_p for kind in rule.state_tensors}
    if recipe.ema_decay:
        trained |= named_in_checkpoint(named)
    whole = state.format > 1 and state.step > 0  # before the first step nothing has a velocity
    for kind, found, wanted, complete in (("weight", weights, named, True), ("velocity", momentum, trained, whole)):
        odd = found.keys() - wanted.keys() | (wanted.keys() - found.keys() if complete else set())
        odd |= {n for n, t in found.items() if n in wanted and (t.shape, t.dtype) != (wanted[n].shape, wanted[n].dtype)}
        if odd:
            return f"{kind} {sorted(odd)[0]}"
    return ""


def finished(
    peers: Peers, recipe: Recipe, data_fingerprint: str, last_step: int, sources: dict[str, str]
) -> str | None:
    """What to say if a node holds this run's end, so that nobody trains it again; decided once, for all.

    Args:
        sources: from `lars.run.sources.sources`; a run that others made is its end all the same, and that is said.

    Raises:
        RecipeError: the folder holds the end of another run, or its `result.json` is damaged.
    """
    run = Path(recipe.run_dir)

    def look() -> tuple[int, str] | None:
        before = read_result(run) if peers.leads_node else {}
        if before.get("status") != "finished":
            return None
        then = fixing(flatten_run(run)) | {"data fingerprint": before.get("data_fingerprint")}
        checkpoint.check_same_run(then, recipe, data_fingerprint)
        steps, changed = before.get("steps") or 0, []
        if before.get("source_sha256") != source_sha256(sources):
            changed = changed_sources(run, sources)
        told = f"already finished after {steps} steps, see {recipe.run_dir}/result.json"
        if changed:
            names = ", ".join(changed[:3]) + ", ..." * (len(changed) > 3)
            told += f"; other sources made it, these have changed since: {names}. Another run_dir=... trains it anew"
        return (steps, told) if steps >= last_step else None

    return max(filter(None, peers.gather(peers.together(look))), default=(0, None))[1]
