"""Steps of training on a CPU as the trainer runs them, its freed memory kept, beside glibc's way of giving it back.

The setting is a process's own, so each rival is a process; both are there all the time and take turns.
"""

from __future__ import annotations

import argparse
import multiprocessing
import resource
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import paired
import torch

from dist_kd import models
from dist_kd.cli import ended
from dist_kd.runtime import keep_freed_memory

CPU = torch.device("cpu")


class Subject(NamedTuple):
    arch: str
    image_size: int
    batch: int


SUBJECTS = (
    Subject("efficientnet_b0", 224, 16),
    Subject("efficientnet_lite0", 128, 64),
    Subject("mobilenets_m", 128, 64),
    Subject("resnet20_cifar", 32, 128),
)
TINY = (Subject("cnn_small", 32, 8),)


def work(subject: Subject, kept: bool, link: Connection) -> None:
    """A process that trains `subject` for as many steps as it is told, and answers with seconds and peak bytes."""
    if kept:
        keep_freed_memory()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    network = models.build(subject.arch, 100, image_size=subject.image_size)
    network = network.to(memory_format=torch.channels_last).train()
    side = subject.image_size
    images = torch.randn(subject.batch, 3, side, side).to(memory_format=torch.channels_last)
    labels = torch.arange(subject.batch) % 100
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)
    while steps := link.recv():
        used = resource.getrusage(resource.RUSAGE_SELF)
        begun = time.perf_counter()
        for _ in range(steps):
            torch.nn.functional.cross_entropy(network(images).logits, labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        took = time.perf_counter() - begun
        after = resource.getrusage(resource.RUSAGE_SELF)
        link.send((took / steps, (after.ru_stime - used.ru_stime) / steps, after.ru_maxrss * 1024))


def measure(subject: Subject, rounds: int, steps: int) -> tuple[paired.Times, dict[str, list[float]], dict[str, int]]:
    """(seconds per step, kernel's seconds per step, peak bytes) of both."""
    spawn = multiprocessing.get_context("spawn")
    links, processes = {}, []
    for name in ("kept", "given back"):
        links[name], other = spawn.Pipe()
        processes.append(spawn.Process(target=work, args=(subject, name == "kept", other), daemon=True))
        processes[-1].start()
        other.close()
    kernel: dict[str, list[float]] = {name: [] for name in links}
    peak: dict[str, int] = {}

    def turn(name: str) -> float:
        links[name].send(steps)
        seconds, in_kernel, peak[name] = links[name].recv()
        kernel[name].append(in_kernel)
        return seconds

    for name in links:  # the first steps fill what is kept
        turn(name)
        kernel[name].clear()
    times = paired.self_timed({name: (lambda name=name: turn(name)) for name in links}, rounds)
    for link in links.values():
        link.send(0)
    for process in processes:
        process.join(30)
    return times, kernel, peak


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--steps", type=int, default=3, help="steps of a round (default: 3)")
    parser.add_argument("--tiny", action="store_true", help="a small network: shows that it works")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows, results = [], {}
    for subject in TINY if args.tiny else SUBJECTS:
        times, kernel, peak = measure(subject, args.rounds, args.steps)
        ratio = times.ratio("kept", "given back").show("x")
        rows.append(
            [
                f"{subject.arch}, {subject.batch} x {subject.image_size} px",
                times.ms("kept").show("ms", 0),
                times.ms("given back").show("ms", 0),
                ratio if times.steady("kept", "given back") else f"inconclusive, {ratio}",
                *(f"{1000 * paired.Spread.of(kernel[name]).median:.0f} ms" for name in ("kept", "given back")),
                *(f"{peak[name] / 2**20:,.0f} MiB" for name in ("kept", "given back")),
            ]
        )
        results[subject.arch] = {"seconds": times.wall, "kernel_seconds": kernel, "peak_bytes": peak}
    head = ["network", "kept", "given back", "ratio", "kernel, kept", "kernel, given back", "peak, kept", "peak"]
    what = f"A training step with freed memory kept or given back, {args.rounds} rounds x {args.steps} steps"
    paired.publish(what, paired.machine(CPU), [paired.table(head, rows)], results, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(ended(main))
