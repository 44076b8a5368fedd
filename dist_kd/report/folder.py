"""Owns reading a run's folder for the report: whatever is there, however it ended; what is not there is named."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from dist_kd.tracking.jsonl import read_metrics

MARKS = ("run.json", "config.yaml", "metrics.jsonl", "status.json", "summary.json")  # one of these makes a run folder
WITHOUT = {
    "run.json": "its starts, versions and data are unknown",
    "config.yaml": "its settings are unknown, so it stands in a group of its own",
    "metrics.jsonl": "it has no curves",
    "status.json": "how it stands is unknown",
    "summary.json": "it has not finished; its figures are those of the last evaluation so far",
    "compression.json": "sizes and latency are unknown",
}

# what a run says of its test set -> what a column calls it
TEST_SCORES = {
    "last": ">Test top-1, last epoch (%)",
    "chosen": ">Test top-1, epoch chosen on validation (%)",
    "highest": ">Test top-1, highest of all epochs (%)",
}


def number(value: Any) -> float | None:
    """`value` as a finite float, or None for anything else (also for True: a flag is no figure)."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return None
    try:
        value = float(value)
    except OverflowError:  # JSON knows no limit to integers
        return None
    return value if math.isfinite(value) else None


def at(tree: Any, *path: str | int) -> Any:
    """What stands at `path` in nested dicts and lists, or None if any part of the way is missing."""
    for step in path:
        try:
            tree = tree[step]
        except (TypeError, KeyError, IndexError):
            return None
    return tree


def mapping(value: Any) -> dict[str, Any]:
    return {str(k): v for k, v in value.items()} if isinstance(value, dict) else {}


@dataclass(frozen=True)
class RunRecord:
    """What a run folder says. Every part may be empty; `missing` says what is, in sentences."""

    path: Path
    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    run: dict[str, Any] = field(default_factory=dict)
    status: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    compression: dict[str, Any] = field(default_factory=dict)
    lines: list[dict[str, Any]] = field(default_factory=list)
    missing: tuple[str, ...] = ()

    @cached_property
    def _by_kind(self) -> dict[str, list[dict[str, Any]]]:
        kinds: dict[str, list[dict[str, Any]]] = {}
        for line in self.lines:
            kinds.setdefault(str(line.get("kind")), []).append(line)
        return kinds

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        return self._by_kind.get(kind, [])

    @property
    def state(self) -> str:
        """running, done, preempted, failed or unknown."""
        state = str(self.status.get("state") or "unknown")
        # the trainer makes its report when all is written but its last status
        return "done" if state == "running" and self.summary else state

    @property
    def is_plain(self) -> bool:
        """Whether it learnt from labels only."""
        method = self.settings.get("method")
        return method == "ce" if isinstance(method, str) else not mapping(self.summary.get("teacher"))

    @property
    def arch(self) -> str:
        return str(self.settings.get("arch") or at(self.summary, "student", "arch") or "student")

    @property
    def seed(self) -> int | None:
        seed = self.settings.get("seed")
        return seed if isinstance(seed, int) else None

    @property
    def last(self) -> dict[str, float]:
        """The last evaluation: top1, top5, loss, ece, agreement, epoch, step, samples, as far as known."""
        return _figures(at(self.summary, "student", "last")) or self._evaluation(-1)

    @property
    def best(self) -> dict[str, float]:
        """The evaluation with the highest top-1, with `evaluations`: out of how many it was chosen."""
        best = _figures(at(self.summary, "student", "best"))
        if "top1" in best:
            return best
        scored = [i for i, line in enumerate(self.of_kind("val")) if number(line.get("val/top1")) is not None]
        if not scored:
            return {}
        lines = self.of_kind("val")
        first = max(scored, key=lambda i: lines[i]["val/top1"])  # max takes the first of equals, as training does
        return self._evaluation(first) | {"evaluations": float(len(scored))}

    def _evaluation(self, which: int) -> dict[str, float]:
        lines = self.of_kind("val")
        if not lines:
            return {}
        known = {key.removeprefix("val/"): value for key, value in lines[which].items()}
        return _figures({key: value for key, value in known.items() if "/" not in key})

    def test(self, which: str) -> dict[str, float]:
        """The test set's scores at the `last` evaluation, the one `chosen` on the validation set, or its `highest`,
        with `evaluations`: out of how many; empty without a test set."""
        found = _figures(at(self.summary, "student", "test", which))
        if found or self.summary:
            return found
        lines = [line for line in self.of_kind("val") if number(line.get("test/top1")) is not None]
        if not lines:
            return {}
        by = {"chosen": "val/top1", "highest": "test/top1"}.get(which)
        line = lines[-1] if by is None else max(lines, key=lambda line: number(line.get(by)) or -1.0)
        scores = {key.removeprefix("test/"): value for key, value in line.items() if key.startswith("test/")}
        place = {"step": line.get("step"), "epoch": line.get("val/epoch"), "evaluations": len(lines)}
        return _figures(scores | place)

    @property
    def teacher(self) -> dict[str, float]:
        """The teacher's scores: top1, top5, loss, ece, samples, as far as known; empty without a teacher.

        Those on the test set stand beside them as test/top1 and so on.
        """
        found = _figures(self.summary.get("teacher"))
        found |= {f"test/{k}": v for k, v in _figures(at(self.summary, "teacher", "test")).items()}
        for line in self.of_kind("teacher")[:1]:
            found = (
                _figures({k.removeprefix("teacher/"): v for k, v in line.items() if k.startswith("teacher/")}) | found
            )
        return found

    @property
    def teacher_arch(self) -> str:
        return str(at(self.summary, "teacher", "arch") or self.settings.get("teacher_arch") or "teacher")

    @property
    def resumes(self) -> list[int]:
        """Steps from which the run was taken up again."""
        starts = self.run.get("starts") if isinstance(self.run.get("starts"), list) else []
        steps = [at(start, "step") for start in starts] + [line.get("step") for line in self.of_kind("resume")]
        return sorted({step for step in steps if isinstance(step, int) and step > 0})

    @property
    def epochs_per_step(self) -> float | None:
        """Epochs one step makes, from the last line that knows both; None if no line does."""
        for line in reversed(self.lines):
            epoch, step = number(line.get("train/epoch", line.get("val/epoch"))), number(line.get("step"))
            if epoch and step:
                return epoch / step
        return None


def _figures(tree: Any) -> dict[str, float]:
    return {key: value for key, item in mapping(tree).items() if (value := number(item)) is not None}


def is_run_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in MARKS)


def read_run(path: Path) -> RunRecord:
    """What the folder says. Raises nothing: an unreadable file is a missing one, named with its reason."""
    missing: list[str] = []

    def load(name: str, parse) -> dict[str, Any]:
        try:
            content = parse((path / name).read_bytes())
        except FileNotFoundError:
            missing.append(f"{name} is not there: {WITHOUT[name]}")
        # a yaml file can fail in more ways than YAMLError (dates out of range, deep nesting)
        except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
            reason = " ".join(str(error).split())[:120]
            missing.append(f"{name} cannot be read ({reason}): {WITHOUT[name]}")
        else:
            if isinstance(content, dict):
                return mapping(content)
            missing.append(f"{name} holds no settings or facts by name: {WITHOUT[name]}")
        return {}

    settings = load("config.yaml", yaml.safe_load)
    run, status = load("run.json", json.loads), load("status.json", json.loads)
    summary, compression = load("summary.json", json.loads), load("compression.json", json.loads)
    try:
        lines = read_metrics(path / "metrics.jsonl")
    except (OSError, RecursionError) as error:
        lines = []
        missing.append(f"metrics.jsonl cannot be read ({error}): {WITHOUT['metrics.jsonl']}")
    else:
        if not lines:
            missing.append(f"metrics.jsonl is not there or has no line: {WITHOUT['metrics.jsonl']}")
    name = str(run.get("name") or path.resolve().name)
    return RunRecord(path, name, settings, run, status, summary, compression, lines, tuple(missing))
