"""One training step of the trainer against a bare loop written by hand that does the same: what is our overhead?

The trainer's step is a real one: a run built from the command line's settings, with its meters, seeding, look for
stop requests, learning rate, log points and loader. The bare loop has copies of the same networks, the same prepared
teacher, the same optimizer, and its own crop, flip and normalization on the same pixels.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paired
import torch
from torch import Tensor
from torch.nn import functional as F

from dist_kd import loop
from dist_kd.cli import ended, parse
from dist_kd.config import Config
from dist_kd.data.augment import margin
from dist_kd.data.memory import MemorySamples
from dist_kd.errors import ConfigError
from dist_kd.loop import Run
from dist_kd.optimizer import make_optimizer
from dist_kd.run_folder import RunFolder
from dist_kd.runtime import start_runtime
from dist_kd.sets import open_split
from dist_kd.wiring import build_run

CHANNELS_LAST = torch.channels_last
NEVER = "100000000"
TURN = 10  # steps of one loop before the next one has its turn
SAME = 1e-2  # largest relative difference of the two losses of one batch; bf16 has 8 bits
PARTS = (
    "data", "teacher", "seeding", "student and loss", "backward", "meters", "update", "stop look", "watchdog", "log",
)  # fmt: skip


class BareLoop:
    """What one writes in an afternoon: shuffled batches of a tensor, crop, flip, normalize, distill, update."""

    def __init__(self, config: Config, run: Run, images: Tensor, labels: Tensor) -> None:
        """`images` uint8 [N, 3, S, S], `labels` [N]."""
        self.config, self.run = config, run
        self.student = copy.deepcopy(run.student).train().net
        self.teacher = run.teacher.network.net  # the very same prepared network
        side, pad = images.shape[-1], margin(images.shape[-1])
        self.resize = run.teacher.spec.image_size if run.teacher.spec.image_size != side else None
        self.optimizer = make_optimizer(config, self.student)
        padded = F.pad(images, (pad,) * 4).permute(0, 2, 3, 1).contiguous().numpy()  # [N, S + 2 pad, S + 2 pad, 3]
        # every crop of every image, as a view: [N, 1 + 2 pad, 1 + 2 pad, 3, S, S]
        self.crops = np.lib.stride_tricks.sliding_window_view(padded, (side, side), axis=(1, 2))
        self.labels = labels
        spec = run.student.spec
        self.mean, self.std = (
            255 * torch.tensor(v).view(1, 3, 1, 1).expand(1, 3, side, side).contiguous(memory_format=CHANNELS_LAST)
            for v in (spec.mean, spec.std)
        )
        self.batches = self._batches()
        self.loss_sum = torch.zeros(())

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        while True:
            for rows in torch.randperm(len(self.labels)).split(self.config.batch_size):
                if len(rows) == self.config.batch_size:
                    yield self._view(rows), self.labels[rows]

    def _view(self, rows: Tensor) -> Tensor:
        """Cropped, flipped and normalized: float32 [B, 3, S, S] in channels_last."""
        top, left = np.random.randint(0, self.crops.shape[1], (2, len(rows)))
        views = self.crops[rows.numpy(), top, left]
        flipped = np.random.rand(len(rows)) < 0.5
        views[flipped] = views[flipped][..., ::-1]
        return torch.from_numpy(views).float().contiguous(memory_format=CHANNELS_LAST).sub_(self.mean).div_(self.std)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        return torch.autocast("cpu", torch.bfloat16, enabled=self.run.runtime.precision == "bf16")

    def next_batch(self) -> tuple[Tensor, Tensor]:
        return next(self.batches)

    def ask_teacher(self, images: Tensor) -> Tensor:
        if self.resize:
            images = F.interpolate(images, size=(self.resize,) * 2, mode="bilinear", antialias=True)
        with torch.no_grad(), self.autocast():
            return self.teacher(images)

    def loss(self, images: Tensor, labels: Tensor, teacher_logits: Tensor) -> Tensor:
        with self.autocast():
            logits = self.student(images).float()
        T, w = self.config.T, self.config.w
        ce = F.cross_entropy(logits, labels)
        log_student, log_teacher = F.log_softmax(logits / T, 1), F.log_softmax(teacher_logits.float() / T, 1)
        return (1 - w) * ce + w * T**2 * F.kl_div(log_student, log_teacher, reduction="batchmean", log_target=True)

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def update(self) -> None:
        self.optimizer.step()
        self.optimizer.zero_grad()

    def meter(self, loss: Tensor) -> None:
        self.loss_sum += loss.detach()

    def step(self) -> None:
        images, labels = self.next_batch()
        loss = self.loss(images, labels, self.ask_teacher(images))
        self.backward(loss)
        self.update()
        self.meter(loss)


class OurLoop:
    """The body of loop.fit between two evaluations, a step a call."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.batches = run.source.batches(run.state.step)
        run.learner.train()
        run.meters.restart_clock()

    def step(self) -> None:
        if self.run.stop.agreed():
            raise KeyboardInterrupt
        grad_norm = loop._train_step(self.run, self.batches)
        if self.run.plan.log_due(self.run.state.step):
            loop._log(self.run, grad_norm)


def by_part(ours: OurLoop, bare: BareLoop, rounds: int, steps: int) -> dict[str, dict[str, float]]:
    """Milliseconds a step by part of both loops, medians over rounds. To be called last."""
    run, watch = ours.run, paired.Stopwatch()
    inner = watch.timed("data", ours.batches.__next__)
    ours.batches = (inner() for _ in iter(int, 1))
    run.teacher = watch.timed("teacher", run.teacher)
    theirs = paired.Stopwatch()
    inside = [
        (watch, loop, "seed_networks", "seeding"),
        (watch, run.learner, "forward", "student and loss"),
        (watch, loop, "_backward", "backward"),
        (watch, run.meters, "add", "meters"),
        (watch, run.updates, "begin", "update"),
        (watch, run.updates, "step", "update"),
        (watch, run.stop, "agreed", "stop look"),
        (watch, run.runtime.progress, "at", "watchdog"),
        (watch, loop, "_log", "log"),
        (theirs, bare, "next_batch", "data"),
        (theirs, bare, "ask_teacher", "teacher"),
        (theirs, bare, "loss", "student and loss"),
        (theirs, bare, "backward", "backward"),
        (theirs, bare, "meter", "meters"),
        (theirs, bare, "update", "update"),
    ]
    sides = [("trainer", watch, ours.step), ("bare", theirs, bare.step)]
    found: dict[str, dict[str, list[float]]] = {side: {} for side, _, _ in sides}
    with contextlib.ExitStack() as undo:
        for stopwatch, owner, name, part in inside:
            undo.callback(setattr, owner, name, getattr(owner, name))
            setattr(owner, name, stopwatch.timed(part, getattr(owner, name)))
        for number in range(rounds):
            for side, stopwatch, step in sides if number % 2 == 0 else reversed(sides):
                stopwatch.seconds = dict.fromkeys(PARTS, 0.0)
                whole = paired.Stopwatch()
                timed = whole.timed("step", step)
                for _ in range(steps):
                    timed()
                rest = whole.seconds["step"] - sum(stopwatch.seconds.values())
                for part, seconds in {**stopwatch.seconds, "rest": rest}.items():
                    found[side].setdefault(part, []).append(1000 * seconds / steps)
    return {side: {part: float(np.median(values)) for part, values in parts.items()} for side, parts in found.items()}


def same_loss(ours: OurLoop, bare: BareLoop) -> float:
    """Relative difference of the two losses of one batch: shows that both do the same work."""
    batch = next(ours.batches)
    with torch.no_grad():
        mine = ours.run.learner(batch, ours.run.teacher(batch.images)).total
        theirs = bare.loss(batch.images, batch.labels, bare.ask_teacher(batch.images))
    return abs(float(mine - theirs)) / float(theirs)


def build(args: argparse.Namespace, folder: Path) -> tuple[Config, Run, Tensor, Tensor]:
    """A run as the command line would build it, and its training set as pixels and labels."""
    index = open_split(args.data, "train")
    if index is None or index.spec.image_size is None:
        raise ConfigError(f"--data `{args.data}` is not a set of squares of one size, as this comparison needs")
    side = index.spec.image_size
    settings = [
        *("--data", args.data, "--save-path", str(folder), "--in-memory", "--workers", "0", "--cpu"),
        *("--arch", args.arch, "--teacher-arch", args.teacher_arch, "--teacher-weights", "none", "--kd"),
        *("--augment", "crop+flip", "--image-size", str(side), "--teacher-eval-samples", "100"),
        *("--batch-size", str(args.batch_size), "--mixed-precision", args.mixed_precision),
        *("--max-steps", NEVER, "--eval-steps", NEVER, "--checkpoint-steps", NEVER),
    ]
    config = parse(settings, {}).config
    parsed = parse([*settings, "--device-batch-size", str(config.batch_size)], {})  # no accumulation
    run, _ = build_run(parsed, start_runtime(parsed.config), RunFolder(folder))
    images = MemorySamples(index).stack(np.arange(index.num_samples))
    return parsed.config, run, images, torch.from_numpy(index.rows["label"].astype(np.int64))


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default="digits", help="set of small squares: digits, or a folder with its shards")
    parser.add_argument("--arch", default="cnn_small")
    parser.add_argument("--teacher-arch", default="cnn_medium")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16"))
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=40, help="of each loop in each round")
    parser.add_argument("--part-rounds", type=int, default=5, help="rounds of the account by part; 0 leaves it out")
    # small operations on two threads wait for each other, and very long when anybody else wants a core
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    torch.set_num_threads(args.threads)
    facts = paired.machine(torch.device("cpu"))
    with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(io.StringIO()):
        config, run, images, labels = build(args, Path(name))
        try:
            ours, bare, twin = OurLoop(run), *(BareLoop(config, run, images, labels) for _ in range(2))
            difference = same_loss(ours, bare)
            assert difference < SAME, f"the loops do not do the same: their losses differ by {difference:.1%}"
            rivals = {"trainer": ours.step, "bare": bare.step, "twin": twin.step}
            times = paired.take_turns(rivals, args.rounds, args.steps, torch.device("cpu"), turn=TURN)
            parts = by_part(ours, bare, args.part_rounds, args.steps) if args.part_rounds else {}
        finally:
            run.tracker.close("done")
            run.source.close()
            run.stop.uninstall()
    wall, processor = (times.ratio("trainer", "bare", clock) for clock in ("wall", "processor"))
    noise, steady = times.ratio("twin", "bare"), times.steady("trainer", "bare")
    rows = [
        ["trainer's step", times.ms("trainer").show("ms")],
        ["bare step", times.ms("bare").show("ms")],
        ["trainer / bare, wall clock", wall.show(digits=3) + ("" if steady else ", inconclusive: rounds not steady")],
        ["trainer / bare, processor time", processor.show(digits=3)],
        ["a second bare loop / bare: what chance does", noise.show(digits=3)],
        ["loss of one batch, relative difference", f"{difference:.1e}"],
    ]
    tables = [paired.table(["one step", f"median [min - max] of {args.rounds} rounds x {args.steps} steps"], rows)]
    if parts:
        mine, theirs, whole = parts["trainer"], parts["bare"], sum(parts["bare"].values())
        rows = [
            [part, f"{mine[part]:.3f}", f"{theirs[part]:.3f}", f"{100 * (mine[part] - theirs[part]) / whole:+.2f} %"]
            for part in mine
        ]
        tables.append(paired.table(["part", "trainer, ms", "bare, ms", "difference / bare step"], rows))
    what = (
        f"Step of {config.arch} taught by {config.teacher_arch}, {config.batch_size} images of "
        f"{run.student.spec.image_size} px ({run.source.spec.name}), mixed precision {run.runtime.precision}"
    )
    results = {
        "step_ms": {name: times.ms(name)._asdict() for name in times.wall},
        "ratio": {"wall": wall._asdict(), "processor": processor._asdict(), "noise": noise._asdict(), "steady": steady},
        "rounds": {"wall": times.wall, "processor": times.processor},
        "parts_ms": parts,
        "loss_difference": difference,
    }
    paired.publish(what, facts, tables, results, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(ended(main))
