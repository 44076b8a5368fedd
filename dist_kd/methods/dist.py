"""Distillation by correlation: Huang et al. 2022, arXiv 2205.10536 (DIST).

The intra-class term looks down the columns of the batch: it works over the micro-batches of all processes that run
together, of which only sums travel. Accumulated micro-batches do not meet.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dist_kd.contracts import Batch, ModelOutput
from dist_kd.methods import frame
from dist_kd.methods.ce import in_full_precision, weighted_mean
from dist_kd.methods.ranks import sum_over_ranks, world_size

CONSTANT = 1e-6  # values whose spread is below this share of their size are constant but for rounding


@in_full_precision
def inter_loss(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """T^2 * (1 - correlation of both rows of probabilities): [B, C], [B, C] -> [B], from 0 to 2 T^2."""
    s, t = ((logits / temperature).softmax(dim=1) for logits in (student_logits, teacher_logits))
    sizes = s.square().sum(dim=1), t.square().sum(dim=1)
    s, t = (p - p.mean(dim=1, keepdim=True) for p in (s, t))
    return temperature**2 * (1 - _correlation((s * t).sum(dim=1), s.square().sum(dim=1), t.square().sum(dim=1), *sizes))


@in_full_precision
def intra_loss(student_logits: Tensor, teacher_logits: Tensor, weights: Tensor, temperature: float) -> Tensor:
    """T^2 * (1 - correlation of both columns of probabilities, mean over classes), a scalar from 0 to 2 T^2.

    [B, C], [B, C], [B]: over the rows of all ranks, those of weight 0 left out; their share lowers the value. Of a
    single row it is the constant T^2.
    """
    classes = student_logits.shape[1]
    s, t = ((logits / temperature).softmax(dim=1) for logits in (student_logits, teacher_logits))
    w = weights.to(s.dtype)[:, None]
    # two rounds, means first: the spread of a class over a batch can be far below what a sum of squares resolves
    sums = sum_over_ranks(torch.cat([w.sum(dim=0), (w * s).sum(dim=0), (w * t).sum(dim=0)]))
    good = sums[0].clamp_min(1)
    mean_s, mean_t = sums[1 : 1 + classes] / good, sums[1 + classes :] / good
    s, t = s - mean_s, t - mean_t
    moments = sum_over_ranks(torch.stack([(w * a * b).sum(dim=0) for a, b in ((s, t), (s, s), (t, t))]))
    correlations = _correlation(*moments, good * mean_s.square(), good * mean_t.square())
    share = sums[0] / (weights.shape[0] * world_size())  # 1 unless there are bad rows
    return temperature**2 * share * (1 - correlations.mean())


def _correlation(st: Tensor, ss: Tensor, tt: Tensor, size_s: Tensor, size_t: Tensor) -> Tensor:
    """st / sqrt(ss * tt), and 0 without gradient where one side is constant, which has no correlation with anything."""
    usable = (ss > CONSTANT**2 * size_s) & (tt > CONSTANT**2 * size_t)
    ss, tt = (torch.where(usable, square, 1.0) for square in (ss, tt))
    return torch.where(usable, st / ss.sqrt() / tt.sqrt(), 0.0)


class Term(frame.Term):
    """ce * CE + b * inter + g * intra."""

    coupled = True

    def __init__(self, pair: frame.Pair, T: float, b: float, g: float, ce: float) -> None:
        formula = (
            f"{b:g} * {T:g}^2 * (1 - corr. over classes) + {g:g} * {T:g}^2 * (1 - corr. over the batch) at T={T:g}"
        )
        super().__init__(formula, {"loss_inter": b, "loss_intra": g}, ce=ce)
        self.temperature = T

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        inter = inter_loss(student.logits, teacher.logits, self.temperature)
        intra = intra_loss(student.logits, teacher.logits, batch.weights, self.temperature)
        return {"loss_inter": weighted_mean(inter, batch), "loss_intra": intra}
