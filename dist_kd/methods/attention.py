"""Attention transfer by activations: Zagoruyko, Komodakis 2016, arXiv 1612.03928, with p = 2."""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional as F

from dist_kd.contracts import Batch, ModelOutput
from dist_kd.methods import frame
from dist_kd.methods.ce import in_full_precision, weighted_mean
from dist_kd.methods.stages import at_smaller_side, stage_pairs


def attention_map(maps: Tensor) -> Tensor:
    """Where a network looks: mean over channels of the squares, of length 1: [B, C, H, W] -> [B, H*W]. 0 of a 0 map."""
    # scaled first: squares of squares of small activations would underflow, those of large ones overflow
    scale = maps.detach().abs().amax(dim=(1, 2, 3), keepdim=True)
    scaled = maps / scale.masked_fill(scale == 0, 1)
    return F.normalize(scaled.square().mean(dim=1).flatten(1), dim=1)


@in_full_precision
def attention_loss(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """Mean over pixels of the squared difference of both attention maps: [B, Cs, H, W], [B, Ct, H, W] -> [B]."""
    return (attention_map(student_map) - attention_map(teacher_map)).square().mean(dim=1)


class Term(frame.Term):
    """ce * CE + weight * sum over stages of the mean squared difference of attention maps."""

    def __init__(self, pair: frame.Pair, weight: float, ce: float) -> None:
        pairs = stage_pairs(pair, "stage", "attention")
        names = ", ".join(f"{one.student}-{one.teacher}" for one in pairs)
        formula = f"{weight:g} * sum of MSE(attention of student, of teacher) over {names}"
        super().__init__(formula, {"loss_attention": weight}, ce=ce)
        self.pairs = pairs
        self.student_taps = frozenset(one.student for one in pairs)
        self.teacher_taps = frozenset(one.teacher for one in pairs)

    def forward(self, student: ModelOutput, teacher: ModelOutput, batch: Batch) -> dict[str, Tensor]:
        per_sample = sum(
            attention_loss(*at_smaller_side(student.features[one.student], teacher.features[one.teacher]))
            for one in self.pairs
        )
        return {"loss_attention": weighted_mean(per_sample, batch)}
