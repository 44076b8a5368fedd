"""What can be known before a long run: each check looks at one thing, in a process of its own, within its time.

`examine` gives what they find, as they find it; printing is the command's. A check is a generator of Findings, so that
what it saw before its time was up is not lost; what hangs or dies with it is ended and said, and the next one goes on.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from typing import Any, NamedTuple

from dist_kd import stop_signals
from dist_kd.config import Config
from dist_kd.errors import DistKDError, one_line

OK, LOOK, BAD = "OK", "LOOK", "BAD"  # all is well; worth a look; the run would fail, or not do what was asked for
END_S = 3.0  # for what was killed to be gone


class Finding(NamedTuple):
    """One line: what was found and, unless it is OK, what to do. `facts` are told to later checks."""

    state: str
    name: str
    text: str
    facts: dict[str, Any] = {}  # noqa: RUF012 (never written to)


class Check(NamedTuple):
    """`module` has check(config, facts) -> Iterator[Finding]; `late` is the state if it is not done in `seconds`."""

    name: str
    module: str
    seconds: float
    late: str
    torch: bool = True


CHECKS = (
    Check("packages", "dist_kd.doctor.packages", 10, LOOK, torch=False),
    Check("wandb", "dist_kd.doctor.wandb_state", 8, LOOK, torch=False),
    Check("devices", "dist_kd.doctor.devices", 10, BAD),
    Check("data", "dist_kd.doctor.speed_of_data", 20, LOOK),  # before those that want to know its classes
    Check("collectives", "dist_kd.doctor.collectives", 25, BAD),
    Check("save path", "dist_kd.doctor.save_path", 12, BAD),
    Check("batch", "dist_kd.doctor.batch", 30, LOOK),
)


def examine(config: Config, checks: tuple[Check, ...] = CHECKS) -> Iterator[Finding]:
    """All findings, one by one. Ends within the sum of all limits and the import of torch."""
    facts: dict[str, Any] = {}
    for check in checks:
        if check.torch and "torch" not in sys.modules:
            # once, here: each check is a fork. It must not touch a GPU, which no fork could use then
            os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
            try:
                import_module("dist_kd.wiring")
            except Exception as error:
                yield Finding(
                    BAD, "torch", f"cannot be imported ({said(error)}); repair it, the rest was not looked at"
                )
                return
        for finding in watched(check, config, facts):
            facts |= finding.facts
            yield finding


def watched(check: Check, config: Config, facts: dict[str, Any]) -> Iterator[Finding]:
    """The findings of one check, which runs in a process group of its own that is gone afterwards."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    process = fork.Process(target=_examined, args=(check, config, facts, sender), name=check.name)
    process.start()
    sender.close()
    end = time.monotonic() + check.seconds
    try:
        while True:
            if not receiver.poll(max(0.0, end - time.monotonic())):
                text = (
                    f"not done within {check.seconds:g} s, and ended; is the machine busy, or a disk or network slow?"
                )
                yield Finding(check.late, check.name, text)
                return
            try:
                finding = receiver.recv()
            except EOFError:
                process.join(END_S)
                code = process.exitcode
                text = f"its process died (exit code {code}{', out of memory?' if code == -9 else ''})"
                yield Finding(BAD, check.name, text)
                return
            if finding is None:
                return
            yield finding
    finally:
        _end(process)


def _end(process: Any) -> None:
    """Kills the check and whatever it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.kill()
    process.join(END_S)  # one that waits for a dead disk cannot be ended, and is not waited for


def _examined(check: Check, config: Config, facts: dict[str, Any], sender: Any) -> None:
    os.setsid()
    stop_signals.PARENT = os.getppid()  # by now doctor itself: no launcher has gone
    for name in (signal.SIGINT, signal.SIGTERM):
        signal.signal(name, signal.SIG_DFL)
    quiet = os.open(os.devnull, os.O_RDWR)
    for stream in (0, 1, 2):  # what libraries print belongs to no line
        os.dup2(quiet, stream)
    try:
        for finding in import_module(check.module).check(config, facts):
            sender.send(finding._replace(text=one_line(finding.text)))
    except Exception as error:
        sender.send(Finding(BAD, check.name, said(error)))
    sender.send(None)


def said(error: Exception) -> str:
    """The sentence of an error of ours, or the kind and first line of another."""
    if isinstance(error, DistKDError):
        return one_line("; ".join(map(str, error.args)))
    first = next(iter(str(error).splitlines()), "")
    return one_line(f"{type(error).__name__}: {first}")
