"""Cross-entropy with the labels: what a student learns without a teacher. Knows no data, device or Accelerate."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_kd.contracts import Batch, LossTerms, ModelOutput


def full_precision(logits: Tensor) -> Tensor:
    """The logits in float32, or as they are in float64: a softmax in half precision loses the tails."""
    return logits if logits.dtype == torch.float64 else logits.float()


def cross_entropy(logits: Tensor, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each row: [B, C] -> [B], with soft labels where the batch has them."""
    target = batch.labels if batch.soft_labels is None else batch.soft_labels
    return F.cross_entropy(full_precision(logits), target, reduction="none", label_smoothing=label_smoothing)


def weighted_mean(per_sample: Tensor, batch: Batch) -> Tensor:
    """sum(weight x loss) / rows: the divisor counts every row, so that no rank waits for a count of good ones."""
    return (per_sample * batch.weights).sum() / batch.weights.shape[0]


class Loss(nn.Module):
    """loss = CE(labels, student), mean over the batch."""

    needs_teacher = False
    wants: frozenset[str] = frozenset()

    def __init__(self, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.label_smoothing = label_smoothing
        self.formula = "loss = CE(labels, student)" + (
            f", labels smoothed by {label_smoothing:g}" if label_smoothing else ""
        )

    def forward(self, student: ModelOutput, teacher: ModelOutput | None, batch: Batch) -> LossTerms:
        with torch.autocast(student.logits.device.type, enabled=False):
            total = weighted_mean(cross_entropy(student.logits, batch, self.label_smoothing), batch)
        return LossTerms(total, {"loss_ce": total.detach()}, student.logits.detach())
