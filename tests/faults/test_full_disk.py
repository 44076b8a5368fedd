"""A disk that is full, read-only or limited: training goes on while it can, nothing good is lost, one sentence says it.

Bounds: each process ends within 60 s. Needs root for a small file system of its own; without it only the size limit.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
from faults.zygote import SMALL
from walks.training import assert_same, final_state, status

from dist_kd import checkpoint
from dist_kd.errors import ConfigError, SaveError


@pytest.fixture
def disk(tmp_path) -> Path:
    """20 MB of their own."""
    where = tmp_path / "disk"
    where.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(where)], capture_output=True, text=True, timeout=20
    )
    if done.returncode != 0:
        pytest.skip(f"mounting a tmpfs needs root: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True, timeout=20)


@pytest.fixture
def quota(tmp_path) -> Path:
    """A disk that can have a quota, which holds for root too; as yet it has none."""
    where, image = tmp_path / "quota", tmp_path / "image"
    if shutil.which("mkfs.btrfs") is None:
        pytest.skip("a quota needs Debian's package btrfs-progs")
    where.mkdir()
    with image.open("wb") as file:
        file.truncate(128 << 20)
    subprocess.run(["mkfs.btrfs", "--quiet", str(image)], check=True, capture_output=True, timeout=20)
    done = subprocess.run(["mount", "-o", "loop", str(image), str(where)], capture_output=True, text=True, timeout=20)
    if done.returncode != 0:
        pytest.skip(f"mounting btrfs needs root, a loop device, and a kernel that knows it: {done.stderr.strip()}")
    subprocess.run(["btrfs", "quota", "enable", str(where)], check=True, timeout=20)
    subprocess.run(["btrfs", "subvolume", "create", str(where / "ours")], check=True, capture_output=True, timeout=20)
    yield where / "ours"
    subprocess.run(["umount", "-l", str(where)], check=True, timeout=20)


@pytest.fixture(scope="module")
def undisturbed(zygote, origin, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert zygote.run({"words": words(run, origin)}) == [0]
    return final_state(run)


def words(run: Path, data: Path) -> list[str]:
    return [*SMALL, "--data", str(data), "--save-path", str(run)]


def steps(run: Path) -> list[str]:
    return sorted(p.name for p in (run / "checkpoints").iterdir() if p.name not in ("latest", "best"))


def warnings(out: Path) -> list[str]:
    said = out.read_text()
    assert "Traceback" not in said, said
    return [line for line in said.splitlines() if line.startswith("WARNING: the checkpoint")]


FILL = "head -c 30000000 /dev/zero > {0}/filler; true"  # writes until nothing more fits


def test_a_full_disk_that_has_room_again_costs_nothing(zygote, origin, tmp_path, disk, undisturbed):
    """Full from step 3 to step 5: the saves of steps 3 and 4 fail, that of 6 stands, and the end is the same."""
    run, out = disk / "run", tmp_path / "out"
    at_step = {"2": FILL.format(disk), "5": f"rm {disk}/filler"}
    assert zygote.run({"words": words(run, origin), "at_step": at_step, "out": str(out)}) == [0], out.read_text()
    said = warnings(out)
    assert len(said) == 2, out.read_text()
    for part in ("No space left on device", "0.0 MB free", "free space there", "failed saves in a row: 1", str(run)):
        assert part in said[0]
    # step 3 was evaluated, as the first and so the best; what it was is gone with the next step
    assert ["`best` stays what it was" in line for line in said] == [True, False]
    # what happened to metrics.jsonl meanwhile is said too, and does not end the run
    ours = final_state(run)
    assert_same(ours | {"lines": []}, undisturbed | {"lines": []})
    assert len(steps(run)) == len([s for s in steps(run) if checkpoint.NAME.fullmatch(s)])
    assert status(run)["state"] == "done"


@pytest.mark.parametrize("full", [True, False])
def test_a_best_student_that_could_not_be_saved_is_not_said_to_be_kept(zygote, origin, tmp_path, disk, full):
    """Of the evaluations after steps 3, 6, 9 and 11, that of step 9 is the best."""
    run, out = disk / "run", tmp_path / "out"
    at_step = {"8": FILL.format(disk), "10": f"rm {disk}/filler"} if full else {}
    assert zygote.run({"words": words(run, origin), "at_step": at_step, "out": str(out)}) == [0], out.read_text()
    best = json.loads((run / "summary.json").read_text())["student"]["best"]
    assert (best["step"], best["kept"]) == (9, not full), out.read_text()
    assert (checkpoint.best_of(run / "checkpoints").name == checkpoint.folder_name(9)) is not full


def test_a_disk_that_stays_full_stops_the_run_after_three_saves(zygote, origin, tmp_path, disk, undisturbed):
    run, out = disk / "run", tmp_path / "out"
    job = {"words": words(run, origin), "out": str(out)}
    codes = zygote.run(job | {"at_step": {"2": FILL.format(disk)}})
    assert codes == [SaveError.exit_code], out.read_text()
    assert len(warnings(out)) == 2
    assert len([line for line in out.read_text().splitlines() if line.startswith("save error: ")]) == 1
    assert checkpoint.find(run / "checkpoints")[0].name == checkpoint.folder_name(2)
    assert steps(run) == [checkpoint.folder_name(2)]  # nothing half written is left, but for what it is worth
    # started again on the full disk it says so before it trains
    assert zygote.run(job)[0] in (ConfigError.exit_code, SaveError.exit_code)
    assert "Traceback" not in out.read_text(), out.read_text()
    (disk / "filler").unlink()
    assert zygote.run(job) == [0], out.read_text()
    ours = final_state(run)
    assert_same(ours | {"lines": []}, undisturbed | {"lines": []})


@pytest.mark.parametrize("raised", [True, False])
def test_a_quota_that_is_used_up(zygote, origin, tmp_path, quota, undisturbed, raised):
    """From step 3 on nothing fits. Raised before step 6, it cost two saves; else the third that fails is the last."""
    run, out = quota / "run", tmp_path / "out"
    # of the first folder with a quota of its own; asked of the disk, since asking there would need room there
    limit = f"sync -f {quota}; btrfs qgroup limit {{}} 0/256 {quota.parent}"
    at_step = {"2": limit.format("64K")} | ({"5": limit.format("none")} if raised else {})
    codes = zygote.run({"words": words(run, origin), "at_step": at_step, "out": str(out)})
    assert codes == [0 if raised else SaveError.exit_code], out.read_text()
    said = warnings(out)
    assert len(said) == 2, out.read_text()
    for part in ("Disk quota exceeded", "the quota is used up: remove files, or have it raised", str(run)):
        assert part in said[0]
    if not raised:
        assert checkpoint.find(run / "checkpoints")[0].name == checkpoint.folder_name(2)
        subprocess.run(limit.format("none"), shell=True, check=True, timeout=20)
        assert zygote.run({"words": words(run, origin), "out": str(out)}) == [0], out.read_text()
    ours = final_state(run)
    assert_same(ours | {"lines": []}, undisturbed | {"lines": []})
    assert status(run)["state"] == "done"


@pytest.mark.parametrize("how", ["stopped", "finished"])
def test_the_last_save_must_succeed(zygote, origin, tmp_path, disk, how):
    run, out = disk / "run", tmp_path / "out"
    at_step = {"4" if how == "stopped" else "10": FILL.format(disk)}
    if how == "stopped":
        at_step["4"] += "; kill -TERM $PPID"
    codes = zygote.run({"words": words(run, origin), "at_step": at_step, "out": str(out)})
    assert codes == [SaveError.exit_code], out.read_text()
    assert warnings(out) == []
    assert "save error: the checkpoint of step" in out.read_text()
    assert checkpoint.find(run / "checkpoints")[1] == []


def test_read_only_from_the_middle_on(zygote, origin, tmp_path, disk):
    run, out = disk / "run", tmp_path / "out"
    where = run / "checkpoints"
    # a whole file system that is written to cannot be remounted: a mount of its own for the part that counts can
    remount = f"mount --bind {where} {where} && mount -o remount,ro,bind {where}"
    job = {"words": words(run, origin), "out": str(out)}
    codes = zygote.run(job | {"at_step": {"4": remount}})
    assert codes == [SaveError.exit_code], out.read_text()
    assert "Read-only file system" in warnings(out)[0]
    assert "have it mounted for writing" in warnings(out)[0]
    assert (status(run)["state"], status(run)["kind"]) == ("failed", "save")
    assert "Read-only file system" in status(run)["message"]
    assert checkpoint.find(where)[0].name == checkpoint.folder_name(4)
    assert zygote.run(job) == [ConfigError.exit_code], out.read_text()
    subprocess.run(["umount", str(where)], check=True, timeout=20)
    assert zygote.run(job) == [0], out.read_text()


def test_a_limit_on_the_size_of_files(zygote, origin, tmp_path):
    """`ulimit -f`: the checkpoint's files do not fit, everything else of the run does."""
    run, out = tmp_path / "run", tmp_path / "out"
    codes = zygote.run({"words": words(run, origin), "out": str(out), "fsize": 20_000})
    assert codes == [SaveError.exit_code], out.read_text()
    assert "File too large" in warnings(out)[0]
    assert "ulimit -f" in warnings(out)[0]
    assert (status(run)["state"], status(run)["kind"]) == ("failed", "save")
    assert steps(run) == []


def test_the_run_folder_of_another_user(zygote, origin, tmp_path):
    if os.getuid() != 0:
        pytest.skip("to be another user needs root")
    run, out = tmp_path / "run", tmp_path / "out"
    assert zygote.run({"words": words(run, origin)}) == [0]
    _open_the_way(origin)
    _open_the_way(tmp_path)
    before = {p: p.stat().st_mtime_ns for p in run.rglob("*")}
    out.touch()
    job = {"words": words(run, origin), "out": str(out), "user": 65534, "env": {"HOME": "/tmp"}}
    assert zygote.run(job) == [ConfigError.exit_code], out.read_text()
    assert "cannot be written (Permission denied)" in out.read_text()
    # the folder itself is open to all, its checkpoints are not
    run.chmod(0o777)
    assert zygote.run(job) == [ConfigError.exit_code], out.read_text()
    (run / "checkpoints").chmod(0o700)
    assert zygote.run(job) == [ConfigError.exit_code], out.read_text()
    assert "Traceback" not in out.read_text()
    assert {p: p.stat().st_mtime_ns for p in run.rglob("*") if p != run and p.name != "lock"} == {
        p: t for p, t in before.items() if p.name != "lock"
    }


def _open_the_way(path: Path) -> None:
    for folder in [path, *path.parents]:
        if folder.owner() == "root" and len(folder.parts) > 2:
            folder.chmod(folder.stat().st_mode | 0o755)


def test_links_in_a_run_folder_are_not_followed(tmp_path, zygote):
    """Pruning and cleaning remove folders; where a link stands under such a name, what it leads to stays."""
    outside, folder = tmp_path / "outside", tmp_path / "checkpoints"
    for number in (1, 2):
        assert zygote.run({"save": [str(folder), [number]]}) == [0]
    (folder / checkpoint.folder_name(1)).rename(outside)
    (folder / checkpoint.folder_name(1)).symlink_to(outside)
    (folder / ".step_00000009.0.partial").symlink_to(outside)
    (folder / f"{checkpoint.folder_name(3)}{checkpoint.REPLACED}").symlink_to(outside)
    inner = folder / checkpoint.folder_name(2) / "link"
    inner.symlink_to(outside)
    before = json.dumps(sorted((str(p), p.stat().st_mtime_ns) for p in outside.rglob("*")))
    checkpoint.clean(folder)
    assert zygote.run({"save": [str(folder), [3, 4, 5, 6]]}) == [0]
    assert json.dumps(sorted((str(p), p.stat().st_mtime_ns) for p in outside.rglob("*"))) == before
    assert checkpoint.find(folder)[0].name == checkpoint.folder_name(6)
    assert not (folder / checkpoint.folder_name(2)).exists()
