"""Knowledge distillation from softened logits: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_kd.contracts import Batch, LossTerms, ModelOutput
from dist_kd.methods.ce import cross_entropy, full_precision, weighted_mean


def kd_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * KL(teacher || student) of each row, both softened by T: [B, C], [B, C] -> [B], float32 or wider."""
    log_student = F.log_softmax(full_precision(student_logits) / temperature, dim=1)
    log_teacher = F.log_softmax(full_precision(teacher_logits) / temperature, dim=1)
    kl = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=1)  # [B, C] -> [B]; never a mean over C
    return kl * temperature**2  # soft-target gradients shrink as 1/T^2; keeps w comparable across T


class Loss(nn.Module):
    """loss = (1 - w) * CE + w * T^2 * KL(teacher || student), per sample, mean over the batch."""

    needs_teacher = True
    wants: frozenset[str] = frozenset()

    def __init__(self, T: float = 4.0, w: float = 0.9, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.temperature, self.kd_weight, self.label_smoothing = T, w, label_smoothing
        smoothed = f", labels smoothed by {label_smoothing:g}" if label_smoothing else ""
        self.formula = (
            f"loss = {1 - w:g} * CE(labels, student) + {w:g} * {T:g}^2 * KL(teacher || student at T={T:g}){smoothed}"
        )

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch) -> LossTerms:
        assert teacher is not None, "wiring gives every method that needs a teacher one"
        with torch.autocast(student.logits.device.type, enabled=False):
            ce = weighted_mean(cross_entropy(student.logits, batch, self.label_smoothing), batch)
            kd = weighted_mean(kd_loss(student.logits, teacher.logits, self.temperature), batch)
            total = (1 - self.kd_weight) * ce + self.kd_weight * kd
        parts = {"loss_ce": ce.detach(), "loss_kd": kd.detach()}
        return LossTerms(total, parts, student.logits.detach())
