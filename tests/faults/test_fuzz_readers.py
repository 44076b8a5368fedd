"""Shards, indexes and patterns damaged at random: what comes out is what an independent reader finds, or our own error.

`make test-long` tries fifty times as many. A case that was once found stands as an @example.
"""

import io
import json
import resource
import signal
import tarfile
import tempfile
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from data.tars import tar_of
from faults import hostile_bytes as hostile
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from dist_kd.data.finding import MOST_SHARDS, expand
from dist_kd.data.index import read_index
from dist_kd.data.tar_scan import MOST_CLASSES, MOST_IMAGE_BYTES, ROW, ShardInfo, checksum, scan_shard
from dist_kd.errors import DataError

LONGEST_S = 30  # of one example: a hang, however busy the machine is
MOST_MB = 100  # by which one example may raise the peak of memory
SEEDS = st.integers(0, 2**48)


def tries(short: int, long: int):
    """A test of one argument, examples: few always, many among the slow ones."""
    marks = [pytest.mark.slow, pytest.mark.timeout(1200)]
    return pytest.mark.parametrize("examples", [short, pytest.param(long, marks=marks)])


@contextmanager
def bounded():
    """Limits on time and memory inside: hypothesis itself, outside, takes as much as it likes."""

    def hang(number, frame):
        raise AssertionError(f"took longer than {LONGEST_S} s")

    old = signal.signal(signal.SIGALRM, hang)
    left = signal.setitimer(signal.ITIMER_REAL, LONGEST_S)[0]
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, old)
        signal.setitimer(signal.ITIMER_REAL, left)
        assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024 < MOST_MB


def explored(test, examples: int) -> None:
    """Runs a hypothesis test so many times."""
    quiet = [HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.data_too_large]
    settings(max_examples=examples, deadline=None, database=None, suppress_health_check=quiet)(test)()


def tars(folder: Path) -> list[bytes]:
    """Well shards in each dialect, with long names, a folder and a comment."""
    long = "folder/" + "n" * 130
    members = [("a.jpg", hostile.encoded("JPEG")), ("a.cls", b"1"), (f"{long}.png", b"x" * 600)]
    members += [(f"{long}.json", b'{"label": 2, "text": "y"}'), ("b.x.txt", b""), ("b.webp", b"z"), ("b.cls", b" 0\n")]
    found = []
    for dialect in (tarfile.GNU_FORMAT, tarfile.PAX_FORMAT):
        path = tar_of(folder / "seed.tar", members, format=dialect, pax_headers={"comment": "c"})
        found.append(path.read_bytes()[: -8 * 1024] if dialect == tarfile.GNU_FORMAT else path.read_bytes())
    members = [(name.replace("n" * 130, "n"), data) for name, data in members]
    short = tar_of(folder / "seed.tar", members, format=tarfile.USTAR_FORMAT)
    return [*found, short.read_bytes()]


def extracted(data: bytes) -> dict[int, bytes]:
    """Offset -> bytes of each file, by Python's own reader."""
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:", ignore_zeros=False) as tar:
        return {member.offset_data: tar.extractfile(member).read() for member in tar if member.isfile()}


def scan(path: Path, data: bytes):
    path.write_bytes(data)
    with path.open("rb", buffering=0) as file:
        return scan_shard(file, "shard", "x.tar")


@tries(400, 20_000)
def test_shards(tmp_path, examples):
    originals = tars(tmp_path)
    outcomes = {"well": 0, "refused": 0}
    for data in originals:
        assert len(scan(tmp_path / "x.tar", data).rows) == 3

    def one(seed):
        data = hostile.damaged_tar(originals, seed)
        with bounded():
            try:
                found = scan(tmp_path / "x.tar", data)
            except DataError as error:
                outcomes["refused"] += 1
                assert str(error).isprintable() and len(str(error)) < 2000
                return
        outcomes["well"] += 1
        files = extracted(data)
        for row in found.rows:
            assert -2 <= row["label"] < MOST_CLASSES
            if row["length"]:  # what we would train on is a file there, whole
                image = files[int(row["offset"])]
                assert len(image) == row["length"] and checksum(image) == row["checksum"]

    explored(given(SEEDS)(one), examples)
    assert min(outcomes.values()) > examples // 50


@tries(200, 10_000)
def test_label_files(tmp_path, examples):
    image = ("a.jpg", b"x")
    texts = [b"7", b'{"label": 7, "a": [1, {"b": null}]}', b'{"label": "7"}', '{"label": 7}'.encode("utf-16")]

    def one(seed, kind, raw):
        text = raw or hostile.damaged(texts, seed)
        tar_of(tmp_path / "x.tar", [image, (f"a.{kind}", text)])
        with bounded():
            (row,) = scan(tmp_path / "x.tar", (tmp_path / "x.tar").read_bytes()).rows
        assert -2 <= row["label"] < MOST_CLASSES
        if row["label"] >= 0 and kind == "cls":
            assert int(text) == row["label"]

    one = example(0, "json", b'{"label": "\\ud800"}')(one)
    one = example(0, "json", b'{"label": ' + b"[" * 100_000)(one)
    one = example(0, "cls", "\u0661".encode())(one)
    one = example(0, "cls", b"1_0")(one)
    explored(given(SEEDS, st.sampled_from(["cls", "json"]), st.none() | st.binary(max_size=40))(one), examples)


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8), lambda inner: st.lists(inner)
)
KEYS = ["schema", "name", "fingerprint", "augment", "image_size", "classes", "shards", "folder"]


@tries(200, 10_000)
def test_indexes(tmp_path, examples):
    rows = np.array([(512, 10, 0, 1), (1536, 600, 1, 2), (4096, 30, 1, 3)], ROW)
    infos = [ShardInfo("x.tar", 10_000, "0", 2), ShardInfo("y.tar", 8_000, "0", 1)]
    hostile.written_index(tmp_path, rows, infos)
    json_path, npy_path = tmp_path / "index.json", tmp_path / "index.npy"
    text, array = json_path.read_bytes(), npy_path.read_bytes()
    assert read_index(tmp_path).num_samples == 3

    def one(what, seed, key, value):
        facts = json.loads(text)
        if what == "json":
            json_path.write_bytes(hostile.damaged([text], seed))
        elif what == "facts":
            json_path.write_text(json.dumps(facts | {key: value}))
        elif what == "shard":
            facts["shards"][0] |= {["name", "bytes", "sha256", "samples"][seed % 4]: value}
            json_path.write_text(json.dumps(facts))
        npy_path.write_bytes(hostile.damaged([array], seed) if what == "npy" else array)
        json_path.write_bytes(text) if what == "npy" else None
        with bounded():
            try:
                index = read_index(tmp_path)
            except DataError as error:
                assert str(error).isprintable() and len(str(error)) < 2000
                return
        assert index.num_samples == sum(index.spec.shard_sizes) == 3 and set(index.spec.classes) == {"a", "b"}
        for sample in range(3):
            shard, row = index.locate(sample)
            assert int(row["offset"]) + int(row["length"]) <= index.shards[shard].bytes
            assert key == "folder" or index.shard_path(shard).resolve().parent.is_relative_to(tmp_path)

    kinds = st.sampled_from(["json", "facts", "shard", "npy"])
    explored(given(kinds, SEEDS, st.sampled_from(KEYS), VALUES)(one), examples)


PIECES = ["{", "}", ",", "..", "0", "9", "99999", "-1", "a", "z", "\\", "{0..9}", "{a,b}", "~", "*", "?", ".tar", "\0"]


@tries(200, 10_000)
def test_patterns(tmp_path, monkeypatch, examples):
    monkeypatch.chdir(tmp_path)

    def one(pieces, extra):
        pattern = "".join(pieces) + extra
        globs = any(c in pattern for c in "*?[")
        with bounded():
            try:
                found = [] if globs and "999" in pattern else expand(pattern)  # a hundred thousand looks take longer
            except DataError as error:
                assert str(error).isprintable() and len(str(error)) < 2000
                return
        assert len(found) <= MOST_SHARDS * (1 + pattern.count(",")) and all(path.is_absolute() for path in found)

    one = example(["{0..999999999}"], "")(one)
    one = example(["{", "{0..99999}" * 2, ",a}"], "")(one)
    one = example(["{0..9999}{0..9}"], "")(one)  # as many as there may be, in time
    one = example(["~\0/x"], "")(one)
    one = example(["{" * 3000, "}" * 3000], "")(one)
    explored(given(st.lists(st.sampled_from(PIECES), max_size=14), st.text(max_size=3))(one), examples)


def test_images_larger_than_are_decoded_are_known_by_their_headers(tmp_path):
    """Sizes are compared before a byte is read: the file is sparse, and 8 GiB would not fit."""
    assert MOST_IMAGE_BYTES < 1 << 30
    with tempfile.NamedTemporaryFile(dir=tmp_path) as file:
        info = tarfile.TarInfo("a.jpg")
        info.size = 8 << 30
        file.write(info.tobuf(tarfile.GNU_FORMAT))
        file.truncate(512 + info.size + 1024)
        file.seek(0)
        with bounded(), pytest.raises(DataError, match="less than 4 GiB"):
            scan_shard(file, "shard", "x.tar")
