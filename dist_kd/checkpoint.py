"""Owns RUN/checkpoints. A checkpoint is complete and verified, or it does not exist. Knows nothing of the loop.

A save writes beside, syncs, writes the manifest last, renames, moves the pointer, and only then prunes.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import pickle
import re
import shutil
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dist_kd.errors import CheckpointError, SaveError, printable, says_memory_ran_out
from dist_kd.models.weights import load_plain
from dist_kd.train_state import TrainState, check, state_of

SCHEMA = 4  # 1 counted bad samples without their kinds; 2 knew no test set; 3 skipped updates in fp16 only
PREFIX = "step_"
REPLACED = ".replaced"
NAME = re.compile(rf"{PREFIX}(\d{{8,}})({re.escape(REPLACED)})?")
NEEDED = {"model.safetensors", "optimizer.pt", "state.json"}
LAYOUT = ("streams", "window", "world_size", "micro_batch")  # what a start takes from here, all at least 1
REMEDIES = {
    errno.ENOSPC: "free space there, or keep fewer with --keep",
    errno.EDQUOT: "the quota is used up: remove files, or have it raised",
    errno.EROFS: "the file system is read-only: have it mounted for writing",
    errno.EFBIG: "this process may not write so large a file: raise `ulimit -f`",
    errno.EACCES: "have the folder's owner let you write there, or give another --save_path",
    errno.EPERM: "have the folder's owner let you write there, or give another --save_path",
}
UNREADABLE = (
    OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, EOFError, pickle.UnpicklingError,
    SafetensorError,
)  # fmt: skip


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
    try:
        beside.write_text(text)
        _sync(beside)
        os.replace(beside, path)
    except OSError:
        with contextlib.suppress(OSError):
            beside.unlink()
        raise


def digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def folder_name(step: int) -> str:
    return f"{PREFIX}{step:08d}"


@contextlib.contextmanager
def writing(path: Path, what: str) -> Iterator[None]:
    """Makes a SaveError of whatever a disk refuses meanwhile; `what` begins its sentence, `path` is where."""
    try:
        yield
    except (OSError, SafetensorError, RuntimeError) as error:
        cause = _disk_error(error)
        if cause is None:
            raise
        try:
            space = os.statvfs(path)
            free = f", {space.f_bavail * space.f_frsize / 1e6:.1f} MB free"
        except OSError:
            free = ""
        raise SaveError(
            f"{what} could not be written to `{path}` ({os.strerror(cause)}{free}); "
            f"{REMEDIES.get(cause, 'check the file system')}"
        ) from error


def _disk_error(error: BaseException | None) -> int | None:
    """The errno behind an error: torch and safetensors wrap it in types of their own."""
    while error is not None:
        if isinstance(error, OSError) and error.errno:
            return error.errno
        told = isinstance(error, SafetensorError) and re.search(r"\(os error (\d+)\)", str(error))
        if told:
            return int(told[1])
        error = error.__cause__ or error.__context__
    return None


def save(folder: Path, snapshot: Snapshot, *, keep: int) -> Path:
    """Writes the checkpoint of snapshot.state.step under `folder`, moves the pointers, prunes. Rank 0 only.

    SaveError if the disk refuses: what stood before still stands, and what was begun is removed.
    """
    step = snapshot.state.step
    final = folder / folder_name(step)
    with writing(folder, f"the checkpoint of step {step}"):
        folder.mkdir(parents=True, exist_ok=True)
        beside = _hidden(final)
        replaced = folder / f"{final.name}{REPLACED}"
        try:
            beside.mkdir()
            _write_files(beside, snapshot)
            _remove(replaced)
            if os.path.lexists(final):
                # the same step again (an evaluation made up for after a resume): found as `replaced` if we die now
                os.rename(final, replaced)
            os.rename(beside, final)
        except BaseException:
            shutil.rmtree(beside, ignore_errors=True)
            _put_back(final)
            raise
        _sync(folder)
        write_atomically(folder / "latest", final.name + "\n")
        # also if it was saved earlier, by a process that died before it could say so
        best = snapshot.state.best_step
        if best >= 0 and holds(folder, best):
            write_atomically(folder / "best", folder_name(best) + "\n")
    _prune(folder, step, keep)
    return final


def _write_files(folder: Path, snapshot: Snapshot) -> None:
    for stem, tensors in snapshot.tensors.items():
        path = folder / f"{stem}.safetensors"
        save_file({k: t.detach().contiguous().cpu() for k, t in tensors.items()}, path)
        path.chmod(0o644)  # safetensors ignores the umask: colleagues could not read it
    with (folder / "optimizer.pt").open("wb") as file:  # given a path, torch.save would lose the disk's error
        torch.save(snapshot.optimizer, file)
    state = {"schema": SCHEMA, "state": asdict(snapshot.state), **snapshot.facts}
    (folder / "state.json").write_text(json.dumps(state, indent=1))
    files = sorted(p for p in folder.iterdir())
    for path in files:
        _sync(path)
    manifest = {"schema": SCHEMA, "files": {p.name: {"bytes": p.stat().st_size, "sha256": digest(p)} for p in files}}
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=1))
    _sync(folder / "manifest.json")
    _sync(folder)


def _hidden(path: Path) -> Path:
    """A name beside `path` that no search takes for a checkpoint, and that `clean` removes."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.partial")


def _remove(path: Path) -> None:
    """Removes one of our folders: first its name, so that no half of it is ever found. Links are not followed."""
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        hidden = _hidden(path)
        os.rename(path, hidden)
        shutil.rmtree(hidden, ignore_errors=True)


def _put_back(final: Path) -> None:
    """What a save that did not end has moved away stands under its name again."""
    replaced = final.with_name(final.name + REPLACED)
    with contextlib.suppress(OSError):
        if os.path.lexists(replaced) and not os.path.lexists(final):
            os.rename(replaced, final)


def _prune(folder: Path, step: int, keep: int) -> None:
    """Removes all but the newest `keep` up to `step` and the best. Only folders we wrote; links stay.

    A folder of a later step was passed over at the start, for what is wrong with it: it is left to be looked at.
    Whatever goes wrong here is said at most: the new checkpoint stands.
    """
    kept = {folder_name(step), _pointer(folder, "best")}
    try:
        ours = [p for n, p in _steps(folder) if n <= step and not p.is_symlink() and (p / "manifest.json").is_file()]
        standing = [p for p in ours if not p.name.endswith(REPLACED)]
        for path in [*(p for p in ours if p not in standing), *standing[keep:]]:
            if path.name not in kept:
                _remove(path)
    except (OSError, CheckpointError) as error:
        with contextlib.suppress(OSError):  # a log on a full disk
            line = f"warning: older checkpoints could not be removed ({error}); the new one of step {step} stands"
            print(printable(line), flush=True)
    clean(folder)


def clean(folder: Path) -> None:
    """Removes what killed saves have left in `folder`, and ends what they had begun. Rank 0 only; links stay."""
    with contextlib.suppress(OSError):
        for path in folder.glob(f".{PREFIX}*.partial"):
            if not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
        for path in [*folder.glob(".latest.*"), *folder.glob(".best.*")]:
            path.unlink()
        for path in folder.glob(f"{PREFIX}*{REPLACED}"):
            final = path.with_name(path.name.removesuffix(REPLACED))
            if os.path.lexists(final) and problem(final) is None:
                _remove(path)
            else:
                _put_back(final)


# --------------------------------------------------------------------------------------------- reading


def _pointer(folder: Path, name: str) -> str | None:
    """The checkpoint that `latest` or `best` names, if it is a name of ours: it may lead nowhere else."""
    try:
        path = folder / name
        text = path.read_text().strip() if path.is_file() else ""
    except (OSError, ValueError):
        return None
    return text if NAME.fullmatch(text) else None


def _steps(folder: Path) -> list[tuple[int, Path]]:
    """Steps and what bears their names, the newest first, what was replaced last. By step, never by clock."""
    try:
        names = [match for name in os.listdir(folder) if (match := NAME.fullmatch(name))]
    except FileNotFoundError:
        return []
    except OSError as error:
        raise CheckpointError(
            f"`{folder}` cannot be read ({error.strerror}); have its owner let you read it, or give another --save_path"
        ) from error
    names.sort(key=lambda match: (int(match[1]), not match[2]), reverse=True)
    return [(int(match[1]), folder / match[0]) for match in names]


def problem(checkpoint: Path) -> str | None:
    """Why this checkpoint cannot be used, or None if it verifies byte for byte and says what a start asks of it."""
    try:
        if not (checkpoint / "manifest.json").is_file():
            return "manifest.json is missing"
        manifest = json.loads((checkpoint / "manifest.json").read_text())
        schema, files = manifest["schema"], manifest["files"]
        if type(schema) is not int or schema < 1:
            return f"its manifest gives the schema `{schema!r:.40}`, which is no number from 1 to {SCHEMA}"
        if schema > SCHEMA:
            return f"it was written by a newer version (schema {schema}, this one reads up to {SCHEMA})"
        for name, entry in files.items():
            path = checkpoint / name
            if Path(name).name != name:
                return f"its manifest names {name!r:.80}, which is no file of this folder"
            if path.is_symlink() or not path.is_file():
                return f"{name} is {'no plain file' if os.path.lexists(path) else 'missing'}"
            if path.stat().st_size != entry["bytes"]:
                return f"{name} has {path.stat().st_size} bytes, its manifest says {entry['bytes']!r:.40}"
            if digest(path) != entry["sha256"]:
                return f"{name} is damaged: its sha256 is not the manifest's"
        if not files.keys() >= NEEDED:
            return f"its manifest does not name {', '.join(sorted(NEEDED - files.keys()))}"
    except UNREADABLE as error:
        return f"its manifest cannot be read ({type(error).__name__}: {' '.join(str(error).split()):.200})"
    try:
        facts = read_facts(checkpoint)
        state_of(facts)
        for name, kind in (("settings", dict), ("layout", dict), ("data", str)):
            check(facts[name], kind, name)
        for name in LAYOUT:
            check(facts["layout"][name], int, name)
            if facts["layout"][name] < 1:
                raise ValueError(f"{name} is {facts['layout'][name]}")
    except UNREADABLE as error:
        return (
            f"state.json is not what this version writes ({type(error).__name__}: {' '.join(str(error).split()):.200})"
        )
    return None


def find(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that verifies, and a sentence for each newer one that does not."""
    refused = []
    for _, path in _steps(folder):
        why = problem(path)
        if why is None:
            return path, refused
        refused.append(f"checkpoint `{path.name}` is not used: {why}")
    return None, refused


def resolve(text: str) -> Path:
    """The checkpoint that --resume PATH names: a checkpoint's folder, or a run's folder (its newest good one)."""
    path = Path(text)
    if os.path.isfile(path / "manifest.json"):
        why = problem(path)
        if why:
            raise CheckpointError(f"--resume `{text}` cannot be used: {why}; give another checkpoint")
        return path
    found, refused = find(path / "checkpoints" if os.path.isdir(path / "checkpoints") else path)
    if found is None:
        details = "".join(f"; {r}" for r in refused)
        raise CheckpointError(
            f"--resume `{text}` holds no usable checkpoint{details}; give a folder like "
            f"RUN/checkpoints/{folder_name(500)}"
        )
    return found


def holds(folder: Path, step: int) -> bool:
    """Whether a whole checkpoint of `step` is there; its files are not looked at."""
    return (folder / folder_name(step) / "manifest.json").is_file()


def best_of(folder: Path) -> Path | None:
    """The checkpoint with the best validation top-1 so far, if it is there. CheckpointError if it is damaged."""
    name = _pointer(folder, "best")
    if name is None or not os.path.isfile(folder / name / "manifest.json"):
        return None
    why = problem(folder / name)
    if why:
        raise CheckpointError(f"the best checkpoint `{folder / name}` cannot be used: {why}; take the last instead")
    return folder / name


def read_facts(checkpoint: Path) -> dict[str, Any]:
    return json.loads((checkpoint / "state.json").read_text())


def load(checkpoint: Path, device: torch.device | str) -> Snapshot:
    """The checkpoint's content. CheckpointError if a file cannot be read; verify first with `problem`.

    Memory that runs out stays the error that it is: nothing is wrong with the files then.
    """
    try:
        facts = read_facts(checkpoint)
        state = state_of(facts)
        del facts["state"]
        # only what was verified: a file that the manifest does not name is not of this checkpoint
        files = json.loads((checkpoint / "manifest.json").read_text())["files"]
        paths = [checkpoint / name for name in sorted(files) if name.endswith(".safetensors")]
        tensors = {path.stem: load_file(path, device=str(device)) for path in paths}
        optimizer = load_plain(checkpoint / "optimizer.pt", device)
    except UNREADABLE as error:
        if says_memory_ran_out(error):
            raise
        why = f"{type(error).__name__}: {' '.join(str(error).split()):.300}"
        if isinstance(error, pickle.UnpicklingError):  # torch would tell how to run it all the same
            why = "optimizer.pt holds more than tensors and numbers: what could run code is not read"
        raise CheckpointError(
            f"checkpoint `{checkpoint}` cannot be read on this process ({why}); "
            "check the file system, or remove the folder to fall back to an older one"
        ) from error
    return Snapshot(state, tensors, optimizer, facts)


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """`name: saved -> now` for each setting that differs."""
    names = sorted({*saved, *now})
    return [f"{n}: {saved.get(n)!r} -> {now.get(n)!r}" for n in names if saved.get(n) != now.get(n)]
