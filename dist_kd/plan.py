"""Every number that follows from the chosen ones: Config + world size + sizes of the sets -> Plan. Pure, no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

from dist_kd.config import Config
from dist_kd.errors import ConfigError


def due(step: int, every: int) -> bool:
    """Whether something done every `every` steps is done after `step` steps: the only cadence predicate."""
    return step > 0 and step % every == 0


@dataclass(frozen=True)
class Plan:
    """Derived numbers. `step` counts finished optimizer updates; the rate of update k is lr_at(k), k from 0."""

    global_batch: int
    world_size: int
    micro_batch: int  # rows one device sees at once; batch norm and batch-coupled losses work over these
    accum_steps: int  # micro-batches per optimizer step on each rank
    steps_per_epoch: int
    total_steps: int
    warmup_steps: int
    log_steps: int
    eval_steps: int
    checkpoint_steps: int
    peak_lr: float
    schedule: str
    lr_floor: float
    lr_period: int  # steps between drops, the first period of warm restarts, or half a swing
    lr_gamma: float

    @property
    def rank_batch(self) -> int:
        return self.global_batch // self.world_size

    def first_row(self, rank: int, micro_step: int) -> int:
        """Number, within the global batch, of the first row of a micro-batch."""
        return rank * self.rank_batch + micro_step * self.micro_batch

    def epoch_at(self, step: int) -> float:
        return step / self.steps_per_epoch

    def eval_due(self, step: int) -> bool:
        return due(step, self.eval_steps) or step == self.total_steps

    def log_due(self, step: int) -> bool:
        return due(step, self.log_steps) or step == self.total_steps

    def lr_at(self, step: int) -> float:
        """Learning rate of update `step` (from 0). Reaches the peak with the last warm-up update."""
        if step < self.warmup_steps:
            return self.peak_lr * (step + 1) / self.warmup_steps
        return self.peak_lr * SCHEDULES[self.schedule](self, step - self.warmup_steps)


def _constant(plan: Plan, step: int) -> float:
    return 1.0


def _step(plan: Plan, step: int) -> float:
    return plan.lr_gamma ** (step // plan.lr_period)


def _half_cosine(share: float, floor: float) -> float:
    return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * share))


def _cosine(plan: Plan, step: int) -> float:
    return _half_cosine(step / max(1, plan.total_steps - plan.warmup_steps), plan.lr_floor)


def _restarts(plan: Plan, step: int) -> float:
    # SGDR, arXiv 1608.03983: period i lasts lr_period * gamma^i
    period = float(plan.lr_period)
    while step >= period:
        step -= period
        period *= plan.lr_gamma
    return _half_cosine(step / period, plan.lr_floor)


def _swing(plan: Plan, step: int) -> float:
    # CosineAnnealingLR beyond its T_max, as some published runs have it: down, and up again by the same way
    return _half_cosine(step / plan.lr_period, plan.lr_floor)


SCHEDULES = {"constant": _constant, "step": _step, "cosine": _cosine, "restarts": _restarts, "swing": _swing}


def micro_batch_size(rank_batch: int, largest: int, even: bool) -> int:
    """The largest divisor of `rank_batch` not above `largest`, even if asked; 0 if there is none."""
    fits = (m for m in range(min(rank_batch, largest), 0, -1) if rank_batch % m == 0 and not (even and m % 2))
    return next(fits, 0)


def micro_batch_of(config: Config, world_size: int) -> int:
    """Rows that each of `world_size` devices sees at once, or a ConfigError with numbers that work."""
    batch, even = config.batch_size, bool(config.mixup or config.cutmix)
    unit = world_size * (2 if even else 1)
    if batch % unit:
        near = max(unit, batch // unit * unit)
        pairs = ", in pairs for mixup or cutmix" if even else ""
        raise ConfigError(
            f"--batch-size `{batch}` cannot be shared equally by {world_size} processes{pairs}; "
            f"use `{near}` or `{near + unit}`"
        )
    rank_batch = batch // world_size
    micro = micro_batch_size(rank_batch, config.device_batch_size, even)
    asked = min(rank_batch, config.device_batch_size)
    if even and asked < 2:
        raise ConfigError(
            f"--device-batch-size `{config.device_batch_size}` must be at least 2 with mixup or cutmix, which mix rows "
            "in pairs"
        )
    if micro * 2 < asked:
        # a tiny divisor would silently make training many times slower than asked
        better = asked - asked % 2 if even else asked
        near = math.ceil(rank_batch / better) * better * world_size
        raise ConfigError(
            f"--batch-size `{batch}` gives each of {world_size} processes {rank_batch} samples, whose largest "
            f"micro-batch within --device-batch-size `{config.device_batch_size}` is {micro}, less than half; use "
            f"--batch-size `{near}`, or --device-batch-size `{rank_batch}`"
        )
    return micro


def world_sizes(config: Config) -> list[int]:
    """Numbers of processes that can share the global batch, ascending."""

    def works(count: int) -> bool:
        try:
            return micro_batch_of(config, count) > 0
        except ConfigError:
            return False

    return [count for count in range(1, config.batch_size + 1) if config.batch_size % count == 0 and works(count)]


def make_plan(config: Config, world_size: int, train_samples: int) -> Plan:
    """The plan of a run, or a ConfigError that says which numbers would work."""
    if train_samples < config.batch_size:
        raise ConfigError(
            f"--batch-size `{config.batch_size}` is larger than the training set of {train_samples} samples; "
            f"the largest that fits is `{train_samples // world_size * world_size}`"
        )
    micro = micro_batch_of(config, world_size)
    per_epoch = train_samples // config.batch_size
    total = config.max_steps or max(1, round(config.epochs * per_epoch))
    warmup = round(config.warmup_epochs * per_epoch)
    if warmup >= total and warmup:
        raise ConfigError(
            f"--warmup-epochs `{config.warmup_epochs:g}` is {warmup} steps, but the whole training has {total}; "
            "shorten it or train longer"
        )
    gamma = config.lr_gamma or (1.0 if config.schedule == "restarts" else 0.1)
    if config.schedule == "restarts" and gamma < 1:
        raise ConfigError(
            f"--lr-gamma `{gamma:g}` would shrink the periods of --schedule restarts to nothing; use 1 or 2"
        )
    return Plan(
        global_batch=config.batch_size,
        world_size=world_size,
        micro_batch=micro,
        accum_steps=config.batch_size // world_size // micro,
        steps_per_epoch=per_epoch,
        total_steps=total,
        warmup_steps=warmup,
        log_steps=config.log_steps,
        eval_steps=config.eval_steps or per_epoch,
        checkpoint_steps=config.checkpoint_steps,
        peak_lr=config.peak_lr,
        schedule=config.schedule,
        lr_floor=config.lr_floor,
        lr_period=max(1, round(config.lr_step_epochs * per_epoch)),
        lr_gamma=gamma,
    )
