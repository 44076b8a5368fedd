"""A launcher that is killed leaves nobody behind.

Bound: 60 s after the death of torchrun no process of the run is left; a run of small steps saves and stops in a few.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from faults.zygote import ROOT, SMALL
from walks.training import status

from dist_kd import checkpoint


def children(pid: int) -> list[int]:
    """All processes below this one."""
    mine = [int(c) for t in Path(f"/proc/{pid}/task").glob("*/children") for c in t.read_text().split()]
    return mine + [below for child in mine for below in children(child)]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def wait_for(condition, limit: float, what: str) -> None:
    end = time.monotonic() + limit
    while not condition():
        assert time.monotonic() < end, f"not within {limit} s: {what}"
        time.sleep(0.1)


@pytest.mark.timeout(300)
@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for processes in /proc")
def test_a_killed_torchrun_leaves_no_process(origin, tmp_path):
    run = tmp_path / "run"
    own = {SMALL.index(flag) + more for flag in ("--max-steps", "--workers", "--checkpoint-steps") for more in (0, 1)}
    words = [word for i, word in enumerate(SMALL) if i not in own and word != "--in-memory"]
    words += ["--max-steps", "1000000", "--no-in-memory", "--workers", "1", "--checkpoint-steps", "1000000"]
    out = (tmp_path / "out").open("w")
    launcher = subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
            "--nproc-per-node", "2", "dist_kd/train.py", *words, "--data", str(origin), "--save-path", str(run),
        ],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}, start_new_session=True,
        stdout=out, stderr=subprocess.STDOUT,
    )  # fmt: skip
    below: list[int] = []
    try:
        metrics = run / "metrics.jsonl"
        wait_for(
            lambda: launcher.poll() is not None or (metrics.exists() and metrics.stat().st_size > 500),
            180,
            "the first steps",
        )
        assert launcher.poll() is None, (tmp_path / "out").read_text()
        below = children(launcher.pid)
        assert len(below) >= 4, "two trainers with a loader worker each"
        launcher.kill()
        launcher.wait(10)
        wait_for(lambda: not any(map(alive, below)), 60, "the end of all processes")
    finally:
        out.close()
        launcher.kill()
        launcher.wait(10)
        for pid in filter(alive, below):
            os.kill(pid, signal.SIGKILL)
    said = status(run)
    seen = ("the launcher is gone", "the launcher is gone on rank 1")  # whichever process looked first
    assert said["state"] == "preempted" and said["message"] in seen, (tmp_path / "out").read_text()
    found, refused = checkpoint.find(run / "checkpoints")
    assert (found.name, refused) == (checkpoint.folder_name(said["step"]), [])
