"""A shard, and how tests open it through the cache of a node, look at what is left, and bound the time."""

from __future__ import annotations

import contextlib
import hashlib
import os
import time

import numpy as np
import pytest

from dist_kd.data.remote import Limits
from dist_kd.data.shard_cache import ShardCache

QUICK = Limits(connect_s=1, idle_s=1, attempts=3, pause_s=0.05, longest_pause_s=0.2)
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
