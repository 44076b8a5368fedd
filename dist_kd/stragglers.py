"""Which rank makes the others wait: each one's own work in a step, compared at every log point.

Own work is waiting for data, the teacher's forward and the student's forward. What follows, backward, is where the
fast ranks wait for the slow one, and would hide who is slow. With a loss that is coupled over ranks the fast ones wait
in the forward pass, so that only data and teacher tell them apart.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

from dist_kd.contracts import World
from dist_kd.meters import OWN

SLOW = 1.5  # times the median of all ranks is worth a warning
MATTERS = 0.1  # share of a step that the others must have waited
AGAIN_S = 3600.0  # between two warnings about one rank


class Stragglers:
    """Remembers which rank was warned about when."""

    def __init__(self) -> None:
        self._warned: dict[int, float] = {}
        self._settled = False  # the first window of a start has first times in it

    def look(
        self, world: World, own_ms: list[float], step_ms: float, reduce_sum: Callable[[Tensor], Tensor]
    ) -> tuple[dict[str, float], str | None]:
        """The metrics of one log window, and a warning if a rank is slow. All ranks call it; nothing with one rank.

        `own_ms`: mean milliseconds a step that this rank spent in each part of OWN.
        """
        if world.world_size == 1:
            return {}, None
        table = torch.zeros(world.world_size, len(OWN), dtype=torch.float64)
        table[world.rank] = torch.tensor(own_ms)
        rows: list[list[float]] = reduce_sum(table).tolist()
        totals = [sum(row) for row in rows]
        slowest, median = totals.index(max(totals)), statistics.median_low(totals)  # of two: the faster one's
        values = {"time/slowest_rank": slowest, "time/slowest_ms": totals[slowest], "time/median_ms": median}
        lost_ms = totals[slowest] - median
        recent = time.monotonic() - self._warned.get(slowest, -AGAIN_S) < AGAIN_S
        unsettled, self._settled = not self._settled, True
        if unsettled or recent or totals[slowest] <= SLOW * median or lost_ms <= MATTERS * step_ms:
            return values, None
        self._warned[slowest] = time.monotonic()
        parts = ", ".join(f"{name} {ms:.1f}" for name, ms in zip(OWN, rows[slowest], strict=True))
        return values, (
            f"WARNING: rank {slowest} is slow: {totals[slowest]:.1f} ms of its own work a step ({parts}), the median "
            f"rank {median:.1f} ms; all wait for it, {min(100.0, 100 * lost_ms / step_ms):.0f} % of each step"
        )
