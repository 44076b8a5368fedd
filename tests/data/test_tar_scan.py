import json
import re
import tarfile
import tracemalloc

import pytest
from data.tars import END, STRUCTURE, block_of, record, tar_of

from dist_kd.data import tar_scan, tar_walk
from dist_kd.data.tar_scan import scan_shard
from dist_kd.errors import DataError

PAX, GLOBAL, LONG_NAME, LONG_LINK = (
    tarfile.XHDTYPE,
    tarfile.XGLTYPE,
    tarfile.GNUTYPE_LONGNAME,
    tarfile.GNUTYPE_LONGLINK,
)


def scan(path, num_classes=None):
    with open(path, "rb") as file:
        return scan_shard(file, str(path), path.name, num_classes)


@pytest.fixture
def of_bytes(tmp_path):
    """of_bytes(...) -> the scan of a shard made of these bytes."""

    def scanned(*parts, classes=None):
        path = tmp_path / "a.tar"
        path.write_bytes(b"".join(parts))
        return scan(path, classes)

    return scanned


def kinds(scanned):
    return {kind: marked.count for kind, marked in scanned.marked.items()}


# what is in a shard


def test_names_and_kinds_of_members(tmp_path, make_image):
    long = "d" * 90 + "/" + "e" * 150
    for number, form in enumerate((tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)):
        path = tar_of(
            tmp_path / f"a{number}.tar",
            [
                ("a.b/k1.JPG", make_image(1)),
                ("a.b/k1.cls", b" 3\n"),
                (f"{long}.png", make_image(2, kind="PNG")),
                (f"{long}.seg.png", b"of no interest"),
                (f"{long}.json", b'{"label": 1, "caption": "two"}'),
                ("k3.cls", b"0"),
                ("k3.webp", make_image(3, kind="WEBP")),
                ("k3.txt", b""),
                ("k3.json", b'{"caption": "no label here"}'),
                ("__meta__/x", b"webdataset leaves these out"),
                ("a.b/._k1.jpg", b"macOS adds these"),
                ("\u00e9/\u732b.jpg", make_image(4)),
                ("\u00e9/\u732b.cls", b"7"),
            ],
            format=form,
        )
        found = scan(path)
        assert found.rows["label"].tolist() == [3, 1, 0, 7]
        assert found.keys == ["a.b/k1", long, "k3", "\u00e9/\u732b"]
        assert not found.marked


def test_members_need_not_stand_together(tmp_path, make_image):
    """All images first, then all labels: webdataset loses such a shard, an index does not."""
    members = [(f"k{i}.jpg", make_image(i)) for i in range(4)] + [(f"k{i}.cls", b"%d" % i) for i in range(4)]
    assert scan(tar_of(tmp_path / "a.tar", members)).rows["label"].tolist() == [0, 1, 2, 3]


def test_images_longer_than_what_is_read_at_once(tmp_path, monkeypatch, shards):
    (path,) = shards((9,))
    whole = scan(path)
    monkeypatch.setattr(tar_walk, "CHUNK", 7)
    pieces = scan(path)
    assert pieces.rows.tolist() == whole.rows.tolist() and pieces.info == whole.info


def test_folders_and_harmless_extended_headers(of_bytes):
    found = of_bytes(
        block_of("pax_global_header", record("comment", "0123"), GLOBAL),
        block_of("a", kind=tarfile.DIRTYPE, size=700),  # tar gives folders no data, whatever they say
        block_of("b/", kind=b"\0"),
        block_of("x", record("mtime", "1.5") + record("SCHILY.xattr.user", "y" * 600), PAX),
        block_of("a/k.jpg", b"image"),
        block_of("././@LongLink", b"elsewhere\0", LONG_LINK),
        block_of("././@LongLink", b"a/" + b"l" * 300 + b".jpg\0", LONG_NAME),
        block_of("a/lll", b"image"),
        END,
    )
    assert found.keys == ["a/k", "a/" + "l" * 300]


# damage to the structure, each kind of which some reader loses without a word


@pytest.mark.parametrize("damage", STRUCTURE)
def test_damaged_structure_is_refused(shards, damage):
    (path,) = shards((8,))
    change, message = STRUCTURE[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message) as refused:
        scan(path)
    assert f"`{path}`" in str(refused.value)


GOOD = [("a.jpg", b"x"), ("a.cls", b"0")]


@pytest.mark.parametrize(
    ("again", "message"),
    [
        (GOOD, r"second image for key `a`, `a.jpg`"),
        ([("a.png", b"x")], r"second image for key `a`, `a.png`"),
        ([("a.cls", b"0")], r"second label for key `a`"),
        ([("a.json", b"{}"), ("a.json", b"{}")], r"second label for key `a`, `a.json`"),
    ],
)
def test_a_key_twice_is_refused(tmp_path, again, message):
    with pytest.raises(DataError, match=message):
        scan(tar_of(tmp_path / "a.tar", [*GOOD, ("b.jpg", b"x"), ("b.cls", b"0"), *again]))


@pytest.mark.parametrize(
    "kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.GNUTYPE_SPARSE, b"M", b"\xff"]
)
def test_what_is_no_file_is_refused(of_bytes, kind):
    with pytest.raises(DataError, match=r"holds `a.jpg` as a link or special file"):
        of_bytes(block_of("a.jpg", kind=kind), END)


# hostile headers


HOSTILE = {
    "a size beyond the file": ([block_of("a.jpg", size=8**11 - 1)], r"inside `a.jpg` \(8589934591 bytes"),
    "a negative size": ([block_of("a.jpg", size=-512)], r"inside `a.jpg` \(-512 bytes"),
    "a size of 2^70": ([block_of("a.jpg", size=2**70)], r"inside `a.jpg` \(1180591620717411303424 bytes"),
    "a size beyond the file in pax": (
        [block_of("x", record("size", "9" * 20), PAX), block_of("a.jpg", b"x")],
        r"inside `a.jpg` \(9{20} bytes",
    ),
    "a negative size in pax": ([block_of("x", record("size", "-1"), PAX), block_of("a.jpg")], r"damaged size `-1`"),
    "a size that is no number": ([block_of("x", record("size", "\u00b2"), PAX), block_of("a.jpg")], r"damaged size `"),
    "a size of 5000 digits": ([block_of("x", record("size", "1" * 5000), PAX), block_of("a.jpg")], r"damaged size `1"),
    "a record longer than its header": (
        [block_of("x", b"99 path=a.jpg\n", PAX), block_of("a.jpg")],
        r"extended header",
    ),
    "a record of length 0": ([block_of("x", b"0 path=a.jpg\n", PAX), block_of("a.jpg")], r"damaged extended header"),
    "a record without end": ([block_of("x", b"12 path=a.jpg", PAX), block_of("a.jpg")], r"damaged extended header"),
    "an extended header of 2 MB": (
        [block_of("x", record("comment", "y" * (2 << 20)), PAX), block_of("a.jpg")],
        r"extended header of \d+ bytes at byte 0",
    ),
    "an extended header beyond the file": ([block_of("x", size=2**40, kind=PAX)], r"inside `x`"),
    "a name of 5000 bytes": (
        [block_of("x", b"n" * 5000 + b".jpg", LONG_NAME), block_of("n")],
        r"name of 5004 bytes at byte 0, but 1 to 4096",
    ),
    "an empty name": ([block_of("x", b"\0", LONG_NAME), block_of("n")], r"name of 0 bytes"),
    "two names": (
        [block_of("x", b"a.jpg\0", LONG_NAME), block_of("x", record("path", "b.jpg"), PAX), block_of("n", b"x")],
        r"extended headers that contradict each other from byte 0 on",
    ),
    "names without end": ([block_of("x", b"a.jpg" + bytes(4000), LONG_NAME)] * 400, r"extended headers of more than"),
    "a name for nothing": ([block_of("a.jpg", b"x"), block_of("x", b"b.jpg", LONG_NAME)], r"without its member"),
    "a name for all": ([block_of("x", record("path", "a.jpg"), GLOBAL), block_of("b.jpg")], r"sets path for all"),
    "a sparse file": (
        [
            block_of("x", record("GNU.sparse.major", "1") + record("GNU.sparse.realsize", "9" * 15), PAX),
            block_of("a.jpg"),
        ],
        r"sparse file",
    ),
    "a name that a terminal obeys": ([block_of("\x1b[2Jx")], r"holds `\\x1b\[2Jx`, which has no extension"),
    "a hidden file": ([block_of("a/.jpg")], r"holds `a/.jpg`, which has no extension"),
    "an image of 4 GiB": ([block_of("a.jpg", size=2**32)], r"inside `a.jpg`"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_headers_are_refused(of_bytes, name):
    parts, message = HOSTILE[name]
    with pytest.raises(DataError, match=message):
        of_bytes(*parts, END)


def test_an_image_of_4_gib_is_refused_though_it_is_there(tmp_path):
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        file.write(block_of("a.jpg", size=2**32))
        file.truncate(512 + 2**32 + 1024)  # a hole: no disk is used
    with pytest.raises(DataError, match=r"holds `a.jpg` of 4294967296 bytes"):
        scan(path)


def test_members_samples_and_keys_are_limited(of_bytes, monkeypatch):
    blocks = [block_of(f"k{i}.jpg", b"x") for i in range(10)]
    monkeypatch.setattr(tar_walk, "MOST_MEMBERS", 10)
    monkeypatch.setattr(tar_scan, "MOST_SAMPLES", 10)
    assert len(of_bytes(*blocks, END).rows) == 10
    monkeypatch.setattr(tar_walk, "MOST_MEMBERS", 9)
    with pytest.raises(DataError, match="more than 9 members"):
        of_bytes(*blocks, END)
    monkeypatch.setattr(tar_walk, "MOST_MEMBERS", 10)
    monkeypatch.setattr(tar_scan, "MOST_SAMPLES", 9)
    with pytest.raises(DataError, match="more than 9 samples"):
        of_bytes(*blocks, END)
    monkeypatch.setattr(tar_scan, "MOST_SAMPLES", 10)
    monkeypatch.setattr(tar_scan, "MOST_KEY_BYTES", 300)
    with pytest.raises(DataError, match="cut it into several shards"):
        of_bytes(*blocks, END)


def test_members_of_no_interest_take_no_memory(tmp_path):
    """Pickles and arrays are passed over: a hole of 1 GiB is walked through in pieces."""
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        for name, data in (("a.jpg", b"x"), ("a.cls", b"0")):
            file.write(block_of(name, data))
        for name in ("a.pyd", "a.npy"):
            file.write(block_of(name, size=64 << 20))
            file.seek(64 << 20, 1)
        file.write(END)
    tracemalloc.start()
    try:
        assert len(scan(path).rows) == 1
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()


# content of one sample

NO_INTEGER = "which is not an integer"
CONTENT = {
    "no label": ([("b.jpg", b"x")], "missing_label", r"no label for key `b`; each sample needs KEY.cls"),
    "no image": ([("b.cls", b"0")], "missing_image", r"no image for key `b`"),
    "neither": ([("b.txt", b"x")], "missing_image", r"no image for key `b`"),
    "dotted key": ([("b.005.jpg", b"x"), ("b.005.cls", b"0")], "missing_image", r"no image for key `b`.*first dot"),
    "image of 0 bytes": ([("b.jpg", b""), ("b.cls", b"0")], "empty", r"image of 0 bytes for key `b`"),
    "label no integer": (
        [("b.jpg", b"x"), ("b.cls", b"cat")],
        "label",
        r"`b.cls` says label `cat`, which is not an integer",
    ),
    "label empty": ([("b.jpg", b"x"), ("b.cls", b"")], "label", NO_INTEGER),
    "label with a point": ([("b.jpg", b"x"), ("b.cls", b"3.0")], "label", NO_INTEGER),
    "label negative": ([("b.jpg", b"x"), ("b.cls", b"-1")], "label", r"`-1`, which must be one of 0..4"),
    "label too large": ([("b.jpg", b"x"), ("b.cls", b"5")], "label", r"`5`, which must be one of 0..4.* 5 classes"),
    "label of 20 digits": ([("b.jpg", b"x"), ("b.cls", b"1" * 20)], "label", NO_INTEGER),
    "label too long": ([("b.jpg", b"x"), ("b.cls", b" " * 2000)], "label", r"2000 bytes, too long for a label"),
    "label of bytes": ([("b.jpg", b"x"), ("b.cls", b"\xff\x1b[2J")], "label", r"`\\udcff\\x1b\[2J`"),
    "no JSON": ([("b.jpg", b"x"), ("b.json", b"{")], "label", r"`b.json` is not JSON"),
    "JSON too large": ([("b.jpg", b"x"), ("b.json", b" " * (2 << 20))], "label", r"2097152 bytes, above the 1048576"),
    "JSON nested": ([("b.jpg", b"x"), ("b.json", b"[" * 10**6)], "label", r"not JSON"),
    "JSON nested under label": (
        [("b.jpg", b"x"), ("b.json", b'{"label":' + b"[" * 900 + b"]" * 900 + b"}")],
        "label",
        NO_INTEGER,
    ),
    "JSON of thousands of digits": (
        [("b.jpg", b"x"), ("b.json", b'{"label": ' + b"1" * 9999 + b"}")],
        "label",
        "not JSON",
    ),
    "JSON in UTF-16 cut": ([("b.jpg", b"x"), ("b.json", b"\xff\xfe{")], "label", "not JSON"),
}
JSON_LABELS = [5, True, 1.0, 1e300, float("nan"), float("inf"), "cat", "", [1], {"a": 1}, "\ud800", -1, 10**18, "1.0"]


@pytest.mark.parametrize("damage", CONTENT)
def test_a_damaged_sample_is_marked_and_keeps_its_number(tmp_path, damage):
    members, kind, message = CONTENT[damage]
    path = tar_of(tmp_path / "a.tar", [*GOOD, *members, ("c.jpg", b"z"), ("c.cls", b"4")])
    found = scan(path, 5)
    assert found.keys == ["a", "b", "c"] and kinds(found) == {kind: 1}
    ((row, sentence),) = found.marked[kind].sentences.items()
    assert row == 1 and re.search(message, sentence) and f"`{path}`" in sentence
    assert sentence.isprintable()
    good = scan(tar_of(tmp_path / "b.tar", [*GOOD, ("c.jpg", b"z"), ("c.cls", b"4")]), 5).rows
    assert (
        found.rows[[0, 2]][["length", "label", "checksum"]].tolist() == good[["length", "label", "checksum"]].tolist()
    )


@pytest.mark.parametrize("label", JSON_LABELS, ids=repr)
def test_labels_in_json_that_are_none_of_the_classes(tmp_path, label):
    found = scan(tar_of(tmp_path / "a.tar", [("b.jpg", b"x"), ("b.json", json.dumps({"label": label}).encode())]), 5)
    assert kinds(found) == {"label": 1} and found.rows["label"].tolist() == [-2]


def test_labels_that_are_accepted(tmp_path):
    members = [("a.cls", b" 07\n"), ("b.json", b'{"label": 2}'), ("c.json", b'{"label": " 3 "}'), ("d.cls", b"-0")]
    # KEY.cls decides where there are both, in either order
    members += [("e.json", b'{"label": "x"}'), ("e.cls", b"1"), ("f.cls", b"4"), ("f.json", b"{")]
    members += [("g.json", b'{"label": 1, "label": 5}'), ("h.json", b'{"label": null}'), ("h.cls", b"9")]
    found = scan(tar_of(tmp_path / "a.tar", members + [(f"{key}.jpg", b"x") for key in "abcdefgh"]))
    expected = {"a": 7, "b": 2, "c": 3, "d": 0, "e": 1, "f": 4, "g": 5, "h": 9}
    assert dict(zip(found.keys, found.rows["label"].tolist(), strict=True)) == expected
    assert not found.marked


def test_an_absurd_label_is_no_class(tmp_path):
    members = [("a.jpg", b"x"), ("a.cls", b"999999"), ("b.jpg", b"x"), ("b.cls", b"1000000")]
    members += [("c.jpg", b"x"), ("c.cls", b"2147483647")]
    found = scan(tar_of(tmp_path / "a.tar", members))
    assert found.rows["label"].tolist() == [999999, -2, -2]
    assert "give a list of classes" in found.marked["label"].sentences[1]


def test_only_the_first_of_each_kind_are_spelled_out(tmp_path):
    members = [(f"k{i}.jpg", b"x") for i in range(30)] + [(f"m{i}.cls", b"0") for i in range(25)]
    found = scan(tar_of(tmp_path / "a.tar", members))
    assert kinds(found) == {"missing_label": 30, "missing_image": 25}
    assert [list(marked.sentences) for marked in found.marked.values()] == [list(range(30, 50)), list(range(20))]


def test_keys_are_no_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ["../../escaped", "/tmp/absolute", "a/../b", "C:\\x", "~/home", "$HOME", "k;touch canary", "nul\u200b"]
    members = [(f"{name}{kind}", b"0") for name in names for kind in (".jpg", ".cls")]
    before = sorted(tmp_path.rglob("*"))
    found = scan(tar_of(tmp_path / "a.tar", members))
    assert found.keys == names
    assert sorted(tmp_path.rglob("*")) == [*before, tmp_path / "a.tar"]
