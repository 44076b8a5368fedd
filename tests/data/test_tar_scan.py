import json
import re
import tarfile
import tracemalloc

import pytest
from data.tars import END, block_of, scan, tar_of

from dist_kd.data import tar_scan, tar_walk
from dist_kd.errors import DataError


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


# a key comes once

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
