"""Trains any recipe: build, set up, train, clean up. The recipe fixes the run, the launch file only its speed.

    accelerate launch --config_file launch/<where>.yaml recipes/train.py --config recipes/<model>/<what>.yaml [k=v]

`--check [--processes N]` validates recipe and data and trains nothing. Exit status: 0 finished, 2 bad recipe or
environment, 75 stopped by a signal after saving (start again to resume), anything else is a failure.
"""

from __future__ import annotations

import gc
import logging
import sys
import time
from functools import partial
from pathlib import Path

from lars.recipe import command_line, config

command_line.pin(sys.argv[1:])  # before anything imports torch, which reads its instruction set once
gc.disable()  # imports leave no garbage, and to look for it among their objects takes long

import torch
from accelerate.utils import gather_object

from lars import ShardingError, bind
from lars.commands.preflight import Preflight, preflight
from lars.data.index import fingerprint
from lars.data.loader import Loader, training_batches
from lars.data.order import Audit, Order, samples_hash
from lars.data.source import BadImages, DataError
from lars.engine.build import build_model, build_optimizer, start_engine
from lars.engine.evaluate import evaluate
from lars.engine.nonfinite import explain_nonfinite
from lars.exact.reduction import StepSums
from lars.recipe.keys import Recipe
from lars.recipe.launched import Alone, Launched, is_first
from lars.recipe.refusal import RecipeError, hidden
from lars.recipe.schedule import Schedule, evaluation_epochs
from lars.run import checkpoint, trackers
from lars.run.agreement import same_content, same_data, same_run, same_weights, strength
from lars.run.checkpoint_writer import CheckpointWriter
from lars.run.folder import NotWritten, RunFolder, position
from lars.run.lock import LockLost
from lars.run.mllog import MLLog
from lars.run.peers import Peers
from lars.run.progress import Progress, group_table, outlive_output
from lars.run.resume import finished, recall_weights, resume
from lars.run.signals import EXIT_STOPPED, StopRequest, interrupts_end_at_once
from lars.run.sources import sources
from lars.run.watchdog import Watchdog

gc.freeze()  # what is imported stays
gc.enable()


class Training:
    """One run of a recipe on this process."""

    def __init__(self, recipe: Recipe, config_file: Path, launched: Launched, peers: Peers) -> None:
        recall_weights(recipe)
        self.recipe, self.launched, self.peers, self.rank = recipe, launched, peers, peers.rank
        self.sources = sources(config_file)
        self.folder = RunFolder(recipe, writes=self.rank == 0)
        self.watchdog = Watchdog(peers, recipe.runtime, partial(self.folder.end, "failed"))
        self.writer = CheckpointWriter(self.folder.path, recipe.checkpoint, self.folder.lock.check)
        self.step, self.samples_hash, self.bad_images, self.seconds, self.evaluation = 0, 0, 0, 0.0, {}
        self.engine, self.data_error = None, None  # the latter: why this process has no samples

    def setup(self, checked: Preflight) -> bool:
        """Agreement on what rank 0 has `checked`, engine, model, newest checkpoint; False if it is finished."""
        recipe, peers = self.recipe, self.peers
        self.plan = plan = checked.plan
        self.train_index, self.val_index = self.indexes = same_data(peers, [checked.train, checked.val], recipe.data)
        self.fingerprint = fingerprint(self.train_index, self.val_index)
        same_run(peers, recipe, self.launched, self.fingerprint, self.sources)
        self.last_step = min(plan.steps, recipe.max_steps or plan.steps)
        peers.together(self.folder.lock.acquire if self.rank == 0 else lambda: None)
        if end := finished(peers, recipe, self.fingerprint, self.last_step, self.sources):
            self.folder.say(end)
            return False
        self.engine = start_engine(recipe, self.launched)
        self.stop = StopRequest(peers)  # until here a signal ends the processes at once
        self.schedule = Schedule.of(recipe, plan)
        self.order = Order(self.train_index, recipe.seed, plan.global_batch, plan.bn_group)
        self.model, ghosts = build_model(recipe)
        self.aliases = checkpoint.aliases(self.model)
        state, momentum = resume(peers, self.folder.path, recipe, self.fingerprint, self.model)
        if state:
            self.step, self.samples_hash, self.bad_images = state.step, state.samples_hash, state.bad_images
            self.seconds, self.evaluation = state.seconds, state.evaluation
        self.engine.prepare(self.model, ghosts)
        optimizer = build_optimizer(recipe, self.model)
        groups = group_table(self.model, optimizer)
        self.engine.wrap(optimizer, plan)
        bind(self.engine.train_module, optimizer)
        self.engine.load_optimizer_state(momentum)
        self.engine.pin_arithmetic()
        same_weights(peers, self.engine.weights(), self.step)
        self.sums = self.engine.sums(plan.passes, counts=3)
        self.audit = Audit(self.order, self.step, self.samples_hash)
        facts, promise = strength(peers, self.engine, recipe, state)
        facts |= same_content(peers, self.indexes, state.content if state else ())
        self.folder.open(recipe, self.sources, self.step, self.evaluation, facts)
        self.mllog = MLLog(recipe, plan, self.val_index.samples, self.step, writes=self.rank == 0)
        self.folder.tracker = trackers.start(self.engine.accelerator, recipe)
        engine = f"{self.engine.name} on {self.engine.device.type}, {promise}"
        self.folder.say(f"{plan.start_up_line()} | {engine}\n{checked.memory}\n{groups}")
        return True

    def train(self) -> int:
        """The loop: steps, evaluations, checkpoints. Returns the exit status."""
        recipe, plan = self.recipe, self.plan
        last, every = self.last_step, recipe.checkpoint.every_steps
        evaluations = {s for s in plan.evaluation_steps(evaluation_epochs(recipe)) if s < last} | {last}
        saves = evaluations if every is None else {*range(every, last, every), last}
        slots = [range(i * plan.micro_batch, (i + 1) * plan.micro_batch) for i in plan.local_passes(self.rank)]
        batches = self.batches(slots)
        progress = Progress(recipe.name, self.step, last, shown=self.rank == 0)
        self.engine.assert_pinned()
        try:
            while True:
                if self.step in evaluations - {self.evaluation.get("step")} and not self.evaluate(progress):
                    return self.stopped(progress)
                if self.step in saves:
                    self.save()
                if self.step == last:
                    break
                started = time.perf_counter()
                loss, lr = self.train_step(batches, slots)
                if loss is not None:
                    self.log_step(progress, loss, lr, time.perf_counter() - started, batches.waited)
                if loss is None or self.data_error:
                    return self.stopped(progress)
        finally:
            progress.close()
            batches.close()
        self.writer.wait(needed=True)
        self.folder.end("finished", weights_sha256=self.digest, **self.position())
        top1 = f"top-1 {self.evaluation['top1']:.2f} %"
        progress.note(f"finished: {self.step} steps, weights {self.digest[:16]}, {top1}\n{self.folder.what_next}")
        return 0

    def batches(self, slots: list[range]) -> Loader:
        """The passes of this process from the present step on."""
        rest = self.step, self.last_step, self.engine.device, self.stop.requested
        return training_batches(self.order, self.train_index, self.recipe, slots, *rest)

    def train_step(self, batches: Loader, slots: list[range]) -> tuple[float | None, float]:
        """One optimizer step: mean loss and rate. The loss is None if the step was dropped: a signal, or no samples."""
        consumed, bad, ids, lr = 0, 0, [], self.schedule.rate(self.step)
        for done, part in enumerate(slots):
            if self.stopping(done):
                return None, lr
            batch = batches.take(len(part))
            self.data_error = self.data_error or batch.data_error
            with self.engine.exchange(last=part is slots[-1]):
                loss = self.engine.forward(batch.images, batch.labels, self.step, part.start // len(part))
                self.engine.backward(loss, len(slots))
            self.sums.add_gradients()
            self.sums.add_floats(torch.cat([loss.detach().double().view(1), self.engine.statistics()]))
            consumed += samples_hash(self.step, part, batch.ids)
            bad += batch.bad
            ids += batch.ids.tolist()
        if len(slots) < self.plan.passes_per_process and self.stopping(len(slots) + 1):  # others have one more to play
            return None, lr
        self.watchdog.at(self.step, self.plan.passes_per_process)
        self.sums.add_counts([consumed, bad, self.data_error is not None])
        sums = self.sums.finish()
        if sums.counts[2]:  # some process played a stand-in; nothing of the step has been applied yet
            return None, lr
        sums.bad_gradients += self.engine.bad_gradients()
        if sums.bad_gradients or sums.bad_floats:
            self.explain(sums, slots)
        self.engine.update_statistics(sums.floats[1:] / (self.plan.global_batch // (self.plan.bn_group or 1)))
        if not self.engine.step(lr, self.step + 1):
            self.explain(sums, slots)
        self.samples_hash = (self.samples_hash + sums.counts[0]) % 2**64
        self.step, self.bad_images = self.step + 1, self.bad_images + sums.counts[1]
        read = max(self.step * self.plan.global_batch, self.plan.samples)
        self.data_error = BadImages.beyond(self.bad_images, read, self.recipe.data.max_bad_fraction)
        if self.recipe.log_samples:
            self.folder.append("ledger.jsonl", {"step": self.step, "ids": gather_object(ids)})
        return float(sums.floats[0]) / self.plan.passes, lr

    def explain(self, sums: StepSums, slots: list[range]) -> None:
        """Play the unfinished step again to find where it stopped being finite, and end the run there."""
        passes = zip(self.plan.local_passes(self.rank), self.batches(slots))
        explain_nonfinite(self.engine, self.step, passes, sums.bad_gradients)

    def stopping(self, part: int) -> bool:
        """Before each pass, by all processes: is the run to stop?"""
        self.watchdog.at(self.step, part)
        return self.stop.agreed()

    def stopped(self, progress: Progress) -> int:
        """Drop the step or evaluation under way, save the last finished step, end as signal or data error say."""
        self.save()
        self.writer.wait()
        if errors := [e for e in gather_object([self.data_error]) if e and not isinstance(e, InterruptedError)]:
            progress.note(f"step {self.step} is saved{getattr(errors[0], 'again', '')}")
            raise errors[0]
        self.folder.end("preempted", **self.position())
        progress.note(f"stopped by a signal after step {self.step}; start the same command again to resume")
        return EXIT_STOPPED

    def evaluate(self, progress: Progress) -> bool:
        """Audit the samples consumed so far, then evaluate the whole validation split; False if it was stopped."""
        self.audit.check(self.step, self.samples_hash)
        started = time.perf_counter()
        evaluation = evaluate(self.engine, self.recipe, self.val_index, self.plan, self.stopping, self.stop.requested)
        self.data_error, result = evaluation.data_error, evaluation.scores
        if result is None:
            return False
        self.evaluation = {"step": self.step, "top1": result["top1"], "top5": result["top5"]}
        self.folder.log("eval", step=self.step, epoch=(epoch := self.position()["epochs"]), **result)
        self.mllog.evaluation(self.step, time.perf_counter() - started, result["top1"])
        progress.note(f"epoch {epoch:.2f}: {evaluation.line}")
        return True

    def save(self) -> None:
        """Write a checkpoint (rank 0; the weights may lie in slices on all) of samples that are audited."""
        self.audit.check(self.step, self.samples_hash)
        weights, momentum = self.engine.weights(), self.engine.optimizer_state()
        self.digest = same_weights(self.peers, weights, self.step)
        self.folder.result |= same_content(self.peers, self.indexes)
        if self.rank == 0:
            numbers = (self.step, self.samples_hash, self.bad_images, self.seconds, self.evaluation, self.fingerprint)
            state = checkpoint.State(*numbers, config.trajectory(self.recipe), self.aliases, made=self.folder.made)
            state.content = [index.content.kept() for index in self.indexes]
            self.writer.save(state, weights, momentum)

    def log_step(self, progress: Progress, loss: float, lr: float, took: float, waited: float) -> None:
        self.seconds, rate = self.seconds + took, self.plan.global_batch / took
        self.folder.result.update(where := self.position())
        values = {"loss": loss, "lr": lr, "images": where["images"], "images_per_second": round(rate, 1)}
        self.folder.log("train", {"waited_seconds": waited}, step=self.step, epoch=where["epochs"], **values)
        if self.plan.ends_hundredth(self.step) and (ratios := self.engine.trust_ratios()):
            self.folder.log("trust", step=self.step, epoch=where["epochs"], ratios=ratios)
        progress.step(self.step, loss, lr, rate, waited)

    def position(self) -> dict[str, object]:
        return position(self.step, self.plan, self.seconds, self.samples_hash)

    def ended(self, error: str) -> None:
        """The run has failed here: tell the other processes, and the result."""
        self.watchdog.leave(error := hidden(error))
        self.folder.end("failed", error=error)

    def cleanup(self) -> None:
        """End the trackers and the process group; a process that leaves its group open can abort at exit."""
        self.watchdog.end()
        self.folder.lock.release()
        if self.engine:
            self.engine.accelerator.end_training()
        self.peers.part()


def main(arguments: list[str] | None = None) -> int:
    args = command_line.parse(arguments, __doc__)
    outlive_output()
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    first = is_first()
    recipe = launched = checked = refused = training = None
    try:
        try:
            recipe = config.load(args.config, args.overrides)
            launched = Launched.read(recipe)
            processes = launched.processes if args.processes is None else args.processes
            checked = preflight(recipe, launched.engine, processes) if first or args.check else None
        except RecipeError as error:
            refused = error
        if args.check:
            if refused:
                raise refused
            print(f"{recipe.name}: {checked.plan.start_up_line()}\n{checked.memory}")
            return 0
        training = Training(recipe, args.config, launched, Peers.meet(refused))
        return training.train() if training.setup(training.peers.broadcast(checked)) else 0
    except (RecipeError, ShardingError, DataError, LockLost, NotWritten) as error:
        if first or isinstance(error, Alone):
            print(f"error: {error}", file=sys.stderr, flush=True)
        if training is not None:
            training.ended(str(error))
        return 1 if isinstance(error, (DataError, LockLost, NotWritten)) else 2
    except BaseException as error:
        who = training and training.watchdog.blame(error)
        if training is not None:
            training.ended(training.watchdog.say(who) if who else f"{type(error).__name__}: {error}")
        if not who:
            raise
        return 1
    finally:
        if training is not None:
            training.cleanup()


if __name__ == "__main__":
    interrupts_end_at_once()
    sys.exit(main())
