"""`dist-kd doctor`: a run that is well, and each thing that is not, found and said before the run.

Bounds: each command ends within 120 s, and leaves neither a process nor a file.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dist_kd.cli import parse
from dist_kd.commands.main import main as console
from dist_kd.config import Config
from dist_kd.doctor import BAD, CHECKS, LOOK, OK, Finding, batch, packages, save_path, speed_of_data, wandb_state
from dist_kd.errors import DataError
from dist_kd.models import build
from dist_kd.optimizer import make_optimizer

LIMIT = 120
SMALL = ["--arch", "cnn_small", "--image-size", "8", "--batch-size", "32", "--cpu"]
KD = ["--kd", "--teacher-arch", "cnn_small", "--teacher-weights", "none"]


@pytest.fixture(scope="module")
def digits(tmp_path_factory) -> Path:
    where = tmp_path_factory.mktemp("digits")
    assert console(["pack", "digits", str(where), "--limit-per-class", "21", "--jobs", "1"]) == 0
    return where


def config(*words: str) -> Config:
    return parse([*SMALL, *words], {}, require_data=False).config


def plain_env(**more: str) -> dict[str, str]:
    hidden = ("RANK", "WORLD_SIZE", "WANDB", "DIST_KD_DATA", "ACCELERATE", "TORCHELASTIC")
    return {k: v for k, v in os.environ.items() if not k.startswith(hidden)} | {"OMP_NUM_THREADS": "1"} | more


def doctor(*words: str, code: int, **env: str) -> dict[str, tuple[str, str]]:
    """What the command says: name of a line -> (state, text)."""
    command = [sys.executable, "-m", "dist_kd.commands.main", "doctor", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=LIMIT, env=plain_env(**env))
    assert done.returncode == code and done.stderr == "", done.stdout + done.stderr
    *lines, last = done.stdout.splitlines()
    assert last.startswith(f"{len(lines)} lines: ")
    found = [re.fullmatch(r"(OK   |LOOK |BAD  ) ([a-z0-9 ]{12}) (\S.*)", line) for line in lines]
    assert all(found), done.stdout
    return {match[2].strip(): (match[1].strip(), match[3]) for match in found}


def processes_with(word: str) -> list[str]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if word in path.read_bytes().decode(errors="replace") and int(path.parent.name) != os.getpid():
                found.append(path.parent.name)
        except OSError:
            continue
    return found


def test_a_run_that_is_well(digits, tmp_path):
    """Also where the variables of a launcher are set."""
    run = tmp_path / "to" / "run"
    words = [*SMALL, *KD, "--data", str(digits), "--epochs", "5", "--no-in-memory", "--workers", "1"]
    lines = doctor(*words, "--save-path", str(run), code=0, ACCELERATE_MIXED_PRECISION="no")
    names = ["wandb", "cpu", "memory", "gpu", "time", "data speed", "save speed"]
    assert set(names) <= lines.keys()
    assert not [line for line in lines.items() if line[1][0] == BAD]
    for name in ("packages", "data", "samples", "collectives", "save path", "batch"):
        assert lines[name][0] == OK
    assert "digits: 210 train, 210 val samples in 10 classes" in lines["data"][1]
    assert "210 samples from all over" in lines["samples"][1]
    assert lines["data rest"][0] == LOOK and "leaves out 18 of 210 samples" in lines["data rest"][1]
    assert re.match(r"[\d,]+ images/s with --workers 1 for each .*, [\d,]+ with none", lines["data speed"][1])
    assert "gloo, 2 processes of this machine" in lines["collectives"][1]
    assert "the micro-batch of 32 needs" in lines["batch"][1] and "going by" not in lines["batch"][1]
    assert re.search(r"--epochs 5 by 1 process on this machine would take about 0\.\d minutes", lines["time"][1])
    assert list(tmp_path.iterdir()) == [] and processes_with(str(run)) == []


def test_what_is_asked_of_it(capsys, monkeypatch):
    assert console(["doctor", "--help"]) == 0
    assert "Exit code 0 without a BAD line, else 1" in capsys.readouterr().out
    assert console(["doctor", "--lr", "0"]) == 2
    assert "--lr: must be greater than 0" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    assert console(["doctor"]) == 2
    assert "run it alone, once on each machine" in capsys.readouterr().err


def test_bad_lines_and_the_exit_code(tmp_path):
    """No data there, no interface of that name, and a save path below a file."""
    file = tmp_path / "file"
    file.touch()
    words = [*SMALL, "--data", str(tmp_path / "nowhere"), "--save-path", str(file / "run"), "--wandb"]
    netrc = {"NETRC": str(tmp_path / "none"), "HOME": str(tmp_path)}
    lines = doctor(*words, code=1, GLOO_SOCKET_IFNAME="nosuch0", **netrc)
    assert {name for name, (state, _) in lines.items() if state == BAD} == {"data", "collectives", "save path", "wandb"}
    assert "nowhere` matches no file" in lines["data"][1]
    assert "gloo did not work" in lines["collectives"][1] and "GLOO_SOCKET_IFNAME" in lines["collectives"][1]
    assert "cannot be written: Not a directory" in lines["save path"][1]


def test_a_check_that_hangs_dies_or_breaks(tmp_path):
    """It is ended in its time with all that it started, what it had found is kept, and the next one goes on."""
    child = "import subprocess, sys; subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(99)', TAG]); "
    bodies = {
        "hangs": "yield Finding('OK', 'first', 'seen', {'a': 1}); " + child + "import time; time.sleep(99)",
        "dies": "assert facts == {'a': 1}; import os, signal; os.kill(os.getpid(), signal.SIGKILL); yield",
        "breaks": "raise ZeroDivisionError('by\\nnothing'); yield",
        "fine": "print('noise'); yield Finding('OK', 'fine', 'a\\x1b[31mb')",
    }
    tag = f"tag-{os.getpid()}-{tmp_path.name}"
    for name, body in bodies.items():
        text = f"from dist_kd.doctor import Finding\nTAG = {tag!r}\ndef check(config, facts):\n    {body}\n"
        (tmp_path / f"check_{name}.py").write_text(text)
    code = (
        "from dist_kd.doctor import *; from dist_kd.doctor import Check, Config, examine\n"
        f"checks = tuple(Check(n, 'check_' + n, 2, 'LOOK', torch=False) for n in {list(bodies)})\n"
        "print([tuple(f)[:3] for f in examine(Config(), checks)])"
    )
    path = os.pathsep.join([str(tmp_path), str(Path(__file__).parents[2])])
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, env=plain_env(PYTHONPATH=path))
    assert done.returncode == 0 and done.stderr == ""
    first, hangs, dies, breaks, fine = eval(done.stdout)
    assert first == (OK, "first", "seen")
    assert hangs[:2] == (LOOK, "hangs") and "not done within 2 s" in hangs[2]
    assert dies[:2] == (BAD, "dies") and "exit code -9" in dies[2]
    assert breaks == (BAD, "breaks", "ZeroDivisionError: by")
    assert fine == (OK, "fine", "a\\x1b[31mb")
    assert processes_with(tag) == []


# ------------------------------------------------------------------------------------------- save path


def test_a_good_place_is_left_as_it_was(tmp_path):
    room, speed = save_path.check(config("--save-path", str(tmp_path / "a" / "b")), {"classes": 10})
    assert (room.state, speed.state) == (OK, OK)
    # cnn_small: 24,346 parameters and some buffers, with SGD's momentum; 4 bytes each
    assert re.search(r"checkpoints of 0\.(19|20) MB take 0\.(78|79|80) MB", room.text), room.text
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def disk(tmp_path):
    """4 MB of their own."""
    where = tmp_path / "disk"
    where.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "none", str(where)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    if done.returncode != 0:
        pytest.skip(f"mounting a tmpfs needs root: {done.stderr.strip()}")
    yield where
    subprocess.run(["umount", "-l", str(where)], check=True, timeout=20)


def test_too_little_disk(disk):
    found = list(
        save_path.check(config("--save-path", str(disk / "run")).model_copy(update={"arch": "efficientnet_b0"}), {})
    )
    assert found[0].state == BAD and "make room" in found[0].text
    assert "4.19 MB free, and checkpoints of 42.48 MB take 0.17 GB (--keep 2" in found[0].text
    tight = list(save_path.check(config("--keep", "12", "--save-path", str(disk / "run")), {"classes": 10}))
    assert tight[0].state == LOOK  # 14 of 0.2 MB of 4.2 MB
    assert list(disk.iterdir()) == []


def test_a_read_only_disk(disk):
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True, timeout=20)
    (found,) = save_path.check(config("--save-path", str(disk / "run")), {})
    assert found.state == BAD and "cannot be written: Read-only file system; choose another" in found.text


@pytest.mark.parametrize("momentum", [0.9, 0.0])
@pytest.mark.parametrize("name", list(save_path.SLOTS))
def test_slots_are_what_the_optimizer_keeps(name, momentum):
    network = build("cnn_small", 10, image_size=8)
    parameters = sum(p.numel() for p in network.parameters())
    chosen = config("--optimizer", name, "--momentum", str(momentum))
    optimizer = make_optimizer(chosen, network)
    network(torch.zeros(2, 3, 8, 8)).logits.sum().backward()
    optimizer.step()
    kept = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t is not None and t.ndim)
    assert save_path.checkpoint_bytes(chosen, parameters, 0) == 4 * (parameters + kept)


# ------------------------------------------------------------------------------------------------ data


def test_damaged_samples(tmp_path):
    where = tmp_path / "digits"
    assert console(["pack", "digits", str(where), "--limit-per-class", "21", "--jobs", "1"]) == 0
    (shard,) = (where / "train").glob("*.tar")
    from dist_kd.data.index import read_index

    rows = read_index(where / "train").rows
    with shard.open("r+b") as file:
        for row in rows[::42]:  # 5 of 210
            file.seek(int(row["offset"]) + 30)
            file.write(b"damage")

    def states(*words: str) -> dict[str, Finding]:
        return {f.name: f for f in speed_of_data.check(config("--data", str(where), "--workers", "0", *words), {})}

    found = states()["samples"]
    assert found.state == BAD and "5 of 210 samples are damaged (sample 0 of shard" in found.text
    assert "so a run would stop" in found.text
    found = states("--max-bad-fraction", "0.03")
    assert found["samples"].state == LOOK and found["data"].facts == {"classes": 10, "samples": 210}
    with pytest.raises(DataError, match="bytes where its index says"):
        shard.write_bytes(shard.read_bytes()[:-20_000])
        states()


def test_without_data():
    (found,) = speed_of_data.check(config(), {})
    assert found.state == LOOK and "not looked at" in found.text


# ---------------------------------------------------------------------------------- packages and W&B


def test_versions_against_floors():
    lines = ["torch>=2", "numpy>=999", "nothere>=1.5", 'absent>=1; extra == "timm"', 'gone; python_version < "3"']
    assert packages.unmet(lines[:1], set()) == []
    numpy, nothere = packages.unmet(lines, set())
    assert re.fullmatch(r"numpy is \S+, and >=999 is needed", numpy)
    assert nothere == "nothere is missing (>=1.5 is needed)"
    assert packages.unmet(lines[3:], {"timm"}) == ["absent is missing (>=1 is needed)"]
    assert packages.extras(Config(arch="timm/resnet18", tensorboard=True)) == {"timm", "tensorboard"}
    assert packages.extras(config("--data", "s3://bucket/set")) == {"s3"}


def test_the_state_of_wandb(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))

    def said(*words: str) -> tuple[str, str]:
        (found,) = wandb_state.check(config(*words), {})
        return found.state, found.text

    state, text = said()
    assert state == OK and text.startswith("not asked for; ") and "no API key" in text
    state, text = said("--wandb")
    assert state == BAD and "would be offline (no API key" in text and "WANDB_MODE=offline" in text
    canary = "canary" * 8
    monkeypatch.setenv("WANDB_API_KEY", canary)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")  # where nobody answers
    state, text = said("--wandb")
    assert state == BAD and "127.0.0.1:9" in text and canary not in text
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert said("--wandb")[0] == OK


# ----------------------------------------------------------------------------------------------- batch


def test_memory_of_a_micro_batch_is_a_straight_line(monkeypatch):
    """1 GiB, 2 for the first step of any size, 1/8 for each row: 128 rows need 19, and 11 are there."""
    gib, seen = 2**30, [0]

    def step(rows: int) -> float:
        seen.append(rows)
        return 0.001

    def peak() -> int:
        return int(gib * (1 + 2 * (max(seen) > 0) + max(seen) / 8))

    monkeypatch.setattr(batch, "_peak", peak)
    monkeypatch.setattr(batch, "memory", lambda: (64 * gib, 10 * gib))
    rows, _, found = batch._on_cpu(step, 128, end=float("inf"))
    assert rows == 128 and found.state == BAD
    assert "needs 19.0 GiB of the 11.0 GiB" in found.text and "--device-batch-size 64 or less" in found.text
    seen[:] = [0]
    rows, _, found = batch._on_cpu(step, 64, end=float("inf"))
    assert (rows, found.state) == (64, OK) and "needs 11.0 GiB" in found.text


def test_what_fits_a_gpu_is_found_by_trying(monkeypatch):
    """One on which 48 rows fit."""

    def step(rows: int) -> float:
        if rows > 48:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0.001

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (2**30, 2**30))
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**29)
    rows, _, found = batch._on_gpu(step, 128)
    assert (rows, found.state) == (32, BAD) and "one of 32 does: --device-batch-size 32" in found.text
    rows, _, found = batch._on_gpu(step, 12)
    assert (rows, found.state) == (12, OK) and "takes 0.5 GiB of the GPU's 1.0 GiB; one of 48 fits too" in found.text
    rows, seconds, found = batch._on_gpu(lambda rows: step(99), 8)
    assert (rows, seconds, found.state) == (0, 0.0, BAD)


def test_a_stop_ends_the_check_under_way(digits, tmp_path):
    run = tmp_path / "run"
    command = [sys.executable, "-m", "dist_kd.commands.main", "doctor", *SMALL, "--data", str(digits)]
    command += ["--save-path", str(run), "--no-in-memory"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=plain_env(PYTHONUNBUFFERED="1"))
    with process:
        for line in process.stdout:
            if " samples " in line:  # the first half of the check of data: workers come next
                process.terminate()
                break
        assert process.wait(30) == 143
    assert processes_with(str(run)) == []


def test_every_check_is_on_the_list_once():
    there = {path.stem for path in Path(save_path.__file__).parent.glob("*.py")} - {"__init__", "student"}
    assert {check.module.rpartition(".")[2] for check in CHECKS} == there and len(CHECKS) == len(there)
