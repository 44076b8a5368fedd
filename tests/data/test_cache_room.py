"""The cache of a node: shared by processes, killed in the middle, within its budget, on disks that refuse."""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import signal
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from data.bad_server import BadServer, cut, stall, trickle
from data.node_cache import GOOD, QUICK, SHARD, SIZE, fetch, left, opener, within

from dist_kd.data.shard_cache import ShardCache
from dist_kd.errors import DataError

# --- several processes


@pytest.mark.parametrize(("size", "sha256"), [(SIZE, GOOD), (0, "")], ids=["indexed", "foreign"])
def test_six_processes_share_one_download(server, cache, size, sha256):
    server.always["a.tar"] = trickle(50_000, 0.2)  # long enough that all of them meet
    processes = [opener(server.url("a.tar"), cache.folder, size, sha256) for _ in range(6)]
    for process in processes:
        out, err = process.communicate(timeout=60)
        assert process.returncode == 0 and out.strip() == GOOD, err
    assert len(server.asked) == (1 if sha256 else 6)  # of a foreign one each asks whether it is still the same
    with within(10):
        while not server.sent:  # its thread ends a little after the last byte has come
            time.sleep(0.02)
    assert server.sent == ["a.tar"] and left(cache) == ([".tar"] if sha256 else [".json", ".tar"])


def test_after_kill_9_the_next_process_resumes(server, cache):
    server.first["a.tar"] = [stall(120_000)]
    process = opener(server.url("a.tar"), cache.folder)
    part = cache.folder / "shards" / f"{GOOD}.part"
    try:
        with within(30):
            while not part.exists() or part.stat().st_size < 120_000:
                time.sleep(0.02)
        with pytest.raises(DataError, match="being fetched by another process of this node"):
            fetch(replace(cache, timeout_s=0.3), server.url("a.tar"))
        assert cache.clean(0) == 0 and part.exists()  # it is held
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=10)
    assert fetch(cache, server.url("a.tar")) == SHARD
    assert server.offsets("a.tar") == [None, 120_000]
    assert left(cache) == [".tar"]


def test_leftovers_are_cleaned_when_nobody_holds_them(server, cache):
    server.always["a.tar"] = cut(100_000)
    with pytest.raises(DataError):
        fetch(replace(cache, limits=replace(QUICK, attempts=1)), server.url("a.tar"))
    assert left(cache) == [".json", ".part"]
    assert cache.clean() == 0  # young enough to be resumed
    assert cache.clean(0) == 100_000
    assert left(cache) == []
    assert replace(cache, folder=cache.folder / "none").clean() == 0


def test_a_damaged_leftover_does_no_harm(server, cache):
    server.always["a.tar"] = cut(100_000)
    with pytest.raises(DataError):
        fetch(replace(cache, limits=replace(QUICK, attempts=1)), server.url("a.tar"))
    del server.always["a.tar"]
    part = cache.folder / "shards" / f"{GOOD}.part"
    part.write_bytes(bytes(100_000))  # as after a power cut
    assert fetch(cache, server.url("a.tar")) == SHARD
    assert server.offsets("a.tar") == [None, 100_000, None]


# --- room


def shards(server: BadServer, count: int) -> list[tuple[str, str]]:
    """(url, sha256) of further shards."""
    found = []
    for number in range(count):
        content = bytes([number]) * SIZE
        server.files[f"{number}.tar"] = content
        found.append((server.url(f"{number}.tar"), hashlib.sha256(content).hexdigest()))
    return found


def test_the_least_recently_used_go_first(server, cache):
    cache = replace(cache, limit_bytes=3 * SIZE + 10)
    known = shards(server, 4)
    for age, (url, sha256) in enumerate(known[:3]):
        fetch(cache, url, SIZE, sha256)
        used = time.time() - 1000 + age
        os.utime(cache.folder / "shards" / f"{sha256}.tar", (used, used))
    fetch(cache, known[0][0], SIZE, known[0][1])  # the oldest is used again
    opened = cache.open(known[1][0], SIZE, known[1][1])
    used = time.time() - 2000
    os.utime(cache.folder / "shards" / f"{known[1][1]}.tar", (used, used))
    fetch(cache, known[3][0], SIZE, known[3][1])
    here = {path.stem for path in (cache.folder / "shards").glob("*.tar")}
    assert here == {known[i][1] for i in (0, 2, 3)}
    assert os.pread(opened, 2 * SIZE, 0) == server.files["1.tar"]  # outlives its eviction
    os.close(opened)


def test_a_use_is_noted_at_most_once_a_minute(server, cache):
    fetch(cache, server.url("a.tar"))
    path = cache.folder / "shards" / f"{GOOD}.tar"
    for age, noted in ((30, False), (90, True)):
        used = time.time() - age
        os.utime(path, (used, used))
        fetch(cache, server.url("a.tar"))
        assert (path.stat().st_mtime > used + 1) is noted


def test_a_shard_larger_than_the_budget_is_refused_with_the_arithmetic(server, cache):
    small = replace(cache, limit_bytes=SIZE - 1)
    with pytest.raises(DataError, match=r"has 0.30 MB, but the cache in .* may hold 0.30 MB.*--cache-gb 0.1"):
        fetch(small, server.url("a.tar"))
    assert not server.asked
    with pytest.raises(DataError, match="may hold"):
        fetch(small, server.url("a.tar"), None, None)
    assert left(cache) == []


def test_downloads_under_way_count(server, cache):
    server.first["a.tar"] = [stall(100)]
    process = opener(server.url("a.tar"), cache.folder)
    part = cache.folder / "shards" / f"{GOOD}.part"
    ((url, sha256),) = shards(server, 1)
    try:
        with within(30):
            while not part.exists() or part.stat().st_size < 100:
                time.sleep(0.02)
        narrow = replace(cache, limit_bytes=2 * SIZE - 1, timeout_s=1.0)
        with within(10), pytest.raises(DataError, match=r"shards under way take 0\.30 MB of its 0\.60 MB"):
            fetch(narrow, url, SIZE, sha256)
    finally:
        process.kill()
        process.communicate(timeout=10)
    assert fetch(narrow, url, SIZE, sha256) == server.files["0.tar"]  # the dead one's part makes room
    assert left(cache) == [".tar"]


def test_the_budget_holds_while_several_processes_fetch(server, cache):
    known = shards(server, 8)
    limit = 3 * SIZE
    running = [opener(url, cache.folder, SIZE, sha256, limit) for url, sha256 in known]
    most = 0
    with within(60):
        while any(process.poll() is None for process in running):
            sizes = []
            for path in (cache.folder / "shards").glob("[!.]*"):
                with contextlib.suppress(FileNotFoundError):
                    sizes.append((path.stat().st_ino, path.stat().st_size))
            most = max(most, sum(dict(sizes).values()))
            time.sleep(0.01)
    for process in running:
        _, err = process.communicate(timeout=10)
        assert process.returncode == 0, err
    assert SIZE < most <= limit + 10_000  # the notes beside them


# --- the disk


@contextlib.contextmanager
def small_disk(folder: Path, options: str):
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True, check=False)
    if mounted.returncode:
        pytest.xfail("only root can mount a disk; the tests with RLIMIT_FSIZE and as nobody need none")
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def test_a_full_disk_is_a_sentence_and_nothing_stays(server, tmp_path):
    with small_disk(tmp_path / "disk", "size=200k"):
        cache = ShardCache(tmp_path / "disk", 10 * SIZE, 20.0, QUICK)
        with within(10), pytest.raises(DataError, match=r"no room on its disk.*0.30 MB are needed.*DIST_KD_CACHE"):
            fetch(cache, server.url("a.tar"))
        assert left(cache) == []
        server.always["a.tar"] = cut(SIZE, length=False)  # how much is to come is not known
        with within(10), pytest.raises(DataError, match="no room on its disk"):
            fetch(cache, server.url("a.tar"), None, None)
        assert left(cache) == []


def test_shards_go_when_the_disk_is_smaller_than_the_budget(server, tmp_path):
    known = shards(server, 4)
    with small_disk(tmp_path / "disk", "size=1m"):
        cache = ShardCache(tmp_path / "disk", 100 * SIZE, 20.0, QUICK)
        for url, sha256 in known:
            fetch(cache, url, SIZE, sha256)
        assert 2 <= len(left(cache)) <= 3


def test_a_file_that_may_not_grow_is_a_sentence_and_nothing_stays(server, cache):
    def limit():
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))

    process = opener(server.url("a.tar"), cache.folder, preexec_fn=limit)
    _, err = process.communicate(timeout=60)
    assert process.returncode and "has no room on its disk (file too large; 0.30 MB are needed" in err
    assert left(cache) == []


def test_a_read_only_folder_serves_what_it_holds(server, tmp_path):
    ((url, sha256),) = shards(server, 1)
    with small_disk(tmp_path / "disk", "size=1m"):
        cache = ShardCache(tmp_path / "disk", 10 * SIZE, 20.0, QUICK)
        fetch(cache, url, SIZE, sha256)
        subprocess.run(["mount", "-o", "remount,ro", tmp_path / "disk"], check=True)
        assert fetch(cache, url, SIZE, sha256) == server.files["0.tar"]
        assert cache.clean(0) == 0
        with pytest.raises(DataError, match=r"cannot be written \(read-only file system\).*DIST_KD_CACHE"):
            fetch(cache, server.url("a.tar"))


def test_a_folder_of_somebody_else_is_a_sentence(server):
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o555)
        process = opener(server.url("a.tar"), Path(folder), env=os.environ | {"AS_NOBODY": "1"})
        _, err = process.communicate(timeout=60)
        assert process.returncode
        assert "cannot be written (permission denied); name another folder by DIST_KD_CACHE" in err
