"""Memory that ran out, of the device or the host, becomes one sentence: how much was asked for, and what to do."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import torch

from dist_kd.config import Config
from dist_kd.contracts import NetworkSpec
from dist_kd.errors import DistKDError, OutOfMemoryError, says_memory_ran_out
from dist_kd.plan import micro_batch_of
from dist_kd.runtime import Runtime

ASKED = re.compile(r"[Tt]ried to allocate ([\d.]+) ?(\w+)|[Uu]nable to allocate ([\d.]+) (\w+)")


def told(config: Config, runtime: Runtime, run: Callable[[], Any]) -> contextlib.AbstractContextManager[None]:
    """Memory that runs out in training is raised as OutOfMemoryError. `run()` is the Run, None before there is one."""
    return _told(runtime, lambda rank, error: of_training(config, runtime.world.world_size, rank, run(), error))


def told_of_scoring(config: Config, runtime: Runtime, spec: NetworkSpec) -> contextlib.AbstractContextManager[None]:
    """The same while a finished network of `spec` is only scored, `config.device_batch_size` images at once."""
    return _told(runtime, lambda rank, error: of_scoring(config.device_batch_size, spec, rank, error))


@contextlib.contextmanager
def _told(runtime: Runtime, sentence: Callable[[int, Exception], str]) -> Iterator[None]:
    """What rank 0 met while all waited for it is told as rank 0's by all of them, which is once."""
    try:
        yield
    except Exception as error:
        if isinstance(error, DistKDError) or not says_memory_ran_out(error):
            raise
        alike = getattr(error, "alike", False)
        ours = OutOfMemoryError(sentence(0 if alike else runtime.world.rank, error))
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


def of_training(config: Config, world_size: int, rank: int, run: Any, error: BaseException) -> str:
    """Who, when, how much, for what, and the remedy."""
    micro, size = micro_batch_of(config, world_size), smaller(config, world_size)
    side = run.student.spec.image_size if run else config.image_size
    remedies = []
    if size:
        names = f" and --save-path `{run.folder.parent}`" if run and config.save_path is None else ""
        remedies.append(
            f"give --device-batch-size {size}: the global batch of {config.batch_size} stays, and so does the result "
            f"apart from batch norm (a run with a checkpoint goes on with --allow-reshard{names})"
        )
    else:
        remedies.append("give a smaller --image-size or network")
    if not _of_device(error):
        remedies.append("--no-in-memory and fewer --workers save memory of the host")
    when = f"in step {run.state.step + 1}" if run else "before the first step"
    return f"{_who(rank, when, error)}; a micro-batch is `{_images(micro, side)}`: {'; '.join(remedies)}"


def of_scoring(size: int, spec: NetworkSpec, rank: int, error: BaseException) -> str:
    """The same for one network and `size` images at once; fewer at once change no count."""
    remedies = [f"give --device-batch-size {size // 2}"] if size > 1 else ["take a machine with more memory"]
    if not _of_device(error):
        remedies.append("fewer --workers save memory of the host")
    who = _who(rank, f"while {spec.arch} was scored", error)
    return f"{who}; a batch is `{_images(size, spec.image_size)}`: {'; '.join(remedies)}"


def _of_device(error: BaseException) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "CUBLAS" in str(error)


def _who(rank: int, when: str, error: BaseException) -> str:
    asked = amount(error)
    place = "the GPU" if _of_device(error) else "the host"
    return f"{place} of rank {rank} ran out of memory {when}{f', when {asked} more were asked for' if asked else ''}"


def _images(count: int, side: int | None) -> str:
    return f"{count} images" + (f" of {side} x {side} pixels" if side else "")
