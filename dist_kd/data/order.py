"""Owns which sample stands where: (seed, epoch, shard sizes, batch) -> sample numbers of a step. No torch, no I/O.

An epoch is a permutation that can be computed at any place, so resuming is arithmetic, and the global batches are the
same on any number of ranks and workers. The steps of the construction are numbered as in the docstring of `Order`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import zip_longest

import numpy as np

from dist_kd.errors import ConfigError

FULL_SHUFFLE_SAMPLES = 16_000_000  # up to here the permutation of a whole epoch is held in memory (about 400 MB)
STREAMS = 16  # most streams of an order with a bounded window
WINDOW_SHARDS = 4  # window of such an order, in mean shards

PIECES, ROTATION, WINDOW = 1, 2, 3  # what random words are for; each purpose has counters of its own


def random_words(seed: int, epoch: int, purpose: int, count: int, *, stream: int = 0, window: int = 0) -> np.ndarray:
    """`count` uint64 words that follow from the arguments alone (Philox, counter-based).

    The lowest counter word is left to the generator, which counts up in it.
    """
    generator = np.random.Philox(key=[seed, epoch], counter=[0, window, stream, purpose])
    return generator.random_raw(count)


def permutation(words: np.ndarray) -> np.ndarray:
    """The permutation that sorts the words; `Generator.permutation` may change between numpy releases, this not."""
    return np.argsort(words, kind="stable")


def choose_layout(shard_sizes: tuple[int, ...], batch: int, local: bool) -> tuple[int, int]:
    """(streams, window) of a run: chosen once, at its first start, then kept in its checkpoints.

    Local shards of up to 16 M samples: one stream, one window, which is a full shuffle. Otherwise the largest divisor
    of the batch up to 16, and windows of four mean shards, so that a rank meets only its streams' shards.
    """
    samples = sum(shard_sizes)
    if local and samples <= FULL_SHUFFLE_SAMPLES:
        return 1, max(samples, 1)
    streams = max(d for d in range(1, min(STREAMS, batch) + 1) if batch % d == 0)
    filled = sum(size > 0 for size in shard_sizes)
    return streams, max(1, min(samples, round(WINDOW_SHARDS * samples / max(filled, 1))))


@dataclass(frozen=True)
class Order:
    """The order of samples of a run: every number a pure function of the five fields.

    1. Shards longer than the window are cut into pieces; the pieces are permuted, laid end to end, and rotated.
    2. An epoch has steps_per_epoch = N // batch steps; stream p covers the p-th of `streams` equal runs of positions;
       the rest, fewer than `batch` samples, is left out, and the rotation makes it another rest in the next epoch.
    3. Inside a stream, positions are permuted within consecutive windows; the last may be shorter.
    4. A global batch takes batch / streams consecutive samples of each stream, stream by stream.

    ConfigError if the set has fewer samples than one batch.
    """

    shard_sizes: tuple[int, ...]
    batch: int  # samples of one global batch
    seed: int
    streams: int  # divides batch
    window: int  # samples
    _windows: dict = field(default_factory=dict, init=False, repr=False, compare=False)  # stream -> last one used

    def __post_init__(self) -> None:
        if self.num_samples < self.batch:
            raise ConfigError(
                f"global batch `{self.batch}` is larger than the training set of {self.num_samples} samples; "
                + (f"use `--batch-size {self.num_samples}` or less" if self.num_samples else "the set is empty")
            )
        if self.streams < 1 or self.batch % self.streams:
            raise ConfigError(
                f"`{self.streams}` streams of samples, as chosen at the run's first start, do not divide the global "
                f"batch `{self.batch}`; take a multiple as --batch-size, or start anew with another --save_path"
            )
        if self.window < 1:
            raise ConfigError(f"the shuffle window is `{self.window}` samples, but must be at least 1")

    @cached_property
    def num_samples(self) -> int:
        return sum(self.shard_sizes)

    @property
    def steps_per_epoch(self) -> int:
        return self.num_samples // self.batch

    @property
    def left_out(self) -> int:
        """Samples an epoch leaves out (others in each epoch)."""
        return self.num_samples % self.batch

    def epoch_of(self, step: int) -> int:
        return step // self.steps_per_epoch

    def global_batch(self, step: int) -> np.ndarray:
        """Sample numbers [batch] int64 of a step; steps are counted over all epochs."""
        return self._rows(step, 0, self.batch)

    def rank_rows(self, step: int, rank: int, world_size: int) -> np.ndarray:
        """Sample numbers [batch / world_size] int64 of one rank: rows rank * batch / world_size on of the global
        batch. Computes only the streams this rank touches. ConfigError if world_size does not divide the batch."""
        if self.batch % world_size:
            raise ConfigError(
                f"global batch `{self.batch}` is not a multiple of {world_size} processes; use `--batch-size "
                f"{max(self.batch // world_size, 1) * world_size}`, or another number of processes"
            )
        rows = self.batch // world_size
        return self._rows(step, rank * rows, (rank + 1) * rows)

    def epoch_order(self, epoch: int) -> np.ndarray:
        """Sample numbers [steps_per_epoch, batch] int64 of an epoch. For small sets: it is held whole."""
        first = epoch * self.steps_per_epoch
        return np.stack([self.global_batch(step) for step in range(first, first + self.steps_per_epoch)])

    def streams_of(self, first_rank: int, ranks: int, world_size: int) -> range:
        """The streams that `ranks` processes from `first_rank` on take rows of."""
        share, rows = self.batch // self.streams, self.batch // world_size
        return range(first_rank * rows // share, -(-(first_rank + ranks) * rows // share))

    def shards_ahead(self, step: int, rank: int, world_size: int) -> Iterator[tuple[int, int]]:
        """Endless (first step that may want it, shard) of one rank's streams from a step on; steps never fall.

        Those of a window come together, as its samples are permuted; computes pieces and positions only.
        """
        streams, share = self.streams_of(rank, 1, world_size), self.batch // self.streams
        shard_ends = np.cumsum(np.asarray(self.shard_sizes, np.int64))
        length = self.steps_per_epoch * share  # of a stream
        epoch, k = divmod(step, self.steps_per_epoch)
        while True:
            stops, ends, rotation = _laid_out(self.shard_sizes, self.window, self.seed, epoch)
            shards = np.searchsorted(shard_ends, stops - 1, side="right")  # of each piece
            for first in range(k * share // self.window * self.window, length, self.window):
                wanted = max(step, epoch * self.steps_per_epoch + first // share)
                spans = []
                for stream in streams:
                    start = stream * length + first + rotation
                    places = np.array([start, start + min(self.window, length - first) - 1]) % self.num_samples
                    low, high = np.searchsorted(ends, places, side="right").tolist()
                    # a window that runs over the end of the laid-out pieces goes on at their beginning
                    over = places[0] > places[1]
                    spans.append([*shards[low:], *shards[: high + 1]] if over else shards[low : high + 1].tolist())
                for shard in dict.fromkeys(s for some in zip_longest(*spans) for s in some if s is not None):
                    yield wanted, int(shard)
            epoch, k = epoch + 1, 0

    def _rows(self, step: int, first: int, last: int) -> np.ndarray:
        epoch, k = divmod(step, self.steps_per_epoch)
        share = self.batch // self.streams  # rows of each stream in a batch
        parts = []
        for stream in range(first // share, -(-last // share)):
            low = max(first - stream * share, 0)
            high = min(last - stream * share, share)
            parts.append(self._stream(epoch, stream, k * share + low, k * share + high))
        return np.concatenate(parts)

    def _stream(self, epoch: int, stream: int, first: int, last: int) -> np.ndarray:
        """Samples first..last-1 of a stream."""
        parts = []
        while first < last:
            window, start = divmod(first, self.window)
            stop = min(start + last - first, self.window)
            parts.append(self._window_samples(epoch, stream, window)[start:stop])
            first += stop - start
        return np.concatenate(parts)

    def _window_samples(self, epoch: int, stream: int, window: int) -> np.ndarray:
        key, samples = self._windows.get(stream, (None, None))
        if key != (epoch, window):
            samples = self._windows[stream] = (None, None)  # a window may be a whole epoch: the last one goes first
            length = self.steps_per_epoch * (self.batch // self.streams)  # of the stream
            first, last = window * self.window, min((window + 1) * self.window, length)
            order = permutation(random_words(self.seed, epoch, WINDOW, last - first, stream=stream, window=window))
            samples = self._at(epoch, stream * length + first, stream * length + last)[order]
            self._windows[stream] = (epoch, window), samples
        return samples

    def _at(self, epoch: int, first: int, last: int) -> np.ndarray:
        """Sample numbers at positions first..last-1 of an epoch, before windows are permuted."""
        stops, ends, rotation = _laid_out(self.shard_sizes, self.window, self.seed, epoch)
        places = np.arange(first + rotation, last + rotation)
        places %= self.num_samples
        places += (stops - ends)[np.searchsorted(ends, places, side="right")]
        return places


@lru_cache(maxsize=4)
def _laid_out(sizes: tuple[int, ...], window: int, seed: int, epoch: int) -> tuple[np.ndarray, np.ndarray, int]:
    """The permuted pieces laid end to end: (sample number + length of each, where each ends, rotation)."""
    shard_ends = np.cumsum(np.asarray(sizes, np.int64))
    starts, stops = [], []
    for size, shard_end in zip(sizes, shard_ends.tolist(), strict=True):
        cuts = range(shard_end - size, shard_end, window)
        starts += cuts
        stops += [min(cut + window, shard_end) for cut in cuts]
    order = permutation(random_words(seed, epoch, PIECES, len(starts)))
    starts, stops = np.asarray(starts, np.int64)[order], np.asarray(stops, np.int64)[order]
    rotation = int(random_words(seed, epoch, ROTATION, 1)[0]) % int(shard_ends[-1])
    return stops, np.cumsum(stops - starts), rotation
