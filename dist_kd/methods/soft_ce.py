"""Soft cross-entropy with the teacher alone, no label: Shen, Savvides 2020 (MEAL V2), arXiv 2009.08453.

With mixup it is the function matching of Beyer et al. 2021, arXiv 2106.05237: its KL has the same gradient.
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dist_kd.contracts import Batch, ModelOutput
from dist_kd.methods import frame
from dist_kd.methods.ce import in_full_precision, weighted_mean


@in_full_precision
def soft_ce_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float = 1.0) -> Tensor:
    """T^2 * cross-entropy of each row with the teacher's probabilities, both softened by T: [B, C], [B, C] -> [B]."""
    teacher = (teacher_logits / temperature).softmax(dim=1)
    return -(teacher * F.log_softmax(student_logits / temperature, dim=1)).sum(dim=1) * temperature**2


class Term(frame.Term):
    """weight * T^2 * CE(teacher at T, student at T)."""

    def __init__(self, pair: frame.Pair, T: float, weight: float) -> None:
        super().__init__(f"{weight:g} * {T:g}^2 * CE(teacher, student at T={T:g})", {"loss_soft_ce": weight})
        self.temperature = T

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        per_sample = soft_ce_loss(student.logits, teacher.logits, self.temperature)
        return {"loss_soft_ce": weighted_mean(per_sample, batch)}
