"""What rank 0 shows while training: a bar and compact rows on a terminal, else one plain line per log point."""

from __future__ import annotations

import math
import sys
import time
from typing import Any, TextIO

from dist_kd.errors import printable

HEADER_EVERY = 20  # rows of training between two headers on a terminal
ROW = "{:>8}  {:>7}  {:>8}  {:>8}  {:>8}  {:>7}  {:>9}  {:>8}  {:>6}  {:>8}  {:>9}"
HEADER = ROW.format(
    "step", "epoch", "loss", "loss_ce", "loss_kd", "top-1 %", "lr", "ms/step", "data %", "teach. %", "images/s"
)


def _number(value: float | None, digits: int = 3) -> str:
    return "-" if value is None else f"{value:.{digits}f}" if math.isfinite(value) else str(value)


def _share(values: dict[str, float], part: str) -> float | None:
    """Percent of the step spent in `part`, if both were measured."""
    step, spent = values.get("time/step_ms"), values.get(f"time/{part}_ms")
    return 100 * spent / step if step and spent is not None else None


def _duration(seconds: float) -> str:
    minutes, seconds = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}"


def train_row(values: dict[str, float], step: int) -> str:
    """One row under HEADER."""
    get = values.get
    lr = get("train/lr")
    return ROW.format(
        step,
        _number(get("train/epoch"), 2),
        _number(get("train/loss")),
        _number(get("train/loss_ce")),
        _number(get("train/loss_kd")),
        _number(get("train/top1"), 2),
        "-" if lr is None else f"{lr:.3g}",
        _number(get("time/step_ms"), 1),
        _number(_share(values, "data"), 0),
        _number(_share(values, "teacher"), 0),
        _number(get("time/images_per_s"), 0),
    )


def train_line(values: dict[str, float], step: int, total_steps: int) -> str:
    """One self-explaining line for a log file; parts that were not measured are left out."""
    get = values.get
    width = len(str(total_steps))
    words = [f"step {step:>{width}}/{total_steps}"]
    if "train/epoch" in values:
        words.append(f"epoch {values['train/epoch']:6.2f}")
    parts = [f"{k} {_number(get(f'train/loss_{k}'))}" for k in ("ce", "kd") if f"train/loss_{k}" in values]
    if "train/loss" in values:
        words.append(f"loss {_number(values['train/loss'])}" + (f" ({', '.join(parts)})" if parts else ""))
    if "train/top1" in values:
        words.append(f"top-1 {values['train/top1']:6.2f} %")
    if "train/lr" in values:
        words.append(f"lr {values['train/lr']:.3g}")
    if "time/step_ms" in values:
        shares = [f"{p} {_share(values, p):.0f} %" for p in ("data", "teacher") if f"time/{p}_ms" in values]
        words.append(f"{values['time/step_ms']:.1f} ms/step" + (f" ({', '.join(shares)})" if shares else ""))
    if "time/images_per_s" in values:
        words.append(f"{values['time/images_per_s']:.0f} images/s")
    return "  ".join(words)


def score_line(values: dict[str, float], step: int, total_steps: int, kind: str) -> str:
    """One line for an evaluation of the student (`val`) or of the teacher (`teacher`)."""
    width = len(str(total_steps))
    words = [f"step {step:>{width}}/{total_steps}", "validation" if kind == "val" else "teacher   "]
    for key, name in (("top1", "top-1"), ("top5", "top-5"), ("agreement", "agreement"), ("ece", "ECE")):
        if f"{kind}/{key}" in values:
            words.append(f"{name} {_number(values[f'{kind}/{key}'], 2)} %")
    if f"{kind}/loss" in values:
        words.append(f"loss {_number(values[f'{kind}/loss'])}")
    if f"{kind}/samples" in values:
        words.append(f"{values[f'{kind}/samples']:.0f} samples")
    if f"{kind}/seconds" in values:
        words.append(f"in {values[f'{kind}/seconds']:.1f} s")
    test = "test" if kind == "val" else f"{kind}/test"
    if f"{test}/top1" in values:
        words.append(f"test top-1 {_number(values[f'{test}/top1'], 2)} %")
    return "  ".join(words)


class ConsoleTracker:
    """Shows log points as they come. `stream` is standard output unless given (tests)."""

    def __init__(self, name: str, total_steps: int, *, start_step: int = 0, stream: TextIO | None = None) -> None:
        self._stream = sys.stdout if stream is None else stream
        self._total = total_steps
        self._rows = 0
        self._best: float | None = None
        self._start = (time.monotonic(), start_step)
        self._bar: Any = None
        if self._stream.isatty():
            self._open_bar(name, start_step)

    def _open_bar(self, name: str, start_step: int) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=None),
            TextColumn("{task.completed:.0f}/{task.total:.0f} steps"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[best]}"),
            console=Console(file=self._stream, highlight=False),
            refresh_per_second=2,  # drawn by a thread: more would take the processor from training
            transient=True,
        )
        self._task = self._bar.add_task(name, total=self._total, completed=start_step, best="")
        self._bar.start()

    def note(self, line: str) -> None:
        """Prints one line, above the bar if there is one."""
        line = printable(line)
        if self._bar is None:
            print(line, file=self._stream, flush=True)
        else:
            self._bar.console.print(line, markup=False, soft_wrap=True)

    def _left(self, step: int) -> str:
        then, first = self._start
        if step <= first or step >= self._total:
            return ""
        return f"  left {_duration((time.monotonic() - then) / (step - first) * (self._total - step))}"

    def log(self, values: dict[str, float], step: int, kind: str = "train") -> None:
        if kind == "resume":
            self.note(f"resumed at step {step}")
        elif kind != "train":
            self.note(score_line(values, step, self._total, kind))
            if kind == "val" and "val/top1" in values:
                self._best = max(values["val/top1"], self._best or 0.0)
        elif self._bar is None:
            self.note(train_line(values, step, self._total) + self._left(step))
        else:
            if self._rows % HEADER_EVERY == 0:
                self.note(HEADER)
            self.note(train_row(values, step))
            self._rows += 1
        if self._bar is not None:
            best = "" if self._best is None else f"best top-1 {self._best:.2f} %"
            self._bar.update(self._task, completed=step, best=best)

    def summary(self, values: dict[str, Any]) -> None:
        """Nothing: the table at the end is the command's."""

    def close(self, status: str) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None
