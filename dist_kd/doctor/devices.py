"""Cores, memory and GPUs of this machine, and whether torch can use them."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from dist_kd.compression import cpu_name
from dist_kd.config import Config
from dist_kd.doctor import BAD, LOOK, OK, Finding

DRIVER = Path("/proc/driver/nvidia/version")
GROUP = Path("/sys/fs/cgroup")  # of this container, where memory is limited (version 2)
BUSY_SHARE = 0.1  # of a GPU's memory that somebody else may hold


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def memory() -> tuple[int, int]:
    """(all, available) bytes of memory that this process may use."""
    lines = dict(line.split(":", 1) for line in Path("/proc/meminfo").read_text().splitlines())
    whole, free = (1024 * int(lines[name].split()[0]) for name in ("MemTotal", "MemAvailable"))
    try:
        limit = int((GROUP / "memory.max").read_text())
        used = int((GROUP / "memory.current").read_text())
    except (OSError, ValueError):  # no such group, or "max"
        return whole, free
    return min(whole, limit), min(free, max(0, limit - used))


def check(config: Config, facts: dict[str, Any]) -> Iterator[Finding]:
    cores = len(os.sched_getaffinity(0))
    whole, free = memory()
    text = (
        f"{cpu_name()}: {cores} core(s), torch with {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f}"
    )
    busy = os.getloadavg()[0] > cores
    yield Finding(
        LOOK if busy else OK,
        "cpu",
        f"{text}; other programs are running: a run, and the speeds below, will be slower" if busy else text,
        {"cores": cores},
    )
    low = free < 2**30
    yield Finding(
        LOOK if low else OK,
        "memory",
        f"{gib(free)} of {gib(whole)} available" + ("; end other programs before a long run" if low else ""),
    )
    yield from _gpus(config)


def _gpus(config: Config) -> Iterator[Finding]:
    built = (
        f"torch {torch.__version__} is built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}"
    )
    if config.cpu:
        yield Finding(OK, "gpu", "not looked at: --cpu")
        return
    try:
        usable = torch.cuda.is_available() and torch.zeros(1, device="cuda").item() == 0
        reason = ""
    except RuntimeError as error:
        usable, reason = False, f" ({str(error).splitlines()[0]})"
    if not usable and (DRIVER.exists() or reason):
        driver = DRIVER.read_text().splitlines()[0] if DRIVER.exists() else "no driver found"
        yield Finding(
            BAD,
            "gpu",
            f"there is one, but torch cannot use it{reason}: {built}, the driver is `{' '.join(driver.split())}`; "
            "install a torch that fits the driver, or train with --cpu",
        )
        return
    if not usable:
        yield Finding(OK, "gpu", f"none; a run is on the CPU of this {platform.machine()} machine ({built})")
        return
    for number in range(torch.cuda.device_count()):
        free, whole = torch.cuda.mem_get_info(number)
        bf16 = "bf16" if torch.cuda.is_bf16_supported() else "no bf16 (fp16 works)"
        text = f"{number}: {torch.cuda.get_device_name(number)}, {gib(free)} of {gib(whole)} free, {bf16}; {built}"
        taken = whole - free > BUSY_SHARE * whole
        more = "; another program is on it: see nvidia-smi" if taken else ""
        yield Finding(LOOK if taken else OK, "gpu", text + more, {"gpus": number + 1})
