"""Rows of all processes in one loss: sums and rows that travel, with their gradients. One process: nothing happens.

Gradients are added over the ranks on the way back; DDP then takes their mean, which is the gradient of the one loss.
Every rank must call these equally often.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor) -> Tensor:
        total = values.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total


class _Rows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor) -> Tensor:
        ctx.rows = rows.shape[0]
        parts = [torch.empty_like(rows) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, rows.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        dist.all_reduce(total)
        return total.narrow(0, dist.get_rank() * ctx.rows, ctx.rows)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of every rank's `values`, with gradient."""
    return values if world_size() == 1 else _Sum.apply(values)


def rows_of_all_ranks(rows: Tensor) -> Tensor:
    """Every rank's rows in the order of ranks, [B, ...] -> [R * B, ...], with gradient; B is equal on all."""
    return rows if world_size() == 1 else _Rows.apply(rows)
