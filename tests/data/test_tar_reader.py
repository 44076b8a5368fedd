import os
import pickle
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from dist_kd.data import tar_reader
from dist_kd.data.survey import build_index
from dist_kd.data.tar_reader import BadSample, TarReader
from dist_kd.errors import DataError


@pytest.fixture
def index(shards):
    paths = shards((7, 10, 5))
    return build_index(paths[0].parent, paths, name="x", classes=None)


def open_files() -> set[str]:
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(os.readlink(f"/proc/self/fd/{number}"))
        except FileNotFoundError:
            continue
    return found


def test_bytes_are_those_in_the_tars(index):
    expected = []
    for shard in range(3):
        with tarfile.open(index.shard_path(shard)) as tar:
            expected += [tar.extractfile(member).read() for member in tar if member.name.endswith(".jpg")]
    reader = TarReader(index)
    for sample in np.random.default_rng(0).permutation(22):
        assert reader.read(int(sample)) == expected[sample]
    reader.close()


def test_few_files_are_open_at_once(index, monkeypatch):
    monkeypatch.setattr(tar_reader, "OPEN_SHARDS", 2)
    reader = TarReader(index)
    for sample in (0, 7, 17, 0, 17, 7):
        reader.read(sample)
        assert len([name for name in open_files() if name.endswith(".tar")]) <= 2
    reader.close()
    assert not [name for name in open_files() if name.endswith(".tar")]


def test_threads_that_share_a_reader_close_nothing_under_each_other(index, monkeypatch):
    """With one file kept open, every other thread's read closes it; its number may then be another shard's."""
    alone = TarReader(index)
    expected = [alone.read(sample) for sample in range(22)]
    monkeypatch.setattr(tar_reader, "OPEN_SHARDS", 1)
    monkeypatch.setattr(tar_reader, "RETRY_WAITS", ())
    reader, samples = TarReader(index), np.random.default_rng(0).integers(0, 22, 4000).tolist()
    monkeypatch.setattr(os, "pread", lambda *args, pread=os.pread: time.sleep(0) or pread(*args))  # others go first
    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(reader.read, samples)) == [expected[sample] for sample in samples]
    assert reader.retries == 0


def test_pickles_without_open_files(index):
    reader = TarReader(index)
    data = reader.read(3)
    other = pickle.loads(pickle.dumps(reader))
    assert not other._open and other.read(3) == data


def test_wrong_bytes_are_a_bad_sample(index):
    row = index.rows[8]
    path = index.shard_path(1)
    data = bytearray(path.read_bytes())
    data[int(row["offset"]) + 40] ^= 4
    path.write_bytes(data)
    reader = TarReader(index)
    with pytest.raises(BadSample, match=r"sample 8 of shard `.*train-0001.tar` .*\(checksum\).*dist-kd verify") as bad:
        reader.read(8)
    assert bad.value.damage == "checksum"
    again = pickle.loads(pickle.dumps(bad.value))
    assert again.damage == "checksum" and str(again) == str(bad.value)
    reader.read(9)


def test_a_shard_that_is_too_short_or_gone_ends_the_run(index):
    reader = TarReader(index)
    offset = int(index.rows[8]["offset"])
    reader.read(7)  # the shard is open, and whole
    os.truncate(index.shard_path(1), offset + 10)
    with pytest.raises(DataError, match=r"sample 8 .*ends after 10 of them.*copy it again") as short:
        reader.read(8)
    assert not isinstance(short.value, BadSample)  # never skipped
    os.truncate(index.shard_path(1), offset - 10)
    with pytest.raises(DataError, match=r"ends after 0 of them"):
        reader.read(8)
    another = TarReader(index)
    for _ in range(2):  # whoever opens it now reads nothing of it
        with pytest.raises(DataError, match=rf"shard .* has {offset - 10} bytes where the index says \d+"):
            another.read(7)
    index.shard_path(2).unlink()
    with pytest.raises(DataError, match=r"sample 20 .*No such file.*put the shard back") as gone:
        reader.read(20)
    assert not isinstance(gone.value, BadSample) and reader.retries == 0


def test_reads_that_fail_are_tried_again(index, monkeypatch):
    """A descriptor that went stale, as on a network disk: the read fails, is counted, and is tried on a new one."""
    monkeypatch.setattr(tar_reader, "RETRY_WAITS", (0.0, 0.0))
    reader = TarReader(index)
    data = reader.read(0)
    reader._open[0] = tar_reader._File(os.open(index.shard_path(0), os.O_WRONLY))  # reading it fails
    assert reader.read(0) == data and reader.retries == 1
    assert reader.read(1) and reader.retries == 1


def test_reads_that_go_on_failing_end_the_run(index, monkeypatch):
    monkeypatch.setattr(tar_reader, "RETRY_WAITS", (0.0, 0.0))
    loop = index.shard_path(0)
    loop.unlink()
    loop.symlink_to(loop)  # opening it fails with ELOOP for ever
    reader = TarReader(index)
    with pytest.raises(DataError, match=r"sample 0 .*cannot be read \(.*after 2 retries\)"):
        reader.read(0)
    assert reader.retries == 2


# a shard that is replaced or vanishes in mid-run


def with_another_image(path, row) -> bytes:
    """The shard with one byte of an image changed: the same length, as a repacked one may well have."""
    data = bytearray(path.read_bytes())
    data[int(row["offset"]) + 40] ^= 4
    return bytes(data)


def aside(path, data: bytes):
    time.sleep(0.02)  # a file's times are a few milliseconds coarse
    other = path.with_name("other.part")
    other.write_bytes(data)
    os.utime(other, ns=(10**18, 10**18))  # an old file, as a copy that keeps times would make
    return other


@pytest.mark.parametrize("opened_before", [False, True])
def test_a_shard_replaced_in_mid_run_ends_it(index, opened_before):
    """Another file under its name. It is never counted as a bad sample."""
    path, row = index.shard_path(1), index.rows[8]
    reader = TarReader(index)
    if opened_before:
        reader.read(9)
    os.replace(aside(path, with_another_image(path, row)), path)
    if opened_before:
        assert reader.read(8)  # the old file lives as long as it is open
        reader.close()
    with pytest.raises(DataError, match=r"shard `.*train-0001.tar` was replaced: .*another one.*sample 8 ") as gone:
        reader.read(8)
    assert not isinstance(gone.value, BadSample)
    reader.close()


def test_a_shard_written_to_in_mid_run_ends_it(index):
    path, row = index.shard_path(1), index.rows[8]
    reader = TarReader(index)
    reader.read(9)
    time.sleep(0.02)
    path.write_bytes(with_another_image(path, row))
    with pytest.raises(DataError, match=r"was replaced: .*written to, since this run began") as gone:
        reader.read(8)
    assert not isinstance(gone.value, BadSample)


def test_a_worker_knows_when_the_run_began(index):
    """A reader that travelled to another process, and opens the shard there for the first time."""
    path, row = index.shard_path(1), index.rows[8]
    reader = TarReader(index)
    os.replace(aside(path, with_another_image(path, row)), path)
    with pytest.raises(DataError, match="was replaced"):
        pickle.loads(pickle.dumps(reader)).read(8)


def test_a_shard_that_vanishes_may_still_be_read_where_it_is_open(index):
    reader = TarReader(index)
    first = reader.read(8)
    index.shard_path(1).unlink()
    assert reader.read(8) == first
    with pytest.raises(DataError, match=r"sample 8 .*No such file"):
        TarReader(index).read(8)


def test_a_link_that_points_elsewhere_in_mid_run(index):
    """Both files are older than the run: only that the shard was another file tells."""
    path, row = index.shard_path(1), index.rows[8]
    old, new = path.with_name("old"), path.with_name("new")
    new.write_bytes(with_another_image(path, row))
    path.rename(old)
    path.symlink_to(old)
    time.sleep(0.02)
    reader = TarReader(index)
    reader.read(8)
    path.unlink()
    path.symlink_to(new)
    reader.close()
    with pytest.raises(DataError, match="was replaced: its file is another one"):
        reader.read(8)


def test_threads_open_a_shard_once(index, monkeypatch):
    """Opening one of another machine takes seconds, and all threads of a set in memory begin with the same."""
    opened = []

    def slowly(shard):
        opened.append(shard)
        time.sleep(0.05)
        return os.open(index.shard_path(shard), os.O_RDONLY)

    monkeypatch.setattr(type(index), "open_shard", lambda self, shard: slowly(shard))
    reader = TarReader(index)
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(reader.read, range(7)))
    assert opened == [0]
    reader.close()
