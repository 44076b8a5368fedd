"""The place where a run is saved: written to as checkpoints are, and its room against what a run keeps there."""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dist_kd.config import Config
from dist_kd.data.cache_files import gb
from dist_kd.doctor import BAD, LOOK, OK, Finding
from dist_kd.doctor.student import CLASSES, sizes

PROBE_BYTES = 64 << 20
CHUNK = 4 << 20
SLOW_SAVE_S = 30.0
# tensors of a parameter's size that an optimizer keeps for each; one less of those with momentum if that is 0
SLOTS = {"sgd": 1, "adam": 2, "amsgrad": 3, "adamw": 2, "rmsprop": 2}
MOMENTUM_IS_A_SLOT = ("sgd", "rmsprop")


def checkpoint_bytes(config: Config, parameters: int, buffers: int) -> int:
    """Of one checkpoint: student, optimizer and average. A method's own parts (adapters, memories) come on top."""
    slots = SLOTS[config.optimizer] - (config.momentum == 0 and config.optimizer in MOMENTUM_IS_A_SLOT)
    networks = 2 if config.ema_decay else 1
    return 4 * (parameters * (networks + slots) + buffers * networks)


def nearest(folder: Path) -> Path:
    """The folder, or the first one above it that exists."""
    folder = folder.absolute()
    return next(above for above in (folder, *folder.parents) if os.path.lexists(above))


def check(config: Config, facts: dict[str, Any]) -> Iterator[Finding]:
    """Leaves nothing behind: the large file has no name while it is written."""
    wanted = Path(config.save_path or Path("runs") / config.default_name).absolute()
    there = nearest(wanted)
    try:
        with tempfile.TemporaryDirectory(prefix=".doctor-", dir=there) as folder:
            wrong = _names(Path(folder))
            if wrong:
                yield Finding(BAD, "save path", f"`{there}`: {wrong}; use a local disk or another --save-path")
            yield from _room(config, facts, wanted, Path(folder))
    except OSError as error:
        yield Finding(BAD, "save path", f"`{wanted}` cannot be written: {error.strerror}; choose another --save-path")


def _names(folder: Path) -> str:
    """What is wrong with this disk's names; "" if a file is replaced as one act, and made by one process only."""
    old, new = folder / "old", folder / "new"
    old.write_text("old")
    new.write_text("new")
    os.replace(new, old)
    if old.read_text() != "new" or new.exists():
        return "a file that was renamed over another one did not take its place"
    try:
        os.close(os.open(old, os.O_WRONLY | os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return ""
    return "a file that is there could be created once more (O_EXCL), so two runs could take the same folder"


def _room(config: Config, facts: dict[str, Any], wanted: Path, folder: Path) -> Iterator[Finding]:
    stat = os.statvfs(folder)
    free = stat.f_bavail * stat.f_frsize
    one = checkpoint_bytes(config, *sizes(config, facts.get("classes", CLASSES)))
    need = (config.keep + 2) * one
    text = (
        f"`{wanted}`: {gb(free)} free, and checkpoints of {gb(one)} take {gb(need)} "
        f"(--keep {config.keep}, the best, and one being written)"
    )
    if free < need:
        yield Finding(BAD, "save path", f"{text}; make room, lower --keep or choose another --save-path")
    elif free < 2 * need:
        yield Finding(LOOK, "save path", f"{text}; little is left for anything else")
    else:
        yield Finding(OK, "save path", text)
    size = min(PROBE_BYTES, free // 4 // CHUNK * CHUNK)
    if not size:
        return
    took = _written(folder / "probe", size)
    speed = size / took
    save = one / speed
    text = f"{size >> 20} MiB written and synced at {speed / 1e6:.0f} MB/s: a checkpoint takes about {save:.1f} s"
    slow = save > SLOW_SAVE_S
    more = f"; training waits for it every {config.checkpoint_steps} steps (--checkpoint-steps)" if slow else ""
    yield Finding(LOOK if slow else OK, "save speed", text + more)


def _written(path: Path, size: int) -> float:
    """Seconds in which `size` bytes are on the disk."""
    chunk = os.urandom(CHUNK)  # a disk that compresses must not look faster than it is
    number = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.unlink(path)
        start = time.perf_counter()
        for _ in range(size // CHUNK):
            view = memoryview(chunk)
            while view:
                view = view[os.write(number, view) :]
        os.fsync(number)
        return time.perf_counter() - start
    finally:
        os.close(number)
