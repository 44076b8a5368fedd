"""Shards and indexes that mean harm: no code of theirs runs, nothing is written outside, no message obeys them."""

import os
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path

import numpy as np
import pytest
from data.tars import END, block_of, record, tar_of
from faults import hostile_bytes as hostile

from dist_kd.commands.main import main
from dist_kd.data.finding import open_data
from dist_kd.data.index import checksum
from dist_kd.data.memory import MemorySamples
from dist_kd.data.tar_scan import ROW, ShardInfo
from dist_kd.errors import DataError

GOOD = hostile.encoded("JPEG")


@pytest.fixture
def said(tmp_path, capsys, monkeypatch):
    """said(*argv) -> (exit code, what stderr says, one line a problem); caches stay in this test's folder."""
    monkeypatch.setenv("DIST_KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))

    def run(*argv) -> tuple[int, str]:
        capsys.readouterr()
        code = main([*map(str, argv), "--jobs", "1"])
        words = capsys.readouterr().err
        assert "Traceback" not in words
        assert all(line.isprintable() and len(line) < 2000 for line in words.splitlines()), words
        return code, words

    return run


@pytest.fixture
def canary(tmp_path):
    """A file that payloads would make; it must not be there in the end."""
    path = tmp_path / "canary"
    yield path
    assert not path.exists()


def files_of(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_payloads_beside_an_image_are_never_looked_at(tmp_path, canary, said):
    payload, array = hostile.pickled(canary), hostile.object_array(canary)
    script = f"import pathlib; pathlib.Path({str(canary)!r}).touch()".encode()
    members = [("a.jpg", GOOD), ("a.cls", b"0")]
    members += [(f"a.{kind}", payload) for kind in ("pkl", "pickle", "pyd", "pth", "pt", "pyc", "ten", "mp", "joblib")]
    members += [("a.npy", array), ("a.npz", array), ("a.py", script), ("a.sh", b"touch " + os.fsencode(canary))]
    (tmp_path / "set").mkdir()
    tar_of(tmp_path / "set" / "x.tar", members)
    assert said("index", tmp_path / "set") == (0, "")
    assert said("verify", tmp_path / "set") == (0, "")
    assert MemorySamples(open_data(str(tmp_path / "set"))).pixels(0).shape == (3, 8, 8)


@pytest.mark.parametrize("kind", ["jpg", "png", "webp", "cls", "json"])
def test_payloads_under_the_names_that_are_read(tmp_path, canary, said, kind):
    members = {"a.jpg": GOOD, "a.cls": b"0", f"a.{kind}": hostile.pickled(canary)}
    if kind in ("png", "webp"):
        del members["a.jpg"]
    if kind == "json":
        del members["a.cls"]
    tar_of(tmp_path / "x.tar", list(members.items()))
    code, words = said("index", tmp_path / "x.tar")
    if kind in ("cls", "json"):
        assert code == 3 and "wrong label for key `a`" in words
        return
    assert code == 0
    code, words = said("verify", tmp_path)
    assert code == 3 and "cannot be decoded" in words


NAMES = {
    "above": "../../escaped",
    "absolute": "/tmp/dist_kd_escaped",
    "newline": "a\nexit code 0: all is well",
    "terminal": "\x1b[2J\x1b]0;owned\x07",
    "surrogate": "\udcff\udc80",
    "right to left": "\u202egpj",
    "null": "a\0b",
    "long": "x" * 3000,
    "too long": "x" * 10_000,
    "deep": "/".join("d" * 1000),
    "shell": "$(touch canary);`touch canary`|pipe:touch canary",
    "home": "~root/x",
}


@pytest.mark.parametrize("name", NAMES)
def test_names_are_never_paths_and_are_shown_as_text(tmp_path, said, name):
    folder = tmp_path / "deep" / "er" / "set"
    folder.mkdir(parents=True)
    # written by hand: tarfile would not write some of these
    body = b" path=" + NAMES[name].encode("utf-8", "surrogateescape") + b".jpg\n"
    length = next(n for n in range(len(body), len(body) + 9) if n == len(body) + len(str(n)))
    pax = block_of("pax", str(length).encode() + body, tarfile.XHDTYPE)
    (folder / "x.tar").write_bytes(pax + block_of("short", GOOD) + block_of("b.jpg", GOOD) + END)
    before = files_of(tmp_path)
    code, words = said("index", folder)
    assert code == 3 and ("no label" in words or "has a name of 10004 bytes" in words)
    code, words = said("verify", folder)
    assert code == 3
    assert files_of(tmp_path) == before
    assert not Path("/tmp/dist_kd_escaped.jpg").exists()


@pytest.mark.parametrize("name", [name for name in NAMES if name != "too long"])
def test_samples_with_such_names_are_samples_like_others(tmp_path, said, name):
    folder = tmp_path / "set"
    folder.mkdir()
    key = NAMES[name].replace("\0", "")
    members = [(key + ".jpg", GOOD), (key + ".cls", b"0")]
    tar_of(folder / "x.tar", members, format=tarfile.PAX_FORMAT)
    assert said("index", folder)[0] == said("verify", folder)[0] == 0
    assert files_of(tmp_path) - {"cache"} == {"set", "set/x.tar", "set/index.json", "set/index.npy"}


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_in_a_tar_are_refused(tmp_path, said, kind):
    info = tarfile.TarInfo("a.jpg")
    info.type, info.linkname = kind, "/etc/passwd"
    data = info.tobuf(tarfile.GNU_FORMAT) + block_of("a.cls", b"0") + END
    (tmp_path / "x.tar").write_bytes(data)
    code, words = said("index", tmp_path / "x.tar")
    assert code == 3 and "as a link or special file" in words


@pytest.mark.timeout(20)
@pytest.mark.parametrize("what", ["pipe", "endless device", "folder", "dangling link", "loop"])
def test_shards_that_are_no_files(tmp_path, said, what):
    folder = tmp_path / "set"
    folder.mkdir()
    shard = folder / "x.tar"
    if what == "pipe":
        os.mkfifo(shard)
    elif what == "folder":
        shard.mkdir()
    else:
        shard.symlink_to({"endless device": "/dev/zero", "dangling link": "/nowhere", "loop": "x.tar"}[what])
    for command in ("index", "verify"):
        code, words = said(command, folder)
        assert code == 3 and "x.tar" in words
    with pytest.raises(DataError):
        open_data(str(folder))
    # and behind an index that says it is one
    hostile.written_index(folder, hostile.row_of(512, GOOD), [ShardInfo("x.tar", 10_000, "0", 1)])
    code, words = said("verify", folder)
    assert code == 3 and "x.tar" in words
    with pytest.raises(DataError):
        MemorySamples(open_data(str(folder)))


def headers(*records: tuple[str, str]) -> bytes:
    return block_of("pax", b"".join(record(*r) for r in records), tarfile.XHDTYPE)


SIZES = {
    "pax size": headers(("size", "9" * 19)),
    "pax size of thousands of digits": headers(("size", "9" * 5000)),
    "pax size in other digits": headers(("size", "\u00b2")),
    "negative size": headers(("size", "-512")),
    "a pax header of 8 GiB": block_of("pax", b"", tarfile.XHDTYPE, size=8 << 30),
    "a name of 8 GiB": block_of("@LongLink", b"", tarfile.GNUTYPE_LONGNAME, size=8 << 30),
    "a pax header of too much": block_of("pax", record("comment", "x" * (3 << 20)), tarfile.XHDTYPE),
    "pax headers without end": headers(("comment", "x")) * 50_000,
    "a label of 8 GiB": block_of("a.cls", b"", size=8 << 30),
    "sparse": headers(("GNU.sparse.major", "1"), ("GNU.sparse.realsize", "9" * 15)),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", SIZES)
def test_absurd_sizes_are_refused_at_once(tmp_path, said, kind):
    (tmp_path / "x.tar").write_bytes(SIZES[kind] + block_of("a.jpg", GOOD) + block_of("a.cls", b"0") + END)
    code, words = said("index", tmp_path / "x.tar")
    assert code == 3 and "x.tar" in words


@pytest.mark.timeout(20)
def test_very_many_records_take_no_longer_than_their_bytes(tmp_path, said):
    pax = block_of("pax", b"6 a=b\n" * 150_000, tarfile.XHDTYPE)
    (tmp_path / "x.tar").write_bytes(pax + block_of("a.jpg", GOOD) + block_of("a.cls", b"0") + END)
    assert said("index", tmp_path / "x.tar")[0] == 0


JSONS = {
    "nested": b'{"label": ' + b"[" * 400_000,
    "nested well": b'{"label": ' + b"[" * 400_000 + b"]" * 400_000 + b"}",
    "huge number": b'{"label": ' + b"9" * 900_000 + b"}",
    "too long": b'{"label": ' + b"9" * (4 << 20) + b"}",
    "surrogate": b'{"label": "\\ud800"}',
    "float": b'{"label": 1e999}',
    "true": b'{"label": true}',
    "list": b'{"label": [0]}',
    "other encoding": '{"label": "\u0661"}'.encode("utf-16"),
}


@pytest.mark.timeout(20)
@pytest.mark.parametrize("kind", JSONS)
def test_json_bombs_are_a_wrong_label(tmp_path, said, kind):
    tar_of(tmp_path / "x.tar", [("a.jpg", GOOD), ("a.json", JSONS[kind])])
    code, words = said("index", tmp_path / "x.tar")
    assert code == 3 and "holds a wrong label for key `a`" in words


def test_packed_tars_are_refused_unread(tmp_path, said):
    zeros = zlib.compressobj(9, zlib.DEFLATED, 31)
    (tmp_path / "x.tar").write_bytes(zeros.compress(bytes(64 << 20)) + zeros.flush())
    code, words = said("index", tmp_path / "x.tar")
    assert code == 3 and "is compressed (gzip)" in words


# Indexes


@pytest.fixture
def indexed(tmp_path):
    """indexed(**facts) -> the folder of one good sample, index.json saying other `facts` than it should."""
    folder = tmp_path / "set"
    folder.mkdir()
    shard = tar_of(folder / "x.tar", [("a.jpg", GOOD), ("a.cls", b"0")])
    info = ShardInfo("x.tar", shard.stat().st_size, "0" * 64, 1)
    return lambda **facts: hostile.written_index(folder, hostile.row_of(512, GOOD), [info], **facts)


FACTS = {
    "above": {"shards": [{"name": "../set/x.tar", "bytes": 10240, "sha256": "0", "samples": 1}]},
    "absolute": {"shards": [{"name": "/etc/passwd", "bytes": 10240, "sha256": "0", "samples": 1}]},
    "command": {"shards": [{"name": "pipe:touch canary", "bytes": 10240, "sha256": "0", "samples": 1}]},
    "url": {"shards": [{"name": "http://127.0.0.1:9/x", "bytes": 10240, "sha256": "0", "samples": 1}]},
    "null": {"shards": [{"name": "x\0.tar", "bytes": 10240, "sha256": "0", "samples": 1}]},
    "text for a number": {"shards": [{"name": "x.tar", "bytes": "10240", "sha256": "0", "samples": 1}]},
    "half a sample": {"shards": [{"name": "x.tar", "bytes": 10240, "sha256": "0", "samples": 1.0}]},
    "less than none": {"shards": [{"name": "x.tar", "bytes": 10240, "sha256": "0", "samples": n} for n in (2, -1)]},
    "no list": {"shards": 7},
    "no shard": {"shards": [7]},
    "smaller shard": {"shards": [{"name": "x.tar", "bytes": 600, "sha256": "0", "samples": 1}]},
    "classes": {"classes": [0, 1]},
    "no classes": {"classes": []},
    "size": {"image_size": 10**12 + 0.5},
    "negative size": {"image_size": -1},
    "name": {"name": ["x"]},
    "augment": {"augment": {"a": 1}},
    "folder": {"folder": 7},
    "schema": {"schema": {"a": "\x1b[2J" * 1000}},
}


@pytest.mark.parametrize("kind", FACTS)
def test_facts_that_cannot_be(indexed, said, canary, kind):
    code, words = said("verify", indexed(**FACTS[kind]))
    assert code == 3 and "write it again" in words


def test_a_folder_elsewhere_is_read_and_never_written(indexed, said, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    (other / "x.tar").write_bytes(b"secret" * 2000)
    folder = indexed(folder=str(other))
    before = {path: path.read_bytes() for path in other.iterdir()}
    code, words = said("verify", folder)
    assert code == 3 and "secretsecret" in words  # the beginning of a file that is no tar, as of any
    with pytest.raises(DataError):
        MemorySamples(open_data(str(folder)))
    assert {path: path.read_bytes() for path in other.iterdir()} == before


@pytest.mark.parametrize("url", ["pipe:touch canary", "file:///etc", "x", "ssh://a/b", "-oProxy=x"])
@pytest.mark.timeout(60)
def test_addresses_in_a_local_index(indexed, said, canary, url, monkeypatch):
    monkeypatch.chdir(canary.parent)
    code, _ = said("verify", indexed(url=url))
    assert code in (2, 3)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("kind", ["nested", "digits", "too long", "endless device", "pipe", "a list", "not UTF-8"])
def test_index_json_bombs(indexed, said, kind):
    path = indexed() / "index.json"
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "endless device":
        path.symlink_to("/dev/zero")
    elif kind == "too long":
        with path.open("wb") as file:
            file.write(b'{"schema": 1, "classes": "')
            file.truncate(200 << 30)  # takes no place on the disk
    else:
        path.write_bytes(
            {
                "nested": b'{"schema":' + b'{"a":' * 200_000,
                "digits": b'{"schema": ' + b"1" * (30 << 20) + b"}",
                "a list": b'["schema"]',
                "not UTF-8": b'{"schema": "\xff"}',
            }[kind]
        )
    code, words = said("verify", path.parent)
    assert code == 3 and "index.json" in words
    assert said("index", path.parent / "x.tar")[0] in (0, 3)  # it would keep what an earlier one says


def npy(shape: str, descr: str | None = None, data: bytes = b"", head: bytes = b"\x93NUMPY\x01\x00") -> bytes:
    descr = descr if descr is not None else repr(ROW.descr)
    text = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}, }}".encode()
    text += b" " * (-(len(text) + 11) % 64) + b"\n"
    return head + len(text).to_bytes(2 if head[6] == 1 else 4, "little") + text + data


ROWS = {
    "10^12 rows": npy("(1000000000000,)"),
    "10^30 rows": npy("(1" + "0" * 30 + ",)"),
    "overflowing": npy("(4611686018427387904, 4611686018427387904)"),
    "negative": npy("(-1,)"),
    "none": npy("(0,)"),
    "other type": npy("(1,)", "'<f8'", bytes(8)),
    "nested": npy("(1,)", "[" * 3000),
    "code": npy("(1,)", "__import__('os').system('touch canary')"),
    "old": npy("(1L,)", data=bytes(20)),
    "version 2 with a header of 4 GiB": b"\x93NUMPY\x02\x00\xff\xff\xff\xff{",
    "version 9": npy("(1,)", data=bytes(20), head=b"\x93NUMPY\x09\x00"),
    "zip": b"PK\x03\x04" + bytes(100),
    "empty": b"",
}


@pytest.mark.parametrize("kind", [*ROWS, "pickle", "object array"])
def test_index_npy_is_rows_or_refused(indexed, said, canary, kind, monkeypatch):
    monkeypatch.chdir(canary.parent)
    folder = indexed()
    data = {"pickle": hostile.pickled(canary), "object array": hostile.object_array(canary)} | ROWS
    (folder / "index.npy").write_bytes(data[kind])
    code, words = said("verify", folder)
    assert code == 3 and "damaged" in words


@pytest.mark.parametrize(
    ("offset", "length", "label"), [(2**64 - 1, 1, 0), (2**63, 2**32 - 1, 0), (10_000, 10_000, 0), (512, 10, 2)]
)
def test_rows_that_point_outside(tmp_path, said, offset, length, label):
    row = np.array([(offset, length, label, checksum(b""))], ROW)
    code, words = said("verify", hostile.written_index(tmp_path, row, [ShardInfo("x.tar", 10240, "0", 1)]))
    assert code == 3 and ("rows lie behind" in words or "has label 2, but 2 classes" in words)


# The words that name data

WORDS = ["{0..999999999}", "{0..99999}{0..99999}", "{{0..99999}{0..99999},a}", "{" * 5000 + "}" * 5000, "{a..z}" * 40]
WORDS += ["{0.." + "9" * 5000 + "}", "x" * 5000, "~no_such_user_at_all/x", "[", "pipe:touch canary", "\udcff", ""]


@pytest.mark.timeout(30)
@pytest.mark.parametrize("word", range(len(WORDS)))
def test_words_that_name_no_data(said, canary, word, monkeypatch):
    monkeypatch.chdir(canary.parent)
    for command in ("index", "verify"):
        assert said(command, WORDS[word])[0] in (2, 3)


def test_a_pattern_is_as_long_as_bash_says(tmp_path, monkeypatch):
    from dist_kd.data.finding import expand

    monkeypatch.chdir(tmp_path)
    names = [path.name for path in expand("{a,{b,c}}.tar, x{1..3}{y,z},{d..f..2}")]
    assert names == ["a.tar", "b.tar", "c.tar", "x1y", "x1z", "x2y", "x2z", "x3y", "x3z", "d", "f"]


def test_training_does_not_start_on_a_hostile_index(indexed, canary, tmp_path):
    folder = indexed()
    (folder / "index.npy").write_bytes(hostile.object_array(canary))
    command = [sys.executable, "-m", "dist_kd.commands.main", "train", "--arch", "cnn_small", "--cpu", "--data"]
    command += [str(folder), "--val-data", str(folder), "--save-path", str(tmp_path / "run")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, cwd=Path(__file__).parents[2])
    assert done.returncode == 3 and "Traceback" not in done.stderr
    assert "damaged (ValueError: index.npy does not begin as ours do); write it again" in done.stderr
