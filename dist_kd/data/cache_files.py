"""Owns the files of the cache as files: locks, notes, room on the disk, and the sentences when the disk refuses."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from dist_kd.errors import DataError

LOCK_WAIT_S = 0.05  # between two looks at a lock that another holds

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM)
NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


@contextmanager
def locked(path: Path, deadline: float, what: str) -> Iterator[int]:
    """A descriptor of a file, created if need be, that no other process or thread has locked."""
    began = time.monotonic()
    while True:
        held = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o666)
        try:
            while True:
                try:
                    fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise DataError(
                            f"{what}, which has not finished within {time.monotonic() - began:.3g} s; see whether "
                            f"that process still moves (`lsof {path}` names it)"
                        ) from None
                    time.sleep(LOCK_WAIT_S)
            if same_file(held, path):  # else it was renamed or removed meanwhile
                yield held
                return
        finally:
            # closing is not enough: a worker forked meanwhile has this descriptor too
            fcntl.flock(held, fcntl.LOCK_UN)
            os.close(held)


@contextmanager
def disk_words(folder: Path, what: str, needs: Callable[[], int | None] = lambda: None) -> Iterator[None]:
    """Errors of the disk as sentences."""
    try:
        yield
    except OSError as error:
        where, move = f"the cache in `{folder}`", "name another folder by DIST_KD_CACHE"
        if error.errno in FULL:
            size = needs()
            need = f"{gb(size)} are needed and " if size else ""
            free = f"{gb(free_on(folder))} free"
            raise DataError(
                f"{what}: {where} has no room on its disk ({error.strerror.lower()}; {need}{free}); make room, lower "
                f"`--cache-gb`, or {move}"
            ) from None
        if error.errno in CLOSED:
            raise DataError(f"{what}: {where} cannot be written ({error.strerror.lower()}); {move}") from None
        if error.errno in NO_LOCKS:
            raise DataError(f"{what}: {where} is on a file system without file locks; {move} on a local disk") from None
        raise DataError(f"{what}: {where} failed: {error.strerror or error}; {move}") from error


def same_file(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def write_all(descriptor: int, chunk: bytes) -> None:
    view = memoryview(chunk)
    while view:
        view = view[os.write(descriptor, view) :]


def read_note(path: Path) -> dict:
    try:
        note = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return note if isinstance(note, dict) else {}


def write_note(path: Path, note: dict) -> None:
    new = path.with_name(path.name + ".new")  # its part is locked: nobody else writes it
    new.write_text(json.dumps(note))
    os.replace(new, path)


def boot() -> str:
    """Which start of the machine this is."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""


def size_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def free_on(folder: Path) -> int:
    try:
        stat = os.statvfs(folder)
    except OSError:
        return 0
    return stat.f_bavail * stat.f_frsize


def gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.2f} MB"
