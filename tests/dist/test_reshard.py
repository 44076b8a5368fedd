"""A run that goes on with other processes and other workers is given what one uninterrupted process is given.

The ledger (DIST_KD_LEDGER) tells: each rank appends epoch, step and sample numbers of every micro-batch it consumes.
"""

import itertools
import json
import os
import signal
import time
from pathlib import Path
from typing import NamedTuple

import pytest
from dist.counting import assert_counts, assert_each_scored_once, count_by_hand
from dist.launching import launch, train_here, world_size

from dist_kd.errors import ConfigError

LIMIT = 120  # seconds of one start, on a machine that is busy with other things
BATCH, PER_EPOCH = 12, 20  # 247 samples: 7 left out
SETTINGS = [
    "--arch", "cnn_small", "--no-kd", "--image-size", "8", "--batch-size", str(BATCH), "--device-batch-size", "64",
    "--schedule", "constant", "--eval-steps", "100000", "--augment", "crop", "--no-in-memory", "--cpu",
]  # fmt: skip


class Part(NamedTuple):
    """One start of a run."""

    processes: int
    workers: int
    until: int | None = None  # --max-steps; None: stopped from outside, soon after its first steps
    how: str = ""


def start(run: Path, ledger: Path, data: Path, part: Part, *more: str) -> None:
    """One start of a run, to its end."""
    ledger.mkdir()
    words = [
        *SETTINGS, "--workers", str(part.workers), "--max-steps", str(part.until or 5000), "--data", str(data),
        "--save-path", str(run), *more,
    ]  # fmt: skip
    variables = {"DIST_KD_LEDGER": str(ledger)}
    if part.processes == 1:
        train_here(*words, variables=variables)
        return
    stop = {"STOP": stop_by_file, "SIGUSR1": stop_by_signal, "": None}[part.how]

    def meanwhile(process) -> None:
        until_fed(process, ledger)
        stop(process, run)

    how = {"processes": part.processes, "variables": variables, "meanwhile": stop and meanwhile}
    launch("torchrun", "dist_kd/train.py", *words, limit=LIMIT, **how)


def until_fed(process, ledger: Path, limit: float = LIMIT) -> None:
    """Waits until rank 0 has consumed three batches."""
    deadline = time.monotonic() + limit
    while True:
        assert process.poll() is None and time.monotonic() < deadline, "the run has not begun to train"
        if (ledger / "rank0.txt").exists() and (ledger / "rank0.txt").read_text().count("\n") >= 3:
            return
        time.sleep(0.02)


def stop_by_file(_, run: Path) -> None:
    (run / "STOP").touch()


def stop_by_signal(process, _) -> None:
    """To the last rank alone: the others must agree."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ranks = [int(pid) for pid in children if b"train.py" in Path(f"/proc/{pid}/cmdline").read_bytes()]
    os.kill(ranks[-1], signal.SIGUSR1)


def numbers(file: Path) -> list[list[int]]:
    return [list(map(int, line.split())) for line in file.read_text().splitlines()]


def read_ledger(folder: Path, ranks: int) -> list[list[int]]:
    """[epoch, step, samples of the global batch in rank order] of each step; every rank must know the same steps."""
    assert len(list(folder.glob("rank*.txt"))) == ranks
    by_rank = []
    for rank in range(ranks):
        lines = [tuple(line) for line in numbers(folder / f"rank{rank}.txt")]
        steps = itertools.groupby(lines, key=lambda line: line[:2])  # a step stands once, its micro-batches together
        by_rank.append([(key, [sample for line in group for sample in line[2:]]) for key, group in steps])
    joined = []
    for parts in zip(*by_rank, strict=True):
        assert len({key for key, _ in parts}) == 1 and {len(samples) for _, samples in parts} == {BATCH // ranks}
        joined.append([*parts[0][0], *(sample for _, samples in parts for sample in samples)])
    return joined


def run_in_parts(folder: Path, data: Path, parts: list[Part]) -> tuple[list[list[int]], list[int]]:
    """The ledger of a run in parts, and the steps at which they ended."""
    run, lines, ends = folder / "run", [], []
    for number, part in enumerate(parts):
        if part.until is not None and part.until <= (ends or [0])[-1]:
            part = part._replace(until=ends[-1] + 7)  # a stop from outside came later than planned
        allowed = ["--allow-reshard", "--allow-changes"] if number else []  # the changed setting is --max-steps
        start(run, folder / f"ledger{number}", data, part, *allowed)
        assert world_size(run) == part.processes
        status = json.loads((run / "status.json").read_text())
        assert status["state"] == ("done" if part.until else "preempted")
        ends.append(status["step"])
        lines += read_ledger(folder / f"ledger{number}", part.processes)
        assert len(lines) == ends[-1], "steps lost, or done twice"
    assert [entry["world_size"] for entry in json.loads((run / "run.json").read_text())["starts"]] == [
        part.processes for part in parts
    ]
    return lines, ends


def assert_equal_to_one_process(folder: Path, data: Path, lines: list[list[int]]) -> None:
    whole = Part(1, 0, len(lines))
    start(folder / "whole", folder / "ledger", data, whole)
    assert world_size(folder / "whole") == 1
    assert read_ledger(folder / "ledger", 1) == lines
    assert [line[:2] for line in lines] == [[step // PER_EPOCH, step] for step in range(len(lines))]
    for epoch in range(len(lines) // PER_EPOCH):
        shown = [sample for line in lines if line[0] == epoch for sample in line[2:]]
        assert len(set(shown)) == len(shown) == PER_EPOCH * BATCH


@pytest.mark.timeout(400)
def test_one_then_two_then_three_processes(odd_digits, tmp_path):
    """And back to one without --allow-reshard, which is refused."""
    lines, ends = run_in_parts(tmp_path, odd_digits, [Part(1, 2, 7), Part(2, 0, how="SIGUSR1"), Part(3, 1, 47)])
    assert ends[0] == 7 < ends[1] < ends[2]
    assert_equal_to_one_process(tmp_path, odd_digits, lines)
    # its last evaluation: one batch of 61, so two of three ranks had none
    scores = json.loads((tmp_path / "run" / "summary.json").read_text())["student"]["last"]
    assert_counts(scores, count_by_hand(tmp_path / "run", odd_digits))
    assert_each_scored_once(tmp_path / "ledger2", 3, 1)

    status = tmp_path / "run" / "status.json"
    before = status.read_text()
    with pytest.raises(ConfigError, match=r"3 -> 1 processes.*--allow-reshard.* 1, 2, 3, 4, 6, 12 processes"):
        start(tmp_path / "run", tmp_path / "refused", odd_digits, Part(1, 0, ends[2]))
    assert status.read_text() == before
    assert not list((tmp_path / "refused").iterdir())  # nothing was read


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_the_whole_way_round(odd_digits, tmp_path):
    """1 -> 2 -> 4 -> 3 -> 2 processes with other workers each time; twice stopped in epoch 0, then anywhere."""
    parts = [Part(1, 0, 5), Part(2, 2, 13), Part(4, 1, how="STOP"), Part(3, 3, how="SIGUSR1"), Part(2, 0, 0)]
    lines, ends = run_in_parts(tmp_path, odd_digits, parts)
    assert ends[:2] == [5, 13] and ends == sorted(set(ends))
    assert_equal_to_one_process(tmp_path, odd_digits, lines)
