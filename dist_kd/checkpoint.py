"""Owns RUN/checkpoints. A checkpoint is complete and verified, or it does not exist. Knows nothing of the loop.

A save writes beside, syncs, writes the manifest last, renames, moves the pointer, and only then prunes.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import uuid
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_kd.contracts import DataCounters
from dist_kd.errors import CheckpointError

SCHEMA = 3  # 1 counted bad samples without their kinds; 2 knew no test set
PREFIX = "step_"
REPLACED = ".replaced"


@dataclass
class ThirdSet:
    """What a test set said of the student so far. Nothing is chosen by it but `highest`, which is named so."""

    data: str = ""  # its fingerprint
    evaluations: int = 0
    bad: dict[str, int] = field(default_factory=dict)  # of the last evaluation: kind of damage -> samples
    last: dict[str, float] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)  # where the validation set's top-1 was best
    highest: dict[str, float] = field(default_factory=dict)  # where its own was

    def add(self, figures: dict[str, float], val_top1: float) -> None:
        """Takes in one evaluation; `val_top1` is the validation set's at the same step. Of equals the first stays."""
        self.evaluations += 1
        self.last = figures | {"val_top1": val_top1}
        if not self.chosen or val_top1 > self.chosen["val_top1"]:
            self.chosen = dict(self.last)
        if not self.highest or figures["top1"] > self.highest["top1"]:
            self.highest = dict(self.last)


@dataclass
class TrainState:
    """What grows during training and is not a tensor."""

    step: int = 0  # finished optimizer updates
    evaluated_at: int = -1  # the step of the last finished evaluation
    best_top1: float = -1.0
    best_step: int = -1
    evaluations: int = 0
    skipped_steps: int = 0  # updates dropped by fp16 loss scaling
    meter_sums: list[float] = field(default_factory=list)  # of the unfinished log window
    data: DataCounters = field(default_factory=DataCounters)  # of training, summed over all ranks
    val_bad: dict[str, int] = field(default_factory=dict)  # of the last evaluation: kind of damage -> samples
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    test: ThirdSet = field(default_factory=ThirdSet)


@dataclass(frozen=True)
class Snapshot:
    """What one checkpoint holds. Tensors by name; `optimizer` is a state dict of tensors, numbers and lists."""

    state: TrainState
    tensors: dict[str, dict[str, Tensor]]  # file stem (model, ema, method) -> state dict
    optimizer: dict[str, Any]
    facts: dict[str, Any]  # layout (streams, window, world_size), settings, data fingerprint


# --------------------------------------------------------------------------------------------- writing


def _sync(path: Path) -> None:
    """Flushes a file or a folder's entries to the disk."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def write_atomically(path: Path, text: str) -> None:
    """Replaces `path` by `text` so that a reader, or a crash, sees the old or the new whole."""
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    beside.write_text(text)
    _sync(beside)
    os.replace(beside, path)


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


def save(folder: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Writes the checkpoint of snapshot.state.step under `folder`, moves the pointers, prunes. Rank 0 only."""
    folder.mkdir(parents=True, exist_ok=True)
    final = folder / folder_name(snapshot.state.step)
    beside = folder / f".{final.name}.{uuid.uuid4().hex[:8]}.partial"
    replaced = folder / f"{final.name}{REPLACED}"
    beside.mkdir()
    try:
        _write_files(beside, snapshot)
        if final.exists():
            # the same step again (an evaluation made up for after a resume): still found under this name if we die now
            os.rename(final, replaced)
        os.rename(beside, final)
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise
    _sync(folder)
    write_atomically(folder / "latest", final.name + "\n")
    if snapshot.state.best_step == snapshot.state.step:
        write_atomically(folder / "best", final.name + "\n")
    _prune(folder, keep)
    return final


def _write_files(folder: Path, snapshot: Snapshot) -> None:
    for stem, tensors in snapshot.tensors.items():
        path = folder / f"{stem}.safetensors"
        save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, path)
        path.chmod(0o644)  # safetensors ignores the umask: colleagues could not read it
    torch.save(snapshot.optimizer, folder / "optimizer.pt")
    state = {"schema": SCHEMA, "state": asdict(snapshot.state), **snapshot.facts}
    (folder / "state.json").write_text(json.dumps(state, indent=1))
    files = sorted(p for p in folder.iterdir())
    for path in files:
        _sync(path)
    manifest = {"schema": SCHEMA, "files": {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in files}}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    _sync(folder / "manifest.json")
    _sync(folder)


def _prune(folder: Path, keep: int) -> None:
    """Removes all but the newest `keep` and the best, and what killed saves left. Only folders we wrote."""
    kept = {_pointer(folder, "latest"), _pointer(folder, "best")}
    complete = _complete(folder)
    old = [p for p in complete if p.name.endswith(REPLACED)]
    for path in old + [p for p in complete if p not in old][keep:]:
        if path.name not in kept and not path.is_symlink():
            shutil.rmtree(path)
    for path in folder.glob(f".{PREFIX}*.partial"):
        shutil.rmtree(path, ignore_errors=True)


# --------------------------------------------------------------------------------------------- reading


def _pointer(folder: Path, name: str) -> str | None:
    try:
        return (folder / name).read_text().strip()
    except OSError:
        return None


def _complete(folder: Path) -> list[Path]:
    """Folders with a manifest, newest step first. The order is by step, never by clock."""
    found = [p for p in folder.glob(f"{PREFIX}*") if (p / "manifest.json").is_file()]
    return sorted(found, key=lambda p: p.name, reverse=True)


def problem(checkpoint: Path) -> str | None:
    """Why this checkpoint cannot be used, or None if it verifies byte for byte."""
    try:
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        if manifest["schema"] > SCHEMA:
            return f"it was written by a newer version (schema {manifest['schema']}, this one reads up to {SCHEMA})"
        for name, entry in manifest["files"].items():
            path = checkpoint / name
            if not path.is_file():
                return f"{name} is missing"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, its manifest says {entry['bytes']}"
            if digest(path) != entry["sha256"]:
                return f"{name} is damaged: its sha256 is not the manifest's"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its manifest cannot be read ({type(error).__name__}: {error})"
    return None


def find(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a sentence for each newer one that does not."""
    refused = []
    for path in _complete(folder):
        why = problem(path)
        if why is None:
            return path, refused
        refused.append(f"checkpoint `{path.name}` is not used: {why}")
    return None, refused


def resolve(text: str) -> Path:
    """The checkpoint that --resume PATH names: a checkpoint's folder, or a run's folder (its newest good one)."""
    path = Path(text)
    if (path / "manifest.json").is_file():
        why = problem(path)
        if why:
            raise CheckpointError(f"--resume `{text}` cannot be used: {why}; give another checkpoint")
        return path
    found, refused = find(path / "checkpoints" if (path / "checkpoints").is_dir() else path)
    if found is None:
        details = "".join(f"; {r}" for r in refused)
        raise CheckpointError(
            f"--resume `{text}` holds no usable checkpoint{details}; give a folder like "
            f"RUN/checkpoints/{folder_name(500)}"
        )
    return found


def best_of(folder: Path) -> Path | None:
    """The checkpoint with the best validation top-1 so far, if it is there."""
    name = _pointer(folder, "best")
    return folder / name if name and (folder / name / "manifest.json").is_file() else None


def read_facts(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())


def load(checkpoint: Path, device: torch.device | str) -> Snapshot:
    """The checkpoint's content. CheckpointError if a file cannot be read; verify first with `problem`."""
    try:
        facts = read_facts(checkpoint)
        fields = facts.pop("state")
        fields.pop("bad_samples", None)  # schema 1
        parts = {"data": DataCounters(**fields.get("data", {})), "test": ThirdSet(**fields.get("test", {}))}
        state = TrainState(**fields | parts)
        tensors = {p.stem: load_file(p, device=str(device)) for p in sorted(checkpoint.glob("*.safetensors"))}
        optimizer = torch.load(checkpoint / "optimizer.pt", map_location=device, weights_only=True)
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        raise CheckpointError(
            f"checkpoint `{checkpoint}` cannot be read on this process ({type(error).__name__}: {error}); "
            "check the file system, or remove the folder to fall back to an older one"
        ) from error
    return Snapshot(state, tensors, optimizer, facts)


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`name: saved -> now` for each setting that differs."""
    names = sorted({*saved, *now})
    return [f"{n}: {saved.get(n)!r} -> {now.get(n)!r}" for n in names if saved.get(n) != now.get(n)]
