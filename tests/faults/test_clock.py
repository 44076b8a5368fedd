"""A clock that is wrong by a day, on one rank or in one start: nothing is taken for hung, stale, changed or newer.

Bound: 60 s a start.
"""

import json
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from data.bad_server import BadServer
from dist.launching import ROOT, world_size
from faults.clocks import DAY_S, wrong_clock
from faults.epochs import damaged_shard
from faults.test_run_lock import HOLDER, forged
from faults.zygote import SMALL, Zygote, free_port, pair
from walks.training import assert_same, final_state, status

from dist_kd import checkpoint
from dist_kd.data.finding import open_data
from dist_kd.run_lock import SILENT_S

OFFSETS = [-DAY_S, DAY_S]


@pytest.fixture(scope="module")
def clock(tmp_path_factory) -> Path:
    """How wrong the clock of `astray` is, to be written before a start."""
    return tmp_path_factory.mktemp("clock") / "offset"


@pytest.fixture(scope="module")
def astray(clock):
    """Starts trainers whose clock is wrong."""
    with pytest.MonkeyPatch.context() as patch:
        clock.write_text(f"{-DAY_S}")
        for name, value in wrong_clock(clock).items():
            patch.setenv(name, value)
        found = Zygote()
    yield found
    found.close()


def run_python(code: str, *words: str, offset: Path) -> tuple[int, str]:
    env = os.environ | wrong_clock(offset) | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=60,
        stdin=subprocess.DEVNULL,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.mark.parametrize("offset", OFFSETS)
def test_the_clock_is_wrong_here(tmp_path, offset):
    (tmp_path / "clock").write_text(str(offset))
    code, said = run_python("import time; print(time.time())", offset=tmp_path / "clock")
    assert code == 0 and float(said) - time.time() == pytest.approx(offset, abs=60)


def test_starts_with_the_clock_right_then_behind_then_ahead(zygote, astray, clock, origin, tmp_path):
    """Each goes on from the newest step, whatever the times of files say, and the end is that of one start."""
    run, whole, out = tmp_path / "run", tmp_path / "whole", tmp_path / "out"

    def job(folder: Path, **more) -> dict:
        return {"words": [*SMALL, "--data", str(origin), "--save-path", str(folder)], "out": str(out), **more}

    stop = {"signals": [["step", "SIGTERM"]]}
    assert zygote.run(job(whole)) == [0]
    assert zygote.run(job(run, **stop)) == [75], out.read_text()
    older = run / "checkpoints" / checkpoint.folder_name(2)
    for path in (older, *older.iterdir()):
        os.utime(path, (time.time() + DAY_S,) * 2)
    clock.write_text(f"{-DAY_S}")
    assert astray.run(job(run, **stop)) == [75], out.read_text()
    assert status(run)["time"] < json.loads((run / "run.json").read_text())["starts"][0]["time"]
    clock.write_text(f"{DAY_S}")
    assert astray.run(job(run)) == [0], out.read_text()
    assert [start["step"] for start in json.loads((run / "run.json").read_text())["starts"]] == [0, 3, 6]
    assert_same(final_state(run), final_state(whole))
    assert sorted(p.name for p in (run / "checkpoints").glob("step_*"))[-2:] == [
        checkpoint.folder_name(step) for step in (10, 11)
    ]


@pytest.mark.parametrize("offset", OFFSETS)
@pytest.mark.parametrize(("silent", "taken"), [(0.0, False), (SILENT_S + 60, True)])
def test_the_lock_of_another_machine(tmp_path, offset, silent, taken):
    run = tmp_path / "run"
    run.mkdir()
    (tmp_path / "clock").write_text(str(offset))
    forged(run, silent, job="", restarts=0)
    code, said = run_python(HOLDER, str(run), offset=tmp_path / "clock")
    assert (code == 0) == taken, said
    assert ("no sign of life for 3" if taken else "belongs to a run that goes on") in said


def test_a_damaged_sample_is_not_taken_for_a_shard_that_changed(astray, clock, packed, tmp_path):
    """By a clock a day behind, a shard that was written today was written to after the start."""
    clock.write_text(f"{-DAY_S}")
    shard, index = damaged_shard(packed / "train"), open_data(str(packed / "train"))
    row = index.rows[index.ends[0]]
    with shard.open("r+b") as file:
        file.seek(int(row["offset"]) + int(row["length"]) // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    run, out = tmp_path / "run", tmp_path / "out"
    words = [*SMALL, "--data", str(packed), "--save-path", str(run), "--max-bad-fraction", "0.1"]
    assert astray.run({"words": words, "out": str(out)}) == [0], out.read_text()
    assert "(checksum)" in out.read_text() and status(run)["state"] == "done"


def test_one_rank_of_two_has_a_clock_that_is_wrong_and_is_set(zygote, astray, clock, origin, tmp_path):
    """A day behind, then ahead, then behind again: no rank is found to hang or to be slow, and the end is the same."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    clock.write_text(f"{-DAY_S}")
    at_step = {
        str(k): f"sleep 1; echo {offset} > {clock}; sleep 1" for k, offset in ((3, DAY_S), (6, -DAY_S), (9, DAY_S))
    }

    def jobs(folder: Path, **of_rank_0) -> list[dict]:
        words = [*SMALL, "--data", str(origin), "--save-path", str(folder), "--hang-timeout", "8"]
        return pair(
            lambda rank: {"words": words, "out": str(tmp_path / f"out{rank}")} | (of_rank_0 if not rank else {}),
            free_port(),
        )

    assert zygote.run(*jobs(whole)) == [0, 0]
    right, wrong = jobs(run, at_step=at_step)
    with ThreadPoolExecutor() as other:
        ours = other.submit(astray.run, wrong)
        assert zygote.run(right) == [0], (tmp_path / "out0").read_text()
        assert ours.result(60) == [0], (tmp_path / "out1").read_text()
    assert world_size(run) == 2 and clock.read_text() == f"{DAY_S}\n"
    assert_same(final_state(run), final_state(whole))
    assert "warning" not in (tmp_path / "out0").read_text()


def test_what_another_process_fetches_is_not_taken_for_left_behind(origin, tmp_path):
    """A cache that several machines share: folders of indexes on their way are as old as the file system says."""
    (tmp_path / "clock").write_text(str(DAY_S))
    fresh, left = (tmp_path / "cache" / "index" / f".index-{name}" for name in ("fresh", "left"))
    for folder in (fresh, left):
        folder.mkdir(parents=True)
    os.utime(left, (time.time() - DAY_S,) * 2)
    files = {f"set/{path.name}": path.read_bytes() for path in (origin / "train").iterdir() if path.is_file()}
    code = "import sys; from dist_kd.data.finding import open_data; print(open_data(sys.argv[1]).num_samples)"
    with BadServer(files) as server:
        assert run_python(code, server.url("set"), offset=tmp_path / "clock") == (0, "150\n")
    assert fresh.exists() and not left.exists()
