"""Signals that ask for a stop, from a process's first moment: noted, and obeyed where nothing is half done. No torch.

A run's own handlers (runtime.py:StopRequests) take over what was noted here, and give the signals back at its end.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from typing import Any

STOP_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
PARENT = os.getppid()  # who started this process, while it lives


class Noted:
    """A signal handler that only remembers. A second SIGINT raises: somebody at the keyboard will not wait."""

    reason: str | None = None

    def __call__(self, number: int, frame: Any) -> None:
        if self.reason is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.reason = self.reason or f"signal {signal.Signals(number).name}"

    def take(self) -> str | None:
        """The first signal that came, in words; whoever takes it has to obey it."""
        taken, self.reason = self.reason, None
        return taken


noted = Noted()


@contextlib.contextmanager
def noting() -> Iterator[None]:
    """Notes the signals meanwhile. Elsewhere than in the main thread, where Python allows no handler, does nothing."""
    previous: dict[int, Any] = {}
    with contextlib.suppress(ValueError):
        for number in STOP_SIGNALS:
            previous[number] = signal.signal(number, noted)
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def orphaned() -> bool:
    """Whether the process that started this one is gone: its children are given to another."""
    return os.getppid() != PARENT
