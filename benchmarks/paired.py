"""Times of rivals taken in turn, so that whatever else the machine does falls on all of them; ratios with spread.

Knows no network and no trainer: a rival is a function that does its work once per call.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch

from dist_kd.compression import cpu_name

STEADY = 1.3  # a rival whose own rounds differ by more than this factor says nothing


class Spread(NamedTuple):
    """Median, smallest and largest of the rounds."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: list[float]) -> Spread:
        return cls(statistics.median(values), min(values), max(values))

    def show(self, unit: str = "", digits: int = 2) -> str:
        low, high = (f"{value:.{digits}f}" for value in (self.low, self.high))
        return f"{self.median:.{digits}f} [{low} - {high}]{unit and ' ' + unit}"


class Times(NamedTuple):
    """Seconds per call: one list of rounds by rival, by the wall's clock and by this process's processor time."""

    wall: dict[str, list[float]]
    processor: dict[str, list[float]]

    def ms(self, name: str) -> Spread:
        return Spread.of([1000 * seconds for seconds in self.wall[name]])

    def ratio(self, name: str, to: str, clock: str = "wall") -> Spread:
        """Of each round's pair, never of two medians: what slows a round slows both halves of it."""
        rounds = getattr(self, clock)
        return Spread.of([a / b for a, b in zip(rounds[name], rounds[to], strict=True)])

    def steady(self, *names: str) -> bool:
        return all(max(self.wall[name]) <= STEADY * min(self.wall[name]) for name in names)


def take_turns(
    rivals: dict[str, Callable[[], Any]], rounds: int, calls: int, device: torch.device, turn: int | None = None
) -> Times:
    """Every rival `calls` times in each round, `turn` calls at a time (default: all), every other turn backwards.

    Short turns let slow drifts of the machine fall on all alike. Each begins with a call that is not timed: it finds
    the processor's caches full of the rival before, as a loop that runs alone does not.
    """
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = Times({name: [] for name in rivals}, {name: [] for name in rivals})
    order = list(rivals.items())
    for _ in range(rounds):
        for seconds in (*times.wall.values(), *times.processor.values()):
            seconds.append(0.0)
        for first in range(0, calls, turn or calls):
            order.reverse()
            for name, run in order:
                run()
                wait()
                wall, processor = time.perf_counter(), time.process_time()
                for _ in range(min(turn or calls, calls - first)):
                    run()
                wait()
                times.wall[name][-1] += (time.perf_counter() - wall) / calls
                times.processor[name][-1] += (time.process_time() - processor) / calls
    return times


def self_timed(rivals: dict[str, Callable[[], float]], rounds: int) -> Times:
    """Every rival once in each round, every other round backwards; each returns its own seconds per unit of work.

    For rivals with processes of their own: they must start, get going and end outside the time.
    """
    times = Times({name: [] for name in rivals}, {})
    order = list(rivals.items())
    for _ in range(rounds):
        for name, run in order:
            times.wall[name].append(run())
        order.reverse()
    return times


class Stopwatch:
    """Seconds by named part, for functions wrapped with `timed`. For work that is done when the function returns."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def timed(self, part: str, function: Callable) -> Callable:
        self.seconds.setdefault(part, 0.0)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                self.seconds[part] += time.perf_counter() - start

        return wrapped


def machine(device: torch.device) -> dict[str, Any]:
    """What the numbers were measured on."""
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_gib": round(pages / 2**30, 1),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "torch": torch.__version__,
        "python": sys.version.split()[0],
        "load_before": round(os.getloadavg()[0], 2),  # processes that wanted a core while we started
    }


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table, its columns as wide as their widest cell."""
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    cells = ([cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def publish(what: str, facts: dict[str, Any], tables: list[str], results: dict[str, Any], path: Path | None) -> None:
    """Prints the tables under the machine's name; writes everything to `path` as JSON if there is one."""
    named = ", ".join(f"{key} {value}" for key, value in facts.items() if value is not None)
    print("\n\n".join([f"{what}\n{named}", *tables]), flush=True)
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"what": what, "machine": facts, **results}, indent=1) + "\n")
