"""RUN/lock: one run at a time writes a run's folder. A lock whose run is gone is taken over, with a line that says why.

Gone is: a process of this machine that does not live any more; an earlier start of the same SLURM job, which SLURM
ended before it requeued the job; or no sign of life for SILENT_S seconds. Signs of life are the file's time of change.
They are compared with the time of a file just made beside it, so that one clock, the file system's, is asked for both.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import platform
import tempfile
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from dist_kd.errors import ConfigError

BEAT_S = 15.0  # between two signs of life
SILENT_S = 300.0  # well above what a network file system keeps a file's times in its cache for
LARGEST_PID = 2**22  # that Linux gives


def process_start(pid: int) -> str | None:
    """When a process of this machine began, in ticks since boot; "" if that cannot be known, None if there is none."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except OSError:
        pass  # another user's
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return None if state in "ZX" else fields[18]


def machine() -> str:
    """What a process number belongs to: host, boot, and the container's own numbering where there is one."""
    parts = [platform.node()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def myself() -> dict[str, Any]:
    """What the lock says of the process that holds it."""
    return {
        "host": platform.node(),
        "machine": machine(),
        "pid": os.getpid(),
        "process_start": process_start(os.getpid()),
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restarts": int(os.environ.get("SLURM_RESTART_COUNT") or 0),
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "token": uuid.uuid4().hex,
    }


def read(lock: Path) -> dict[str, Any]:
    """What the lock there says; {} if it is gone or only half written. ConfigError for a symbolic link."""
    try:
        with open(os.open(lock, os.O_RDONLY | os.O_NOFOLLOW)) as file:
            content = json.load(file)
    except (FileNotFoundError, ValueError, RecursionError):
        return {}
    except OSError as error:
        if error.errno != errno.ELOOP:
            raise
        raise ConfigError(f"`{lock}` is a symbolic link, and no run makes one; remove it") from None
    return content if isinstance(content, dict) else {}


class RunLock:
    """The lock of one run's folder. Rank 0 only; made by `take`, gone after `release`."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "lock"
        self.held = False
        self._mine: dict[str, Any] = {}
        self._ended = threading.Event()

    def take(self) -> str | None:
        """Takes the lock; a line if it was taken over from a run that is gone. ConfigError if another run holds it."""
        self._mine, line = myself(), None
        if not self._create():
            holder, silent = read(self.path), self._silence()
            why = gone(holder, self._mine, silent)
            if why is None or not self._put_aside(holder) or not self._create():
                raise ConfigError(self._refusal(holder, silent))
            line = f"took over the lock of an earlier start in this folder ({who(holder)}): {why}"
        self.held = True
        threading.Thread(target=self._beat, name="lock", daemon=True).start()
        return line

    def _create(self) -> bool:
        try:
            number = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)  # EXCL follows no symbolic link
        except FileExistsError:
            return False
        try:
            with open(number, "w") as file:
                file.write(json.dumps(self._mine, indent=1) + "\n")
        except OSError:  # a full disk: half a lock would keep the next start out
            self.path.unlink()
            raise
        return True

    def _silence(self) -> float:
        """Seconds without a sign of life, by the file system's own clock."""
        with contextlib.suppress(FileNotFoundError), tempfile.TemporaryFile(dir=self.path.parent) as now:
            now.write(b".")
            now.flush()
            return os.fstat(now.fileno()).st_mtime - os.stat(self.path, follow_symlinks=False).st_mtime
        return 0.0

    def _put_aside(self, holder: dict[str, Any]) -> bool:
        """Removes the lock that was judged, and only that one: two starts may have judged it at once."""
        aside = self.path.with_name(f".lock.{self._mine['token']}")
        try:
            os.rename(self.path, aside)
        except FileNotFoundError:
            return False
        same = read(aside) == holder
        if not same:
            with contextlib.suppress(OSError):  # unless a third one made its own by now
                os.link(aside, self.path)
        aside.unlink()
        return same

    def _refusal(self, holder: dict[str, Any], silent: float) -> str:
        return (
            f"`{self.path.parent}` belongs to a run that goes on ({who(holder)}; last sign of life "
            f"{max(0, silent):.0f} s ago): wait for its end, stop it, or give another --save_path; if it is gone for "
            f"certain, remove `{self.path}`, or wait until it was silent for {SILENT_S:.0f} s"
        )

    def _beat(self) -> None:
        while not self._ended.wait(BEAT_S):
            # a file system away for a moment: the next one will do. A lock that is not ours gets no sign of life
            with contextlib.suppress(OSError, ConfigError):
                if read(self.path) == self._mine:
                    os.utime(self.path)

    def check(self) -> None:
        """ConfigError if the lock was lost: this process stood still so long that another run took over the folder."""
        if self.held and read(self.path) != self._mine:
            self.held = False
            raise ConfigError(
                f"the lock `{self.path}` is no longer this run's ({who(read(self.path))}): it was removed, or this "
                "process was silent for so long that another run took over; nothing more is written here"
            )

    def release(self) -> None:
        """Removes the lock if it is this process's. Does nothing where none is held."""
        self._ended.set()
        with contextlib.suppress(OSError, ConfigError):
            if self.held and read(self.path) == self._mine:
                self.path.unlink()
        self.held = False


def who(holder: dict[str, Any]) -> str:
    """Who holds a lock, in words."""
    if not holder:
        return "the lock does not say whose"
    job = f", SLURM job {holder['job']}" if holder.get("job") else ""
    return f"process {holder.get('pid')} on {holder.get('host')}{job}, since {holder.get('time')}"


def gone(holder: dict[str, Any], mine: dict[str, Any], silent: float) -> str | None:
    """Why the run that made this lock cannot be going on, or None if it may be."""
    # anybody who may write there may have written it: what is not of its kind says nothing
    pid, restarts = (value if type(value) is int else 0 for value in (holder.get("pid"), holder.get("restarts")))
    if holder.get("machine") == mine["machine"] and 0 < pid <= LARGEST_PID:
        # of this machine everything is known, also of a process that stands still
        started = process_start(pid)
        if started is None:
            return "that process is gone"
        if started != holder.get("process_start") and started:
            return "that process is gone, and its number is another's"
        return None
    if mine["job"] and holder.get("job") == mine["job"] and restarts < mine["restarts"]:
        return f"SLURM has requeued job {mine['job']} since"
    if silent > SILENT_S:
        return f"no sign of life for {silent:.0f} s"
    return None
