"""Owns what is made of a request (epoch, step, sample numbers): uint8 pixels as their view shows them, and labels.

Knows nothing of processes: feed.py runs it in workers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dist_kd.data.decode import TarSamples
from dist_kd.data.index import Index
from dist_kd.data.memory import MemorySamples
from dist_kd.data.tar_reader import BadSample
from dist_kd.errors import DataError

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
        return self.rows(request)

    def rows(self, request: Request, out: Tensor | None = None, at: np.ndarray | None = None) -> Rows:
        """The rows, their images in `out` [B, 3, S, S] if there is one; `at` [1] says all the while which is read."""
        retries = self.samples.retries
        nothing = torch.empty(0)
        try:
            images, shown, bad = self._images(request, out, np.empty(1, np.int64) if at is None else at)
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

    def _images(
        self, request: Request, out: Tensor | None, at: np.ndarray
    ) -> tuple[Tensor, np.ndarray, list[tuple[int, str, str]]]:
        """(images, the samples they show, what was bad). A replaced row keeps the intended sample's view."""
        epoch, _, samples = request
        shown, bad = samples.copy(), []
        if self._in_one_tensor(samples):
            pixels = self.samples.stack(samples)
        else:
            pixels = self._read(samples, shown, bad, at)  # one at a time: photographs are large
            if self._small(len(samples)):
                pixels = list(pixels)
                if len({image.shape for image in pixels}) == 1:
                    pixels = torch.stack(pixels)
        images = self.view.batch(pixels, epoch, samples, out) if self.train else self.view.batch(pixels, out)
        return images, shown, bad

    def _read(
        self, samples: np.ndarray, shown: np.ndarray, bad: list[tuple[int, str, str]], at: np.ndarray
    ) -> Iterator[Tensor]:
        """The pixels of each sample, or of what is shown in its place."""
        for row, sample in enumerate(samples.tolist()):
            at[0] = sample
            try:
                pixels = self.samples.pixels(sample)
            except BadSample as damage:
                if self.strict:
                    raise
                bad.append((sample, damage.damage, str(damage)))
                shown[row], pixels = self._nearest_good(sample)
            yield pixels

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
        raise DataError(f"shard `{self.index.location(shard)}` has no readable sample; copy it again")
