"""Owns what happens to rows behind the workers: accounted for, moved to the device, normalized, written to a ledger."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor

from dist_kd.contracts import Batch, World
from dist_kd.data.account import Account
from dist_kd.data.feed import Rows
from dist_kd.errors import DataError

LEDGER = "DIST_KD_LEDGER"  # folder to which each rank writes what it was given, one line a micro-batch


class Delivery:
    """Rows -> Batch on the device; what was bad goes to the account, what was given out to the ledger."""

    def __init__(
        self,
        account: Account,
        world: World,
        device: torch.device | str,
        mean: tuple[float, float, float],
        std: tuple[float, float, float],
        channels_last: bool,
        ledger: str = "",
    ):
        """`ledger`: how the name of the ledger's file begins."""
        self.device = torch.device(device)
        self.pin = self.device.type == "cuda"
        self.mean = torch.tensor(mean, device=self.device).view(1, 3, 1, 1)
        self.std = torch.tensor(std, device=self.device).view(1, 3, 1, 1)
        self._wide = self.mean, self.std
        self.format = torch.channels_last if channels_last else torch.contiguous_format
        self.account = account
        folder = os.environ.get(LEDGER)
        self._ledger = Path(folder) / f"{ledger}rank{world.rank}.txt" if folder else None

    def batch(self, rows: Rows) -> Batch:
        """The batch on the device; DataError if its samples could not be read at all."""
        if rows.failure:
            raise DataError(rows.failure)
        self.account.add(rows)
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
