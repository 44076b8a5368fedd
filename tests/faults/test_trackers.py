"""Trackers that fail while real training runs: its checkpoint is the same byte for byte, and it ends as it would.

Bounds: W&B delays a start by 10 s at most (measured in tests/tracking/test_wandb_run.py); each run ends within 60 s.
"""

import json
import os
import socket
import subprocess
from pathlib import Path

import pytest
from faults.zygote import SMALL, free_port
from tracking.slow_wandb import SlowWandb
from walks.training import assert_same, final_state, status

pytest.importorskip("wandb")
pytest.importorskip("tensorboard")
KEY = "0123456789abcdef" * 2 + "01234567"
END_SERVICE = (
    "for p in $(cat /proc/$PPID/task/*/children); do grep -q wandb-core /proc/$p/comm && kill -KILL $p; done; :"
)


def job(folder: Path, data: Path, *more: str, **facts) -> dict:
    """A run of 11 steps that logs at every other, without any W&B settings of this machine."""
    folder.mkdir(exist_ok=True)
    clean = {name: "" for name in os.environ if name.startswith("WANDB") or name.lower().endswith("_proxy")}
    env = clean | {"HOME": str(folder), "NETRC": str(folder / "none")} | facts.pop("env", {})
    words = [*SMALL, "--data", str(data), "--save-path", str(folder / "run"), *more]
    return {"words": words, "env": env, "out": str(folder / "out"), **facts}


@pytest.fixture(scope="module")
def plain(zygote, origin, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("plain")
    assert zygote.run(job(folder, origin)) == [0]
    return folder / "run"


def digests(run: Path) -> dict:
    newest = max((run / "checkpoints").glob("step_*"))
    files = json.loads((newest / "manifest.json").read_text())["files"]
    return {name: entry["sha256"] for name, entry in files.items() if name.endswith(("safetensors", "pt"))}


def assert_untouched(run: Path, plain: Path) -> None:
    assert status(run)["state"] == "done"
    assert digests(run) == digests(plain) and len(digests(run)) == 3


@pytest.fixture
def full(tmp_path):
    """A disk of its own without a free byte."""
    where = tmp_path / "full"
    where.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64k", "none", where], capture_output=True, timeout=20)
    if done.returncode:
        pytest.skip(f"mounting a tmpfs needs root: {done.stderr.decode().strip()}")
    for name in ("wandb", "tensorboard"):
        (where / name).mkdir()
    (where / "metrics.jsonl").touch()
    with pytest.raises(OSError), (where / "rest").open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    yield where
    subprocess.run(["umount", "-l", where], check=True, timeout=20)


def test_offline_for_want_of_a_key(zygote, plain, origin, tmp_path):
    assert zygote.run(job(tmp_path, origin, "--wandb", "--tensorboard")) == [0]
    assert_untouched(tmp_path / "run", plain)
    assert_same(final_state(tmp_path / "run"), final_state(plain))
    assert "W&B offline (no API key" in (tmp_path / "out").read_text()


def test_its_service_is_killed_in_the_middle(zygote, plain, origin, tmp_path):
    assert zygote.run(job(tmp_path, origin, "--wandb", at_step={"5": END_SERVICE})) == [0]
    assert_untouched(tmp_path / "run", plain)
    assert_same(final_state(tmp_path / "run"), final_state(plain))
    assert (tmp_path / "out").read_text().count("warning: W&B") == 1


def test_a_full_disk_under_all_of_them(zygote, plain, origin, tmp_path, full):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("wandb", "tensorboard", "metrics.jsonl"):
        (run / name).symlink_to(full / name)
    assert zygote.run(job(tmp_path, origin, "--wandb", "--tensorboard")) == [0], (tmp_path / "out").read_text()
    assert_untouched(run, plain)
    said = (tmp_path / "out").read_text()
    assert said.count("warning: metrics.jsonl could not be written ([Errno 28] No space left on device)") == 1, said
    assert (full / "metrics.jsonl").stat().st_size == 0


def test_places_that_take_no_file(zygote, plain, origin, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    for name in ("wandb", "tensorboard"):
        (run / name).write_text("a file where a folder belongs")  # refuses the superuser too
    assert zygote.run(job(tmp_path, origin, "--wandb", "--tensorboard")) == [0], (tmp_path / "out").read_text()
    assert_untouched(run, plain)
    assert "warning: TensorBoard could not be written" in (tmp_path / "out").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["refused", "black hole", "3 s an answer", "30 s an answer"])
def test_a_server_that_is_none_or_slow(zygote, plain, origin, tmp_path, kind):
    pause = float(kind.split()[0]) if kind.endswith("an answer") else 0
    with socket.create_server(("127.0.0.1", 0)) as hole, SlowWandb(pause) as slow:
        urls = {"refused": free_port(), "black hole": hole.getsockname()[1]}
        url = f"http://127.0.0.1:{urls[kind]}" if kind in urls else slow.url
        env = {"WANDB_API_KEY": KEY, "WANDB_BASE_URL": url, "WANDB_MODE": "online"}
        assert zygote.run(job(tmp_path, origin, "--wandb", env=env), limit=110) == [0]
    assert_untouched(tmp_path / "run", plain)
    assert_same(final_state(tmp_path / "run"), final_state(plain))
    said = (tmp_path / "out").read_text()
    assert said.count("W&B online: " if kind == "3 s an answer" else "W&B offline (") == 1, said
    assert "warning" not in said, said
