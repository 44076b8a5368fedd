"""Cross-entropy with the labels, and what every loss is computed with. Knows no data, device or Accelerate."""

from __future__ import annotations

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_kd.contracts import Batch


def full_precision(values: Tensor) -> Tensor:
    """The values in float32, or as they are in float64: a softmax in half precision loses the tails."""
    return values if values.dtype == torch.float64 else values.float()


def outside_autocast(device: torch.device) -> AbstractContextManager:
    """Autocast switched off where it is on; the switch itself costs a small step as much as an operation."""
    on = torch.is_autocast_enabled(device.type)
    return torch.autocast(device.type, enabled=False) if on else nullcontext()


def in_full_precision(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` outside autocast, its first two arguments (student's and teacher's) in float32 or wider."""

    @functools.wraps(function)
    def computed(student: Tensor, teacher: Tensor, *more: Any, **named: Any) -> Any:
        with outside_autocast(student.device):
            return function(full_precision(student), full_precision(teacher), *more, **named)

    return computed


def cross_entropy(logits: Tensor, batch: Batch, label_smoothing: float = 0.0) -> Tensor:
    """Cross-entropy of each row: [B, C] -> [B], with soft labels where the batch has them."""
    target = batch.labels if batch.soft_labels is None else batch.soft_labels
    return F.cross_entropy(full_precision(logits), target, reduction="none", label_smoothing=label_smoothing)


def weighted_mean(per_sample: Tensor, batch: Batch) -> Tensor:
    """sum(weight x loss) / rows: the divisor counts every row, so that no rank waits for a count of good ones."""
    return (per_sample * batch.weights).sum() / batch.weights.shape[0]
