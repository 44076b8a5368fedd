"""What a step costs with each method, beside the same step with labels alone and beside the teacher's own forward.

One student, one teacher, batches that are there already. A step is what the loop does between two batches: the
teacher's forward, the student's forward, the loss, backward and update.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paired
import torch

from dist_kd.cli import ended, parse
from dist_kd.contracts import Batch
from dist_kd.learner import Learner
from dist_kd.methods import METHODS
from dist_kd.optimizer import make_optimizer
from dist_kd.runtime import Runtime, start_runtime
from dist_kd.wiring import build_loss, build_student, build_teachers, prepare_teacher

CLASSES = 100
SAMPLES = 50_000  # of the set that the batches stand for: banks and warm-ups are as long
HEAD = ["method", "step", "step / ce", "step / kd", "its own parameters", "its own buffers"]


def made_up(batch_size: int, side: int, device: torch.device) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(batch_size, 3, side, side, generator=generator).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(CLASSES, (batch_size,), generator=generator)
    batch = Batch(images, labels, torch.ones(batch_size), torch.arange(batch_size))
    return Batch(*(part.to(device) for part in batch[:4]))


def step_of(method: str, args: argparse.Namespace) -> tuple[Callable[[], Any], dict[str, Any], Runtime]:
    """The step with this method, what the method keeps, and where it runs."""
    taught = ["--teacher-arch", args.teacher_arch, "--teacher-weights", "none"] if method != "ce" else []
    settings = [
        *("--arch", args.arch, "--method", method, *taught, "--image-size", str(args.image_size), "--data", "-"),
        *("--batch-size", str(args.batch_size), "--device-batch-size", str(args.batch_size), "--lr", "0.001"),
        *("--mixed-precision", args.mixed_precision),
    ]
    config = parse(settings, {}).config
    runtime = start_runtime(config)
    student = build_student(config, CLASSES)
    teachers = build_teachers(config, CLASSES)
    loss = build_loss(config, student, teachers, SAMPLES).to(runtime.device)
    teacher = prepare_teacher(config, runtime, teachers, student.spec)
    student = student.to(runtime.device, memory_format=torch.channels_last)
    learner = Learner(student, loss).train()
    optimizer = make_optimizer(config, learner)
    batch = made_up(args.batch_size, args.image_size, runtime.device)

    def step() -> None:
        with runtime.autocast():
            total = learner(batch, teacher(batch.images)).total
        total.backward()
        optimizer.step()
        optimizer.zero_grad()

    kept = {
        "formula": loss.formula,
        "parameters": sum(p.numel() for p in loss.parameters()),
        "buffers": sum(b.numel() for b in loss.buffers()),
    }
    return step, kept, runtime


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="resnet20_cifar")
    parser.add_argument("--teacher-arch", default="resnet56_cifar")
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--image-size", type=int, default=32)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--mixed-precision", default="no")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=6, help="steps of each in each round")
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    parser.add_argument("--tiny", action="store_true", help="two rounds of one step, to see that it works")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    if args.tiny:
        args.rounds, args.calls, args.batch_size = 2, 1, 8
    if args.threads:
        torch.set_num_threads(args.threads)
    methods = list(dict.fromkeys(["ce", "kd", *args.methods]))
    steps: dict[str, Callable[[], Any]] = {}
    kept: dict[str, dict[str, Any]] = {}
    for method in methods:
        steps[method], kept[method], runtime = step_of(method, args)
    facts = paired.machine(runtime.device)
    times = paired.take_turns(steps, args.rounds, args.calls, runtime.device, turn=2)
    rows, found = [], {}
    for method in methods:
        steady = times.steady(method, "ce", "kd")
        beside = {to: times.ratio(method, to) for to in ("ce", "kd")}
        rows.append(
            [
                method,
                times.ms(method).show("ms", 1),
                *(
                    ratio.show("x") + ("" if steady else ", inconclusive: rounds not steady")
                    for ratio in beside.values()
                ),
                f"{kept[method]['parameters']:,}",
                f"{kept[method]['buffers']:,}",
            ]
        )
        found[method] = kept[method] | {
            "ms": times.ms(method)._asdict(),
            **{f"beside_{to}": ratio._asdict() for to, ratio in beside.items()},
            "steady": steady,
            "rounds_s": times.wall[method],
        }
    what = (
        f"Step of {args.arch}, taught by {args.teacher_arch}, {args.batch_size} images of {args.image_size} px, "
        f"{CLASSES} classes, median [min - max] of {args.rounds} rounds x {args.calls}"
    )
    paired.publish(what, facts, [paired.table(HEAD, rows)], {"methods": found}, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(ended(main))
