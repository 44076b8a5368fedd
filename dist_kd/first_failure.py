"""Who is at fault when a run of several processes fails: the first error is told, not the broken connections after it.

A rank that fails or dies breaks the connections of all others. Those look into the heartbeats (watchdog.py) for the
rank that has said why, or that is gone, and end with a sentence that names it.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import time
from typing import Any

import torch.distributed as dist

from dist_kd.contracts import World
from dist_kd.errors import DistKDError, LostError
from dist_kd.run_folder import RunFolder
from dist_kd.run_lock import process_start
from dist_kd.watchdog import Watchdog, place

LOOK_S = 5.0  # for a rank that failed to have said so, and the others that they live; a launcher leaves us 30
CLAIM = "first-failure"  # file beside the heartbeats: the first rank to make it writes the run's status
BROKEN = re.compile(r"Connection (closed|reset|refused)|Broken pipe|gloo/transport|NCCL|TCPStore|remote process")


def record(world: World, folder: RunFolder, watch: Watchdog, step: int | None, error: BaseException) -> BaseException:
    """Writes why the run failed to status.json, if this rank is the one to; the error with which to end this process.

    `step` is None as long as nothing was built. What only one rank met is written by it, before it leaves.
    """
    if world.world_size > 1 and _is_consequence(error):
        watch.say("lost")
        culprit, survivors = _culprit(watch, world.rank)
        error = LostError(_sentence(culprit, survivors))
        voice = world.rank == min(survivors)
        error.alike = not voice  # the others say nothing
        first = voice and not (culprit and culprit["state"] == "hung") and _claim(watch)
        kind, message, whose = error.kind, str(error), {}
    else:
        ours = isinstance(error, DistKDError)
        kind, message = (error.kind, str(error)) if ours else ("crash", f"{type(error).__name__}: {error}")
        if ours and error.alike:
            first = world.is_main
        else:
            # claimed before it is said: another rank that reads it would else be the first to write, and write "lost"
            first = (world.is_main or step is not None) and _claim(watch)
            watch.say("failed", message)
        whose = {"rank": world.rank} if world.world_size > 1 else {}
    if world.is_main:
        # a refused start must not overwrite the status of the run that stands in this folder, or goes on in it
        first = first and folder.lock.held and (folder.has_said or not os.path.exists(folder.path / "status.json"))
    if first:
        folder.status("failed", step=step, kind=kind, message=message, **whose)
    return error


def _is_consequence(error: BaseException) -> bool:
    """Whether this says no more than that a connection to another rank broke."""
    return isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and bool(BROKEN.search(str(error))))


def _claim(watch: Watchdog) -> bool:
    """Whether this rank is the first to tell; also where there is no folder to find that out in."""
    with contextlib.suppress(OSError):
        try:
            os.close(os.open(watch.beats / CLAIM, os.O_CREAT | os.O_EXCL))
        except FileExistsError:
            return False
    return True


def _culprit(watch: Watchdog, rank: int) -> tuple[dict[str, Any] | None, list[int]]:
    """The last heartbeat of the rank that ended the others, if it can be told, and the ranks that live."""
    until = time.monotonic() + LOOK_S
    while True:
        beats = watch.heard()
        said = [beat for beat in beats if beat and beat["state"] in ("failed", "hung")]
        lost = [beat for beat in beats if beat and beat["state"] == "lives" and beat["rank"] != rank]
        gone = [beat for beat in lost if beat["host"] == platform.node() and process_start(beat["pid"]) is None]
        survivors = sorted({rank, *(beat["rank"] for beat in beats if beat and beat["state"] == "lost")})
        if said or gone or not lost or time.monotonic() > until:
            return (*said, *gone, *lost, None)[0], survivors
        time.sleep(0.1)


def _sentence(culprit: dict[str, Any] | None, survivors: list[int]) -> str:
    end = "the same command goes on from the last checkpoint"
    if culprit is None:
        return f"a rank was lost: it ended without a word, and it cannot be seen from rank {survivors[0]} which; {end}"
    who = f"rank {culprit['rank']} ({culprit['host']}, process {culprit['pid']})"
    where = place(culprit["section"], culprit["step"])
    if culprit["state"] == "failed":
        return f"{who} failed at {where}: {culprit['message']}"
    if culprit["state"] == "hung":
        return f"{who} ended at {where}, as nothing moved any more"
    return (
        f"a rank was lost: {who} ended without a word, last seen at {where}: killed, most often because memory "
        f"ran out, or its node is gone; {end}"
    )
