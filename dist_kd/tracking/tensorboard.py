"""Mirrors metrics to TensorBoard event files. The only file that imports tensorboard, and only when it is asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from dist_kd.errors import ConfigError


class TensorboardTracker:
    """Scalars under RUN/tensorboard. `resumed_step` hides what an earlier start logged after its checkpoint.

    The first error, which `log` raises, is the end of it in this start.
    """

    def __init__(self, folder: Path, resumed_step: int | None = None) -> None:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError as error:
            raise ConfigError(
                "`--tensorboard` needs the package `tensorboard`, which is not installed; "
                "run `pip install 'dist-kd[tensorboard]'`, or leave the flag out (metrics.jsonl is always written)"
            ) from error
        purge = None if resumed_step is None else resumed_step + 1
        self._writer: SummaryWriter | None = SummaryWriter(str(folder), purge_step=purge)

    def log(self, values: dict[str, float], step: int, kind: str = "train") -> None:
        if self._writer is None:
            return
        try:
            for key, value in values.items():
                self._writer.add_scalar(key, value, step)
        except Exception:
            # its thread has ended: it would raise this very error again and again, longer by each time it was raised
            self._writer = None
            raise

    def summary(self, values: dict[str, Any]) -> None:
        """Nothing: event files have no place for final figures; summary.json has them."""

    def close(self, status: str) -> None:
        if self._writer is not None:
            self._writer.close()
