"""Owns the workers: requests (epoch, step, sample numbers) -> rows of uint8 pixels and labels, in the order asked.

A torch DataLoader whose dataset is a map from request to rows. Workers have no state and no random numbers; when one
dies or hangs, that is a DataError within a time limit, wherever the main process then is.
"""

from __future__ import annotations

import atexit
import signal
import threading
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate
from torch.utils.data._utils import signal_handling

from dist_kd.data.decode import TarSamples
from dist_kd.data.index import Index
from dist_kd.data.memory import MemorySamples
from dist_kd.data.tar_reader import BadSample
from dist_kd.errors import DataError

PREFETCH = 2  # requests each worker has in hand
GRACE_S = 3.0  # for workers to end by themselves
BATCHED_BYTES = 64 << 20  # of decoded images of one size that are viewed together


class Request(NamedTuple):
    epoch: int
    step: int  # of the optimizer; evaluation: number of the batch
    samples: np.ndarray  # [B] int64


class Rows(NamedTuple):
    """What a worker makes of a request. `failure` is a sentence that ends the run; then the rest is empty."""

    epoch: int
    step: int
    samples: Tensor  # [B] int64
    images: Tensor  # [B, 3, S, S] uint8
    labels: Tensor  # [B] int64
    weights: Tensor  # [B] float32
    bad: list[tuple[int, str, str]]  # sample, kind of damage, sentence
    retries: int
    failure: str = ""


class Shown(Dataset):
    """Request -> Rows: samples as their view shows them. Never raises a DataError: a worker's would lose its words."""

    def __init__(self, index: Index, samples: TarSamples | MemorySamples, view: Any, *, train: bool, strict: bool):
        self.index, self.samples, self.view, self.train, self.strict = index, samples, view, train, strict

    def __getitem__(self, request: Request) -> Rows:
        retries = self.samples.retries
        nothing = torch.empty(0)
        try:
            images, shown, bad = self._images(request)
        except DataError as error:
            return Rows(request.epoch, request.step, nothing, nothing, nothing, nothing, [], 0, str(error))
        weights = torch.ones(len(request.samples))
        if bad:
            weights[torch.from_numpy(np.isin(request.samples, [sample for sample, _, _ in bad]))] = 0.0
        return Rows(
            request.epoch,
            request.step,
            torch.from_numpy(request.samples),
            images,
            torch.from_numpy(self.index.rows["label"][shown].astype(np.int64)),
            weights,
            bad,
            self.samples.retries - retries,
        )

    def _images(self, request: Request) -> tuple[Tensor, np.ndarray, list[tuple[int, str, str]]]:
        """(images, the samples they show, what was bad). A replaced row keeps the intended sample's view."""
        epoch, _, samples = request
        if self._in_one_tensor(samples):
            return self._views(self.samples.stack(samples), epoch, samples), samples, []
        shown, bad, rows = samples.copy(), [], []
        together = self._small(len(samples))
        for row, sample in enumerate(samples.tolist()):
            try:
                pixels = self.samples.pixels(sample)
            except BadSample as damage:
                if self.strict:
                    raise
                bad.append((sample, damage.damage, str(damage)))
                shown[row], pixels = self._nearest_good(sample)
            rows.append(pixels if together else self._view(pixels, epoch, sample))
        if not together:
            return default_collate(rows), shown, bad  # in a worker this writes straight into shared memory
        if len({pixels.shape for pixels in rows}) == 1:
            return self._views(torch.stack(rows), epoch, samples), shown, bad
        views = [self._view(pixels, epoch, sample) for pixels, sample in zip(rows, samples.tolist(), strict=True)]
        return default_collate(views), shown, bad

    def _view(self, pixels: Tensor, epoch: int, sample: int) -> Tensor:
        return self.view(pixels, epoch, sample) if self.train else self.view(pixels)

    def _views(self, pixels: Tensor, epoch: int, samples: np.ndarray) -> Tensor:
        return self.view.batch(pixels, epoch, samples) if self.train else self.view.batch(pixels)

    def _in_one_tensor(self, samples: np.ndarray) -> bool:
        if not isinstance(self.samples, MemorySamples) or self.samples.shape is None:
            return False
        return not self.samples.bad or self.samples.bad.keys().isdisjoint(samples.tolist())

    def _small(self, rows: int) -> bool:
        """Whether so many decoded images may be held, to be viewed at once: that saves 0.15 ms an image."""
        side = self.index.image_size
        return side is not None and 3 * side**2 * rows <= BATCHED_BYTES

    def _nearest_good(self, sample: int) -> tuple[int, Tensor]:
        """The nearest earlier sample of the same shard (cyclic) that can be read, and its pixels."""
        shard, _ = self.index.locate(sample)
        size = self.index.shards[shard].samples
        first = self.index.ends[shard] - size
        for back in range(1, size):
            other = first + (sample - first - back) % size
            try:
                return other, self.samples.pixels(other)
            except BadSample:
                continue
        raise DataError(f"shard `{self.index.shard_path(shard)}` has no readable sample; copy it again")


class Feed:
    """The torch DataLoader over a dataset of requests. Every failure of it is a DataError within the time limit."""

    def __init__(self, dataset: Shown, workers: int, timeout_s: float, pin: bool):
        self.dataset, self.workers, self.timeout_s, self.pin = dataset, workers, timeout_s, pin
        self._requests: Iterable[Request] | None = None
        self._loader: DataLoader | None = None
        self._iterator: Any = None

    def start(self, requests: Iterable[Request]) -> Iterator[Rows]:
        """Rows of the requests, in order. Workers start now; those of the same requests are used again."""
        if self._loader is None or requests is not self._requests:
            self.close()
            self._requests = requests
            several = {"timeout": self.timeout_s, "prefetch_factor": PREFETCH, "persistent_workers": True}
            self._loader = DataLoader(
                self.dataset,
                batch_size=None,
                sampler=requests,
                num_workers=self.workers,
                collate_fn=_as_it_is,
                pin_memory=self.pin,
                worker_init_fn=_leave_signals_to_the_main_process,
                generator=torch.Generator(),  # else it draws from torch's own, and so disturbs training
                **(several if self.workers else {}),
            )
        self._iterator = iter(self._loader)
        if self.workers:
            _name_dead_workers()
            atexit.register(self._kill_workers)
        return self._rows(self._iterator)

    def _rows(self, iterator: Any) -> Iterator[Rows]:
        while True:
            try:
                rows = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                self._kill_workers()
                self.close()
                said = self._said(error)
                if said is error:
                    raise
                raise said from None
            yield rows

    def close(self) -> None:
        """End the workers, those that hang after GRACE_S seconds."""
        if self._iterator is not None and self.workers:
            self._disown_workers()
            late = threading.Timer(GRACE_S, self._kill_workers)
            late.start()
            self._iterator._shutdown_workers()
            late.cancel()
            late.join()
            atexit.unregister(self._kill_workers)
        self._requests = self._loader = self._iterator = None

    def _kill_workers(self) -> None:
        """End the workers at once: they ignore gentler signals, and Python would wait for them for ever."""
        self._disown_workers()
        for worker in getattr(self._iterator, "_workers", ()):
            if worker.is_alive():
                worker.kill()
                worker.join()

    def _disown_workers(self) -> None:
        """From here on the end of a worker is meant, and not for torch to report."""
        if getattr(self._iterator, "_worker_pids_set", False):
            signal_handling._remove_worker_pids(id(self._iterator))
            self._iterator._worker_pids_set = False

    def _said(self, error: Exception) -> Exception:
        """The DataError for what torch says of its workers; the error itself if it is something else."""
        text = str(error)
        if text.startswith("DataLoader timed out"):
            return DataError(
                f"no batch came within `{self.timeout_s:g}` s from {self.workers} loader processes (flag "
                "`--loader-timeout`); the storage hangs or is too slow: check it, or give them longer"
            )
        if "shared memory" in text or "/torch_" in text:
            return DataError(
                f"shared memory (/dev/shm) ran out between {self.workers} loader processes and this one; enlarge it, "
                "or use fewer `--workers`, or `--workers 0`"
            )
        # a worker killed while it hands over a batch leaves a broken connection; `Caught` is from inside a worker
        broken = self.workers and isinstance(error, (EOFError, OSError)) and not text.startswith("Caught")
        return _dead_worker(error) if broken or text.startswith("DataLoader worker") else error


def _as_it_is(rows: Rows) -> Rows:
    return rows


def _leave_signals_to_the_main_process(_worker: int) -> None:
    """A stop is sent to the whole process group, but is the loop's to obey: it still needs its next batches.

    Workers end when they are told, or within seconds of the main process's death.
    """
    for name in ("SIGINT", "SIGTERM", "SIGUSR1"):
        signal.signal(getattr(signal, name), signal.SIG_IGN)


def _dead_worker(error: Exception) -> DataError:
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
    return DataError(
        f"a loader process died ({said}); most often memory ran out: use fewer `--workers`, or a machine with more"
    )


def _name_dead_workers() -> None:
    """Make torch's SIGCHLD handler, which raises RuntimeError wherever the main thread is, raise a DataError."""
    if threading.current_thread() is not threading.main_thread():
        return  # then torch has set none, and a death is seen at the time limit
    of_torch = signal.getsignal(signal.SIGCHLD)
    if not callable(of_torch) or getattr(of_torch, "names_dead_workers", False):
        return

    def handler(number: int, frame: Any) -> None:
        try:
            of_torch(number, frame)
        except RuntimeError as error:
            raise _dead_worker(error) from None

    handler.names_dead_workers = True
    signal.signal(signal.SIGCHLD, handler)
