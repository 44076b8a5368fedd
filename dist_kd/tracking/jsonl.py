"""Owns metrics.jsonl: the primary record of a run, one JSON object a line; every other tracker mirrors it.

A line is {"step": n, "kind": "train" | "val" | "teacher" | "resume", KEY: number or null, ...}. A value that is
not finite is written as null, which every JSON reader takes, and is read back as nan.
"""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any


class JsonlTracker:
    """Appends to `path`, one write a line, so that a killed process leaves at most one half line. May raise OSError."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        size = os.fstat(self._fd).st_size
        self._torn = size > 0 and os.pread(self._fd, 1, size - 1) != b"\n"

    def log(self, values: dict[str, float], step: int, kind: str = "train") -> None:
        line = {"step": step, "kind": kind} | {k: v if math.isfinite(v) else None for k, v in values.items()}
        # after a failed write the file may end in half a line: start a new one, readers skip the half
        text = ("\n" if self._torn else "") + json.dumps(line) + "\n"
        data = text.encode()
        self._torn = True
        written = os.write(self._fd, data)
        if written < len(data):  # what a full disk does before it starts to raise
            raise OSError(f"only {written} of {len(data)} bytes could be written to {self._path}")
        self._torn = False

    def summary(self, values: dict[str, Any]) -> None:
        """Nothing: the run's summary.json is written by the trainer."""

    def close(self, status: str) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


def _parse(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:  # also what a half multi-byte character gives
        return None
    is_metric = isinstance(record, dict) and isinstance(record.get("step"), int)
    return record if is_metric else None


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl in order, nulls as nan; a half line is left out, a missing file is an empty list."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return []
    records = [record for line in lines if (record := _parse(line))]
    return [{k: math.nan if v is None else v for k, v in record.items()} for record in records]


def cut_back(path: Path, step: int, evaluated: bool = True) -> int:
    """Lines dropped because they came after the checkpoint of `step` or were never finished.

    What was logged at `step` itself was written before its checkpoint, and stays; except an evaluation that the
    checkpoint does not know of (`evaluated` False), which will be made again. The file is replaced in one move, byte
    for byte the same up to the cut.
    """

    def stays(record: dict[str, Any]) -> bool:
        return record["step"] < step or (record["step"] == step and (evaluated or record.get("kind") != "val"))

    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except FileNotFoundError:
        return 0
    kept = [line for line in lines if line.endswith(b"\n") and (record := _parse(line)) and stays(record)]
    if len(kept) == len(lines):
        return 0
    beside = path.with_name(path.name + ".partial")
    with open(beside, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
    return len(lines) - len(kept)
