"""Where metrics go: `open_tracker` gives one tracker that passes each call on to console, file and mirrors.

Adding one: a file here with a class that has log, summary and close, and a line in `open_tracker`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

from dist_kd.contracts import Tracker
from dist_kd.errors import ConfigError
from dist_kd.tracking.console import ConsoleTracker
from dist_kd.tracking.jsonl import JsonlTracker, cut_back
from dist_kd.tracking.keys import KINDS, check_known


class NullTracker:
    """Takes everything and does nothing: for ranks other than 0."""

    def log(self, values: dict[str, float], step: int, kind: str = "train") -> None: ...

    def summary(self, values: dict[str, Any]) -> None: ...

    def note(self, text: str) -> None: ...

    def close(self, status: str) -> None: ...


class FanOut:
    """Passes each call to every sink. A sink that raises is named once; the others and training go on."""

    def __init__(self, console: ConsoleTracker) -> None:
        self._console = console
        self._sinks: list[Any] = [console]
        self._failed: set[str] = set()

    def add(self, open_sink: Callable[[], Any], name: str) -> None:
        """Opens a sink. What a user can put right (ConfigError) is raised; a disk that refuses is not."""
        try:
            self._sinks.append(open_sink())
        except OSError as error:
            self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        if name not in self._failed:
            self._failed.add(name)
            self.note(f"warning: {name} could not be written ({error}); training goes on without it")

    def _each(self, call: Callable[[Any], None]) -> None:
        for sink in self._sinks:
            # a full disk may have room again later, so a sink that failed is asked again
            try:
                call(sink)
            except Exception as error:
                self._warn(NAMES.get(type(sink).__name__, type(sink).__name__), error)

    def log(self, values: dict[str, float], step: int, kind: str = "train") -> None:
        check_known(values)
        assert kind in KINDS, f"kind of log line is {kind!r}, not one of {KINDS}"
        values = {key: float(value) for key, value in values.items()}
        self._each(lambda sink: sink.log(values, step, kind))

    def summary(self, values: dict[str, Any]) -> None:
        self._each(lambda sink: sink.summary(values))

    def note(self, text: str) -> None:
        # a terminal that is gone (closed ssh) must not end training
        with contextlib.suppress(OSError, ValueError):
            self._console.note(text)

    def close(self, status: str) -> None:
        self._each(lambda sink: sink.close(status))
        self._sinks = []


NAMES = {"ConsoleTracker": "the console", "JsonlTracker": "metrics.jsonl", "TensorboardTracker": "TensorBoard"}


def open_tracker(
    run_dir: Path,
    *,
    run_id: str,
    name: str,
    settings: dict[str, Any],
    total_steps: int,
    wandb: bool,
    wandb_project: str,
    tensorboard: bool,
    resumed_step: int | None,
    evaluated: bool = True,
) -> Tracker:
    """The tracker of rank 0. `resumed_step` is the checkpoint's step, or None for a start from the beginning;
    `evaluated` says whether that checkpoint holds the evaluation due at its step.

    metrics.jsonl is first cut back to that step (to nothing without one), so that it has no doubled line.
    Raises ConfigError for a mirror whose package is missing; nothing else.
    """
    console = ConsoleTracker(name, total_steps, start_step=resumed_step or 0)
    tracker = FanOut(console)

    def open_jsonl() -> JsonlTracker:
        cut_back(run_dir / "metrics.jsonl", -1 if resumed_step is None else resumed_step, evaluated)
        return JsonlTracker(run_dir / "metrics.jsonl")

    if tensorboard:
        from dist_kd.tracking.tensorboard import TensorboardTracker

        try:
            tracker.add(lambda: TensorboardTracker(run_dir / "tensorboard", resumed_step), "TensorBoard")
        except ConfigError:
            tracker.close("failed")  # gives the terminal back before the error is shown
            raise
    tracker.add(open_jsonl, "metrics.jsonl")
    if wandb:
        from dist_kd.tracking.wandb_run import WandbTracker

        identity = {"run_id": run_id, "name": name, "project": wandb_project}
        tracker.add(lambda: WandbTracker(run_dir, settings=settings, note=tracker.note, **identity), "W&B")
    if resumed_step is not None:
        tracker.log({}, resumed_step, kind="resume")
    return tracker


__all__ = ["FanOut", "NullTracker", "Tracker", "open_tracker"]
