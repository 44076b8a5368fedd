"""A shard, and how tests open it through the cache of a node, look at what is left, and bound the time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dist_kd.data.remote import Limits
from dist_kd.data.shard_cache import ShardCache

# A busy machine may keep an answer waiting for a second or two: only a test of silence waits for less.
QUICK = Limits(connect_s=5, idle_s=5, attempts=3, pause_s=0.05, longest_pause_s=0.2)
SHORT_SILENCE = replace(QUICK, idle_s=1)
SIZE = 300_000
SHARD = np.random.default_rng(0).bytes(SIZE)
OTHER = np.random.default_rng(1).bytes(SIZE)
GOOD = hashlib.sha256(SHARD).hexdigest()


def fetch(cache: ShardCache, url: str, size: int | None = SIZE, sha256: str | None = GOOD) -> bytes:
    found = cache.open(url, size, sha256)
    try:
        assert not os.get_inheritable(found)
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.write(found, b"x")
        return os.pread(found, 1 << 30, 0)
    finally:
        os.close(found)


def left(cache: ShardCache) -> list[str]:
    """Names in the folder by their endings, without the lock of the room."""
    return sorted(path.suffix for path in (cache.folder / "shards").glob("[!.]*"))


@contextlib.contextmanager
def within(seconds: float):
    began = time.monotonic()
    yield
    assert time.monotonic() - began < seconds


OPEN = """
import hashlib, logging, os, sys
from pathlib import Path
from dist_kd.data.shard_cache import ShardCache
logging.basicConfig(level="INFO")
if "AS_NOBODY" in os.environ and os.geteuid() == 0:
    os.seteuid(65534)  # root may write everywhere
url, folder, size, sha256, limit = sys.argv[1:]
found = ShardCache(Path(folder), int(limit), 60.0).open(url, int(size) or None, sha256 or None)
print(hashlib.sha256(os.pread(found, 1 << 30, 0)).hexdigest())
"""


def opener(url: str, folder: Path, size: int = SIZE, sha256: str = GOOD, limit: int = 10 * SIZE, **more):
    """Another process that opens a shard and prints the sha256 of what it read."""
    command = [sys.executable, "-c", OPEN, url, str(folder), str(size), sha256, str(limit)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)
