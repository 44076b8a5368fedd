"""Running sums on the device and clocks around the parts of a step. `drain` is the only host sync of training."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from dist_kd.contracts import Batch, LossTerms

PARTS = ("data", "teacher", "student")
OWN = ("data", "teacher", "forward")  # what a rank does without waiting for others; `forward` is within `student`
# micro-batches counted together: one at a time, between a backward and the next forward that push each other out of
# the processor's caches, these small operations take eight times as long (0.3 ms a step)
KEPT = 16


class Clock:
    """Seconds spent in named parts: by CUDA events where work is asynchronous, else by the host's clock."""

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._host: dict[str, float] = defaultdict(float)
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def part(self, name: str) -> Iterator[None]:
        # waiting for data happens on the host, also with a GPU
        if not self._cuda or name == "data":
            start = time.perf_counter()
            yield
            self._host[name] += time.perf_counter() - start
            return
        events = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        events[0].record()
        yield
        events[1].record()
        self._events.append((name, *events))

    def drain(self) -> dict[str, float]:
        """Seconds by part since the last drain. Syncs the device once."""
        if self._events:
            self._events[-1][2].synchronize()
        for name, first, last in self._events:
            self._host[name] += first.elapsed_time(last) / 1000
        seconds = dict(self._host)
        self._host.clear()
        self._events.clear()
        return seconds


class Meters:
    """Sums over micro-batches since the last log point: losses, hits, rows. Part of what a checkpoint saves."""

    def __init__(self, device: torch.device, loss_parts: tuple[str, ...]) -> None:
        # summed in float64 where the device has it, so that a resumed sum is the same sum
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.names = ("loss", *loss_parts, "top1", "top5", "rows", "bad")
        self._sums = torch.zeros(len(self.names), dtype=dtype, device=device)
        self._kept: list[tuple[LossTerms, Tensor, Tensor]] = []  # micro-batches not yet in the sums
        self._weights: dict[int, Tensor] = {}
        self.clock = Clock(device)
        self.own_ms = [0.0] * len(OWN)  # of this rank, a step, in the window that was drained last
        self._since = time.perf_counter()
        self._steps = 0

    def add(self, terms: LossTerms, batch: Batch) -> None:
        """Adds one micro-batch without a host sync. Hits are against hard labels, also under mixup."""
        kept = LossTerms(terms.total.detach(), terms.parts, terms.logits)  # detached: no graph outlives its step
        self._kept.append((kept, batch.labels, batch.weights))
        if len(self._kept) == KEPT:
            self._count()

    @torch.no_grad()
    def _count(self) -> None:
        """Brings the sums up to date: in the order of the micro-batches, so that it does not matter when."""
        for terms, labels, weights in self._kept:
            rows = labels.shape[0]
            top = terms.logits.topk(min(5, terms.logits.shape[1]), dim=1).indices
            hits = weights @ (top == labels[:, None]).to(weights.dtype)  # [5] hits by place
            good = weights.sum()
            means = [terms.total, *(terms.parts[n] for n in self.names[1:-4])]
            news = torch.stack([*means, hits[0], hits.sum(), good, rows - good])
            # a micro-batch without a finite loss is left out whole: its update is skipped, and counted there
            news = torch.where(news.isfinite().all(), news, 0).to(self._sums.dtype)
            self._sums.addcmul_(news, self._weights_for(rows))
        self._kept.clear()

    def _weights_for(self, rows: int) -> Tensor:
        """What a micro-batch's numbers are multiplied with to be sums: means by its rows, counts by one."""
        if rows not in self._weights:
            counts = 4  # top1, top5, rows, bad
            weights = [float(rows)] * (len(self.names) - counts) + [1.0] * counts
            self._weights[rows] = torch.tensor(weights, dtype=self._sums.dtype, device=self._sums.device)
        return self._weights[rows]

    def step_done(self) -> None:
        self._steps += 1

    def state(self) -> Tensor:
        """The sums of this rank, for a checkpoint: [n] float64 on the CPU."""
        self._count()
        return self._sums.double().cpu()

    def load(self, sums: list[float]) -> None:
        self._kept.clear()
        self._sums.copy_(torch.tensor(sums, dtype=torch.float64))

    def drain(self, reduce_sum) -> dict[str, float]:
        """Means over all ranks since the last drain, and this rank's times. `reduce_sum(tensor)` adds over ranks."""
        self._count()
        sums = dict(zip(self.names, reduce_sum(self._sums).tolist(), strict=True))
        parts = self.clock.drain()
        now = time.perf_counter()
        steps = max(1, self._steps)
        rows = sums["rows"] + sums["bad"] or math.nan  # losses are divided by all rows, hits by the good ones
        values = {f"train/{n}": sums[n] / rows for n in self.names[:-4]}
        values |= {f"train/{n}": 100 * sums[n] / (sums["rows"] or math.nan) for n in ("top1", "top5")}
        wall = now - self._since
        values["time/step_ms"] = 1000 * wall / steps
        values |= {f"time/{p}_ms": 1000 * parts.get(p, 0.0) / steps for p in PARTS}
        values["time/other_ms"] = max(0.0, values["time/step_ms"] - sum(values[f"time/{p}_ms"] for p in PARTS))
        self.own_ms = [1000 * parts.get(p, 0.0) / steps for p in OWN]
        self._sums.zero_()
        self.restart_clock()
        return values

    def restart_clock(self) -> None:
        """Starts a new window of time: after evaluations and saves, which are not part of a step."""
        self._since, self._steps = time.perf_counter(), 0
        self.clock.drain()
