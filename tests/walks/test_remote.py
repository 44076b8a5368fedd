"""Runs on shards of another machine: the same numbers as on local ones, one download a node, and a server that dies."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from functools import partial
from pathlib import Path

import pytest
from data.bad_server import BadServer, status
from dist.launching import launch, world_size
from walks.training import assert_same, final_state, train
from walks.training import status as status_of

from dist_kd import wiring
from dist_kd.cli import parse
from dist_kd.commands.main import main
from dist_kd.data import remote_sets
from dist_kd.data.order import choose_layout
from dist_kd.data.remote import Limits, read_small
from dist_kd.errors import ConfigError, DataError
from dist_kd.lifetime import run_training

TESTS = Path(__file__).parent.parent
TARS = ("--no-in-memory", "--workers", "2")
PLAIN = [
    "--arch", "cnn_small", "--no-kd", "--image-size", "8", "--batch-size", "32", "--device-batch-size", "16",
    "--log-steps", "4", "--no-in-memory", "--cpu", "--workers", "1",
]  # fmt: skip


@pytest.fixture(scope="module")
def served(digits):
    """(server, where the shards of 41 digits of each class lie behind it)."""
    files = {f"set/{path.relative_to(digits)}": path.read_bytes() for path in digits.rglob("*") if path.is_file()}
    with BadServer(files) as server:
        yield server, server.url("set")


@pytest.fixture(autouse=True)
def cold_cache(served, tmp_path, monkeypatch):
    """No test finds what another fetched; the server counts anew."""
    monkeypatch.setenv("DIST_KD_CACHE", str(tmp_path / "cache"))
    served[0].asked.clear()
    served[0].always.clear()


def downloads(server: BadServer) -> Counter:
    return Counter(asked.path for asked in server.asked if asked.path.endswith(".tar"))


def all_once(server: BadServer) -> Counter:
    return Counter(path for path in server.files if path.endswith(".tar"))


def windows_as_if_remote(monkeypatch) -> None:
    monkeypatch.setattr(wiring, "choose_layout", lambda sizes, batch, local: choose_layout(sizes, batch, local=False))


def test_http_equals_local_and_a_warm_cache_asks_for_no_shard(digits, served, tmp_path, monkeypatch, capsys):
    server, url = served
    assert train(tmp_path / "cold", url, *TARS) == "done"
    said = capsys.readouterr().out
    assert re.search(rf"remote, through {tmp_path}/cache: up to 100 GB, .*16 streams of windows of \d+", said)
    assert downloads(server) == all_once(server)
    assert train(tmp_path / "warm", url, *TARS) == "done"
    assert downloads(server) == all_once(server)
    windows_as_if_remote(monkeypatch)
    assert train(tmp_path / "local", digits, *TARS, "--cache-gb", "50") == "done"
    assert "--cache-gb 50 has no effect: the shards are on this machine" in capsys.readouterr().out
    local = final_state(tmp_path / "local")
    assert_same(final_state(tmp_path / "cold"), local)
    assert_same(final_state(tmp_path / "warm"), local)


def test_a_run_goes_on_where_the_shards_now_lie(digits, served, tmp_path, monkeypatch):
    """Remote, then local, then remote: one run, with the windows of its first start."""
    _, url = served
    run = tmp_path / "run"
    assert train(run, url, *TARS, stop_at_batch=9) == "preempted"
    assert train(run, digits, *TARS, stop_at_batch=9) == "preempted"
    assert train(run, f"{url}/train", "--val-data", f"{url}/val", *TARS) == "done"
    windows_as_if_remote(monkeypatch)
    assert train(tmp_path / "whole", digits, *TARS) == "done"
    assert_same(final_state(run), final_state(tmp_path / "whole"))


def test_other_data_is_still_other_data(digits, served, tmp_path):
    _, url = served
    assert train(tmp_path, url, *TARS, stop_at_batch=3) == "preempted"
    with pytest.raises(ConfigError, match=r"other settings that change the result: val_data: "):
        train(tmp_path, url, *TARS, "--val-data", str(digits / "train"))


def test_a_budget_too_small_is_refused_before_the_first_shard(served, tmp_path):
    server, url = served
    with pytest.raises(ConfigError, match=r"--cache-gb `0.0001` is too little .* give --cache-gb 0.000\d+ or more"):
        train(tmp_path, url, *TARS, "--cache-gb", "0.0001")
    assert not downloads(server) and server.asked  # the index was read


def test_killed_and_resumed(digits, served, tmp_path, monkeypatch):
    server, url = served
    code = (
        "from pathlib import Path; from walks.training import train; "
        f"train(Path({str(tmp_path / 'run')!r}), {url!r}, *{TARS}, stop_at_batch=18, how='SIGKILL')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=TESTS)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert train(tmp_path / "run", url, *TARS) == "done"
    assert downloads(server) == all_once(server)
    windows_as_if_remote(monkeypatch)
    assert train(tmp_path / "local", digits, *TARS) == "done"
    assert_same(final_state(tmp_path / "run"), final_state(tmp_path / "local"))


def test_two_processes_share_one_download(served, tmp_path, capsys):
    server, url = served
    run = tmp_path / "run"
    said = launch("torchrun", "dist_kd/train.py", *PLAIN, "--epochs", "2", "--data", url, "--save-path", str(run))
    assert world_size(run) == 2
    assert downloads(server) == all_once(server)
    assert Counter(asked.path for asked in server.asked)["set/train/index.npy"] == 1
    assert "16 streams" in said
    capsys.readouterr()
    assert main(["evaluate", str(run), "--json", "--workers", "0"]) == 0
    summary = json.loads((run / "summary.json").read_text())
    assert json.loads(capsys.readouterr().out)["top1"] == summary["student"]["last"]["top1"]
    assert downloads(server) == all_once(server)


@pytest.mark.slow
def test_a_server_that_dies_ends_the_run_in_time_and_its_return_goes_on(served, tmp_path):
    """A cache of the least size, so that shards are evicted and asked for again; then the server answers no more."""
    server, url = served
    run = tmp_path / "run"
    sizes = sorted(len(server.files[path]) for path in all_once(server) if "/train/" in path)
    small = ["--cache-gb", str((sum(sizes) + 1000) / 1e9), "--loader-timeout", "8", "--epochs", "400"]
    words = [*PLAIN, *small, "--checkpoint-steps", "5", "--eval-steps", "10", "--data", url, "--save-path", str(run)]

    died = []

    def kill_the_server(process) -> None:
        deadline = time.monotonic() + 60
        while not list((run / "checkpoints").glob("step_*/manifest.json")) and time.monotonic() < deadline:
            time.sleep(0.1)
        died.append(time.monotonic())
        server.always.update({path: status(503) for path in all_once(server)})

    said = launch("plain", "dist_kd/train.py", *words, expected=3, limit=90, meanwhile=kill_the_server)
    assert time.monotonic() - died[0] < 30  # the cache's limit of 7.2 s, once for the reader, and the process's end
    assert re.search(r"data error: `http://.*\.tar`.* answered 503", said), said[-2000:]
    failed = status_of(run)
    assert (failed["state"], failed["kind"]) == ("failed", "data") and "answered 503" in failed["message"]
    server.always.clear()

    def stop_it(process) -> None:
        deadline = time.monotonic() + 60
        while latest.read_text() == last and time.monotonic() < deadline:
            time.sleep(0.1)
        (run / "STOP").touch()

    latest = run / "checkpoints" / "latest"
    last = latest.read_text()
    launch("plain", "dist_kd/train.py", *words, expected=75, limit=90, meanwhile=stop_it)
    assert status_of(run)["state"] == "preempted" and status_of(run)["step"] > failed["step"]


@pytest.mark.parametrize(
    ("limits", "bound"),
    [(Limits(attempts=3, pause_s=0.05), 20), pytest.param(None, 150, marks=pytest.mark.slow)],
    ids=["short limits", "its own limits"],
)
@pytest.mark.parametrize("what", ["index.json", "index.npy"])
def test_an_index_that_cannot_be_had_ends_the_start(served, tmp_path, monkeypatch, limits, bound, what):
    """A server that answers 500 for ever: one sentence within its bound, which is also the status; no shard is had."""
    server, url = served
    server.always[f"set/train/{what}"] = status(500)
    if limits:
        monkeypatch.setattr(remote_sets, "read_small", partial(read_small, limits=limits))
    began = time.monotonic()
    words = [*PLAIN, "--epochs", "1", "--data", url, "--save-path", str(tmp_path / "run")]
    with pytest.raises(DataError) as caught:
        run_training(parse(words, {}))
    assert time.monotonic() - began < bound
    attempts = limits.attempts if limits else 10
    found = f"`{url}/train/{what}` answered 500 Internal Server Error; gave up after {attempts} attempts "
    assert str(caught.value).startswith(found)
    assert str(caught.value).endswith("see to that server, or copy the data here; then the same command goes on")
    assert status_of(tmp_path / "run")["message"] == str(caught.value)
    assert not downloads(server)


def test_foreign_shards_are_indexed_once(digits, served, tmp_path, monkeypatch, caplog):
    """The same tars without an index, named by a pattern."""
    monkeypatch.setattr(remote_sets, "JOBS", 1)  # a process more takes seconds to start
    server, _ = served
    for split in ("train", "val"):
        for path in sorted((digits / split).glob("*.tar")):
            server.files[f"foreign/{path.name}"] = path.read_bytes()
    names = sorted(path.removeprefix("foreign/") for path in server.files if path.startswith("foreign/"))
    train_last, val_last = (sum(split in name for name in names) - 1 for split in ("train", "val"))
    data = ["--val-data", server.url(f"foreign/digits-val-{{000000..{val_last:06d}}}.tar"), *TARS]
    where = server.url(f"foreign/digits-train-{{000000..{train_last:06d}}}.tar")
    assert train(tmp_path / "one", where, *data, stop_at_batch=4) == "preempted"
    assert "one-time pass over all of them" in caplog.text
    first = downloads(server)
    assert set(first.values()) == {1}
    caplog.clear()
    assert train(tmp_path / "two", where, *data, stop_at_batch=4) == "preempted"
    assert downloads(server) == first and "one-time pass" not in caplog.text


def test_commands_on_remote_shards(digits, served, tmp_path, capsys):
    server, url = served
    assert main(["verify", url, "--jobs", "1"]) == 0
    assert capsys.readouterr().out.count(": well") == 2
    pattern = url + "/train/" + next(iter(digits.glob("train/*.tar"))).name
    assert main(["index", pattern, "--jobs", "1"]) == 2 and "--output DIR" in capsys.readouterr().err
    assert main(["index", pattern, "--output", str(tmp_path / "index"), "--jobs", "1", "--augment", "crop"]) == 0
    assert main(["verify", str(tmp_path / "index"), "--jobs", "1"]) == 0
    path = next(iter(path for path in all_once(server) if "/train/" in path))
    shutil.rmtree(tmp_path / "cache")
    server.files[path], good = server.files[path][:2048] + b"x" + server.files[path][2049:], server.files[path]
    try:
        assert main(["verify", url, "--jobs", "1"]) == DataError.exit_code
        assert "has sha256" in capsys.readouterr().err
    finally:
        server.files[path] = good


def test_a_shard_replaced_or_gone_before_the_start(digits, tmp_path):
    copy = tmp_path / "set"
    shutil.copytree(digits, copy)
    shard = sorted((copy / "train").glob("*.tar"))[1]
    os.truncate(shard, shard.stat().st_size - 512)
    with pytest.raises(DataError, match=rf"shard `{shard}` has \d+ bytes where its index says \d+"):
        train(tmp_path / "run", copy, *TARS)
    shard.unlink()
    with pytest.raises(DataError, match=rf"shard `{shard}` cannot be read \(No such file"):
        train(tmp_path / "run", copy, *TARS)
