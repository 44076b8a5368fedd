"""The shapes that pass between rooms. Imports nothing of ours and no torch at run time.

Tensor shapes: B batch, C classes, H and W pixels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:
    from torch import Tensor


class Batch(NamedTuple):
    """One micro-batch, on the device, normalized with the student's mean and std."""

    images: Tensor  # [B, 3, H, W] float32
    labels: Tensor  # [B] int64
    weights: Tensor  # [B] float32: 0 where a bad sample was replaced or a row is padding, else 1
    samples: Tensor  # [B] int64: sample numbers in the index (the intended ones)
    soft_labels: Tensor | None = None  # [B, C] float32 under mixup or cutmix, else None


class ModelOutput(NamedTuple):
    """What every network returns: a NamedTuple, because Accelerate upcasts those and not dataclasses."""

    logits: Tensor  # [B, C]
    features: dict[str, Tensor]  # the taps that were asked for, else empty


class LossTerms(NamedTuple):
    """What every method returns. `total` is the mean over the micro-batch of weight x per-sample loss."""

    total: Tensor  # scalar float32, with gradient
    parts: dict[str, Tensor]  # detached scalars; names are keys of tracking/keys.py
    logits: Tensor  # [B, C] the student's, detached


@dataclass(frozen=True)
class World:
    """Which process this is. `local_*` count processes on this node."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class NetworkSpec:
    """What a network expects of its input and how its weights came to be."""

    arch: str  # canonical name, e.g. "efficientnet_b0" or "timm/resnet18"
    num_classes: int
    mean: tuple[float, float, float]  # of pixels scaled to 0..1
    std: tuple[float, float, float]
    image_size: int  # pixels, side of the square it is trained for
    crop_pct: float  # evaluation: resize the shorter side to image_size / crop_pct, crop the centre
    interpolation: str  # "bilinear" or "bicubic", for the evaluation resize
    weights: str = "none"  # what was loaded, e.g. "IMAGENET1K_V2", "lite0", a path


@dataclass(frozen=True)
class DataSpec:
    """What a set of samples is: the facts everything else may depend on."""

    name: str
    classes: tuple[str, ...]
    shard_sizes: tuple[int, ...]  # samples per shard; sample numbers run through the shards in order
    fingerprint: str  # digest of the index: same samples, same order <=> same fingerprint
    augment: str = "none"  # the augmentation this kind of data is usually trained with
    image_size: int | None = None  # side in pixels if all images have one square size

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    @property
    def num_samples(self) -> int:
        return sum(self.shard_sizes)


@dataclass
class DataCounters:
    """What happened to samples on the way; merged over ranks and written to summary.json."""

    bad: dict[str, int] = field(default_factory=dict)  # kind of damage -> samples replaced
    retries: int = 0
    epoch: int = 0
    in_epoch: int = 0  # samples replaced in this epoch: all different ones
    first: dict[str, str] = field(default_factory=dict)  # kind -> a sentence about the first one
    named: list[str] = field(default_factory=list)  # the first ones


class DataAccount(Protocol):
    """What a source says of the damaged samples it was to show."""

    mine: DataCounters  # of this rank
    limit: int  # samples that may be bad in one epoch, or one evaluation, over all ranks

    def load(self, saved: DataCounters, *, main: bool) -> None: ...

    def clear(self) -> None: ...

    def of_all(self, reduce_sum: Callable[[Tensor], Tensor], gather: Callable[[Any], list]) -> DataCounters: ...

    def check(self, counters: DataCounters, seen: int = 0) -> None: ...


class TrainSource(Protocol):
    """Training batches of this rank. Nothing above can tell streaming from memory."""

    spec: DataSpec
    account: DataAccount

    def batches(self, step: int) -> Iterator[Batch]:
        """Endless micro-batches from the first one of optimizer step `step` on."""
        ...


class EvalSource(Protocol):
    """Evaluation batches of this rank: each sample of the set is on exactly one rank, exactly once."""

    spec: DataSpec
    account: DataAccount

    def batches(self) -> Iterator[Batch]: ...


class Method(Protocol):
    """A loss. Concretely an nn.Module whose own parameters (adapters) are trained and saved with the student."""

    needs_teacher: bool
    student_taps: frozenset[str]  # features it reads, by role or path; both empty: logits only
    teacher_taps: frozenset[str]
    formula: str  # the loss in force, one line, with its numbers
    coupled: tuple[str, ...]  # methods in it that look across the rows of the micro-batches that run together
    warnings: tuple[str, ...]  # what the numbers chosen are known to do, a line each
    notes: tuple[str, ...]  # what they cost, a line each
    teacher_batch_norm: bool  # whether the teacher's batch norms work over the batch while it teaches

    def __call__(self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch) -> LossTerms: ...


class Tracker(Protocol):
    """Where metrics go. Never raises but for unknown keys, never blocks training for long."""

    def log(self, values: dict[str, float], step: int, kind: str = "train") -> None: ...

    def summary(self, values: dict[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...  # one line to the console, above the progress bar

    def close(self, status: str) -> None: ...
