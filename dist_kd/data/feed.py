"""Owns the workers: requests -> rows (rows.py), in the order asked.

A torch DataLoader whose dataset is a map from request to rows. Workers have no state and no random numbers; when one
dies or hangs, that is a DataError within a time limit, wherever the main process then is, and names the sample that
worker was at. Images do not travel: workers write them into memory that they share with the main process.
"""

from __future__ import annotations

import atexit
import itertools
import mmap
import signal
import threading
import weakref
from collections.abc import Iterable, Iterator
from multiprocessing import connection
from typing import Any, ClassVar, NamedTuple, NoReturn

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling

from dist_kd.data.rows import Request, Rows, Shown
from dist_kd.errors import DataError
from dist_kd.stop_signals import STOP_SIGNALS

PREFETCH = 2  # requests each worker has in hand
GRACE_S = 3.0  # for workers to end by themselves


class Shared:
    """Memory of this process and its workers: images of the batches on their way, and the sample each worker is at.

    Fresh shared memory for each batch costs as much as decoding small images (page faults, zeroing, a descriptor that
    is passed on); here each slot is used again and again. Anonymous, so nothing is left behind in /dev/shm.
    """

    alive: ClassVar[weakref.WeakValueDictionary[int, Shared]] = weakref.WeakValueDictionary()
    numbers: ClassVar[Iterator[int]] = itertools.count()

    def __init__(self, workers: int, rows: int, size: int):
        self.slots = PREFETCH * workers + 1  # those asked for, and the one in use
        try:
            memory = mmap.mmap(-1, self.slots * rows * size * size * 3)
        except OSError as error:
            raise DataError(
                f"no memory for {self.slots} batches of {rows} images between {workers} loader processes and this one "
                f"({error.strerror}); use fewer `--workers` or a smaller `--device-batch-size`"
            ) from None
        flat = torch.frombuffer(memory, dtype=torch.uint8)
        self.images = flat.view(self.slots, rows, size, size, 3).permute(0, 1, 4, 2, 3)  # channels last
        self.at = np.frombuffer(mmap.mmap(-1, 8 * workers), np.int64)
        self.at[:] = -1  # nothing yet
        self.number = next(self.numbers)
        self.alive[self.number] = self


class _Parcel(NamedTuple):
    """Rows on their way out of a worker, without the images; unpickling gives the Rows."""

    rows: Rows
    shared: int
    slot: int

    def __reduce__(self):
        tensors = [tensor.numpy() for tensor in (self.rows.samples, self.rows.labels, self.rows.weights)]
        rest = self.rows._replace(samples=None, images=None, labels=None, weights=None)
        return _unpack, (tuple(rest), tensors, self.shared, self.slot)


def _unpack(rest: tuple, arrays: list[np.ndarray], shared: int, slot: int) -> Rows:
    samples, labels, weights = map(torch.from_numpy, arrays)
    images = Shared.alive[shared].images[slot, : len(samples)]
    return Rows(*rest)._replace(samples=samples, images=images, labels=labels, weights=weights)


class _InWorkers(Dataset):
    """(number, request) -> the rows, as a worker makes and sends them."""

    def __init__(self, shown: Shown, shared: Shared):
        self.shown, self.shared = shown, shared

    def __getitem__(self, numbered: tuple[int, Request]) -> _Parcel:
        number, request = numbered
        slot, worker = number % self.shared.slots, get_worker_info().id
        out = self.shared.images[slot, : len(request.samples)]
        return _Parcel(self.shown.rows(request, out, self.shared.at[worker : worker + 1]), self.shared.number, slot)


class _Numbered:
    """(number, request) of each request."""

    def __init__(self, requests: Iterable[Request]):
        self.requests = requests

    def __iter__(self) -> Iterator[tuple[int, Request]]:
        return enumerate(self.requests)


class Feed:
    """The torch DataLoader over a dataset of requests. Every failure of it is a DataError within the time limit."""

    running: ClassVar[weakref.WeakSet[Feed]] = weakref.WeakSet()  # those with workers

    def __init__(self, dataset: Shown, workers: int, timeout_s: float, pin: bool):
        self.dataset, self.workers, self.timeout_s, self.pin = dataset, workers, timeout_s, pin
        self._requests: Iterable[Request] | None = None
        self._loader: DataLoader | None = None
        self._iterator: Any = None
        self._shared: Shared | None = None
        self._death: DataError | None = None  # of a worker, which was raised somewhere

    def start(self, requests: Iterable[Request]) -> Iterator[Rows]:
        """Rows of the requests, in order; no request may be longer than the first.

        With workers, a batch's images are overwritten once the next one is asked for. Workers start now; those of the
        same requests are used again.
        """
        if self._loader is None or requests is not self._requests:
            self.close()
            self._requests = requests
            several = {"dataset": self.dataset, "sampler": requests}
            if self.workers:
                rows = len(next(iter(requests)).samples)
                self._shared = Shared(self.workers, rows, self.dataset.view.image_size)
                several = {
                    "dataset": _InWorkers(self.dataset, self._shared),
                    "sampler": _Numbered(requests),
                    "timeout": self.timeout_s,
                    "prefetch_factor": PREFETCH,
                    "persistent_workers": True,
                    "multiprocessing_context": "fork",  # which hands the shared memory on
                }
            self._loader = DataLoader(
                batch_size=None,
                num_workers=self.workers,
                collate_fn=_as_it_is,
                pin_memory=self.pin,
                worker_init_fn=_leave_signals_to_the_main_process,
                generator=torch.Generator(),  # else it draws from torch's own, and so disturbs training
                **several,
            )
        if self._death is not None:
            self._fail(self._death)
        signals = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)  # until the workers ignore them
        try:
            self._iterator = iter(self._loader)  # workers used again say first that they are there
        except Exception as error:
            self._fail(error)
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, signals)
        if self.workers:
            self.running.add(self)
            _name_dead_workers()
            atexit.register(self._kill_workers)
        return self._rows(self._iterator)

    def _rows(self, iterator: Any) -> Iterator[Rows]:
        while True:
            if self._death is not None:
                self._fail(self._death)
            try:
                rows = next(iterator)
            except StopIteration:
                return
            except Exception as error:
                self._fail(error)
            yield rows

    def _fail(self, error: Exception) -> NoReturn:
        said = self._said(error)
        self._kill_workers()
        self.close()
        if said is error:
            raise error
        raise said from None

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
        self.running.discard(self)
        self._requests = self._loader = self._iterator = self._shared = self._death = None

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
            (awaited, *_) = self._iterator._task_info.get(self._iterator._rcvd_idx, (None,))
            last = "" if awaited is None else f"; the one awaited {self._last_read(awaited)}"
            return DataError(
                f"no batch came within `{self.timeout_s:g}` s from {self.workers} loader processes (flag "
                f"`--loader-timeout`){last}; the storage hangs or is too slow: check it, or give them longer"
            )
        # a worker killed while it hands over a batch leaves a broken connection; `Caught` is from inside a worker
        broken = self.workers and isinstance(error, (EOFError, OSError)) and not text.startswith("Caught")
        return _dead_worker(error) if broken or text.startswith("DataLoader worker") else error

    def _last_read(self, worker: int) -> str:
        sample = int(self._shared.at[worker])
        if sample < 0:
            return "had read nothing yet"
        shard, _ = self.dataset.index.locate(sample)
        return f"was at sample {sample} of shard `{self.dataset.index.location(shard)}`"

    def _epitaphs(self) -> list[str]:
        """What each dead worker was at."""
        workers = getattr(self._iterator, "_workers", ())
        ended = connection.wait([worker.sentinel for worker in workers], timeout=1.0)  # a death takes its time to show
        return [self._last_read(number) for number, worker in enumerate(workers) if worker.sentinel in ended]


def _as_it_is(rows: Rows) -> Rows:
    return rows


def _leave_signals_to_the_main_process(_worker: int) -> None:
    """A stop is sent to the whole process group, but is the loop's to obey: it still needs its next batches.

    Workers end when they are told, or within seconds of the main process's death.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)


def _dead_worker(error: Exception) -> DataError:
    said = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(". ")
    last = [where for feed in list(Feed.running) for where in feed._epitaphs()]
    return DataError(
        f"a loader process died ({said}){'; it ' + last[0] if last else ''}; most often memory ran out: use fewer "
        "`--workers`, or a machine with more"
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
            died = _dead_worker(error)
            # what runs just now may let no exception out, a tracker or a destructor: the next request says it again
            for feed in list(Feed.running):
                feed._death = died
            raise died from None

    handler.names_dead_workers = True
    signal.signal(signal.SIGCHLD, handler)
