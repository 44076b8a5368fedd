import subprocess
import sys
from pathlib import Path

import pytest

from dist_kd.tracking import FanOut, NullTracker, open_tracker
from dist_kd.tracking.console import ConsoleTracker
from dist_kd.tracking.jsonl import JsonlTracker, read_metrics


def opened(run_dir: Path, resumed_step: int | None = None):
    return open_tracker(
        run_dir,
        run_id="run1",
        name="student",
        settings={"seed": 0},
        total_steps=10,
        wandb=False,
        wandb_project="p",
        tensorboard=False,
        resumed_step=resumed_step,
    )


def steps(run_dir: Path, kind: str) -> list[int]:
    return [r["step"] for r in read_metrics(run_dir / "metrics.jsonl") if r["kind"] == kind]


def test_a_killed_and_resumed_run_has_each_line_once(tmp_path, capsys):
    tracker = opened(tmp_path)
    tracker.log({"teacher/top1": 90.0}, 0, kind="teacher")
    for step in range(1, 6):
        tracker.log({"train/loss": 1.0}, step)
    tracker.log({"val/top1": 40.0}, 3, kind="val")
    # no close: killed after the checkpoint of step 3
    again = opened(tmp_path, resumed_step=3)
    for step in range(4, 7):
        again.log({"train/loss": 1.0}, step)
    again.close("done")
    assert steps(tmp_path, "train") == [1, 2, 3, 4, 5, 6]
    assert steps(tmp_path, "val") == [3]
    assert steps(tmp_path, "teacher") == [0]
    assert steps(tmp_path, "resume") == [3]
    assert "resumed at step 3" in capsys.readouterr().out


def test_a_start_from_the_beginning_forgets_an_earlier_one(tmp_path):
    opened(tmp_path).log({"train/loss": 1.0}, 1)
    tracker = opened(tmp_path)
    tracker.log({"train/loss": 2.0}, 1)
    tracker.close("done")
    assert steps(tmp_path, "train") == [1]


def test_unknown_key_or_kind_is_a_programming_error(tmp_path):
    tracker = opened(tmp_path)
    with pytest.raises(AssertionError, match="train/typo"):
        tracker.log({"train/typo": 1.0}, 1)
    with pytest.raises(AssertionError, match="valid"):
        tracker.log({"val/top1": 1.0}, 1, kind="valid")
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    tracker.close("failed")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_is_told_once_and_stops_nobody(tmp_path, capsys):
    tracker = FanOut(ConsoleTracker("student", 10))
    tracker.add(lambda: JsonlTracker(Path("/dev/full")), "metrics.jsonl")
    tracker.add(lambda: JsonlTracker(tmp_path / "good.jsonl"), "the other sink")
    for step in range(3):
        tracker.log({"train/loss": 1.0}, step)
    tracker.close("done")
    out = capsys.readouterr().out
    assert out.count("warning") == 1 and "metrics.jsonl could not be written" in out and "No space left" in out
    assert len(read_metrics(tmp_path / "good.jsonl")) == 3


def test_a_run_folder_that_takes_no_file_is_told_and_stops_nobody(tmp_path, capsys):
    (tmp_path / "metrics.jsonl").mkdir()
    tracker = opened(tmp_path)
    tracker.log({"train/loss": 1.0}, 1)
    tracker.close("done")
    out = capsys.readouterr().out
    assert out.count("warning: metrics.jsonl could not be written") == 1
    assert "loss 1.000" in out


def test_a_closed_output_stops_nobody(tmp_path):
    """Standard output is a pipe whose reader has gone, as after a lost connection."""
    program = """
import sys, time
from pathlib import Path
from dist_kd.tracking import open_tracker
run_dir = Path(sys.argv[1])
tracker = open_tracker(run_dir, run_id="r", name="n", settings={}, total_steps=9, wandb=False, wandb_project="p",
                       tensorboard=False, resumed_step=None)
sys.stdin.readline()
for step in range(3):
    tracker.log({"train/loss": 1.0}, step)
    tracker.note("still here")
tracker.close("done")
assert len((run_dir / "metrics.jsonl").read_text().splitlines()) == 3
print("trained", file=sys.stderr)
import os
os._exit(0)  # not by the interpreter's end, which flushes the broken pipe
"""
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    process.stdout.close()
    process.stdin.write(b"go\n")
    process.stdin.close()
    error = process.stderr.read()
    process.stderr.close()
    assert process.wait(30) == 0 and b"trained" in error, error


def test_null_tracker_takes_everything(tmp_path):
    tracker = NullTracker()
    tracker.log({"train/loss": 1.0}, 1, kind="train")
    tracker.summary({})
    tracker.note("text")
    tracker.close("done")


def test_importing_the_room_loads_no_heavy_package():
    program = "import dist_kd.tracking, sys; assert not {'torch', 'wandb', 'rich', 'tensorboard'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=30)
