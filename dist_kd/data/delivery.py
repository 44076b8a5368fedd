"""Owns what happens to rows behind the workers: counted, moved to the device, normalized there, written to a ledger."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
from torch import Tensor

from dist_kd.contracts import Batch, DataCounters, World
from dist_kd.data.feed import Rows
from dist_kd.data.index import Index
from dist_kd.errors import DataError

log = logging.getLogger(__name__)

LEDGER = "DIST_KD_LEDGER"  # folder to which each rank writes what it was given, one line a micro-batch


class Delivery:
    """Rows -> Batch on the device, with the account of what was bad and the ledger of what was given out."""

    def __init__(
        self,
        index: Index,
        world: World,
        device: torch.device | str,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        channels_last: bool,
        max_bad_fraction: float,
    ):
        self.device = torch.device(device)
        self.pin = self.device.type == "cuda"
        self.mean = torch.tensor(mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=self.device).view(1, 3, 1, 1)
        self._wide = self.mean, self.std
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.counters = DataCounters()
        self.index, self.max_bad_fraction = index, max_bad_fraction
        self._bad: set[int] = set()
        folder = os.environ.get(LEDGER)
        self._ledger = Path(folder) / f"rank{world.rank}.txt" if folder else None

    def batch(self, rows: Rows) -> Batch:
        """The batch on the device; DataError if more samples are bad than may be."""
        if rows.failure:
            raise DataError(rows.failure)
        self.counters.retries += rows.retries
        for sample, kind, sentence in rows.bad:
            self._count_bad(sample, kind, sentence)
        if self._ledger is not None:
            with self._ledger.open("a") as file:
                file.write(" ".join(map(str, (rows.epoch, rows.step, *rows.samples.tolist()))) + "\n")
        # uint8 travels; a copy from pinned memory does not wait for the device
        # float first: torch moves floats into channels_last twice as fast as bytes
        images = rows.images.to(self.device, non_blocking=self.pin).float().contiguous(memory_format=self.format)
        mean, std = self._constants(images)
        return Batch(
            images=images.div_(255).sub_(mean).div_(std),
            labels=rows.labels.to(self.device, non_blocking=self.pin),
            weights=rows.weights.to(self.device, non_blocking=self.pin),
            samples=rows.samples.to(self.device, non_blocking=self.pin),
        )

    def _constants(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and std as whole images [1, 3, S, S]: ten times as fast to subtract as three numbers, channels last."""
        if self._wide[0].shape[1:] != images.shape[1:]:
            wide = (value.expand(1, *images.shape[1:]) for value in (self.mean, self.std))
            self._wide = tuple(value.contiguous(memory_format=self.format) for value in wide)
        return self._wide

    def _count_bad(self, sample: int, kind: str, sentence: str) -> None:
        if kind not in self.counters.bad:
            log.warning("%s. Its row counts nothing; further ones (%s) are counted, not named", sentence, kind)
        self.counters.bad[kind] = self.counters.bad.get(kind, 0) + 1
        self._bad.add(sample)
        if len(self._bad) > self.max_bad_fraction * self.index.num_samples:
            raise DataError(
                f"{len(self._bad)} of {self.index.num_samples} samples are damaged, more than the share "
                f"`{self.max_bad_fraction}` that may be; the last: {sentence}"
            )
