"""Hard-label distillation: Touvron et al. 2020 (DeiT), arXiv 2012.12877, section 4."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dist_kd.contracts import Batch, ModelOutput
from dist_kd.methods import frame
from dist_kd.methods.ce import in_full_precision, weighted_mean


@in_full_precision
def hard_loss(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Cross-entropy of each row with the teacher's first guess: [B, C], [B, C] -> [B]. Also of mixed images."""
    return F.cross_entropy(student_logits, teacher_logits.argmax(dim=1), reduction="none")


class Term(frame.Term):
    """(1 - w) * CE + w * CE(teacher's first guess, student)."""

    def __init__(self, pair: frame.Pair, w: float) -> None:
        super().__init__(f"{w:g} * CE(teacher's first guess, student)", {"loss_hard": w}, ce=1 - w)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        return {"loss_hard": weighted_mean(hard_loss(student.logits, teacher.logits), batch)}
