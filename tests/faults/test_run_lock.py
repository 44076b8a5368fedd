"""Two runs in one folder: the second is refused before it writes anything; a lock whose run is gone is taken over."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dist_kd import run_lock
from dist_kd.cli import parse
from dist_kd.errors import ConfigError, DistKDError
from dist_kd.lifetime import run_training
from dist_kd.run_folder import RunFolder
from dist_kd.run_lock import SILENT_S, RunLock, gone, myself, process_start

ROOT = Path(__file__).parents[2]
LIMIT = 120  # seconds for a start on a busy machine; an idle one takes six
TRAIN = [
    "dist_kd/train.py", "--data", "digits", "--arch", "cnn_small", "--no-kd", "--image-size", "8", "--cpu",
    "--batch-size", "16", "--max-steps", "1000000", "--eval-steps", "1000000", "--log-steps", "5",
    "--checkpoint-steps", "20",
]  # fmt: skip
# holds the lock until its input ends; says so first
HOLDER = """
import sys
from pathlib import Path
from dist_kd.run_lock import RunLock
lock = RunLock(Path(sys.argv[1]))
print(lock.take(), flush=True)
sys.stdin.read()
lock.release()
"""


def start(*words: str, **variables: str) -> subprocess.Popen:
    plain = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.Popen(
        [sys.executable, *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=ROOT, env=plain | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""} | variables,
    )  # fmt: skip


def end(process: subprocess.Popen, limit: float = LIMIT) -> tuple[int, str, str]:
    """(exit code, stdout, stderr); killed and failed after `limit` seconds."""
    try:
        said, complained = process.communicate(timeout=limit)
    except BaseException:
        process.kill()
        process.communicate()
        raise
    return process.returncode, said, complained


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def wait_for(found, limit: float = LIMIT) -> None:
    deadline = time.monotonic() + limit
    while not found():
        assert time.monotonic() < deadline, f"waited {limit} s"
        time.sleep(0.05)


def forged(folder: Path, silent: float = 0.0, **facts) -> None:
    """The lock of a run on another machine, whose last sign of life was `silent` seconds ago."""
    there = myself() | {"host": "n17", "machine": "n17 of another boot", "pid": 4711} | facts
    (folder / "lock").write_text(json.dumps(there))
    then = time.time() - silent
    os.utime(folder / "lock", (then, then))


@pytest.mark.timeout(4 * LIMIT)
def test_a_second_run_is_refused_and_a_killed_one_is_followed(tmp_path):
    """Bound: the second start ends within LIMIT; nothing in the folder changes by it; the first goes on."""
    run = tmp_path / "run"
    first = start(*TRAIN, "--save-path", str(run))
    try:
        wait_for(lambda: list((run / "checkpoints").glob("step_*/manifest.json")))
        os.kill(first.pid, signal.SIGSTOP)  # so that only the second could write; of this machine it is known to live
        before = contents(run)
        code, said, complained = end(start(*TRAIN, "--save-path", str(run), "--seed", "1"))
        assert (code, said) == (2, "")
        assert contents(run) == before
        assert complained.count("\n") == 1, complained
        for words in (
            f"config error: `{run}` belongs to a run that goes on",
            f"process {first.pid} on ",
            "--save_path",
        ):
            assert words in complained
        os.kill(first.pid, signal.SIGCONT)
        steps = max(p.name for p in (run / "checkpoints").glob("step_*"))
        wait_for(lambda: max(p.name for p in (run / "checkpoints").glob("step_*")) > steps)
    finally:
        first.kill()
        first.communicate()
    assert (run / "lock").exists()
    code, said, complained = end(start(*TRAIN, "--save-path", str(run), "--time-limit", "0.001"))
    assert code == 75, complained
    assert f"took over the lock of an earlier start in this folder (process {first.pid} on " in said
    assert "that process is gone" in said
    assert not (run / "lock").exists()
    assert json.loads((run / "status.json").read_text())["state"] == "preempted"


def test_a_start_refused_while_the_first_has_not_said_anything_leaves_no_status(tmp_path):
    """The first is still starting: no status.json yet, and the refused one must not write one."""
    run = tmp_path / "run"
    run.mkdir()
    first = start("-c", HOLDER, str(run))
    try:
        assert first.stdout.readline() == "None\n"
        with pytest.raises(ConfigError, match="belongs to a run that goes on"):
            run_training(parse([*TRAIN[1:], "--save-path", str(run)]))
        assert [p.name for p in run.iterdir()] == ["lock"]
    finally:
        end(first)
    assert list(run.iterdir()) == []  # removed at an ordinary end


def test_a_failed_start_leaves_its_reason_and_no_lock(tmp_path):
    run = tmp_path / "run"
    with pytest.raises(DistKDError):
        run_training(parse([*TRAIN[1:], "--save-path", str(run), "--val-data", str(tmp_path / "none")]))
    assert not (run / "lock").exists()
    assert json.loads((run / "status.json").read_text())["state"] == "failed"


def test_many_starts_at_once_one_gets_it(tmp_path):
    """Also where all of them find the lock of a process that is gone."""
    for stale in (False, True):
        if stale:
            dead = start("-c", "")
            end(dead)
            forged(tmp_path, machine=run_lock.machine(), pid=dead.pid, process_start="1")
        locks = [RunLock(tmp_path) for _ in range(8)]
        together, refused = threading.Barrier(len(locks)), []

        def take(lock, together=together, refused=refused):
            together.wait(10)
            try:
                lock.take()
            except ConfigError as error:
                refused.append(str(error))

        threads = [threading.Thread(target=take, args=(lock,)) for lock in locks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)
        assert sum(lock.held for lock in locks) == 1 and len(refused) == 7
        assert [p.name for p in tmp_path.iterdir()] == ["lock"]
        for lock in locks:
            lock.release()
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("facts", "silent", "variables", "expected"),
    [
        ({}, 0, {}, None),
        ({}, SILENT_S - 60, {}, None),
        ({}, SILENT_S + 60, {}, "no sign of life for"),
        ({"job": "88"}, 0, {"SLURM_JOB_ID": "88", "SLURM_RESTART_COUNT": "1"}, "SLURM has requeued job 88"),
        ({"job": "88"}, 0, {"SLURM_JOB_ID": "88"}, None),  # two steps of one job
        ({"job": "88", "restarts": 1}, 0, {"SLURM_JOB_ID": "88", "SLURM_RESTART_COUNT": "1"}, None),
        ({"job": "88"}, 0, {"SLURM_JOB_ID": "89", "SLURM_RESTART_COUNT": "1"}, None),
    ],
)
def test_the_lock_of_another_machine(tmp_path, monkeypatch, facts, silent, variables, expected):
    for name in ("SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    forged(tmp_path, silent, **{"job": "", "restarts": 0} | facts)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    lock, before = RunLock(tmp_path), contents(tmp_path)
    if expected is None:
        with pytest.raises(ConfigError, match="process 4711 on n17"):
            lock.take()
        assert contents(tmp_path) == before
        lock.release()  # of what one does not hold: nothing
        assert contents(tmp_path) == before
    else:
        assert expected in lock.take()
        assert json.loads((tmp_path / "lock").read_text())["pid"] == os.getpid()
        lock.release()
        assert contents(tmp_path) == {}


def test_processes_are_told_apart():
    mine = myself()
    here = {"machine": mine["machine"], "pid": os.getpid(), "process_start": process_start(os.getpid())}
    assert gone(here, mine, 10 * SILENT_S) is None  # it lives, however long it was silent
    assert "its number is another's" in gone(here | {"process_start": "1"}, mine, 0)
    child = start("-c", "")
    child.stdin.close()
    wait_for(lambda: process_start(child.pid) is None)  # dead, though its parent has not asked for its exit code yet
    assert "is gone" in gone(here | {"pid": child.pid}, mine, 0)
    end_of = child.wait(10)
    child.stdout.close(), child.stderr.close()
    assert end_of == 0


def test_half_a_lock_is_held_until_it_was_silent(tmp_path):
    """Killed between making the file and writing it."""
    (tmp_path / "lock").write_text('{"host": "n1", "pi')
    with pytest.raises(ConfigError, match="does not say whose"):
        RunLock(tmp_path).take()
    then = time.time() - SILENT_S - 10
    os.utime(tmp_path / "lock", (then, then))
    lock = RunLock(tmp_path)
    assert "no sign of life" in lock.take()
    lock.release()


FORGED = {
    **{f"pid {pid}": {"pid": pid} for pid in (2**70, 2**31, 0, -1, True, "1", None, [1])},
    **{f"restarts {count}": {"job": "88", "restarts": count} for count in ("0", None, [], 2**70, float("nan"))},
    "host": {"host": {"a": "\x1b[2J"}, "time": [None], "process_start": 7},
}


@pytest.mark.parametrize("what", FORGED)
def test_a_forged_lock_is_held_until_it_was_silent(tmp_path, monkeypatch, what):
    """Whatever stands in it, it is no traceback, and no other process is asked about."""
    monkeypatch.setenv("SLURM_JOB_ID", "88")
    monkeypatch.delenv("SLURM_RESTART_COUNT", raising=False)
    there = {"machine": run_lock.machine()} if "pid" in FORGED[what] else {}
    forged(tmp_path, **there | FORGED[what])
    with pytest.raises(ConfigError, match="belongs to a run that goes on") as caught:
        RunLock(tmp_path).take()
    assert str(caught.value).isprintable()
    forged(tmp_path, SILENT_S + 60, **there | FORGED[what])
    lock = RunLock(tmp_path)
    assert "no sign of life" in lock.take()
    lock.release()


def test_a_lock_nested_too_deeply_says_nothing(tmp_path):
    (tmp_path / "lock").write_text("[" * 100_000)
    with pytest.raises(ConfigError, match="does not say whose"):
        RunLock(tmp_path).take()


def test_signs_of_life_are_given_by_the_file_systems_clock(tmp_path, monkeypatch):
    monkeypatch.setattr(run_lock, "BEAT_S", 0.05)
    lock = RunLock(tmp_path)
    lock.take()
    long_ago = time.time() - 10 * SILENT_S
    os.utime(lock.path, (long_ago, long_ago))
    wait_for(lambda: lock.path.stat().st_mtime > long_ago + 1, 20)
    # a clock of this host that is wrong changes nothing: neither side asks it
    monkeypatch.setattr(time, "time", lambda: long_ago)
    assert abs(lock._silence()) < 10
    lock.release()


def test_a_lock_lost_while_standing_still_ends_the_run_before_it_saves(tmp_path):
    folder = RunFolder(tmp_path)
    folder.occupy()
    folder.lock.check()
    forged(tmp_path)
    with pytest.raises(ConfigError, match=r"no longer this run's .process 4711 on n17"):
        folder.lock.check()
    before = contents(tmp_path)
    folder.lock.release()
    assert contents(tmp_path) == before


@pytest.mark.parametrize("there", [True, False])
def test_a_symbolic_link_is_not_followed(tmp_path, there):
    run, target = tmp_path / "run", tmp_path / "precious"
    run.mkdir()
    if there:
        target.write_text("mine")
        then = time.time() - 10 * SILENT_S
        os.utime(target, (then, then))
    (run / "lock").symlink_to(target)
    with pytest.raises(ConfigError, match="symbolic link"):
        RunFolder(run).occupy()
    assert (run / "lock").is_symlink()
    assert (target.read_text() == "mine") if there else not target.exists()


def test_a_read_only_folder_is_said(tmp_path):
    """A tmpfs turned read-only where mounting is allowed, else a folder without the right to write."""
    run = tmp_path / "run"
    run.mkdir()
    if os.geteuid():
        run.chmod(0o555)
        with pytest.raises(ConfigError, match=r"cannot be written \(Permission denied\); give a folder that can"):
            RunFolder(run).occupy()
        run.chmod(0o755)
        return
    if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "none", run]).returncode:
        pytest.skip("mounting is not allowed here, and root may write anywhere")
    try:
        subprocess.run(["mount", "-o", "remount,ro", run], check=True)
        with pytest.raises(ConfigError, match=r"cannot be written \(Read-only file system\); give a folder that can"):
            RunFolder(run).occupy()
    finally:
        subprocess.run(["umount", run], check=True)
