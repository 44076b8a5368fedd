"""Our loader in all ways that are measured: a plain loop, worker processes, worker threads; and the sets they read."""

from __future__ import annotations

import contextlib
import io
import os
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from loader_rivals import MEAN, STD, per_image

from dist_kd.commands.pack import main as pack
from dist_kd.contracts import World
from dist_kd.data.augment import blank
from dist_kd.data.decode import TarSamples
from dist_kd.data.feed import PREFETCH, Feed
from dist_kd.data.finding import open_data
from dist_kd.data.index import Index
from dist_kd.data.loader import TrainLoader
from dist_kd.data.order import Order, choose_layout
from dist_kd.data.rows import Request, Rows, Shown
from dist_kd.data.tar_reader import TarReader
from dist_kd.data.views import TrainView

FEW = 500  # images, for which further processes take longer to start than to work
OPERATIONS = 2000  # small ones, as a training loop launches


def repeated(photographs: Index, folder: Path, shards: int, per_shard: int) -> Path:
    """A folder of classes with as many images as the shards shall hold, all links to these photographs."""
    reader = TarReader(photographs)
    for number in range(shards * per_shard):
        sample, copy = number % photographs.num_samples, number // photographs.num_samples
        place = folder / f"class{int(photographs.rows['label'][sample]):04d}"
        if copy == 0:
            place.mkdir(parents=True, exist_ok=True)
            data = reader.read(sample)
            (place / f"{sample}-0.{'jpg' if data[:2] == bytes([0xFF, 0xD8]) else 'png'}").write_bytes(data)
        else:
            (first,) = place.glob(f"{sample}-0.*")
            os.link(first, place / f"{sample}-{copy}{first.suffix}")
    return folder


def packed(images: Path, folder: Path, per_shard: int, *flags: str) -> Index:
    """The shards that `dist-kd pack` makes of a folder of images."""
    few = len(list(images.glob("*/*"))) < FEW
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        pack([str(images), str(folder), "--shard-size", str(per_shard), *(["--jobs", "1"] if few else []), *flags])
    return open_data(str(folder / "train"))


class Requests:
    """Endless batches of samples, shuffled again in each epoch."""

    def __init__(self, index: Index, batch_size: int):
        self.count, self.batch_size = index.num_samples, batch_size

    def __iter__(self) -> Iterator[Request]:
        epoch = 0
        while True:
            order = np.random.default_rng(epoch).permutation(self.count)
            for step in range(self.count // self.batch_size):
                yield Request(epoch, step, order[step * self.batch_size : (step + 1) * self.batch_size])
            epoch += 1


class Ours:
    """Decode + random resized crop + flip to uint8 batches out of one set of shards."""

    def __init__(self, index: Index, size: int, batch_size: int, count: int):
        """`count` batches are timed in a turn."""
        self.index, self.size, self.batch_size, self.count = index, size, batch_size, count
        self.requests = Requests(index, batch_size)

    def shown(self) -> Shown:
        view = TrainView("rrc+flip", self.size, 0)
        return Shown(self.index, TarSamples(self.index), view, train=True, strict=True)

    def bare(self) -> Callable[[], float]:
        """The same transform in a plain loop, one batch over the other."""
        shown, out = self.shown(), blank(self.batch_size, self.size)
        batches = (shown.rows(request, out) for request in self.requests)
        return lambda: per_image(batches, self.batch_size, 1, self.count)

    def processes(self, workers: int) -> Callable[[], float]:
        """What `dist-kd train` does, up to the uint8 batch in the main process."""
        return lambda: self._beside(self._processes(workers), workers)

    def threads(self, workers: int) -> Callable[[], float]:
        """The same work in threads of the main process."""
        return lambda: self._beside(self._threads(workers), workers)

    def _beside(self, batches: Iterator[Rows], workers: int) -> float:
        try:
            return per_image(batches, self.batch_size, PREFETCH * workers + 2, self.count)
        finally:
            batches.close()

    def _processes(self, workers: int) -> Iterator[Rows]:
        feed = Feed(self.shown(), workers, 120.0, pin=False)
        try:
            yield from feed.start(self.requests)
        finally:
            feed.close()

    def _threads(self, workers: int) -> Iterator[Rows]:
        pools = [ThreadPoolExecutor(1, initializer=torch.set_num_threads, initargs=(1,)) for _ in range(workers)]
        shown = [self.shown() for _ in pools]
        slots = [blank(self.batch_size, self.size) for _ in range(PREFETCH * workers + 1)]
        pending: deque[Future[Rows]] = deque()
        try:
            for number, request in enumerate(self.requests):
                worker = number % workers
                pending.append(pools[worker].submit(shown[worker].rows, request, slots[number % len(slots)]))
                if len(pending) > PREFETCH * workers:
                    yield pending.popleft().result()
        finally:
            for pool in pools:
                pool.shutdown(cancel_futures=True)

    def floats(self, workers: int) -> Callable[[], float]:
        """On to normalized float32 batches on the CPU: what training without a GPU is given."""

        def turn() -> float:
            loader = train_loader(self.index, TrainView("rrc+flip", self.size, 0), self.batch_size, workers)
            try:
                return per_image(loader.batches(0), self.batch_size, PREFETCH * workers + 2, self.count)
            finally:
                loader.close()

        return turn

    def operations(self, way: str) -> Callable[[], float]:
        """Seconds that one small torch operation takes the main process: `alone`, or beside one worker of a kind."""

        def turn() -> float:
            batches = {"alone": iter(int, 1), "processes": self._processes(1), "threads": self._threads(1)}
            if way == "alone":
                return _operations()
            chosen, seconds = batches[way], []
            for number in range(self.count + 2):
                next(chosen)
                if number >= 2:  # the worker has its next request, and works on it
                    seconds.append(_operations())
            chosen.close()
            return float(np.median(seconds))

        return turn


def _operations() -> float:
    value, started = torch.zeros(8), time.perf_counter()
    for _ in range(OPERATIONS):
        value.add_(1.0)
    return (time.perf_counter() - started) / OPERATIONS


def train_loader(index: Index, view: TrainView, batch_size: int, workers: int, in_memory: bool = False) -> TrainLoader:
    sizes = index.spec.shard_sizes
    return TrainLoader(
        index, Order(sizes, batch_size, 0, *choose_layout(sizes, batch_size, True)), view, world=World(),
        micro_batch=batch_size, device="cpu", mean=MEAN, std=STD, workers=workers, in_memory=in_memory,
    )  # fmt: skip


def read_raw(index: Index) -> Callable[[], float]:
    """Bytes and label of every sample in shuffled order, checksums looked at."""
    reader, labels = TarReader(index), index.rows["label"]
    order = np.random.default_rng(0).permutation(index.num_samples).tolist()

    def turn() -> float:
        started = time.perf_counter()
        for sample in order:
            reader.read(sample), int(labels[sample])
        return (time.perf_counter() - started) / len(order)

    return turn


def decode_only(index: Index, count: int) -> Callable[[], float]:
    """Read and decode in a plain loop."""
    samples = TarSamples(index)
    order = iter(np.random.default_rng(0).integers(0, index.num_samples, 1 << 20).tolist())

    def turn() -> float:
        started = time.perf_counter()
        for _ in range(count):
            samples.pixels(next(order))
        return (time.perf_counter() - started) / count

    return turn
