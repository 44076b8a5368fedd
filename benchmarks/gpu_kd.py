"""The whole distillation step on one device against timm's, and against teacher alone plus student alone.

Synthetic images that lie on the device already, bf16, channels_last. timm's side is what its train.py does with
--kd-model-name: LogitDistillationTask under autocast, backward, optimizer. Both sides train copies of one network,
taught by copies of one other, with the same optimizer.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import itertools
from pathlib import Path
from typing import Any

import paired
import torch
from torch import Tensor, nn

from dist_kd import models
from dist_kd.checkpoint import TrainState
from dist_kd.cli import ended, parse
from dist_kd.config import Config
from dist_kd.contracts import Batch
from dist_kd.learner import Learner
from dist_kd.loop import Run, _train_step
from dist_kd.meters import Meters
from dist_kd.methods import build_chosen, parts_of
from dist_kd.optimizer import make_optimizer
from dist_kd.plan import make_plan
from dist_kd.runtime import Runtime, start_runtime
from dist_kd.teacher import Teacher
from dist_kd.tracking import NullTracker
from dist_kd.updates import Updates
from dist_kd.wiring import build_student

CLASSES = 1000
STEPS = 10**8  # of the schedule: never reached, as its log points and evaluations


def as_timm_wants(network: nn.Module) -> nn.Module:
    """A copy of the bare network that says of itself what timm's task asks of a student and a teacher."""
    net, spec = copy.deepcopy(network.net), network.spec
    net.pretrained_cfg = {"mean": spec.mean, "std": spec.std}
    net.num_classes, net.in_chans = spec.num_classes, 3
    return net


def timm_step(config: Config, runtime: Runtime, student: nn.Module, teacher: nn.Module, batch: Batch):
    """One step of timm's loop: a function without arguments."""
    from timm.task import LogitDistillationTask

    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    net = as_timm_wants(student).to(runtime.device, memory_format=layout)
    # as its train.py makes the teacher: float32 weights that autocast lowers anew in each step
    taught_by = as_timm_wants(teacher).requires_grad_(False).to(runtime.device, memory_format=layout)
    task = LogitDistillationTask(
        net, taught_by, nn.CrossEntropyLoss().to(runtime.device), distill_loss_weight=config.w,
        task_loss_weight=1 - config.w, temperature=config.T, device=runtime.device, verbose=False,
    ).train()  # fmt: skip
    if config.compile:
        task.compile()
    optimizer = make_optimizer(config, net)
    autocast = lowered(runtime)

    def step() -> Tensor:
        with autocast():
            loss = task(batch.images, batch.labels)["loss"]
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return step


def lowered(runtime: Runtime):
    """The autocast of this precision, anew at each call."""
    if runtime.precision == "no":
        return contextlib.nullcontext
    return lambda: torch.autocast(runtime.device.type, dtype=torch.bfloat16)


def our_run(config: Config, runtime: Runtime, student: nn.Module, teacher: Any, student_spec: Any) -> Run:
    """A run as wiring.py makes it, without data, evaluator and folder."""
    student = student.to(runtime.device)
    if config.channels_last:
        student = student.to(memory_format=torch.channels_last)
    method = build_chosen(config)
    learner = Learner(student, method.to(runtime.device))
    optimizer = make_optimizer(config, learner)
    if config.compile:
        student.net.compile()
    updates = Updates(optimizer, student)
    prepared, optimizer = runtime.prepare(learner, optimizer)
    prepared.train()
    return Run(
        plan=make_plan(config, 1, 1_281_167), seed=config.seed, keep=1, folder=Path(), runtime=runtime,
        source=None, teacher=teacher, student=student, method=method, learner=prepared, optimizer=optimizer,
        updates=updates, average=None, evaluator=None, meters=Meters(runtime.device, parts_of(config.method)),
        tracker=NullTracker(), stop=None, state=TrainState(), facts={},
    )  # fmt: skip


def synthetic(config: Config, device: torch.device, size: int) -> Batch:
    chance = torch.Generator(device).manual_seed(0)
    rows = config.batch_size
    images = torch.randn(rows, 3, size, size, generator=chance, device=device)
    layout = torch.channels_last if config.channels_last else torch.contiguous_format
    return Batch(
        images=images.contiguous(memory_format=layout),
        labels=torch.randint(0, CLASSES, (rows,), generator=chance, device=device),
        weights=torch.ones(rows, device=device),
        samples=torch.arange(rows, device=device),
    )


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="timm/efficientnet_b0")
    parser.add_argument("--teacher-arch", default="timm/resnet152")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--mixed-precision", default="bf16", choices=("no", "bf16"))
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=20, help="steps of each in each round")
    parser.add_argument("--tiny", action="store_true", help="small networks and batch, on any device")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser


TINY = ["--arch", "cnn_small", "--teacher-arch", "cnn_medium", "--image-size", "32", "--batch-size", "8"]


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    if args.tiny:
        args = arguments().parse_args(TINY, argparse.Namespace(**{**vars(args), "rounds": 2, "calls": 2}))
    if not args.tiny and not torch.cuda.is_available():
        print("not measured: no GPU at hand (--tiny runs anywhere, to see that it works)")
        return 0
    settings = [
        *("--arch", args.arch, "--teacher-arch", args.teacher_arch, "--teacher-weights", "none", "--kd", "--data", "-"),
        *("--image-size", str(args.image_size), "--batch-size", str(args.batch_size), "--max-steps", str(STEPS)),
        *("--device-batch-size", str(args.batch_size), "--mixed-precision", args.mixed_precision),
        *("--lr", "0.001", "--log-steps", str(STEPS), *(["--compile"] if args.compile else [])),
    ]
    config = parse(settings, {}).config
    runtime = start_runtime(config)
    facts = paired.machine(runtime.device)
    student = build_student(config, CLASSES)
    plain = models.build(config.teacher_arch, CLASSES, "none", role="teacher", image_size=args.image_size).eval()
    batch = synthetic(config, runtime.device, args.image_size)
    rivals = {"timm's KD step": timm_step(config, runtime, student, plain, batch)}
    teacher = Teacher(
        copy.deepcopy(plain), student.spec, image_size=args.image_size, precision=runtime.precision,
        device=runtime.device, channels_last=config.channels_last, compiled=config.compile,
    )  # fmt: skip
    run = our_run(config, runtime, copy.deepcopy(student), teacher, student.spec)
    answer = teacher(batch.images)
    alone = our_run(config, runtime, student, lambda images: answer, student.spec)
    batches = itertools.repeat(batch)
    rivals |= {
        "our KD step": lambda: _train_step(run, batches),
        "teacher alone": lambda: teacher(batch.images),
        "student alone": lambda: _train_step(alone, batches),
    }
    losses = {"ours": float(run.learner(batch, answer).total.detach()), "timm's": float(rivals["timm's KD step"]())}
    for _ in range(2):  # kernels are chosen, programs compiled
        for rival in rivals.values():
            rival()
    times = paired.take_turns(rivals, args.rounds, args.calls, runtime.device)
    halves = [a + b for a, b in zip(times.wall["teacher alone"], times.wall["student alone"], strict=True)]
    times.wall["both alone"] = halves
    steady = times.steady(*rivals)
    speed = [config.batch_size / seconds for seconds in times.wall["our KD step"]]
    ratios = {
        "ours / timm's": times.ratio("our KD step", "timm's KD step"),
        "ours / (teacher alone + student alone)": times.ratio("our KD step", "both alone"),
        "teacher alone / ours": times.ratio("teacher alone", "our KD step"),
    }
    rows = [[name, times.ms(name).show("ms", 1)] for name in rivals]
    rows += [[name, ratio.show(digits=3) + ("" if steady else ", inconclusive")] for name, ratio in ratios.items()]
    rows.append(["our images per second", paired.Spread.of(speed).show(digits=0)])
    # of the same weights and images; told apart by dropout, where a network has it, and by rounding: the prepared
    # teacher's, and that of timm's softmax, which autocast leaves in bf16 on a CPU (not on a GPU)
    rows.append(["first loss, ours and timm's", " and ".join(f"{loss:.4f}" for loss in losses.values())])
    what = (
        f"KD step of {config.arch} taught by {config.teacher_arch}, {config.batch_size} synthetic images of "
        f"{args.image_size} px on {runtime.device.type}, mixed precision {runtime.precision}"
        f"{', compiled' if config.compile else ''}, channels_last"
    )
    results = {
        "ms": {name: times.ms(name)._asdict() for name in times.wall},
        "ratios": {name: ratio._asdict() for name, ratio in ratios.items()},
        "steady": steady,
        "rounds": times.wall,
        "teacher": teacher.notes,
        "first_loss": losses,
    }
    table = paired.table(["", f"median [min - max] of {args.rounds} rounds x {args.calls}"], rows)
    paired.publish(what, facts, [table, *teacher.notes], results, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(ended(main))
