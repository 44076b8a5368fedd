"""A comprehensive overhaul of feature distillation: Heo et al. 2019, arXiv 1904.01866 (OFD).

Maps before the ReLU that ends a stage; what is below the teacher's margin there is not to be imitated exactly.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from dist_kd.contracts import Batch, ModelOutput
from dist_kd.errors import ConfigError
from dist_kd.methods import frame
from dist_kd.methods.ce import in_full_precision, weighted_mean
from dist_kd.methods.stages import Adapter, at_smaller_side, stage_pairs

RARE = 1e-3  # share of negative values below which the published margin is -3 deviations


def margins(mean: Tensor, std: Tensor) -> Tensor:
    """E[x | x < 0] of each channel, x normal with these means and deviations: [C] -> [C] float64, never above 0.

    Published: -3 deviations where x < 0 is rarer than 1 in 1,000. Of a constant channel (deviation 0) the limit, the
    constant itself or 0.
    """
    mean, std = mean.detach().double(), std.detach().double().abs()
    z = -mean / std.clamp_min(torch.finfo(torch.float64).tiny)
    log_below = torch.special.log_ndtr(z)  # log P(x < 0)
    inverse_mills = torch.exp(-z.square() / 2 - math.log(math.sqrt(2 * math.pi)) - log_below)
    expected = torch.where(log_below > math.log(RARE), mean - std * inverse_mills, -3 * std)
    return torch.where(std > 0, expected, mean.clamp_max(0))


@in_full_precision
def partial_l2(student_map: Tensor, teacher_map: Tensor, margin: Tensor) -> Tensor:
    """Squared distance of each row to max(teacher, margin), summed over channels and pixels: [B, C, H, W] twice -> [B].

    margin is [C]. Where the target is not positive, a student at or below it costs nothing.
    """
    target = teacher_map.maximum(margin.to(teacher_map.dtype)[:, None, None])
    counts = (student_map > target) | (target > 0)
    return ((student_map - target).square() * counts).flatten(1).sum(dim=1)


class Term(frame.Term):
    """ce * CE + weight * sum over stages of partial L2 / 2^(stages after it)."""

    def __init__(self, pair: frame.Pair, weight: float, teacher_batch_norm: bool, ce: float) -> None:
        norms = pair.teacher.margin_norms()
        pairs = stage_pairs(pair, "pre_relu", "overhaul", only=frozenset(norms))
        if not pairs:
            raise ConfigError(
                "--method `overhaul` takes margins from the batch norms before the activations, and "
                f"`{pair.teacher.spec.arch}` (--teacher-arch) has none there; use one that has, or reviewkd"
            )
        names = ", ".join(f"{one.student}-{one.teacher}" for one in pairs)
        formula = f"{weight:g} * sum of partial L2 / 2^k over {names} (k = 0 the last), teacher above its margins"
        super().__init__(formula, {"loss_overhaul": weight}, ce=ce)
        self.pairs = pairs
        self.student_taps = frozenset(one.student for one in pairs)
        self.teacher_taps = frozenset(one.teacher for one in pairs)
        self.teacher_batch_norm = teacher_batch_norm
        self.connectors = nn.ModuleList(Adapter(one.student_shape[0], one.teacher_shape[0]) for one in pairs)
        for number, one in enumerate(pairs):
            norm = norms[one.teacher]
            margin = margins(norm.bias, norm.weight).float()
            self.register_buffer(f"margin{number}", margin, persistent=False)  # a function of the teacher

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        per_sample = 0
        for number, (one, connector) in enumerate(zip(self.pairs, self.connectors, strict=True)):
            ours, theirs = at_smaller_side(student.features[one.student], teacher.features[one.teacher])
            share = 2.0 ** (number + 1 - len(self.pairs))
            per_sample = per_sample + share * partial_l2(connector(ours), theirs, getattr(self, f"margin{number}"))
        return {"loss_overhaul": weighted_mean(per_sample, batch)}
