"""Tiny end-to-end runs: real digits in real shards, a random teacher, the whole path of the trainer."""

import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path

import torch

from dist_kd import checkpoint
from dist_kd.cli import parse
from dist_kd.loop import fit
from dist_kd.run_folder import RunFolder
from dist_kd.runtime import start_runtime
from dist_kd.tracking.jsonl import read_metrics
from dist_kd.wiring import build_run

# 10 steps an epoch, 3 epochs; everything on that has state: EMA, momentum, mixing, a teacher
SETTINGS = [
    "--arch", "cnn_small", "--teacher-arch", "cnn_medium", "--teacher-weights", "none", "--kd", "--image-size", "8",
    "--batch-size", "32", "--device-batch-size", "16", "--epochs", "3", "--lr", "0.01", "--ema-decay", "0.9",
    "--mixup", "0.2", "--log-steps", "4", "--checkpoint-steps", "7", "--keep", "3", "--teacher-eval-samples", "20",
    "--cpu",
]  # fmt: skip


class Interrupting:
    """A source that sends a signal to its own process, or makes a STOP file, as batch number `at` is asked for."""

    def __init__(self, source, at: int, how: str, folder: Path) -> None:
        self._source, self._at, self._how, self._folder = source, at, how, folder

    def __getattr__(self, name):
        return getattr(self._source, name)

    def batches(self, step):
        inner = self._source.batches(step)
        try:
            for number, batch in enumerate(inner):
                if number == self._at:
                    if self._how == "stop file":
                        (self._folder / "STOP").touch()
                    else:
                        os.kill(os.getpid(), getattr(signal, self._how))
                yield batch
        finally:
            inner.close()


def settings_without(*flags: str) -> list[str]:
    """SETTINGS without these flags and what they are given."""
    kept, leaving = [], False
    for word in SETTINGS:
        leaving = word in flags if word.startswith("--") else leaving
        kept += [] if leaving else [word]
    return kept


def train(
    folder: Path,
    data: Path,
    *more: str,
    settings: Sequence[str] = SETTINGS,
    stop_at_batch: int | None = None,
    how: str = "SIGTERM",
) -> str:
    """One start of a run in this process; "done" or "preempted"."""
    parsed = parse([*settings, "--data", str(data), "--save-path", str(folder), *more], {})
    folder.mkdir(parents=True, exist_ok=True)
    runtime = start_runtime(parsed.config)
    run, _ = build_run(parsed, runtime, RunFolder(folder))
    if stop_at_batch is not None:
        run.source = Interrupting(run.source, stop_at_batch, how, folder)
    try:
        outcome = fit(run)
        if outcome == "preempted":
            run.stop.obeyed()
    finally:
        run.tracker.close("test")
        run.source.close()
        run.stop.uninstall()
    return outcome


def final_state(folder: Path) -> dict:
    """Everything the last checkpoint holds, and the lines of metrics.jsonl without times."""
    found, refused = checkpoint.find(folder / "checkpoints")
    assert not refused
    snapshot = checkpoint.load(found, "cpu")
    lines = [
        {k: v for k, v in line.items() if not k.startswith("time/") and not k.endswith("/seconds")}
        for line in read_metrics(folder / "metrics.jsonl")
        if line["kind"] != "resume"
    ]
    return {"snapshot": snapshot, "lines": lines}


def assert_same(ours: dict, theirs: dict) -> None:
    """Bit for bit."""
    a, b = ours["snapshot"], theirs["snapshot"]
    assert a.state.step == b.state.step
    assert a.state.test == b.state.test
    assert a.tensors.keys() == b.tensors.keys()
    for stem in a.tensors:
        for name, tensor in a.tensors[stem].items():
            assert torch.equal(tensor, b.tensors[stem][name]), f"{stem}: {name}"
    assert _plain(a.optimizer) == _plain(b.optimizer)
    assert ours["lines"] == theirs["lines"]


def _plain(value):
    if isinstance(value, torch.Tensor):
        return (tuple(value.shape), value.double().flatten().tolist())
    if isinstance(value, dict):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())
