"""A real S3 interface on this machine (moto's server), asked by s3fs with credentials from the environment."""

from __future__ import annotations

import hashlib
import itertools
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import requests
import s3fs
import torch
from data.bad_server import Wire
from data.node_cache import QUICK, fetch, left, opener, within

from dist_kd.data import remote_sets
from dist_kd.data.finding import open_data, split_folder
from dist_kd.data.remote import Forbidden, NotThere, list_tars, read_small
from dist_kd.data.shard_cache import ShardCache
from dist_kd.errors import DataError

SHARD = np.random.default_rng(2).bytes(9_000_000)  # three reads of a store
GOOD = hashlib.sha256(SHARD).hexdigest()
URL = "s3://bucket/train/a.tar"
SERVER = """
import sys
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print(server.get_host_and_port()[1], flush=True)
sys.stdin.read()
server.stop()
"""


@pytest.fixture(scope="module")
def port():
    """Of the server, which ends when its stdin closes."""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
    process = subprocess.Popen([sys.executable, "-c", SERVER], text=True, **pipes)
    try:
        port = int(process.stdout.readline())
        requests.put(f"http://127.0.0.1:{port}/bucket", timeout=10).raise_for_status()
        for name in ("train/a.tar", "train/b.tar", "train/index.json", "train/deep/c.tar"):
            content = SHARD if name == "train/a.tar" else b"0123456789"
            requests.put(f"http://127.0.0.1:{port}/bucket/{name}", data=content, timeout=10).raise_for_status()
        yield port
    finally:
        process.stdin.close()
        process.wait(20)
        process.stdout.close()


@pytest.fixture
def through(port, monkeypatch):
    """Sets the endpoint, as a user does by the environment."""

    def use(endpoint: int) -> None:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{endpoint}")
        s3fs.S3FileSystem.clear_instance_cache()  # it would keep the endpoint of the test before

    for name, value in {
        "AWS_ACCESS_KEY_ID": "name", "AWS_SECRET_ACCESS_KEY": "k4n4ry", "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_CONFIG_FILE": "/dev/null", "AWS_SHARED_CREDENTIALS_FILE": "/dev/null", "AWS_EC2_METADATA_DISABLED": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    use(port)
    yield use
    s3fs.S3FileSystem.clear_instance_cache()


@pytest.fixture
def cache(tmp_path) -> ShardCache:
    return ShardCache(tmp_path / "cache", 10**8, 30.0, QUICK)


def test_a_bucket_is_listed_and_read(through):
    both = ["s3://bucket/train/a.tar", "s3://bucket/train/b.tar"]
    assert list_tars("s3://bucket/train") == list_tars("s3://bucket/train/*.tar") == both
    assert read_small("s3://bucket/train/index.json", 100) == b"0123456789"
    for url in ("s3://bucket/none.tar", "s3://none/a.tar", "s3://bucket/train"):
        with pytest.raises(NotThere):
            read_small(url, 100)
    for url in ("s3://none", "s3://bucket/train/x-*.tar"):
        with pytest.raises(NotThere):
            list_tars(url)


@pytest.mark.parametrize("known", [(len(SHARD), GOOD), (None, None)], ids=["indexed", "foreign"])
def test_a_shard_comes_once(through, port, cache, known):
    with Wire(port) as wire:
        through(wire.port)
        for _ in range(2):
            assert fetch(cache, URL, *known) == SHARD
        assert len(SHARD) < wire.passed < 1.1 * len(SHARD)


def test_after_kill_9_the_rest_comes_by_range(through, port, cache):
    part = cache.folder / "shards" / f"{GOOD}.part"
    with Wire(port, most=6_000_000) as wire:
        through(wire.port)
        process = opener(URL, cache.folder, len(SHARD), GOOD, cache.limit_bytes)
        try:
            with within(40):
                while not part.exists() or part.stat().st_size < 4_000_000:
                    assert process.poll() is None
                    time.sleep(0.05)
        finally:
            process.kill()
            process.communicate(timeout=10)
    with Wire(port) as wire:
        through(wire.port)
        assert fetch(cache, URL, len(SHARD), GOOD) == SHARD
        assert wire.passed < 0.7 * len(SHARD)
    assert left(cache) == [".tar"]


def test_silence_is_bounded(through, port, tmp_path):
    with Wire(port, most=5_000_000) as wire:
        through(wire.port)
        with within(20), pytest.raises(DataError, match="did not come in time; gave up at its time limit"):
            fetch(ShardCache(tmp_path, 10**8, 4.0, QUICK), URL, len(SHARD), GOOD)


def test_nobody_listens(through, port, cache):
    with Wire(port) as wire:
        pass
    through(wire.port)
    with within(40), pytest.raises(DataError, match="gave up after 3 attempts"):
        fetch(cache, URL, len(SHARD), GOOD)


def test_bad_credentials_are_a_sentence_without_them(through, port, cache, caplog, monkeypatch):
    requests.post(f"http://127.0.0.1:{port}/moto-api/reset-auth", data=b"0", timeout=10).raise_for_status()
    try:
        for ask in (lambda: fetch(cache, URL, len(SHARD), GOOD), lambda: list_tars("s3://bucket/train")):
            with within(10), pytest.raises(Forbidden, match="credentials given") as caught:
                ask()
            assert "k4n4ry" not in str(caught.value) + caplog.text
    finally:
        requests.post(f"http://127.0.0.1:{port}/moto-api/reset-auth", data=b"inf", timeout=10).raise_for_status()
    assert left(cache) == []
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    through(port)
    with within(10), pytest.raises(Forbidden, match="Unable to locate credentials"):
        fetch(cache, URL, len(SHARD), GOOD)


def test_a_set_in_a_bucket_is_found_indexed_and_read(port, through, cache, index, train, tmp_path, monkeypatch):
    """Shards that somebody put there: listed, read once for their index, then by two loader processes."""
    monkeypatch.setenv("DIST_KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_sets, "JOBS", 1)
    for shard in index.shards:
        content = (index.folder / shard.name).read_bytes()
        requests.put(f"http://127.0.0.1:{port}/bucket/set/train/{shard.name}", data=content, timeout=10)
    assert split_folder("s3://bucket/set", "val") is None
    remote = open_data(split_folder("s3://bucket/set", "train"), cache)
    assert (remote.url, remote.shards) == ("s3://bucket/set/train", index.shards)
    small = replace(remote, cache=replace(cache, limit_bytes=max(shard.bytes for shard in index.shards)))
    for how in (remote, small):  # the second evicts and fetches again, also in the forked processes
        batches = train(how, workers=2).batches(0), train(index).batches(0)
        for ours, local in itertools.islice(zip(*batches, strict=True), 8):
            assert torch.equal(ours.images, local.images) and torch.equal(ours.samples, local.samples)
