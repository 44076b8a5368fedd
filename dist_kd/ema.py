"""The exponential moving average of the student: parameters and buffers, decay a pure function of the step."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average:
    """A second student that trails the first. `network` is what is evaluated, saved and exported."""

    def __init__(self, student: nn.Module, decay: float) -> None:
        self.network = copy.deepcopy(student).eval().requires_grad_(False)
        self.decay = decay

    def decay_at(self, step: int) -> float:
        """Warmed up as (1 + n) / (10 + n), so that the random start is forgotten; needs no counter of its own."""
        return min(self.decay, (1 + step) / (10 + step))

    @torch.no_grad()
    def update(self, student: nn.Module, step: int) -> None:
        """Moves towards `student` after optimizer step number `step` (from 0). Integer buffers are copied."""
        mine, theirs = list(self.network.state_dict().values()), list(student.state_dict().values())
        floats = [(m, t) for m, t in zip(mine, theirs, strict=True) if m.is_floating_point()]
        torch._foreach_lerp_([m for m, _ in floats], [t for _, t in floats], 1 - self.decay_at(step))
        for m, t in zip(mine, theirs, strict=True):
            if not m.is_floating_point():
                m.copy_(t)
