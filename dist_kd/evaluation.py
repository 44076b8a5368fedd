"""Exact evaluation: each sample once, sums on every rank, one reduction at the end. Knows no tracker and no loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dist_kd.contracts import Batch, DataCounters, EvalSource, ModelOutput

ECE_BINS = 15  # Guo et al. 2017, arXiv 1706.04599: equal-width bins of confidence
COUNTS = ("samples", "top1", "top5", "loss", "agreement", "compared")


@dataclass(frozen=True)
class Scores:
    """Sums over a whole set, from which all figures follow."""

    samples: int
    top1_hits: int
    top5_hits: int
    loss_sum: float
    ece: float  # percent
    agreements: int  # samples where the student's top-1 is the teacher's
    compared: int  # samples whose teacher top-1 is known
    seconds: float
    complete: bool = True  # False if a stop request ended it early: then no figure is used
    data: DataCounters = field(default_factory=DataCounters)  # what of the set was damaged, hence not scored

    def values(self, prefix: str) -> dict[str, float]:
        """Metrics with their keys, e.g. val/top1 in percent."""
        n = max(1, self.samples)
        values = {
            "top1": 100 * self.top1_hits / n,
            "top5": 100 * self.top5_hits / n,
            "loss": self.loss_sum / n,
            "ece": self.ece,
            "samples": self.samples,
            "bad_samples": sum(self.data.bad.values()),
        }
        if self.compared:
            values["agreement"] = 100 * self.agreements / self.compared
        return {f"{prefix}/{k}": v for k, v in values.items()}


class _Sums:
    """Device-side sums of one evaluation."""

    def __init__(self, device: torch.device) -> None:
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self.counts = torch.zeros(len(COUNTS), dtype=dtype, device=device)
        self.bins = torch.zeros(3, ECE_BINS, dtype=dtype, device=device)  # confidence, hits, samples

    def add(self, logits: Tensor, batch: Batch, expected: Tensor | None) -> Tensor:
        """Adds one batch; [B] top-1 classes. `expected` is the teacher's top-1, -1 where unknown."""
        logits = logits.float()
        weights = batch.weights.to(self.counts.dtype)
        top = logits.topk(min(5, logits.shape[1]), dim=1).indices
        hits = (top == batch.labels[:, None]) * weights[:, None]
        loss = F.cross_entropy(logits, batch.labels, reduction="none").to(self.counts.dtype) * weights
        known = torch.zeros_like(batch.labels, dtype=torch.bool) if expected is None else expected >= 0
        same = known if expected is None else known & (top[:, 0] == expected)
        sums = [
            weights.sum(),
            hits[:, 0].sum(),
            hits.sum(),
            loss.sum(),
            (same * weights).sum(),
            (known * weights).sum(),
        ]
        self.counts += torch.stack([s.to(self.counts.dtype) for s in sums])
        confidence = logits.softmax(dim=1).amax(dim=1)
        place = (confidence * ECE_BINS).long().clamp(0, ECE_BINS - 1)
        rows = torch.stack([confidence.to(self.counts.dtype) * weights, hits[:, 0].to(self.counts.dtype), weights])
        self.bins.index_add_(1, place, rows)
        return top[:, 0]


def expected_calibration_error(bins: Tensor) -> float:
    """Sum over bins of share x |confidence - accuracy|, in percent. `bins`: [3, n] confidence sum, hits, samples."""
    total = float(bins[2].sum())
    return 100 * float((bins[0] - bins[1]).abs().sum()) / max(1.0, total)


class Evaluator:
    """Scores networks on one set. Every rank calls it; all get the same Scores."""

    def __init__(
        self,
        source: EvalSource,
        *,
        device: torch.device,
        rounds: int,
        autocast: Callable[[], AbstractContextManager[Any]],
        reduce_sum: Callable[[Tensor], Tensor],
        reduce_max: Callable[[Tensor], Tensor],
        gather: Callable[[Any], list],
        stopped: Callable[[], bool] = lambda: False,
    ) -> None:
        self.source = source
        self._device, self._rounds = device, rounds
        self._autocast, self._stopped = autocast, stopped
        self._reduce_sum, self._reduce_max, self._gather = reduce_sum, reduce_max, gather
        self.answers: Tensor | None = None  # [N] the teacher's top-1 of each sample of the set, -1 where unknown

    def score(self, network: Callable[[Tensor], ModelOutput], *, remember: bool = False) -> Scores:
        """Scores of `network` (normalized images -> ModelOutput); `remember` keeps its top-1 for agreement.

        A stop request is looked for once per round, the same number of times on every rank. DataError, on all ranks,
        if more samples are damaged than may be.
        """
        start = time.perf_counter()
        account = self.source.account
        account.clear()
        sums = _Sums(self._device)
        predicted = torch.full((self.source.spec.num_samples,), -1, dtype=torch.int32, device=self._device)
        batches = iter(self.source.batches())
        complete = True
        with torch.no_grad():
            for _ in range(self._rounds):
                if self._stopped():
                    complete = False
                    break
                batch = next(batches, None)
                if batch is None:
                    continue  # fewer batches than another rank: it still answers for the stop request
                with self._autocast():
                    logits = network(batch.images).logits
                expected = None if self.answers is None else self.answers[batch.samples]
                top1 = sums.add(logits, batch, expected)
                if remember:
                    predicted[batch.samples] = top1.to(torch.int32)
        if hasattr(batches, "close"):
            batches.close()
        data = account.of_all(self._reduce_sum, self._gather)
        if complete:
            account.check(data)
        if remember and complete:
            self.answers = self._reduce_max(predicted).to(self._device)
        counts = self._reduce_sum(sums.counts)
        bins = self._reduce_sum(sums.bins)
        by_name = dict(zip(COUNTS, counts.tolist(), strict=True))
        return Scores(
            samples=round(by_name["samples"]),
            top1_hits=round(by_name["top1"]),
            top5_hits=round(by_name["top5"]),
            loss_sum=by_name["loss"],
            ece=expected_calibration_error(bins),
            agreements=round(by_name["agreement"]),
            compared=round(by_name["compared"]),
            seconds=time.perf_counter() - start,
            complete=complete,
            data=data,
        )
