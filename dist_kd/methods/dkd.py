"""Decoupled distillation: Zhao et al. 2022, arXiv 2203.08679. All in logarithms, so finite at any gap of logits.

kd's KL is TCKD + (1 - the teacher's probability of the right class) * NCKD; here NCKD has a weight of its own.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from dist_kd.contracts import Batch, ModelOutput
from dist_kd.methods import frame
from dist_kd.methods.ce import in_full_precision, weighted_mean


@in_full_precision
def dkd_loss(
    student_logits: Tensor, teacher_logits: Tensor, labels: Tensor, temperature: float
) -> tuple[Tensor, Tensor]:
    """T^2 * TCKD and T^2 * NCKD of each row: [B, C], [B, C], [B] -> [B], [B]. With two classes NCKD is 0."""
    right = F.one_hot(labels, student_logits.shape[1]).bool()
    student_binary, student_others = _apart(student_logits / temperature, right)
    teacher_binary, teacher_others = _apart(teacher_logits / temperature, right)
    tckd = sum(t.exp() * (t - s) for t, s in zip(teacher_binary, student_binary, strict=True))
    gap = (teacher_others - student_others).masked_fill(right, 0.0)  # -inf - -inf where the right class is left out
    nckd = (teacher_others.exp() * gap).sum(dim=1)
    return tckd * temperature**2, nckd * temperature**2


def _apart(logits: Tensor, right: Tensor) -> tuple[tuple[Tensor, Tensor], Tensor]:
    """(log p of the right class [B], log p of all others [B]), and log p among the others [B, C], -inf at the right."""
    others = logits.masked_fill(right, -math.inf)
    everything, rest = logits.logsumexp(dim=1), others.logsumexp(dim=1)
    chosen = logits.masked_fill(~right, 0.0).sum(dim=1)
    return (chosen - everything, rest - everything), others - rest[:, None]


class Term(frame.Term):
    """ce * CE + a * T^2 * TCKD + b * T^2 * NCKD."""

    def __init__(self, pair: frame.Pair, T: float, a: float, b: float, ce: float, warmup: float) -> None:
        formula = f"{a:g} * {T:g}^2 * TCKD + {b:g} * {T:g}^2 * NCKD at T={T:g}"
        super().__init__(formula, {"loss_tckd": a, "loss_nckd": b}, ce=ce)
        self.temperature, self.warmup = T, warmup

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        assert batch.soft_labels is None, "the command line refuses dkd with mixup and cutmix"
        tckd, nckd = dkd_loss(student.logits, teacher.logits, batch.labels, self.temperature)
        return {"loss_tckd": weighted_mean(tckd, batch), "loss_nckd": weighted_mean(nckd, batch)}
