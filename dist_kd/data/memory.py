"""Owns a small set held decoded in memory: the same samples as the tars give, without reading or decoding again."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from weakref import WeakValueDictionary

import numpy as np
import torch

from dist_kd.data.decode import TarSamples
from dist_kd.data.index import Index
from dist_kd.data.tar_reader import BadSample
from dist_kd.errors import DataError

PEEKED = 64  # images whose headers are read to estimate a set
MARGIN = 1.1  # on such an estimate


class MemorySamples:
    """Sample number -> pixels, all decoded at the start by threads.

    `shape` is (H, W) if all images have one size, else None; only then `stack` works. A damaged sample is an error
    at the start, or with `keep_bad` is in `bad` and raised whenever it is asked for, as reading it from tars would.
    """

    retries = 0

    def __init__(self, index: Index, *, keep_bad: bool = False, threads: int | None = None):
        self.index = index
        self.bad: dict[int, BadSample] = {}
        source, count = TarSamples(index), index.num_samples
        threads = threads or len(os.sched_getaffinity(0))
        sizes = np.zeros((count, 2), np.int64)  # 0 x 0 for a bad one

        def measure(sample: int) -> None:
            sizes[sample] = source.shape(sample)

        def decode(sample: int) -> None:
            if sample not in self.bad:
                self._view(sample).copy_(source.pixels(sample))

        def attempt(work: Callable[[int], None]) -> Callable[[Iterable[int]], list[tuple[int, BadSample]]]:
            def over(samples: Iterable[int]) -> list[tuple[int, BadSample]]:
                found = []
                for sample in samples:
                    try:
                        work(sample)
                    except BadSample as bad:
                        if not keep_bad:
                            raise
                        found.append((sample, bad))
                return found

            return over

        with ThreadPoolExecutor(threads) as pool:
            parts = [range(first, min(first + 256, count)) for first in range(0, count, 256)]
            try:
                self.bad.update(bad for found in pool.map(attempt(measure), parts) for bad in found)
                self._sizes = sizes
                self._ends = np.cumsum(3 * sizes[:, 0] * sizes[:, 1])
                _check_room(int(self._ends[-1]))
                self._buffer = torch.empty(int(self._ends[-1]), dtype=torch.uint8)
                self.bad.update(bad for found in pool.map(attempt(decode), parts) for bad in found)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise
        source.reader.close()
        first = (int(sizes[0, 0]), int(sizes[0, 1]))
        self.shape = first if (sizes == sizes[0]).all() and math.prod(first) else None

    def pixels(self, sample: int) -> torch.Tensor:
        """uint8 [3, H, W], shared with the buffer: not to be written to."""
        if sample in self.bad:
            raise self.bad[sample]
        return self._view(sample)

    def stack(self, samples: np.ndarray) -> torch.Tensor:
        """uint8 [len(samples), 3, H, W], a copy. Only if `shape` is not None and none of the samples is bad."""
        images = self._buffer.view(-1, *self.shape, 3)
        return images.index_select(0, torch.from_numpy(samples)).permute(0, 3, 1, 2)

    def _view(self, sample: int) -> torch.Tensor:
        height, width = self._sizes[sample].tolist()
        end = int(self._ends[sample])
        # channels last, as decode_image gives them
        return self._buffer[end - 3 * height * width : end].view(height, width, 3).permute(2, 0, 1)


_held: WeakValueDictionary[tuple[int, bool], MemorySamples] = WeakValueDictionary()


def held(index: Index, *, keep_bad: bool) -> MemorySamples:
    """The samples of this very index, decoded once however many loaders show them at the same time."""
    key = (id(index), keep_bad)  # an index lives at least as long as its samples, so no other has this id meanwhile
    samples = _held.get(key)
    if samples is None:
        samples = _held[key] = MemorySamples(index, keep_bad=keep_bad)
    return samples


def _check_room(size: int) -> None:
    """DataError if this machine has not so many bytes of memory: they would be promised, and then the run killed."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if size > memory:
        raise DataError(
            f"the decoded images take `{size / 1e9:.1f}` GB, but this machine has {memory / 1e9:.1f} GB of memory; "
            "read them from their shards: `--no-in-memory`"
        )


def decoded_bytes(index: Index) -> int:
    """Bytes of the whole set as uint8 pixels: exact for squares of one size, else estimated from some headers."""
    if index.image_size is not None:
        return 3 * index.image_size**2 * index.num_samples
    source, sizes = TarSamples(index), []
    for sample in sorted({i * index.num_samples // PEEKED for i in range(PEEKED)}):
        try:
            height, width = source.shape(sample)
        except BadSample:  # whoever reads it for good will say so
            continue
        sizes.append(3 * height * width)
    return int(MARGIN * index.num_samples * sum(sizes) / max(len(sizes), 1))


def fits(index: Index, budget_bytes: int) -> bool:
    """Whether the decoded set stays within a budget."""
    return decoded_bytes(index) <= budget_bytes
