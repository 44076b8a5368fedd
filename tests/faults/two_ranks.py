"""Two real processes, of which one meets trouble; how long they took to end, and that nothing of them is left."""

import json
import os
import time
import uuid
from pathlib import Path
from typing import NamedTuple

import pytest
from dist.launching import launch, world_size
from walks.training import assert_same, final_state

HANG_S = 8  # --hang-timeout
# torchrun's, from the first rank's end to the SIGKILL of the others; --shutdown-timeout does not change this one
LAUNCHER_S = 30
# from the trouble to the end of the launcher: the limit, two looks and the grace for the others' stacks, the launcher;
# and as much again as a machine may take on which everything else runs too
BOUND_S = HANG_S + 4 + LAUNCHER_S + 45
LIMIT_S = 200  # of a whole launch
STEPS = 24

SETTINGS = [
    "--arch", "cnn_small", "--no-kd", "--image-size", "8", "--batch-size", "16", "--device-batch-size", "8", "--lr",
    "0.01", "--max-steps", str(STEPS), "--eval-steps", "10", "--checkpoint-steps", "4", "--log-steps", "6",
    "--hang-timeout", str(HANG_S), "--loader-timeout", "5", "--workers", "1", "--cpu",
]  # fmt: skip


def assert_same_end(run: Path, undisturbed: Path) -> None:
    """Networks and optimizer bit for bit; logged means but for the order in which float64 sums of two ranks are added
    when a window of log points has a resume in it."""
    ours, theirs = final_state(run), final_state(undisturbed)
    lines = ours.pop("lines"), theirs.pop("lines")
    assert_same(ours | {"lines": []}, theirs | {"lines": []})
    assert len(lines[0]) == len(lines[1])
    for mine, other in zip(*lines, strict=True):
        assert mine.pop("kind") == other.pop("kind")
        assert mine == pytest.approx(other, rel=1e-9)


class End(NamedTuple):
    said: str
    status: dict
    seconds: float  # from the trouble to the launcher's end


def start(run: Path, data: Path, *more: str, expected: int = 0, script: str = "dist_kd/train.py", **variables) -> str:
    """One launch of two processes; what they said. Asserts that none is left."""
    mark = uuid.uuid4().hex
    said = launch(
        "torchrun", script, *SETTINGS, "--data", str(data), "--save-path", str(run), *more,
        limit=LIMIT_S, expected=expected,
        variables={"LEFT_BEHIND": mark, **variables},
    )  # fmt: skip
    assert world_size(run) == 2
    until = time.monotonic() + 15  # workers see within seconds that their process is gone
    while alive(mark) and time.monotonic() < until:
        time.sleep(0.2)
    assert alive(mark) == []
    return said


def alive(mark: str) -> list[str]:
    """The command lines of processes that have this mark in their environment."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (folder / "environ").read_bytes() and os.getpid() != int(folder.name):
                found.append((folder / "cmdline").read_text().replace("\0", " "))
        except OSError:
            continue
    return found


def trouble(
    run: Path, data: Path, what: str, *more: str, rank: int = 1, where: str = "train", at: int = 10, expected: int = 1
) -> End:
    """A launch in which one rank meets trouble."""
    note = run.with_name(f"{run.name}-trouble")
    said = start(
        run, data, *more, expected=expected, script="tests/faults/troubled.py",
        TROUBLE=json.dumps({"rank": rank, "where": where, "at": at, "what": what, "note": str(note)}),
    )  # fmt: skip
    seconds = time.monotonic() - float(note.read_text())
    print(f"{what} in {where}: ended after {seconds:.1f} s")
    return End(said, json.loads((run / "status.json").read_text()), seconds)
