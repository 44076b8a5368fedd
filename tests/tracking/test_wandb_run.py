"""Real runs of the real package, without a network: offline, refused, killed, unwritable."""

import json
import os
import signal
import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

import pytest
from tracking.slow_wandb import SlowWandb

from dist_kd.tracking import wandb_run
from dist_kd.tracking.wandb_run import CONNECT_SECONDS, decide_mode, flatten, reachable

pytest.importorskip("wandb")
SLOW = pytest.mark.slow
FAKE_KEY = "0123456789abcdef" * 2 + "01234567"

PROGRAM = """
import json, os, signal, sys, time
from pathlib import Path
from dist_kd.tracking import open_tracker, wandb_run

run_dir, plan = Path(sys.argv[1]), json.loads(sys.argv[2])
for name, value in plan["limits"].items():
    setattr(wandb_run, name, value)
times = {}

def timed(label, call, *args, **kwargs):
    start = time.perf_counter()
    result = call(*args, **kwargs)
    times[label] = time.perf_counter() - start
    return result

tracker = timed("open", open_tracker, run_dir, run_id="run1", name="student", settings={"T": 4.0, "arch": "tiny"},
                total_steps=5, wandb=True, wandb_project="proj", tensorboard=False, resumed_step=plan["resumed_step"])
for step in range(1, 1 + plan["steps"]):
    if step == 3 and plan["signal"]:
        tasks = Path("/proc/self/task").glob("*/children")  # children of any thread
        children = [int(pid) for found in tasks for pid in found.read_text().split()]
        assert children, "the service should be a child"
        for child in children:
            os.kill(child, plan["signal"])
        time.sleep(0.5)
    timed("log", tracker.log, {"train/loss": 1 / step, "train/top1": 10.0 * step}, step)
tracker.log({"val/top1": 55.0}, 5, kind="val")
tracker.summary({"student": {"last": {"top1": 55.0}}})
timed("close", tracker.close, "done")
print("times " + json.dumps(times))
"""


def free_port() -> int:
    """A port nobody listens on, so that a connection is refused at once."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def train(
    run_dir: Path,
    secret: str = "",
    *,
    hurt: int = 0,
    steps: int = 5,
    resumed_step: int | None = None,
    limits: dict[str, float] | None = None,
    **env: str,
):
    """Runs PROGRAM as a user without W&B settings would; returns its output lines and the times of its calls."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB") and not k.lower().endswith("_proxy")}
    home = run_dir / "home"
    home.mkdir(exist_ok=True)
    limits = {"INIT_SECONDS": 2.0} | (limits or {})
    plan = json.dumps({"signal": hurt, "steps": steps, "resumed_step": resumed_step, "limits": limits})
    command = [sys.executable, "-c", PROGRAM, str(run_dir), plan, *([secret] if secret else [])]
    done = subprocess.run(
        command,
        env=clean | {"HOME": str(home), **env},
        capture_output=True,
        text=True,
        timeout=90,
    )
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert len((run_dir / "metrics.jsonl").read_text().splitlines()) > steps
    return lines, json.loads(lines[-1].removeprefix("times ")), done.stderr


def assert_kept(lines: list[str]) -> None:
    """One line says that the run is offline, and all its steps are in the folder that it names."""
    assert not any("warning" in line for line in lines), lines
    (said,) = [line for line in lines if line.startswith("W&B offline (")]
    stored = list(records(next(Path(said.rpartition(" ")[2]).glob("*.wandb"))))
    assert sum(record.WhichOneof("record_type") == "history" for record in stored) == 6


def records(path: Path):
    """The records of a .wandb file: a header of 7 bytes, then a log in blocks of 32 KiB (the format of LevelDB)."""
    from wandb.proto import wandb_internal_pb2

    data, at, part = path.read_bytes(), 7, b""
    while at + 7 <= len(data):
        room = 32768 - at % 32768
        if room < 7:
            at += room
            continue
        _, size, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or last part
            record = wandb_internal_pb2.Record()
            record.ParseFromString(part)
            part = b""
            yield record


def test_without_a_key_the_run_is_offline_complete_and_can_be_resumed(tmp_path):
    secret = "--token=do-not-store-me"
    lines, times, _ = train(tmp_path, secret)
    assert lines[0].startswith("W&B offline (no API key for api.wandb.ai); upload later: wandb sync ")
    folder = Path(lines[0].rpartition(" ")[2])
    assert folder.parent == tmp_path / "wandb"
    stored = list(records(next(folder.glob("*.wandb"))))

    run = next(record.run for record in stored if record.WhichOneof("record_type") == "run")
    assert (run.run_id, run.project, run.display_name) == ("run1", "proj", "student")
    config = {item.key: json.loads(item.value_json) for item in run.config.update if item.key != "_wandb"}
    assert config == {"T": 4.0, "arch": "tiny"}

    rows = [
        {(item.key or "/".join(item.nested_key)): json.loads(item.value_json) for item in record.history.item}
        for record in stored
        if record.WhichOneof("record_type") == "history"
    ]
    assert [(row["step"], row.get("train/loss"), row.get("val/top1")) for row in rows] == [
        *((step, 1 / step, None) for step in range(1, 6)),
        (5, None, 55.0),
    ]
    metrics = [record.metric for record in stored if record.WhichOneof("record_type") == "metric"]
    assert any(metric.glob_name == "*" and metric.step_metric == "step" for metric in metrics)

    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"do-not-store-me" not in written  # what else is on the command line stays here

    # training is not held up; the limits leave room for a busy machine
    assert times["log"] < 0.2 and times["close"] < 10

    again, _, _ = train(tmp_path, resumed_step=3)
    second = Path(again[0].rpartition(" ")[2])
    assert second != folder and second.name.endswith("run1")


def test_refused_server_is_found_out_before_init(tmp_path):
    env = {"WANDB_API_KEY": FAKE_KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}"}
    lines, _, _ = train(tmp_path, **env)
    assert lines[0].startswith("W&B offline (no answer from 127.0.0.1:")


def test_online_by_force_against_a_refused_server_is_offline(tmp_path):
    env = {"WANDB_API_KEY": FAKE_KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{free_port()}", "WANDB_MODE": "online"}
    lines, times, _ = train(tmp_path, **env)
    assert_kept(lines)
    assert times["open"] < 30  # init_timeout 2 s here, and the start of Python packages on a busy machine


def test_a_killed_service_is_one_warning(tmp_path):
    lines, times, _ = train(tmp_path, hurt=signal.SIGKILL)
    assert sum("warning: W&B is off from here on" in line for line in lines) == 1
    assert times["close"] < 30


def test_a_stuck_service_holds_up_nothing(tmp_path):
    """A stopped process takes what fits into a socket; then whoever writes to it would wait for ever."""
    limits = {"MOST_WAITING": 100, "FINISH_SECONDS": 1.0, "LEEWAY_SECONDS": 1.0}
    lines, times, _ = train(tmp_path, hurt=signal.SIGSTOP, steps=6000, limits=limits)
    assert sum("warning: W&B does not keep up" in line for line in lines) == 1
    assert sum("warning: W&B did not end in time" in line for line in lines) == 1
    assert times["close"] < 20  # its limit is 2 s, and this machine may be busy
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 6001


@pytest.mark.parametrize("limit", [2.0, 20.0])
def test_a_server_that_accepts_and_never_answers(tmp_path, limit):
    """The connection stands, so that only init finds it out; training does not wait for that longer than its limit."""
    with socket.create_server(("127.0.0.1", 0)) as hole:
        env = {"WANDB_API_KEY": FAKE_KEY, "WANDB_BASE_URL": f"http://127.0.0.1:{hole.getsockname()[1]}"}
        limits = {"START_SECONDS": limit, "INIT_SECONDS": 7.0 if limit == 2 else 2.0}
        lines, times, _ = train(tmp_path, limits=limits, **env)
    assert times["open"] < 2 + 18  # 2 s in either case, and this machine may be busy
    assert lines[0].startswith("W&B has not opened within 2 s" if limit == 2 else "W&B offline (")
    assert_kept(lines)


@pytest.mark.parametrize(
    ("pause", "online"),
    [(0.3, True), (6.0, False), pytest.param(3.0, True, marks=SLOW), pytest.param(30.0, False, marks=SLOW)],
)
def test_a_server_that_answers_slowly(tmp_path, pause, online):
    """Online if the three answers of a start come in time, else offline with all that is to be uploaded."""
    slow = pause in (3, 30)
    limits = {"INIT_SECONDS": wandb_run.INIT_SECONDS if slow else 4.0, "START_SECONDS": 10.0 if slow else 2.0}
    with SlowWandb(pause) as server:
        lines, times, _ = train(tmp_path, limits=limits, WANDB_API_KEY=FAKE_KEY, WANDB_BASE_URL=server.url)
    assert times["open"] < limits["START_SECONDS"] + 10  # this machine may be busy
    assert times["log"] < 0.2
    assert server.asked
    if online:
        assert any(line.startswith("W&B online: ") for line in lines), lines
        assert sorted(server.history) == [1, 2, 3, 4, 5, 5]
        assert not any("warning" in line for line in lines), lines
    else:
        assert_kept(lines)


def test_the_start_is_delayed_by_10_seconds_at_most():
    assert wandb_run.START_SECONDS <= 10


def test_a_password_in_the_server_s_address_is_not_printed(tmp_path):
    nowhere = {"NETRC": str(tmp_path / "none")}
    for address in ("http://me:hidden@127.0.0.1:1", "http://me:hidden@127.0.0.1:port"):
        assert "hidden" not in str(decide_mode({"WANDB_BASE_URL": address} | nowhere))
        assert "hidden" not in str(decide_mode({"WANDB_BASE_URL": address, "WANDB_API_KEY": "k"} | nowhere))


def test_disabled_says_and_writes_nothing(tmp_path):
    lines, _, _ = train(tmp_path, WANDB_MODE="disabled")
    assert not any("W&B" in line for line in lines)
    assert not (tmp_path / "wandb").exists()


def test_unwritable_folder_does_not_stop_training(tmp_path):
    (tmp_path / "wandb").write_text("a file where the folder should be")  # refuses also the superuser
    lines, _, _ = train(tmp_path)
    assert "W&B" in lines[0]
    if lines[0].startswith("W&B offline"):  # wandb falls back to the temporary folder: the line says where it really is
        assert Path(lines[0].rpartition(" ")[2]).is_dir()


@pytest.fixture
def no_proxy(monkeypatch):
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


def test_mode_follows_variable_then_key_then_server(tmp_path, no_proxy):
    nowhere = {"NETRC": str(tmp_path / "none")}
    assert decide_mode({"WANDB_MODE": "shared"})[0] == "shared"
    assert decide_mode(nowhere)[0] == "offline"
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        assert decide_mode({"WANDB_API_KEY": "k", "WANDB_BASE_URL": address} | nowhere)[0] == "online"
        assert decide_mode({"WANDB_BASE_URL": address} | nowhere)[0] == "offline"
        file = tmp_path / "netrc"
        file.write_text(f"machine {address.removeprefix('http://')} login user password {FAKE_KEY}\n")
        file.chmod(0o600)
        assert decide_mode({"WANDB_BASE_URL": address, "NETRC": str(file)})[0] == "online"
        # a key for another host is none for this one
        assert decide_mode({"NETRC": str(file)})[0] == "offline"
    assert decide_mode({"WANDB_API_KEY": "k", "WANDB_BASE_URL": address})[0] == "offline"  # closed by now
    assert decide_mode({"WANDB_API_KEY": "k", "WANDB_BASE_URL": "http://h:port"})[0] == "offline"
    file.write_text("machine without sense {")
    assert decide_mode({"NETRC": str(file)})[0] == "offline"


def test_through_a_proxy_the_proxy_is_asked(no_proxy, monkeypatch):
    with socket.socket() as proxy:
        proxy.bind(("127.0.0.1", 0))
        proxy.listen()
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{proxy.getsockname()[1]}")
        assert decide_mode({"WANDB_API_KEY": "k", "WANDB_BASE_URL": "https://wandb.invalid"})[0] == "online"


def test_a_server_that_never_answers_costs_its_limit_and_no_more():
    with socket.socket() as full:  # a listener with a full queue drops further connections
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        port = full.getsockname()[1]
        waiting = [socket.socket() for _ in range(4)]
        for client in waiting:
            client.setblocking(False)
            client.connect_ex(("127.0.0.1", port))
        start = time.perf_counter()
        assert not reachable("127.0.0.1", port, seconds=0.5)
        assert time.perf_counter() - start < 0.5 + CONNECT_SECONDS
        for client in waiting:
            client.close()


def test_flatten_joins_names_and_leaves_lists_out():
    nested = {"student": {"last": {"top1": 55.0}}, "teacher": None, "formula": "CE", "rows": [1], "ok": True}
    assert flatten(nested) == {"student/last/top1": 55.0, "formula": "CE", "ok": True}
