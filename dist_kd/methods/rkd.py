"""Relational distillation: Park et al. 2019, arXiv 1904.05068 (RKD), distances and angles between rows.

Exact over the micro-batches of all processes that run together: their rows travel, and each process works out the
relations that start at its own. Memory on each, with b rows of its own and B in all: b * B * (D + B) numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_kd.contracts import Batch, ModelOutput
from dist_kd.errors import ConfigError
from dist_kd.methods import frame
from dist_kd.methods.ce import in_full_precision
from dist_kd.methods.ranks import rows_of_all_ranks, sum_over_ranks, world_size


@in_full_precision
def rkd_losses(student: Tensor, teacher: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """Distance and angle term of the rows [b, Ds], [b, Dt] with weights [b] of each process: two scalars.

    Means over all B^2 pairs and B^3 triples, degenerate ones (a row with itself) counted as 0; what a row of weight 0
    takes part in is 0 too. Each process returns its own rows' share, so that the mean over processes is the term.
    """
    w = weights.to(student.dtype)
    all_w = rows_of_all_ranks(w)
    pair_w = w[:, None] * all_w  # [b, B]
    directions, distances = zip(*(_toward(own, rows_of_all_ranks(own)) for own in (student, teacher)), strict=True)
    d_s, d_t = (_over_mean(distance, pair_w, all_w) for distance in distances)
    distance = (pair_w * F.smooth_l1_loss(d_s, d_t, reduction="none")).mean()
    cos_s, cos_t = (e @ e.transpose(1, 2) for e in directions)  # [b, B, B]: the angle at a row of ours
    angle = (pair_w[:, None, :] * all_w[:, None] * F.smooth_l1_loss(cos_s, cos_t, reduction="none")).mean()
    return distance, angle


def _toward(own: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors [b, B, D] from each own row to each of all rows, and their distances [b, B]; 0, with gradient 0,
    where two rows are the same."""
    difference = rows[None] - own[:, None]
    square = difference.square().sum(dim=2)
    apart = square > 0
    length = torch.where(apart, square, 1.0).sqrt()  # the root's slope at 0 would be infinite
    return difference / length[:, :, None], torch.where(apart, length, 0.0)


def _over_mean(distances: Tensor, pair_w: Tensor, all_w: Tensor) -> Tensor:
    """Distances over their mean between two different good rows."""
    pairs = all_w.sum().square() - all_w.square().sum()
    mean = sum_over_ranks((pair_w * distances).sum()) / pairs.clamp_min(1)
    return distances / torch.where(mean > 0, mean, 1.0)


class Term(frame.Term):
    """ce * CE + distance * distance term + angle * angle term, on pooled features."""

    coupled = True

    def __init__(self, pair: frame.Pair, distance: float, angle: float, ce: float) -> None:
        formula = f"{distance:g} * smooth L1 of distances + {angle:g} * smooth L1 of angles between pooled features"
        super().__init__(formula, {"loss_rkd_distance": distance, "loss_rkd_angle": angle}, ce=ce)
        self.student_taps = self.teacher_taps = frozenset(["pooled"])

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        if batch.weights.shape[0] * world_size() < 2:
            raise ConfigError(
                "--method `rkd` compares rows with each other, and only `1` row runs at a time; use a larger "
                "--device-batch-size or --batch-size, or more processes"
            )
        distance, angle = rkd_losses(student.features["pooled"], teacher.features["pooled"], batch.weights)
        return {"loss_rkd_distance": distance, "loss_rkd_angle": angle}
