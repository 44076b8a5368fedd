"""Owns the last part of the way to a network: order + samples + views -> batches on the device, normalized there.

The main process computes which samples are wanted, so any step can come first; the workers of feed.py turn them into
uint8 rows, and delivery.py counts, moves and normalizes them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dist_kd.contracts import Batch, DataSpec, World
from dist_kd.data import fetch_ahead, memory
from dist_kd.data.account import Account
from dist_kd.data.decode import TarSamples
from dist_kd.data.delivery import Delivery
from dist_kd.data.feed import Feed
from dist_kd.data.index import Index
from dist_kd.data.order import Order
from dist_kd.data.rows import Request, Rows, Shown
from dist_kd.errors import ConfigError


class TrainLoader:
    """Training batches of one rank, the same global batches whatever ranks, workers or storage."""

    def __init__(
        self,
        index: Index,
        order: Order,
        view: Any,
        *,
        world: World,
        micro_batch: int,
        device: torch.device | str,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        workers: int,
        in_memory: bool,
        mix: Callable[[Tensor, Tensor, int, np.ndarray], tuple[Tensor, Tensor]] | None = None,
        channels_last: bool = True,
        timeout_s: float = 300.0,
        max_bad_fraction: float = 0.0,
    ):
        """`micro_batch` divides this rank's rows of a batch, and is even if rows are mixed in pairs.

        `max_bad_fraction`: 0 makes the first damaged sample a DataError; else `account` says when there are too many.
        """
        rows = order.rank_rows(0, world.rank, world.world_size).size
        if rows % micro_batch:
            raise ConfigError(
                f"micro-batch `{micro_batch}` does not divide the {rows} rows each process has of a batch"
            )
        if mix is not None and micro_batch % 2:
            raise ConfigError(f"micro-batch `{micro_batch}` is odd, but mixup and cutmix pair its rows")
        self.spec: DataSpec = index.spec
        self._order, self._micro_batch, self._mix, self._world = order, micro_batch, mix, world
        self.account = Account(index, index.num_samples, max_bad_fraction)
        self._delivery = Delivery(self.account, world, device, mean, std, channels_last)
        samples = memory.held(index, keep_bad=max_bad_fraction > 0) if in_memory else TarSamples(index)
        dataset = Shown(index, samples, view, train=True, strict=max_bad_fraction == 0)
        self._feed = Feed(dataset, workers, timeout_s, pin=self._delivery.pin)
        self._remote = index if index.url and not in_memory else None
        self._ahead: fetch_ahead.FetchAhead | None = None

    def batches(self, step: int) -> Iterator[Batch]:
        """Endless micro-batches from the first one of optimizer step `step` on. Ends those of an earlier call.

        Remote shards are fetched ahead, and are in the cache before a request is made of them.
        """
        self.close()
        requests: Iterable[Request] = _TrainRequests(self._order, self._world, self._micro_batch, step)
        if self._remote is not None:
            self._ahead = fetch_ahead.training_fetch(self._remote, self._order, self._world, step)
            requests = fetch_ahead.Fetched(requests, self._ahead)
        return self._deliver(self._feed.start(requests))

    def close(self) -> None:
        """End the workers and what fetches ahead; `batches` may be called again."""
        if self._ahead is not None:
            self._ahead.close()
        self._feed.close()

    def _deliver(self, rows_of: Iterator[Rows]) -> Iterator[Batch]:
        for rows in rows_of:
            batch = self._delivery.batch(rows)
            if self._mix is not None:
                images, soft_labels = self._mix(batch.images, batch.labels, rows.epoch, rows.samples.numpy())
                batch = batch._replace(images=images, soft_labels=soft_labels)
            yield batch


class EvalLoader:
    """Evaluation batches of one rank: batch b of the set is on rank b modulo ranks, each sample exactly once."""

    def __init__(
        self,
        index: Index,
        view: Any,
        *,
        world: World,
        batch_size: int,
        device: torch.device | str,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        workers: int,
        in_memory: bool,
        channels_last: bool = True,
        timeout_s: float = 300.0,
        limit: int | None = None,
        max_bad_fraction: float = 0.0,
        ledger: str = "evaluation-",
    ):
        """`limit` takes that many samples, evenly spaced, if the set has more; `ledger` begins its file's name."""
        self.spec: DataSpec = index.spec
        self.num_samples = min(limit or index.num_samples, index.num_samples)  # of all ranks together
        chosen = np.arange(self.num_samples, dtype=np.int64) * index.num_samples // self.num_samples
        self._requests = [
            Request(0, number, chosen[number * batch_size : (number + 1) * batch_size])
            for number in range(world.rank, -(-self.num_samples // batch_size), world.world_size)
        ]
        self.account = Account(index, self.num_samples, max_bad_fraction)
        self._delivery = Delivery(self.account, world, device, mean, std, channels_last, ledger=ledger)
        samples = memory.held(index, keep_bad=max_bad_fraction > 0) if in_memory else TarSamples(index)
        dataset = Shown(index, samples, view, train=False, strict=max_bad_fraction == 0)
        self._feed = Feed(dataset, min(workers, len(self._requests)), timeout_s, pin=self._delivery.pin)
        self._remote = index if index.url and not in_memory else None
        self._fetched = fetch_ahead.Fetched(self._requests)

    def batches(self) -> Iterator[Batch]:
        """This rank's batches; the set's last is shorter. Workers are kept for the next call."""
        if not self._requests:
            return
        ahead = self._remote and fetch_ahead.evaluation_fetch(self._remote, self._requests)
        self._fetched.ahead = ahead
        try:
            yield from map(self._delivery.batch, self._feed.start(self._fetched))
        finally:
            if ahead is not None:
                ahead.close()

    def close(self) -> None:
        """End the workers; `batches` may be called again."""
        self._feed.close()


class _TrainRequests:
    """Endless requests of one rank from a step on; a DataLoader takes it for a sampler."""

    def __init__(self, order: Order, world: World, micro_batch: int, step: int):
        self.order, self.world, self.micro_batch, self.step = order, world, micro_batch, step

    def __iter__(self) -> Iterator[Request]:
        step = self.step
        while True:
            rows = self.order.rank_rows(step, self.world.rank, self.world.world_size)
            for first in range(0, len(rows), self.micro_batch):
                yield Request(self.order.epoch_of(step), step, rows[first : first + self.micro_batch])
            step += 1
