"""What all methods have in common: one cross-entropy, and the terms of the methods, each part with its weight.

A term gives its parts as means over the micro-batch, before their weights, in full precision: autocast is off and
features are in float32 when it is called; logits are as the networks gave them (ce.in_full_precision). Its parameters
(adapters) are trained and saved with the student, its buffers (banks) are saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import torch
from torch import Tensor, nn

from dist_kd.contracts import Batch, LossTerms, ModelOutput, NetworkSpec
from dist_kd.methods.ce import cross_entropy, full_precision, outside_autocast, weighted_mean
from dist_kd.methods.ensemble import at_temperature
from dist_kd.methods.ranks import world_size


class Tapped(Protocol):
    """What a term may ask a network when it is built: models.Network is one."""

    spec: NetworkSpec
    taps: Mapping[str, Any]  # by role: stage1.., pre_relu1.., pooled

    def shapes(self, names: Iterable[str]) -> dict[str, tuple[int, ...]]: ...

    def margin_norms(self) -> dict[str, nn.Module]: ...


@dataclass(frozen=True)
class Pair:
    """What a term may know when it is built: both networks, before they are compiled or folded, and the set's size."""

    student: Tapped | None = None
    teacher: Tapped | None = None  # None without a teacher, and with several
    teachers: int = 1
    num_classes: int = 0
    train_samples: int = 0  # sample numbers of a Batch are below it
    batch_size: int = 1  # global


class Term(nn.Module):
    """What one method adds to the loss: (student, teacher, batch) -> its parts by name, as its row lists them."""

    coupled: ClassVar[bool] = False  # whether rows of the batch meet in it, so that the micro-batch matters

    def __init__(self, formula: str, weights: Mapping[str, float], *, ce: float = 1.0) -> None:
        super().__init__()
        self.formula = formula  # with its numbers, weights included
        self.weights = dict(weights)  # part -> what it is multiplied with in the loss
        self.ce = ce  # weight that it leaves to the cross-entropy
        self.temperature = 1.0  # at which the softmax of several teachers is averaged for it
        self.warmup = 0.0  # epochs over which its weights rise from 0
        self.student_taps: frozenset[str] = frozenset()
        self.teacher_taps: frozenset[str] = frozenset()
        self.warnings: list[str] = []  # lines for the header
        self.notes: list[str] = []  # the same, of what is as it should be
        self.teacher_batch_norm = False  # whether the teacher's batch norms work over the batch while it teaches

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        raise NotImplementedError


class Loss(nn.Module):
    """loss = ce * CE + sum of weight * part, per sample, mean over the batch: contracts.Method.

    The cross-entropy's weight is the smallest that a term leaves it; without `labels` there is none.
    """

    def __init__(self, terms: Mapping[str, Term], pair: Pair, *, label_smoothing: float = 0.0, labels: bool = True):
        super().__init__()
        self.terms = nn.ModuleDict(terms)
        self.label_smoothing = label_smoothing
        self.ce = min((term.ce for term in terms.values()), default=1.0) if labels else None
        self.needs_teacher = bool(terms)
        self.student_taps = frozenset().union(*(term.student_taps for term in terms.values()))
        self.teacher_taps = frozenset().union(*(term.teacher_taps for term in terms.values()))
        self.coupled = tuple(name for name, term in terms.items() if term.coupled)
        self.warnings = tuple(line for term in terms.values() for line in term.warnings)
        self.notes = tuple(line for term in terms.values() for line in term.notes)
        self.teacher_batch_norm = any(term.teacher_batch_norm for term in terms.values())
        self._batch_size, self._train_samples = pair.batch_size, max(1, pair.train_samples)
        if any(term.warmup for term in terms.values()):
            # rows trained on so far, of all processes: the only thing here that grows, saved with the checkpoint
            self.register_buffer("rows_seen", torch.zeros((), dtype=torch.int64))
        self.formula = self._formula(terms, pair)

    def _formula(self, terms: Mapping[str, Term], pair: Pair) -> str:
        ce = [] if self.ce is None else [("" if self.ce == 1 else f"{self.ce:g} * ") + "CE(labels, student)"]
        text = "loss = " + " + ".join([*ce, *(term.formula for term in terms.values())])
        if self.label_smoothing and ce:
            text += f", labels smoothed by {self.label_smoothing:g}"
        for name, term in terms.items():
            text += f", {name} rising over {term.warmup:g} epochs" if term.warmup else ""
        return text + (f", teacher = mean softmax of {pair.teachers} teachers at T" if pair.teachers > 1 else "")

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch) -> LossTerms:
        with outside_autocast(student.logits.device):
            student = _widened(student)
            teacher = None if teacher is None else _widened(teacher)
            parts: dict[str, Tensor] = {}
            weighed: list[Tensor] = []
            if self.ce is not None:
                parts["loss_ce"] = weighted_mean(cross_entropy(student.logits, batch, self.label_smoothing), batch)
                weighed.append(parts["loss_ce"] if self.ce == 1 else self.ce * parts["loss_ce"])
            for term in self.terms.values():
                found = term(student, at_temperature(teacher, term.temperature), batch)
                rise = self._rise(term.warmup)
                for name, weight in term.weights.items():
                    weighed.append((weight if rise is None else weight * rise) * found[name])
                parts |= found
            if self.training and "rows_seen" in self._buffers:
                self.rows_seen += batch.weights.shape[0] * world_size()
        total = weighed[0]
        for part in weighed[1:]:
            total = total + part
        return LossTerms(total, {name: part.detach() for name, part in parts.items()}, student.logits.detach())

    def _rise(self, warmup: float) -> Tensor | None:
        """0 at the first step, 1 after `warmup` epochs, by whole steps: the same on any number of processes."""
        if not warmup:
            return None
        rows = self.rows_seen - self.rows_seen % self._batch_size
        return (rows.to(torch.float32) / (warmup * self._train_samples)).clamp(max=1.0)


def _widened(output: ModelOutput) -> ModelOutput:
    # features only: each loss widens the logits itself, so that its gradient is rounded by itself
    return output._replace(features={name: full_precision(value) for name, value in output.features.items()})
