import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from dist_kd.tracking.jsonl import JsonlTracker, cut_back, read_metrics


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


def write(path: Path, steps: list[int]) -> None:
    tracker = JsonlTracker(path)
    for step in steps:
        tracker.log({"train/loss": 1 / (step + 1)}, step)
    tracker.close("done")


def steps_of(path: Path) -> list[int]:
    return [record["step"] for record in read_metrics(path)]


def test_lines_come_back_as_they_went_in(path):
    tracker = JsonlTracker(path)
    tracker.log({"train/loss": 0.1, "train/top1": 12.5}, 3)
    tracker.log({"val/top1": 50.0}, 3, kind="val")
    assert read_metrics(path) == [  # before close: each line is on disk when log returns
        {"step": 3, "kind": "train", "train/loss": 0.1, "train/top1": 12.5},
        {"step": 3, "kind": "val", "val/top1": 50.0},
    ]
    tracker.close("done")


def test_values_that_are_not_finite_are_null_for_other_readers_and_nan_for_ours(path):
    tracker = JsonlTracker(path)
    tracker.log({"train/grad_norm": math.inf, "train/loss": math.nan}, 1)
    tracker.close("done")

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    assert json.loads(path.read_text(), parse_constant=refuse)["train/loss"] is None
    assert math.isnan(read_metrics(path)[0]["train/grad_norm"])


def test_reader_takes_a_half_last_line_and_no_file(path):
    assert read_metrics(path) == []
    write(path, [1, 2])
    with open(path, "ab") as file:
        file.write(b'{"step": 3, "kind": "tra\xc3')
    assert steps_of(path) == [1, 2]


def test_appending_after_a_half_line_loses_no_whole_line(path):
    path.write_bytes(b'{"step": 1, "kind": "train"}\n{"step": 2, "ki')
    write(path, [2, 3])
    assert steps_of(path) == [1, 2, 3]


@pytest.mark.parametrize("step,kept", [(0, [0]), (2, [0, 1, 2, 2]), (3, [0, 1, 2, 2, 3]), (9, [0, 1, 2, 2, 3])])
def test_cut_back_keeps_up_to_and_with_the_step(path, step, kept):
    write(path, [0, 1, 2, 2, 3])
    before = path.read_bytes()
    dropped = cut_back(path, step)
    assert steps_of(path) == kept
    assert dropped == 5 - len(kept)
    assert before.startswith(path.read_bytes())  # byte for byte what was there
    assert [p.name for p in path.parent.iterdir()] == [path.name]


def test_cut_back_drops_a_half_line_and_a_whole_one_without_its_end(path):
    write(path, [1, 2])
    with open(path, "ab") as file:
        file.write(b'{"step": 2, "kind": "train"}')  # no newline: the process died inside the write
    assert cut_back(path, 5) == 1
    assert steps_of(path) == [1, 2]


def test_cut_back_to_nothing_and_of_nothing(path):
    assert cut_back(path, 5) == 0
    assert not path.exists()
    write(path, [0, 1])
    assert cut_back(path, -1) == 2
    assert path.read_bytes() == b""


def test_every_cut_of_the_file_then_resume_gives_the_whole_series(path):
    """A kill may leave any number of bytes: after cutting back to a checkpoint all steps are there once."""
    write(path, [1, 2, 3, 4])
    whole = path.read_bytes()
    ends = [i + 1 for i, byte in enumerate(whole) if byte == ord("\n")]
    for size in range(ends[1], len(whole) + 1):  # the checkpoint of step 2 came after the line of step 2
        path.write_bytes(whole[:size])
        cut_back(path, 2)
        write(path, [3, 4])
        assert path.read_bytes() == whole, size


def test_full_disk_raises_and_the_file_stays_readable(tmp_path):
    """The kernel's own file size limit stands for a full disk; a process of its own, since the limit is its own."""
    program = """
import resource, sys
from pathlib import Path
from dist_kd.tracking.jsonl import JsonlTracker, read_metrics
path = Path(sys.argv[1])
tracker = JsonlTracker(path)
hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
resource.setrlimit(resource.RLIMIT_FSIZE, (75, hard))
failures = 0
for step in range(6):
    if step == 4:
        resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))  # room again
    try:
        tracker.log({"train/loss": 0.25}, step)
    except OSError:
        failures += 1
steps = [r["step"] for r in read_metrics(path)]
assert failures == 3 and steps == [0, 4, 5], (failures, steps, path.read_bytes())
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "m.jsonl")], check=True, timeout=30)


def test_an_evaluation_the_checkpoint_does_not_know_of_is_cut(path):
    tracker = JsonlTracker(path)
    tracker.log({"val/top1": 40.0}, 2, kind="val")
    tracker.log({"train/loss": 1.0}, 4)
    tracker.log({"val/top1": 50.0}, 4, kind="val")
    tracker.close("done")
    assert cut_back(path, 4) == 0
    assert cut_back(path, 4, evaluated=False) == 1
    assert [(record["step"], record["kind"]) for record in read_metrics(path)] == [(2, "val"), (4, "train")]
