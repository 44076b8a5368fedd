"""Owns which remote shards lie in this node's cache when: how much it must hold, and what is fetched ahead.

The order of samples is known, so a shard is fetched before its first sample is wanted. The main process waits for the
shards of a request before it hands the request out: what a worker reads is then there, and a shard that cannot be had
is said by the cache, within the cache's limits, not by the loader's.
"""

from __future__ import annotations

import itertools
import logging
import os
import threading
import time
from collections.abc import Iterable, Iterator
from typing import NamedTuple

import numpy as np

from dist_kd.contracts import World
from dist_kd.data.index import Index
from dist_kd.data.order import Order
from dist_kd.data.rows import Request
from dist_kd.errors import ConfigError, DataError

log = logging.getLogger(__name__)

AHEAD = 2  # shards of each stream fetched beyond its window at least
CONNECTIONS = 4  # shards a process fetches at the same time
SAY_S = 30.0  # between lines about a wait
GRACE_S = 1.0  # for its threads to end by themselves; they end with the process at the latest

Plan = Iterator[tuple[int, int]]  # (first step that may want it, shard), steps never falling


class Need(NamedTuple):
    """What the cache of one node must hold for training, in bytes but for `streams`."""

    streams: int  # that the processes of a node read
    window: int
    shard: int  # the largest
    whole: int  # the set

    @property
    def bytes(self) -> int:
        return min(self.whole, self.streams * (self.window + AHEAD * self.shard))

    def shards_ahead(self, limit_bytes: int) -> int:
        """How far each stream is fetched ahead, in shards: what a cache of that size has room for, up to a window."""
        room = (limit_bytes - self.bytes) // max(self.streams * self.shard, 1)
        return AHEAD + max(0, min(room, -(-self.window // self.shard)))


def training_need(index: Index, order: Order, world: World) -> Need:
    """Of the node that reads most streams, so that all processes find the same."""
    ranks = min(world.local_world_size, world.world_size)
    nodes = range(0, world.world_size - ranks + 1, ranks)
    sizes = [shard.bytes for shard in index.shards]
    return Need(
        streams=max(len(order.streams_of(first, ranks, world.world_size)) for first in nodes),
        window=-(-order.window * sum(sizes) // order.num_samples),
        shard=max(sizes),
        whole=sum(sizes),
    )


def check_cache(index: Index, order: Order, world: World) -> None:
    """ConfigError, with the arithmetic, if the cache of a remote set is too small for training."""
    if not index.url:
        return
    need, limit = training_need(index, order, world), index.cache.limit_bytes
    if limit >= need.bytes:
        return
    if need.bytes == need.whole:
        why = f"the whole set of {_gb(need.whole)} GB"
    else:
        why = (
            f"{need.streams} streams x (a window of {order.window} samples, {_gb(need.window)} GB, + {AHEAD} shards of "
            f"{_gb(need.shard)} GB) = {_gb(need.bytes)} GB of the {_gb(need.whole)} GB of the set"
        )
    raise ConfigError(
        f"--cache-gb `{limit / 1e9:g}` is too little for the shards of `{index.location(0)}` and so on: a node needs "
        f"{why}; give --cache-gb {_gb(need.bytes)} or more, or copy the shards to a local disk"
    )


def cache_line(index: Index, order: Order, world: World) -> str:
    """What the header says of a remote set."""
    need, cache = training_need(index, order, world), index.cache
    return (
        f"remote, through {cache.folder}: up to {_gb(cache.limit_bytes)} GB, this run needs {_gb(need.bytes)} "
        f"({need.streams} streams of windows of {order.window}); {need.shards_ahead(cache.limit_bytes)} shards of each "
        "stream ahead"
    )


def _gb(size: int) -> str:
    """GB, rounded up to three digits, so that what is printed suffices."""
    unit = 10 ** max(len(str(size)) - 3, 0)
    return f"{-(-size // unit) * unit / 1e9:.12g}"


class FetchAhead:
    """Keeps the next shards of one process's plan in the cache; `reach` says how far the loader is."""

    def __init__(self, index: Index, plan: Plan, ahead: int):
        self._index, self._ahead = index, ahead
        self._wanted, self._fetched = itertools.tee(plan)  # read under the lock only
        self._next = next(self._wanted, None)
        self._passed = self._taken = 0  # items of the plan that the loader has reached, that threads have begun
        self._moved = threading.Condition()
        self._closed = self._said = False
        self._threads: list[threading.Thread] = []

    def reach(self, step: int) -> None:
        """Returns when the shards that requests up to `step` want are in the cache. DataError if one cannot be had."""
        if not self._threads:
            self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(CONNECTIONS)]
            for thread in self._threads:
                thread.start()
        began = said = time.monotonic()
        first = self._passed
        while self._next is not None and self._next[0] <= step:
            shard = self._next[1]
            with self._moved:
                self._passed += 1
                self._next = next(self._wanted, None)
                self._moved.notify_all()
            os.close(self._index.open_shard(shard))
            if (now := time.monotonic()) - said > SAY_S:
                log.warning("step %d waits for its shards: %d came in %.0f s", step, self._passed - first, now - began)
                said = now

    def close(self) -> None:
        """End the threads; one in the middle of a shard ends with it."""
        with self._moved:
            self._closed = True
            self._moved.notify_all()
        for thread in self._threads:
            thread.join(GRACE_S / CONNECTIONS)

    def _run(self) -> None:
        while (shard := self._take()) is not None:
            try:
                os.close(self._index.open_shard(shard))
            except Exception as error:  # the run ends, if it must, where this shard is wanted
                with self._moved:
                    said, self._said = self._said, True
                if not said and not self._closed:
                    log.warning("fetching ahead: %s; it is tried again when it is wanted", error)
                if not isinstance(error, DataError):
                    raise

    def _take(self) -> int | None:
        """The next shard to fetch, when it is near enough; None at the end."""
        with self._moved:
            self._moved.wait_for(lambda: self._closed or self._taken < self._passed + self._ahead)
            item = None if self._closed else next(self._fetched, None)
            self._taken += 1
            return None if item is None else item[1]


class Fetched:
    """Requests that are handed out when their shards are in the cache. A DataLoader takes it for a sampler."""

    def __init__(self, requests: Iterable[Request], ahead: FetchAhead | None = None):
        self.requests, self.ahead = requests, ahead

    def __iter__(self) -> Iterator[Request]:
        for request in self.requests:
            if self.ahead is not None:
                self.ahead.reach(request.step)
            yield request


def training_fetch(index: Index, order: Order, world: World, step: int) -> FetchAhead:
    """Fetches for the training of one rank from a step on."""
    each = training_need(index, order, world).shards_ahead(index.cache.limit_bytes)
    streams = len(order.streams_of(world.rank, 1, world.world_size))
    return FetchAhead(index, order.shards_ahead(step, world.rank, world.world_size), each * streams)


def evaluation_fetch(index: Index, requests: Iterable[Request]) -> FetchAhead:
    """Fetches for requests that go through the set in its order."""

    def plan() -> Plan:
        last = -1
        for request in requests:
            for shard in np.unique(np.searchsorted(index.ends, request.samples, side="right")).tolist():
                if shard > last:
                    yield request.step, shard
                    last = shard

    return FetchAhead(index, plan(), AHEAD)
