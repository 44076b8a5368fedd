"""Nothing waits for ever, and whoever is at fault is named: two real processes, one of which hangs."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.two_ranks import BOUND_S, HANG_S, LIMIT_S, STEPS, assert_same_end, start, trouble
from walks.training import status

from dist_kd.cli import parse
from dist_kd.config import Config
from dist_kd.contracts import World
from dist_kd.errors import ConfigError
from dist_kd.watchdog import Progress, Watchdog, verdict

pytestmark = pytest.mark.timeout(3 * LIMIT_S)
slow = pytest.mark.slow


def assert_hung(end, culprit: str, victim: str) -> None:
    """The status names the one that is behind; it took no longer than promised."""
    assert (end.status["state"], end.status["kind"]) == ("failed", "hung")
    assert re.search(culprit, end.status["message"]), end.status["message"]
    assert re.search(victim, end.status["message"]), end.status["message"]
    assert f"hung error: {end.status['message']}" in end.said
    assert "exitcode  : 7 " in end.said  # torchrun's own is 1
    assert end.seconds < BOUND_S


def test_a_rank_that_sleeps_is_named(origin, tmp_path):
    run = tmp_path / "run"
    end = trouble(run, origin, "sleep")
    assert_hung(end, r"rank 1 \(\S+, process \d+\) is behind, at step 11 \(data\)", "rank 0 at step 11")
    for rank in range(2):
        assert "Thread" in (run / "stacks" / f"rank-{rank}.txt").read_text()
    assert "troubled.py" in (run / "stacks" / "rank-1.txt").read_text()


@slow
def test_after_a_rank_was_stopped_the_run_ends_as_one_that_never_was(origin, tmp_path):
    """SIGSTOP of rank 1 in step 11: its own watchdog stands still too, rank 0's does not."""
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    end = trouble(run, origin, "stop")
    assert_hung(end, r"rank 1 \(\S+, process \d+\) gives no sign of life.* step 1[01] ", "rank 0 at step 11")
    assert "Thread" in (run / "stacks" / "rank-0.txt").read_text()
    start(run, origin)
    assert (status(run)["state"], status(run)["step"]) == ("done", STEPS)
    assert not (run / "heartbeats").exists() and not (run / "stacks").exists()
    start(undisturbed, origin)
    assert_same_end(run, undisturbed)


@slow
@pytest.mark.parametrize(
    ("what", "rank", "where", "culprit", "victim"),
    [
        ("sleep", 0, "train", r"rank 0 \(.*\) is behind, at step 11 \(data\)", "rank 1 at step 11"),
        ("hold the interpreter", 1, "train", r"rank 1 \(.*\) gives no sign of life.* step 1[01] ", "rank 0 at step 11"),
        ("sleep", 1, "evaluation", r"rank 1 \(.*\) is behind, at step 10 \(evaluation\)", "rank 0 at step 10"),
        ("sleep", 0, "save", r"rank 0 \(.*\) is behind, at step 8 \(save\)", r"rank 1 at step 8 \(save\) waiting"),
    ],
)
def test_a_rank_that_hangs_is_named(origin, tmp_path, what, rank, where, culprit, victim):
    run = tmp_path / "run"
    end = trouble(run, origin, what, rank=rank, where=where, at=0 if where == "evaluation" else 10)
    assert_hung(end, culprit, victim)
    assert "troubled.py" in (run / "stacks" / f"rank-{rank}.txt").read_text()


HANGING = """
import sys, time
from pathlib import Path
from dist_kd.contracts import World
from dist_kd.watchdog import Progress, Watchdog
progress = Progress()
progress.patient = False
progress.at("step", 3)
watch = Watchdog(Path(sys.argv[1]), World(0, 1, 0, 1), progress, float(sys.argv[2]), lambda s: print(s, flush=True))
watch.clear()
watch.start()
print("ready", flush=True)
time.sleep(100)
"""


def hanging(folder: Path, limit_s: float) -> subprocess.Popen:
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING, str(folder), str(limit_s)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert process.stdout.readline() == "ready\n"
    return process


def test_one_process_that_hangs_ends_itself(tmp_path):
    process = hanging(tmp_path, 1)
    said, stacks = process.communicate(timeout=60)
    assert process.returncode == 7
    assert "nothing moved for 1 s" in said and "rank 0 at step 3 (step)" in said
    assert "time.sleep" in stacks or 'File "<string>"' in stacks
    assert (tmp_path / "stacks" / "rank-0.txt").read_text() == stacks.split("hung error")[0]


def test_time_in_which_the_whole_process_stood_still_does_not_count(tmp_path):
    """Stopped for longer than the limit, as by `scontrol suspend`: it is not hung, and says so for as long again."""
    process = hanging(tmp_path, 20)
    try:
        os.kill(process.pid, signal.SIGSTOP)
        time.sleep(25)  # the limit itself, not a wait for something
        os.kill(process.pid, signal.SIGCONT)
        beat = tmp_path / "heartbeats" / "rank-0"
        before, until = json.loads(beat.read_text())["beat"], time.monotonic() + 60
        while json.loads(beat.read_text())["beat"] < before + 4:
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.1)
        assert json.loads(beat.read_text())["silent_s"] < 20
    finally:
        process.kill()
        process.communicate(timeout=60)


def heartbeat(rank: int, said: int, section="data", waiting=False, state="hung") -> dict:
    return {
        "rank": rank, "host": "n1", "pid": 100 + rank, "state": state, "message": "", "beat": 1, "said": said,
        "section": section, "step": 7, "waiting": waiting,
    }  # fmt: skip


def test_the_sentence_names_who_has_said_least():
    beats = [heartbeat(0, 12, "backward"), heartbeat(1, 10), heartbeat(2, 12, "backward"), None]
    said = verdict(beats, [], limit_s=900, stacks=Path("run/stacks"))
    assert said == (
        "nothing moved for 900 s (--hang-timeout); rank 1 (n1, process 101) is behind, at step 7 (data); rank 0, 2 at "
        "step 7 (backward); nothing is known here of rank 3; the stacks are in run/stacks; the same command goes on "
        "from the last checkpoint"
    )
    same = verdict([heartbeat(0, 5), heartbeat(1, 5)], [], limit_s=1, stacks=Path("s"))
    assert "all ranks came equally far: rank 0, 1 at step 7 (data)" in same
    silent = verdict([heartbeat(0, 5), heartbeat(1, 5)], [0], limit_s=1, stacks=Path("s"))
    assert "rank 0 (n1, process 100) gives no sign of life" in silent and "rank 1 (" not in silent
    many = verdict([*(heartbeat(r, 1) for r in range(9)), heartbeat(9, 2)], [], limit_s=1, stacks=Path("s"))
    assert "and 5 more ranks" in many


def test_a_folder_that_cannot_be_written_costs_the_names_only(tmp_path):
    (tmp_path / "heartbeats").touch()  # a file where the folder should be
    watch = Watchdog(tmp_path, World(0, 1, 0, 1), Progress(), 100, lambda sentence: None)
    watch.start()
    watch.say("failed", "x")
    assert watch.heard() == [None]
    watch.stop()


def test_a_hang_is_told_also_where_no_heartbeat_can_be_written(tmp_path):
    for name in ("heartbeats", "stacks"):
        (tmp_path / name).touch()
    process = hanging(tmp_path, 1)
    said, stacks = process.communicate(timeout=60)
    assert process.returncode == 7
    assert "nothing moved for 1 s (--hang-timeout); nothing is known here of rank 0" in said
    assert "hung error: nothing moved" in stacks


def test_the_limit_is_longer_than_the_loaders():
    assert Config().hang_limit_s == 900
    assert Config(loader_timeout=1000).hang_limit_s == 3000
    assert Config(hang_timeout=HANG_S).hang_limit_s == HANG_S
    with pytest.raises(ConfigError, match=r"--hang-timeout: `300.0` s would end the run before --loader-timeout"):
        parse(["--data", "somewhere", "--hang-timeout", "300"], {})
    parse(["--data", "somewhere", "--hang-timeout", "300", "--loader-timeout", "200"], {})
    parse(["--data", "somewhere", "--hang-timeout", "300", "--workers", "0"], {})


def test_the_time_of_a_start_is_told_by_section(monkeypatch):
    clock = iter([10.0, 10.5, 12.0, 12.001, 15.0])  # made, then at each section
    monkeypatch.setattr("time.monotonic", lambda: next(clock))
    progress = Progress()
    for section in ("sets", "networks", "data", "networks"):
        progress.at(section)
        progress.beat()
    monkeypatch.setattr("time.monotonic", lambda: 15.0)
    line = progress.started()
    assert line == "started  5.00 s to the end of the first step: start 0.50, sets 1.50, data 3.00"
    assert not progress.patient and progress.spent["networks"] == pytest.approx(0.001)
    progress.at("finish")
    assert "finish" not in progress.spent and sum(progress.spent.values()) == 5.0  # no clock is asked any more
