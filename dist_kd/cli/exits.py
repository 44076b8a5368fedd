"""How a command ends: one clean message and the documented exit code, no traceback for what a user can cause."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable
from typing import NoReturn

from dist_kd.errors import ConfigError, DistKDError

INTERRUPTED = 130  # as shells report a death by SIGINT
PREEMPTED = 75  # stopped in good order: the same command goes on
CLOSED_PIPE = 141  # and by SIGPIPE: `dist-kd report | head`


def is_speaker() -> bool:
    """Whether this process prints what all of them know alike: rank 0, or a process started alone."""
    return os.environ.get("RANK", "0") == "0"


def ended(call: Callable[[], int | None]) -> int:
    """The exit code of `call()`, after saying on stderr what went wrong, if anything did."""
    try:
        code = call() or 0
        _flush()  # a closed pipe shows itself here, not after our last line
        return code
    except DistKDError as error:
        if _speaks(error):
            print(_message(error), file=sys.stderr, flush=True)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        _drop_output()
        return CLOSED_PIPE


def leave(error: BaseException) -> NoReturn:
    """Says the error and ends this process at once: Python's own way out can wait for ranks that wait for this one."""

    def fail() -> int:
        raise error

    try:
        code = ended(fail)
    except BaseException:
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
    os._exit(code)


def _flush() -> None:
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        raise
    except OSError:  # a log on a full disk does not change how the command ended
        _drop_output()


def _drop_output() -> None:
    """Nothing more is written, or the interpreter would complain when it flushes at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _speaks(error: DistKDError) -> bool:
    if error.alike:
        return is_speaker()
    # a setting fails alike on a node, but perhaps on one node only (a missing file, another line typed): one voice each
    return not isinstance(error, ConfigError) or os.environ.get("LOCAL_RANK", "0") == "0"


def _message(error: DistKDError) -> str:
    """`KIND error: SENTENCE`, or a list where there are several; who speaks is named if it is not rank 0."""
    rank, lines = os.environ.get("RANK", "0"), str(error).splitlines()
    head = f"{'' if rank == '0' else f'rank {rank}: '}{error.kind} error"
    return f"{head}: {error}" if len(lines) < 2 else "\n".join([f"{head}s ({len(lines)}):", *(f"  {x}" for x in lines)])
