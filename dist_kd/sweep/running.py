"""Runs side by side: one process each, on its own GPU where there are several; stopped together, with a limit."""

from __future__ import annotations

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

from dist_kd.cli.exits import PREEMPTED
from dist_kd.stop_signals import STOP_SIGNALS
from dist_kd.sweep.study import Run

Outcome = Literal["done", "stopped", "failed"]

GRACE = 300.0  # seconds in which a trainer that was asked to stop must have saved
DEVICE_FILES = ("/dev/nvidia0", "/dev/nvidiactl", "/dev/kfd", "/dev/dxg")  # one of these where torch may find a GPU


def gpus(cpu_only: bool) -> list[str]:
    """What to put into CUDA_VISIBLE_DEVICES for each GPU. Torch is imported only where there may be one."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if cpu_only or visible == "" or not any(Path(file).exists() for file in DEVICE_FILES):
        return []
    import torch

    count = torch.cuda.device_count()
    return visible.split(",")[:count] if visible else [str(k) for k in range(count)]


def places(jobs: int | None, devices: Sequence[str]) -> list[dict[str, str]]:
    """Environments of the runs that go side by side: a GPU each, taken in turn
    if `jobs` is more, and its share of the cores. A user's own OMP_NUM_THREADS stands."""
    count = jobs or max(1, len(devices))
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // count))
    own = [{"CUDA_VISIBLE_DEVICES": devices[k % len(devices)]} if devices else {} for k in range(count)]
    return [{"OMP_NUM_THREADS": threads, "PYTHONUNBUFFERED": "1", **place} for place in own]


class StopRequest:
    """The first signal that asked for an end, by name, or None."""

    reason: str | None = None


@contextmanager
def listening() -> Iterator[StopRequest]:
    """Signals only set a flag while this lasts."""
    stop = StopRequest()

    def note(number: int, frame: object) -> None:
        stop.reason = stop.reason or signal.Signals(number).name

    previous = {number: signal.signal(number, note) for number in STOP_SIGNALS}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _die_with_parent() -> None:
    # if we are killed outright, nobody is left to keep two trainers out of one folder: Linux ends them for us
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG


def _start(run: Run, place: dict[str, str]) -> subprocess.Popen:
    run.log.parent.mkdir(parents=True, exist_ok=True)
    with run.log.open("a") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "dist_kd.commands.main", "train", *run.words],
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env=os.environ | place,
            start_new_session=True,  # Ctrl-C is ours to hand on, once
            preexec_fn=_die_with_parent if sys.platform == "linux" else None,
        )


def _outcome(run: Run, code: int, stopping: bool) -> Outcome:
    if code == 0:  # where a launcher's variables are set, also after a stop
        return "done" if is_done(run) else "stopped"
    # in its first moment a trainer knows no signal yet, and ends by it
    return "stopped" if code == PREEMPTED or (stopping and code == -signal.SIGTERM) else "failed"


def work(
    runs: Sequence[Run],
    places: Sequence[dict[str, str]],
    stop: StopRequest,
    started: Callable[[Run], None],
    ended: Callable[[Run, Outcome, int, float], None],
) -> None:
    """Starts every run, len(places) at a time, until all have ended or `stop` has a reason.

    `ended` is told outcome, exit code and seconds. A trainer that has not saved GRACE seconds after it was asked to
    stop is killed, and counts as failed.
    """
    waiting, free = list(runs), list(places)
    busy: dict[int, tuple[Run, subprocess.Popen, dict[str, str], float]] = {}
    deadline = None
    try:
        while busy or (waiting and not stop.reason):
            while waiting and free and not stop.reason:
                run, place = waiting.pop(0), free.pop(0)
                process = _start(run, place)
                busy[process.pid] = run, process, place, time.monotonic()
                started(run)
            if stop.reason and deadline is None:
                deadline = time.monotonic() + GRACE
                for _, process, _, _ in busy.values():
                    process.terminate()
            if deadline is not None and time.monotonic() > deadline:
                for _, process, _, _ in busy.values():
                    process.kill()
            time.sleep(0.05)
            for pid, (run, process, place, since) in list(busy.items()):
                code = process.poll()
                if code is not None:
                    del busy[pid]
                    free.append(place)
                    ended(run, _outcome(run, code, stop.reason is not None), code, time.monotonic() - since)
    finally:
        for _, process, _, _ in busy.values():  # only if we ourselves failed
            process.terminate()


def is_done(run: Run) -> bool:
    """Whether the trainer has said so in status.json."""
    try:
        return json.loads((run.folder / "status.json").read_text())["state"] == "done"
    except (OSError, ValueError, KeyError, TypeError):
        return False
