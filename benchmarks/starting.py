"""From the command to the end of the first step, and the same of a start that resumes: real processes, by part.

The parts are those of the line `started ...` that every run prints. What comes before them (the interpreter, the
command line's own imports) is the rest of the time seen from outside. Beside it the imports that nobody gets around:
`import torch, torchvision, accelerate` in a process of its own.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import paired
import torch
from PIL import Image
from safetensors.torch import save_file

from dist_kd import models
from dist_kd.cli import ended
from dist_kd.commands.pack import main as pack

LIMIT_S = 300.0  # for one process
SHOWN_S = 0.01
LINE = re.compile(r"^started +([0-9.]+) s to the end of the first step: (.+)$")
FLOOR = "import torch, torchvision, accelerate"
BEFORE = "interpreter, command line"
PARTS = (  # in the order in which they come
    *(BEFORE, "imports", "processes", "start", "sets", "checkpoint", "networks", "loaders", "records"),
    *("teacher's score", "data", "forward", "backward"),
)
CLASSES, SIDE = 10, (320, 256)


class Case(NamedTuple):
    """A run: what is trained by what on which set, and flags of its own."""

    name: str
    arch: str
    teacher: str
    data: str  # "digits", or "photographs": made up, packed as they are
    flags: tuple[str, ...]


LARGE = ("--batch-size", "4", "--no-in-memory", "--teacher-eval-samples", "32")
CASES = (
    Case("large", "efficientnet_b0", "resnet152", "photographs", LARGE),
    Case("small", "resnet20_cifar", "resnet56_cifar", "digits", ("--batch-size", "64", "--image-size", "32")),
)
TINY = (Case("tiny", "cnn_small", "cnn_medium", "digits", ("--batch-size", "16", "--image-size", "8")),)


class Start(NamedTuple):
    """Seconds of one start, from outside and by part."""

    whole: float
    parts: dict[str, float]


def photographs(folder: Path, per_class: int = 40) -> Path:
    """A packed set of smooth noise in the format and size of photographs."""
    rng = np.random.default_rng(0)
    for number in range(CLASSES):
        place = folder / "images" / f"class{number}"
        place.mkdir(parents=True)
        for image in range(per_class):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize(SIDE, Image.Resampling.BICUBIC).save(place / f"{image:03d}.jpg", quality=90)
    pack([str(folder / "images"), str(folder / "packed"), "--val-fraction", "0.2", "--jobs", "1"])
    return folder / "packed"


def command(case: Case, folder: Path) -> list[str]:
    """The line that trains it, with set and teacher's weights made in `folder`; it has no end of its own."""
    data = folder / f"{case.data}-set"
    if case.data == "digits":
        pack(["digits", str(data), "--limit-per-class", "40", "--jobs", "1"])
    else:
        data = photographs(data)
    weights = folder / f"{case.name}.safetensors"
    torch.manual_seed(0)
    save_file(models.build(case.teacher, CLASSES).net.state_dict(), weights)
    return [
        *(sys.executable, "-m", "dist_kd.train", "--data", str(data), "--arch", case.arch, "--student-weights", "none"),
        *("--teacher-arch", case.teacher, "--teacher-weights", str(weights), "--kd", "--cpu", "--workers", "1"),
        *("--optimizer", "adamw", "--ema-decay", "0.99", "--max-steps", "1000000", "--eval-steps", "1000000"),
        *case.flags,
    ]


def start(line: list[str]) -> Start:
    """Starts a run, waits for its first step, has it save and stop, and waits for its end. Seconds of the start."""
    begun, lines = time.perf_counter(), []
    process = subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    over = threading.Timer(LIMIT_S, process.kill)
    over.start()
    found = whole = None
    try:
        for text in process.stdout:
            lines.append(text)
            if found is None and (found := LINE.match(text)):
                whole = time.perf_counter() - begun
                process.send_signal(signal.SIGTERM)
        process.wait()
    finally:
        over.cancel()
        if process.poll() is None:
            process.kill()
            process.wait()
    assert found and process.returncode == 75, f"it ended with {process.returncode}: {''.join(lines[-20:])}"
    named = (part.rsplit(" ", 1) for part in found[2].split(", "))
    return Start(whole, {BEFORE: whole - float(found[1])} | {name: float(seconds) for name, seconds in named})


def floor() -> float:
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", FLOOR], check=True, timeout=LIMIT_S)
    return time.perf_counter() - begun


def measure(case: Case, folder: Path, rounds: int) -> dict[str, list[Start]]:
    """Each round: a start in a new folder, and one that resumes it."""
    line, found = command(case, folder), {"new": [], "resumed": []}
    for number in range(rounds):
        for starts in found.values():
            starts.append(start([*line, "--save-path", str(folder / f"{case.name}-{number}")]))
    return found


def rows_of(found: dict[str, list[Start]], floors: list[float]) -> list[list[str]]:
    """A row a part; seconds."""
    names = dict.fromkeys((*PARTS, *(name for starts in found.values() for one in starts for name in one.parts)))

    def cells(values: dict[str, list[float]]) -> list[str]:
        return [paired.Spread.of(seconds).show() if max(seconds) >= SHOWN_S else "" for seconds in values.values()]

    rows = [["whole", *cells({kind: [one.whole for one in starts] for kind, starts in found.items()})]]
    for name in names:
        parts = {kind: [one.parts.get(name, 0.0) for one in starts] for kind, starts in found.items()}
        if any(max(seconds) >= SHOWN_S for seconds in parts.values()):
            rows.append([name, *cells(parts)])
    return [*rows, [f"`{FLOOR}`, alone", *(2 * [paired.Spread.of(floors).show()])]]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--cases", nargs="*", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--threads", type=int, default=2, help="of each process")
    parser.add_argument("--tiny", action="store_true", help="small networks, one round: shows that it works")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args(argv)
    cases = TINY if args.tiny else [case for case in CASES if not args.cases or case.name in args.cases]
    rounds = 1 if args.tiny else args.rounds
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of the processes that are started
    facts = paired.machine(torch.device("cpu")) | {"threads": args.threads}
    tables, results = [], {}
    for case in cases:
        with tempfile.TemporaryDirectory() as name, contextlib.redirect_stdout(sys.stderr):
            found = measure(case, Path(name), rounds)
        floors = [floor() for _ in range(rounds)]
        head = [f"{case.name}: {case.teacher} teaches {case.arch}, {case.data}; seconds", *found]
        tables.append(paired.table(head, rows_of(found, floors)))
        results[case.name] = {kind: [one._asdict() for one in starts] for kind, starts in found.items()}
        results[case.name]["floor"] = floors
    what = f"From the command to the end of the first step, median [min - max] of {rounds} starts"
    paired.publish(what, facts, tables, results, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(ended(main))
