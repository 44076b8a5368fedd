"""Memory that ran out, of the device or the host, becomes one sentence: how much was asked for, and what to do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dist_kd.config import Config
from dist_kd.errors import DistKDError, OutOfMemoryError, says_memory_ran_out
from dist_kd.plan import micro_batch_of
from dist_kd.runtime import Runtime

ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(\w+)|[Uu]nable to allocate ([\d.]+) (\w+)")


@contextlib.contextmanager
def told(config: Config, runtime: Runtime, run: Callable[[], Any]) -> Iterator[None]:
    """Whatever says meanwhile that memory ran out is raised as OutOfMemoryError. `run()` is the Run, None before.

    What rank 0 met while all waited for it is told as rank 0's by all of them, which is once.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, DistKDError) or not says_memory_ran_out(error):
            raise
        alike = getattr(error, "alike", False)
        whose = 0 if alike else runtime.world.rank
        ours = OutOfMemoryError(sentence(config, runtime.world.world_size, whose, run(), error))
        ours.alike = alike
        raise ours from error


def amount(error: BaseException) -> str:
    """What was asked for, as `2.00 GiB`; "" if the error does not say."""
    match = ASKED.search(str(error))
    if match is None:
        return ""
    number, unit = (group for group in match.groups() if group is not None)
    return f"{int(number) / 2**30:.2f} GiB" if unit == "bytes" else f"{number} {unit}"


def smaller(config: Config, world_size: int) -> int | None:
    """The largest micro-batch of at most half the size that this global batch allows; None if there is none."""
    own, pairs = config.batch_size // world_size, bool(config.mixup or config.cutmix)
    sizes = range(micro_batch_of(config, world_size) // 2, 0, -1)
    return next((size for size in sizes if own % size == 0 and not (pairs and size % 2)), None)


def sentence(config: Config, world_size: int, rank: int, run: Any, error: BaseException) -> str:
    """Who, when, how much, for what, and the remedy."""
    asked = amount(error)
    of_device = isinstance(error, torch.OutOfMemoryError) or "CUBLAS" in str(error)
    micro, size = micro_batch_of(config, world_size), smaller(config, world_size)
    side = run.student.spec.image_size if run else config.image_size
    images = f"{micro} images" + (f" of {side} x {side} pixels" if side else "")
    remedies = []
    if size:
        names = f" and --save-path `{run.folder.parent}`" if run and config.save_path is None else ""
        remedies.append(
            f"give --device-batch-size {size}: the global batch of {config.batch_size} stays, and so does the result "
            f"apart from batch norm (a run with a checkpoint goes on with --allow-reshard{names})"
        )
    else:
        remedies.append("give a smaller --image-size or network")
    if not of_device:
        remedies.append("--no-in-memory and fewer --workers save memory of the host")
    return (
        f"{'the GPU' if of_device else 'the host'} of rank {rank} ran out of memory "
        f"{f'in step {run.state.step + 1}' if run else 'before the first step'}"
        f"{f', when {asked} more were asked for' if asked else ''}; a micro-batch is `{images}`: {'; '.join(remedies)}"
    )
