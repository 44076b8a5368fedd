"""Transformed teacher matching, plain (TTM) and weighted: Zheng, Yang 2024, arXiv 2402.11148."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dist_kd.contracts import Batch, ModelOutput
from dist_kd.methods import frame
from dist_kd.methods.ce import in_full_precision, weighted_mean


@in_full_precision
def wttm_loss(student_logits: Tensor, teacher_logits: Tensor, power: float, *, weighted: bool = True) -> Tensor:
    """U * KL(q || student at T = 1) of each row, q ~ teacher^power: [B, C], [B, C] -> [B].

    U = sum over classes of teacher^power, from 1 (a sure teacher) to C^(1 - power); 1 if not `weighted`. No T^2: the
    student has no temperature.
    """
    log_student = F.log_softmax(student_logits, dim=1)
    raised = power * F.log_softmax(teacher_logits, dim=1)
    log_size = raised.logsumexp(dim=1)  # log U
    log_teacher = raised - log_size[:, None]
    kl = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1)
    return log_size.exp() * kl if weighted else kl


class Term(frame.Term):
    """ce * CE + weight * U * KL(teacher^g || student)."""

    def __init__(self, pair: frame.Pair, g: float, weight: float, weighted: bool, ce: float) -> None:
        formula = f"{weight:g} * {'U * ' if weighted else ''}KL(teacher^{g:g} || student at T=1)"
        super().__init__(formula, {"loss_wttm": weight}, ce=ce)
        self.power, self.weighted = g, weighted
        self.temperature = 1 / g  # p^g is the softmax at T = 1/g

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        per_sample = wttm_loss(student.logits, teacher.logits, self.power, weighted=self.weighted)
        return {"loss_wttm": weighted_mean(per_sample, batch)}
