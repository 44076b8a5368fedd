"""The training loop. Constructs nothing and knows no model, method or data set by name."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from dist_kd import checkpoint
from dist_kd.checkpoint import Snapshot, TrainState
from dist_kd.contracts import DataCounters, Tracker, TrainSource
from dist_kd.ema import Average
from dist_kd.errors import DivergedError, SaveError
from dist_kd.evaluation import Evaluator
from dist_kd.meters import Meters
from dist_kd.optimizer import set_lr
from dist_kd.plan import Plan, due
from dist_kd.runtime import Runtime, StopRequests
from dist_kd.stragglers import Stragglers
from dist_kd.updates import Updates

MOST_FAILED_SAVES = 3  # in a row


@dataclass
class Run:
    """The wired objects of one run. Built by wiring.py, used by fit and nobody else."""

    plan: Plan
    seed: int
    keep: int
    folder: Path
    runtime: Runtime
    source: TrainSource
    teacher: Callable[[torch.Tensor], Any]
    student: nn.Module  # bare
    method: nn.Module
    learner: nn.Module  # student and method, as prepared for these processes
    optimizer: Any  # as prepared
    updates: Updates
    average: Average | None
    evaluator: Evaluator
    meters: Meters
    tracker: Tracker
    stop: StopRequests
    state: TrainState
    facts: dict[str, Any]  # saved with every checkpoint: layout, settings, fingerprint
    tester: Evaluator | None = None  # of a third set, which is scored and never chosen by
    still_ours: Callable[[], None] = lambda: None  # raises if the folder is another run's by now
    failed_saves: int = 0  # in a row
    earlier_s: float = 0.0  # seconds of the starts before this one, up to the checkpoint that it goes on from
    stragglers: Stragglers = field(default_factory=Stragglers)

    @property
    def seconds(self) -> float:
        """Wall time of all starts that led here, this one's imports included."""
        return self.earlier_s + time.monotonic() - self.runtime.begun


def seed_networks(seed: int, step: int, first_row: int, device: torch.device) -> None:
    """Dropout and drop-path of a micro-batch depend on its place in the run alone: no generator state is saved."""
    mixed = (seed * 0x9E3779B97F4A7C15) ^ (step * 0xBF58476D1CE4E5B9) ^ (first_row * 0x94D049BB133111EB)
    # torch.manual_seed asks every kind of device, which takes 0.15 ms; these two are all that a network draws from
    torch.default_generator.manual_seed(mixed & (2**63 - 1))
    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(mixed & (2**63 - 1))


def fit(run: Run) -> str:
    """Trains from run.state on; "done" or "preempted". At each boundary: log, evaluate, save, stop, then one step.

    DataError, on all ranks and after a checkpoint, if more samples are damaged than may be.
    """
    state, plan, account, progress = run.state, run.plan, run.source.account, run.runtime.progress
    batches = run.source.batches(state.step)
    run.learner.train()
    run.meters.restart_clock()
    # a resumed state stands on disk already, and saving it again would only put it at risk
    saved = (state.step, state.evaluated_at) if state.step else None
    try:
        while True:
            improved = cut_short = False
            if plan.eval_due(state.step) and state.evaluated_at != state.step:
                progress.at("evaluation", state.step)
                improved, cut_short = _evaluate(run)
            stopping = run.stop.agreed(account.mine.in_epoch, account.limit) or cut_short
            finished = state.step == plan.total_steps
            wanted = improved or stopping or finished or due(state.step, plan.checkpoint_steps)
            if wanted and saved != (state.step, state.evaluated_at):
                progress.at("save", state.step)
                if _save(run, must=stopping or finished):
                    saved = (state.step, state.evaluated_at)
                account.check(state.data, seen=run.stop.exceeded)
            if finished and not cut_short:
                return "done"
            if stopping:
                return "preempted"
            grad_norm = _train_step(run, batches)
            if progress.patient:
                run.tracker.note(progress.started())
            if plan.log_due(state.step):
                _log(run, grad_norm)
    finally:
        batches.close()
        run.stop.settle()


def _train_step(run: Run, batches) -> torch.Tensor | None:
    """One optimizer update over the global batch; the gradient's norm if it was computed. No host sync."""
    state, plan, clock = run.state, run.plan, run.meters.clock
    accelerator, progress = run.runtime.accelerator, run.runtime.progress
    set_lr(run.optimizer.param_groups, plan.lr_at(state.step))
    run.updates.begin()
    seen = []
    for micro_step in range(plan.accum_steps):
        last = micro_step == plan.accum_steps - 1
        progress.at("data", state.step + 1)
        with clock.part("data"):
            batch = next(batches)
        progress.at("forward", state.step + 1)
        with clock.part("teacher"):
            teacher = run.teacher(batch.images)
        with clock.part("student"):
            first_row = plan.first_row(run.runtime.world.rank, micro_step)
            seed_networks(run.seed, state.step, first_row, run.runtime.device)
            # gradients travel once per update, not once per micro-batch
            with nullcontext() if last else accelerator.no_sync(run.learner):
                with clock.part("forward"):
                    terms = run.learner(batch, teacher)
                progress.at("backward", state.step + 1)
                _backward(terms.total if plan.accum_steps == 1 else terms.total / plan.accum_steps, accelerator.scaler)
        run.meters.add(terms, batch)
        seen.append((terms.total.detach(), batch.samples))
    with clock.part("student"):
        grad_norm = run.updates.step(state, plan.log_due(state.step + 1), lambda: _suspects(run, seen))
        if run.average is not None:
            run.average.update(run.student, state.step)
    state.step += 1
    run.meters.step_done()
    return grad_norm


def _suspects(run: Run, seen: list[tuple[torch.Tensor, torch.Tensor]]) -> str:
    """Where the losses of the last batch were not finite, in words. `seen`: (loss, samples) of its micro-batches."""
    mine = [number for loss, samples in seen if not loss.isfinite() for number in samples.tolist()]
    told = [
        f"on rank {rank} (samples {', '.join(map(str, numbers[:8]))}{', ...' if len(numbers) > 8 else ''})"
        for rank, numbers in enumerate(run.runtime.gather(mine))
        if numbers
    ]
    return f"; the last loss is not finite {' and '.join(told)}" if told else "; every last loss was finite"


def _backward(loss: torch.Tensor, scaler: Any) -> None:
    """Gradients of the loss, scaled under fp16. Accelerate's own would divide it by 1 once more, and back."""
    (loss if scaler is None else scaler.scale(loss)).backward()


def _log(run: Run, grad_norm: torch.Tensor | None) -> None:
    """One line of training metrics: the only host sync between evaluations. All ranks take part in the sums."""
    state, plan = run.state, run.plan
    run.updates.settle(state, state.step)
    values = run.meters.drain(run.runtime.reduce_sum)
    if not state.skipped_in_a_row and not math.isfinite(values["train/loss"]):
        error = DivergedError(
            f"the training loss is `{values['train/loss']}` at step {state.step}: some update of the last "
            f"{plan.log_steps} diverged; lower --lr, lengthen --warmup-epochs or set --clip-norm, and start from "
            "the last checkpoint"
        )
        error.alike = True
        raise error
    slow, warning = run.stragglers.look(
        run.runtime.world, run.meters.own_ms, values["time/step_ms"], run.runtime.reduce_sum
    )
    if warning:
        run.tracker.note(warning)
    values |= slow
    data = _account(run)
    values |= {f"data/bad/{kind}": float(count) for kind, count in data.bad.items()}
    values |= {
        "train/lr": plan.lr_at(state.step - 1),
        "train/grad_norm": float(grad_norm),
        "train/epoch": plan.epoch_at(state.step),
        "train/samples": float(state.step * plan.global_batch),
        "train/skipped_steps": float(state.skipped_steps),
        "time/images_per_s": 1000 * plan.global_batch / values["time/step_ms"],
        "data/bad_samples": float(sum(data.bad.values())),
        "data/retries": float(data.retries),
        "data/left_out": float(run.facts["layout"]["left_out"]),
    }
    if run.runtime.device.type == "cuda":
        values["time/memory_bytes"] = float(torch.cuda.max_memory_allocated(run.runtime.device))
    scaler = run.runtime.accelerator.scaler
    if scaler is not None:
        values["train/scale"] = float(scaler.get_scale())
    run.tracker.log(values, state.step)
    run.meters.restart_clock()


def _account(run: Run) -> DataCounters:
    """What happened to the samples so far, on all ranks; each kind of damage is shown when it is first seen."""
    before, now = run.state.data, run.source.account.of_all(run.runtime.reduce_sum, run.runtime.gather)
    for kind in now.bad.keys() - before.bad.keys():
        run.tracker.note(f"warning: {now.first[kind]}. Its row counts nothing; more such ({kind}) are only counted")
    run.state.data = now
    return now


def note_unscored(run: Run, data: DataCounters, before: dict[str, int]) -> None:
    """Shows each kind of damage to a set's samples that it had not `before`."""
    for kind in data.bad.keys() - before.keys():
        run.tracker.note(f"warning: {data.first[kind]}. It is not scored; more such ({kind}) are only counted")


def _evaluate(run: Run) -> tuple[bool, bool]:
    """Scores the student on one set or two; (whether it is the best so far, whether a stop request ended it early)."""
    state = run.state
    network = run.student if run.average is None else run.average.network
    run.runtime.broadcast_buffers(network)
    network.eval()
    scores = run.evaluator.score(network)
    test = run.tester.score(network) if run.tester is not None and scores.complete else None
    run.student.train()
    run.meters.restart_clock()
    if not scores.complete or (test is not None and not test.complete):
        return False, True  # evaluated_at stays: the resumed run makes up for it, of both sets
    run.updates.settle(state, state.step)
    values = scores.values("val") | {"val/epoch": run.plan.epoch_at(state.step), "val/seconds": scores.seconds}
    if not math.isfinite(values["val/loss"]):
        error = DivergedError(
            f"the validation loss is `{values['val/loss']}` at step {state.step}: what the student is by now is of no "
            "use; lower --lr, lengthen --warmup-epochs or set --clip-norm, and start from an earlier checkpoint"
        )
        error.alike = True
        raise error
    state.evaluated_at = state.step
    state.evaluations += 1
    state.last = {k.removeprefix("val/"): v for k, v in values.items()} | {"step": state.step}
    for scored, before in ((scores, state.val_bad), (test, state.test.bad)):
        if scored is not None:
            note_unscored(run, scored.data, before)
            if run.runtime.world.is_main:
                run.source.account.mine.retries += scored.data.retries
    state.val_bad = scores.data.bad
    if test is not None:
        figures = test.values("test")
        state.test.bad = test.data.bad
        place = {"step": state.step, "epoch": values["val/epoch"]}
        state.test.add({k.removeprefix("test/"): v for k, v in figures.items()} | place, values["val/top1"])
        values |= figures | {"test/seconds": test.seconds}
    improved = values["val/top1"] > state.best_top1
    if improved:
        state.best_top1, state.best_step, state.best = values["val/top1"], state.step, dict(state.last)
    run.tracker.log(values, state.step, kind="val")
    return improved, False


def snapshot(run: Run) -> Snapshot:
    """What a checkpoint holds now. Rank 0's buffers are the run's. Sums of all ranks stand in one place."""
    accelerator = run.runtime.accelerator
    _account(run)
    run.updates.settle(run.state, run.state.step)
    run.state.meter_sums = run.runtime.reduce_sum(run.meters.state()).tolist()
    run.state.seconds = run.seconds
    tensors = {"model": run.student.state_dict()}
    if any(True for _ in run.method.state_dict()):
        tensors["method"] = run.method.state_dict()
    if run.average is not None:
        tensors["ema"] = run.average.network.state_dict()
    optimizer = {"optimizer": run.optimizer.state_dict()}
    if accelerator.scaler is not None:
        optimizer["scaler"] = accelerator.scaler.state_dict()
    return Snapshot(deepcopy(run.state), tensors, optimizer, run.facts)


def _save(run: Run, *, must: bool) -> bool:
    """One checkpoint, written by rank 0 while the others wait; an error there is everybody's error.

    False if the disk refused it: training goes on to the next save. SaveError if it `must` not, as at a run's end, or
    after MOST_FAILED_SAVES in a row.
    """
    content = snapshot(run)

    def write() -> None:
        run.still_ours()
        checkpoint.save(run.folder, content, keep=run.keep)

    try:
        run.runtime.on_main(write)
        run.failed_saves = 0
    except SaveError as error:
        run.failed_saves += 1
        if must or run.failed_saves == MOST_FAILED_SAVES:
            raise
        best = run.state.best_step == run.state.step
        run.tracker.note(
            f"WARNING: {error}. Training goes on, and what it learns since the last checkpoint is lost if it ends; "
            + ("this is the best student so far, and it is not kept: `best` stays what it was; " if best else "")
            + f"failed saves in a row: {run.failed_saves}, it stops at {MOST_FAILED_SAVES}"
        )
    run.meters.restart_clock()
    return not run.failed_saves
