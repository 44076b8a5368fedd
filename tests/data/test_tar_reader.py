import os
import pickle
import tarfile

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
    os.close(reader._open[0])
    reader._open[0] = os.open(index.shard_path(0), os.O_WRONLY)  # reading it fails
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
