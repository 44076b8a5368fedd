"""Several teachers as one: the mean of their softmax at the temperature of the loss that asks.

The members' logits travel as the feature MEMBERS, because each term has its own temperature.
"""

from __future__ import annotations

import math

from torch import Tensor
from torch.nn import functional as F

from dist_kd.contracts import ModelOutput
from dist_kd.methods.ce import full_precision

MEMBERS = "teachers"  # [K, B, C] logits of K teachers


def mean_logits(members: Tensor, temperature: float) -> Tensor:
    """z = T * log(mean over k of softmax(z_k / T)): [K, B, C] -> [B, C], so that softmax(z / T) is that mean."""
    log_each = F.log_softmax(full_precision(members) / temperature, dim=2)
    return temperature * (log_each.logsumexp(dim=0) - math.log(members.shape[0]))


def at_temperature(teacher: ModelOutput, temperature: float) -> ModelOutput:
    """The teacher for a loss at this temperature: the same, unless it is several."""
    if MEMBERS not in teacher.features:
        return teacher
    return teacher._replace(logits=mean_logits(teacher.features[MEMBERS], temperature))
