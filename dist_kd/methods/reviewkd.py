"""Knowledge review: Chen et al. 2021, arXiv 2104.09044 (ReviewKD): later maps help with earlier ones."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dist_kd.contracts import Batch, ModelOutput
from dist_kd.methods import frame
from dist_kd.methods.ce import in_full_precision, weighted_mean
from dist_kd.methods.stages import Adapter, averaged, stage_pairs

GRIDS = (4, 2, 1)  # sides to which both maps are averaged, each with half the weight of the one before
WIDEST = 512  # channels inside the fusion, at most


@in_full_precision
def context_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Hierarchical context loss of each row: [B, C, H, W] twice -> [B].

    Mean of the mean squared differences of the maps and of their averages on the grids smaller than they are, weights
    1, 1/2, 1/4, ...
    """
    total, weights, weight = _mse(student_map, teacher_map), 1.0, 1.0
    for side in GRIDS:
        if side < min(student_map.shape[2:]):
            weight /= 2
            weights += weight
            pooled = (averaged(maps, (side, side)) for maps in (student_map, teacher_map))
            total = total + weight * _mse(*pooled)
    return total / weights


def _mse(a: Tensor, b: Tensor) -> Tensor:
    return (a - b).square().flatten(1).mean(dim=1)


class Fusion(nn.Module):
    """Attention-based fusion: a student's map and what later stages passed on -> (like the teacher's map, to pass on).

    [B, inputs, H, W] and [B, middle, ...] -> [B, outputs, side, side] and [B, middle, side, side].
    """

    def __init__(self, inputs: int, middle: int, outputs: int, side: tuple[int, ...], first: bool) -> None:
        super().__init__()
        self.side = side  # of the teacher's map
        self.inward, self.outward = Adapter(inputs, middle), Adapter(middle, outputs, kernel=3)
        self.attention = None if first else nn.Conv2d(2 * middle, 2, 1)

    def forward(self, maps: Tensor, later: Tensor | None) -> tuple[Tensor, Tensor]:
        fused = self.inward(maps)
        if self.attention is not None:
            later = F.interpolate(later, fused.shape[2:], mode="nearest")
            share = self.attention(torch.cat([fused, later], dim=1)).sigmoid()  # [B, 2, H, W]
            fused = fused * share[:, :1] + later * share[:, 1:]
        if fused.shape[2:] != self.side:
            fused = F.interpolate(fused, self.side, mode="nearest")
        return self.outward(fused), fused


class Term(frame.Term):
    """ce * CE + weight * sum over stages and pooled features of the context loss of the reviewed student."""

    def __init__(self, pair: frame.Pair, weight: float, warmup: float, ce: float) -> None:
        stages = stage_pairs(pair, "stage", "reviewkd")
        self.levels = [(one.student, one.teacher) for one in stages] + [("pooled", "pooled")]
        names = ", ".join(f"{ours}-{theirs}" for ours, theirs in self.levels)
        formula = f"{weight:g} * sum of context losses of the reviewed student over {names}"
        super().__init__(formula, {"loss_reviewkd": weight}, ce=ce)
        self.warmup = warmup
        self.student_taps, self.teacher_taps = map(frozenset, zip(*self.levels, strict=True))
        shapes = [(one.student_shape, one.teacher_shape) for one in stages]
        pooled = (network.shapes(["pooled"])["pooled"] for network in (pair.student, pair.teacher))
        shapes.append(tuple((*shape, 1, 1) for shape in pooled))
        middle = min(WIDEST, shapes[-1][0][0])
        last = len(shapes) - 1
        self.fusions = nn.ModuleList(
            Fusion(ours[0], middle, theirs[0], tuple(theirs[1:]), first=number == last)
            for number, (ours, theirs) in enumerate(shapes)
        )

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        per_sample, later = 0, None
        for (ours, theirs), fusion in zip(reversed(self.levels), reversed(self.fusions), strict=True):
            imitated, later = fusion(_as_map(student.features[ours]), later)
            per_sample = per_sample + context_loss(imitated, _as_map(teacher.features[theirs]))
        return {"loss_reviewkd": weighted_mean(per_sample, batch)}


def _as_map(feature: Tensor) -> Tensor:
    """Pooled features [B, D] as maps of one pixel."""
    return feature if feature.ndim == 4 else feature[:, :, None, None]
