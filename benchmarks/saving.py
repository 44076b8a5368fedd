"""How long a save stands in training's way: steps, saves and the steps behind them, of a run as the trainer builds it.

Nothing of a save is left to a thread: when training goes on, the checkpoint is complete, on the disk, and verified by
its manifest. So the time until training goes on is the time that a save takes. The state is the largest usual one:
two moments of AdamW and a moving average; labels alone, because a teacher makes steps longer and saves no larger.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import paired
import torch
from step import NEVER, OurLoop

from dist_kd import checkpoint, loop
from dist_kd.cli import ended, parse
from dist_kd.loop import Run
from dist_kd.run_folder import RunFolder
from dist_kd.runtime import start_runtime
from dist_kd.wiring import build_run

INTERVAL_S = 300.0  # between two saves, that the stall is held against
MOST_STEPS, MOST_S = 2.0, 1.0  # bars: steps that a save may take the time of; seconds out of an interval
PARTS = {  # what a save does, by the functions that do it
    "state gathered": [(loop, "snapshot")],
    "tensors written": [(checkpoint, "save_file"), (torch, "save")],
    "flushed to the disk": [(checkpoint, "_sync")],
    "digests": [(checkpoint, "digest")],
    "old ones pruned": [(checkpoint, "_prune")],
}


def build(args: argparse.Namespace, folder: Path) -> Run:
    """The run that a command line of this size gets; digits, enlarged, stand for photographs."""
    settings = [
        *("--data", "digits", "--save-path", str(folder), "--in-memory", "--workers", "0", "--cpu"),
        *("--arch", args.arch, "--student-weights", "none", "--image-size", str(args.image_size)),
        *("--batch-size", str(args.batch_size), "--device-batch-size", str(args.batch_size), "--augment", "rrc+flip"),
        *("--optimizer", "adamw", "--ema-decay", "0.999", "--mixed-precision", "no", "--keep", str(args.keep)),
        *("--max-steps", NEVER, "--eval-steps", NEVER, "--checkpoint-steps", NEVER, "--log-steps", NEVER),
    ]
    parsed = parse(settings, {})
    run, _ = build_run(parsed, start_runtime(parsed.config), RunFolder(folder))
    run.still_ours = lambda: None  # no lock was taken
    return run


def measure(run: Run, rounds: int, steps: int) -> dict[str, Any]:
    """Seconds, a list of rounds each: `step` (mean), `save`, `after` (each step behind the save), and parts of a save.

    A round is `steps` steps, a save, and as many steps again.
    """
    trainer, watch = OurLoop(run), paired.Stopwatch()
    found: dict[str, Any] = {"step": [], "save": [], "after": [], "parts": {part: [] for part in PARTS}}

    def seconds(work) -> float:
        begun = time.perf_counter()
        work()
        return time.perf_counter() - begun

    with contextlib.ExitStack() as undo:
        for part, functions in PARTS.items():
            for owner, name in functions:
                undo.callback(setattr, owner, name, getattr(owner, name))
                setattr(owner, name, watch.timed(part, getattr(owner, name)))
        for number in range(-run.keep, rounds):  # first as many as are kept: then each save has one to prune
            for _ in range(2 if number < 0 else 1):
                trainer.step()
            before = [seconds(trainer.step) for _ in range(steps if number >= 0 else 0)]
            watch.seconds = dict.fromkeys(PARTS, 0.0)
            save = seconds(lambda: loop._save(run, must=True))
            if number < 0:
                continue
            found["step"].append(statistics.mean(before))
            found["save"].append(save)
            for part, spent in watch.seconds.items():
                found["parts"][part].append(spent)
            found["after"].append([seconds(trainer.step) for _ in range(steps)])
    trainer.batches.close()
    return found


def verdict(met: bool) -> str:
    return "met" if met else "missed"


def rows_of(found: dict[str, Any]) -> list[list[str]]:
    """The table: stall beside the step of the same round, and the steps behind it."""
    in_steps = paired.Spread.of([save / step for save, step in zip(found["save"], found["step"], strict=True)])
    saves = paired.Spread.of(found["save"])
    behind = [
        paired.Spread.of([later[place] / step for later, step in zip(found["after"], found["step"], strict=True)])
        for place in range(len(found["after"][0]))
    ]
    rest = [save - sum(part[number] for part in found["parts"].values()) for number, save in enumerate(found["save"])]
    ms = {"save": found["save"], "step": found["step"], **found["parts"], "rest": rest}
    spread = {name: paired.Spread.of([1000 * value for value in values]) for name, values in ms.items()}
    return [
        ["step", spread["step"].show("ms", 1), ""],
        ["save, until training goes on and the checkpoint is complete", spread["save"].show("ms", 1), ""],
        ["save / step", in_steps.show("steps"), f"<= {MOST_STEPS:g}: {verdict(in_steps.median <= MOST_STEPS)}"],
        [
            f"share of an interval of {INTERVAL_S:.0f} s",
            f"{100 * saves.median / INTERVAL_S:.3f} %",
            f"longest < {MOST_S:g} s: {verdict(saves.high < MOST_S)}",
        ],
        *([f"save: {name}", spread[name].show("ms", 1), ""] for name in (*PARTS, "rest")),
        *([f"step {number} behind a save / step", ratio.show(), ""] for number, ratio in enumerate(behind, 1)),
    ]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", default="efficientnet_b0")
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--keep", type=int, default=2, help="checkpoints that are kept (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--steps", type=int, default=3, help="before and behind each save (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="of torch")
    parser.add_argument("--folder", type=Path, help="where to save; default: the folder for temporary files")
    parser.add_argument("--tiny", action="store_true", help="a small network: shows that it works")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    if args.tiny:
        args.arch, args.image_size, args.rounds, args.steps = "cnn_small", 8, 2, 1
    torch.set_num_threads(args.threads)
    facts = paired.machine(torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=args.folder) as name, contextlib.redirect_stdout(io.StringIO()):
        folder = Path(name)
        run = build(args, folder)
        try:
            found = measure(run, args.rounds, args.steps)
        finally:
            run.tracker.close("done")
            run.source.close()
            run.stop.uninstall()
        newest, refused = checkpoint.find(folder / "checkpoints")
        assert newest is not None and not refused, f"the saves left no checkpoint that verifies: {refused}"
        found["files"] = {path.name: path.stat().st_size for path in sorted(newest.iterdir())}
    size = sum(found["files"].values())
    what = (
        f"Saves of {args.arch} with AdamW and a moving average, {size / 1e6:.1f} MB, beside steps of {args.batch_size} "
        f"images of {args.image_size} px; {args.rounds} rounds of {args.steps} steps, a save, {args.steps} steps"
    )
    head = ["", f"median [min - max] of {args.rounds} rounds", "bar"]
    paired.publish(what, facts, [paired.table(head, rows_of(found))], found, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(ended(main))
