"""What is trained: the student and the method's own parts in one module, so that DDP wraps one thing."""

from __future__ import annotations

from torch import nn

from dist_kd.contracts import Batch, LossTerms, ModelOutput


class Learner(nn.Module):
    """Batch and the teacher's output -> LossTerms. Knows no device, no optimizer and no teacher network."""

    def __init__(self, student: nn.Module, method: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.method = method

    def forward(self, batch: Batch, teacher: ModelOutput | None) -> LossTerms:
        return self.method(self.student(batch.images), teacher, batch)
