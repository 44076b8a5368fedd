import gc
import io
import json
import pickle
import tarfile
from pathlib import Path

import numpy as np
import pytest
import webdataset
import xxhash

from dist_kd.data.index import ROW, read_index, write_index
from dist_kd.data.survey import build_index, verify_index
from dist_kd.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIST_KD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def index_of(paths, **how):
    return build_index(paths[0].parent, paths, **{"name": "x", "classes": None} | how)


def tar_of(path: Path, members: list[tuple[str, bytes]], **how) -> Path:
    with tarfile.open(path, "w", **how) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def header_at(data: bytes, number: int) -> int:
    """Offset of the number-th member's header."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()[number].offset


# what an index is


def test_rows_are_those_of_an_independent_reader(shards):
    paths = shards((7, 10, 5))
    index = index_of(paths)
    expected = []
    for path in paths:
        with tarfile.open(path) as tar:
            by_name = {member.name: member for member in tar}
            for name, member in by_name.items():
                if name.endswith(".jpg"):
                    image = tar.extractfile(member).read()
                    label = int(tar.extractfile(by_name[name.replace(".jpg", ".cls")]).read())
                    check = xxhash.xxh3_64(image).intdigest() % 2**32
                    expected.append((member.offset_data, member.size, label, check))
    assert index.rows.tolist() == expected
    assert ROW.itemsize == 20
    assert index.classes == ("0", "1", "2", "3", "4")
    assert index.spec.shard_sizes == (7, 10, 5) and index.spec.num_samples == 22
    assert index.shard_path(1) == paths[1]
    assert index.locate(6)[0] == 0 and index.locate(7)[0] == 1 and index.locate(21)[0] == 2
    assert index.locate(7)[1] == index.rows[7]
    with pytest.raises(IndexError):
        index.locate(22)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # webdataset leaves files open
def test_keys_labels_and_order_are_those_webdataset_gives(shards):
    paths = shards((6, 3))
    seen = [int(sample["cls"]) for sample in webdataset.WebDataset([str(p) for p in paths], shardshuffle=False)]
    gc.collect()
    assert index_of(paths).rows["label"].tolist() == seen


def test_several_processes_give_the_same(shards):
    paths = shards((3, 4, 5))
    one, two = index_of(paths), index_of(paths, jobs=2)
    assert one.rows.tolist() == two.rows.tolist() and one.shards == two.shards


def test_written_and_read(shards):
    index = index_of(shards((7, 10)), classes=tuple("abcde"), augment="flip", image_size=8)
    write_index(index)
    again = read_index(index.folder)
    assert again.spec == index.spec and again.shards == index.shards
    assert again.spec.augment == "flip" and again.spec.image_size == 8
    assert isinstance(again.rows, np.memmap) and again.rows.tolist() == index.rows.tolist()
    facts = json.loads((index.folder / "index.json").read_text())
    assert facts["wids_version"] == 1
    assert [(shard["url"], shard["nsamples"]) for shard in facts["shardlist"]] == [
        ("train-0000.tar", 7),
        ("train-0001.tar", 10),
    ]
    assert sorted(p.name for p in index.folder.iterdir()) == [
        "index.json",
        "index.npy",
        *(s.name for s in index.shards),
    ]


def test_a_mapped_index_travels_as_a_path(shards):
    index = index_of(shards((300,)))
    write_index(index)
    mapped = read_index(index.folder)
    pickled = pickle.dumps(mapped)
    assert len(pickled) < 300 * 20
    assert pickle.loads(pickled).rows.tolist() == index.rows.tolist()
    assert pickle.loads(pickle.dumps(mapped.select([0]))).rows.tolist() == index.rows.tolist()


def test_fingerprint_follows_the_samples(shards, tmp_path, make_image):
    paths = shards((7, 10))
    index = index_of(paths)
    elsewhere = tmp_path / "other"
    elsewhere.mkdir()
    copies = []
    for path in paths:  # the same samples in another tar format: other offsets, same set
        with tarfile.open(path) as tar:
            members = [(m.name, tar.extractfile(m).read()) for m in tar]
        copies.append(tar_of(elsewhere / path.name, [("._note.jpg", b""), *members], format=tarfile.PAX_FORMAT))
    copy = build_index(elsewhere, copies, name="y", classes=None)
    assert copy.rows["offset"].tolist() != index.rows["offset"].tolist()
    assert copy.fingerprint == index.fingerprint
    assert build_index(paths[0].parent, paths[::-1], name="x", classes=None).fingerprint != index.fingerprint
    assert index_of(paths, classes=tuple("abcde")).fingerprint != index.fingerprint


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
            ],
            format=form,
        )
        assert build_index(tmp_path, [path], name="x", classes=None).rows["label"].tolist() == [3, 1, 0]


def test_members_need_not_stand_together(tmp_path, make_image):
    """All images first, then all labels: webdataset loses such a shard, an index does not."""
    members = [(f"k{i}.jpg", make_image(i)) for i in range(4)] + [(f"k{i}.cls", b"%d" % i) for i in range(4)]
    path = tar_of(tmp_path / "a.tar", members)
    assert build_index(tmp_path, [path], name="x", classes=None).rows["label"].tolist() == [0, 1, 2, 3]


# damage, each kind of which some reader loses without a word


def flipped(data: bytes, at: int) -> bytes:
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def data_at(data: bytes, number: int) -> int:
    """Offset of the number-th member's bytes."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        return tar.getmembers()[number].offset_data


def ended(data: bytes) -> int:
    """Offset of the end-of-archive blocks."""
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        last = tar.getmembers()[-1]
    return last.offset_data + -(-last.size // 512) * 512


DAMAGE = {
    "cut at a member's end": (lambda d: d[: header_at(d, 6)], r"ends at byte \d+ without the end-of-archive blocks"),
    "cut in a header": (lambda d: d[: header_at(d, 6) + 100], r"ends inside the header"),
    "cut in a member": (lambda d: d[: data_at(d, 7) + 100], r"inside `k00006.jpg` \(\d+ bytes"),
    "cut in the end": (lambda d: d[: ended(d) + 512], r"cut inside its end-of-archive blocks"),
    "no end": (lambda d: d[: ended(d)], r"without the end-of-archive blocks"),
    "bit in a name": (lambda d: flipped(d, header_at(d, 6) + 2), r"damaged header at byte \d+, behind key `k00005`"),
    "bit in a size": (lambda d: flipped(d, header_at(d, 6) + 130), r"damaged header"),
    "header zeroed": (
        lambda d: d[: header_at(d, 6)] + bytes(512) + d[header_at(d, 6) + 512 :],
        r"seems to end at byte \d+ \(behind key `k00005`\), but more follows",
    ),
    "zero blocks inside": (
        lambda d: d[: header_at(d, 6)] + bytes(2048) + d[header_at(d, 6) :],
        r"but more follows",
    ),
    "garbage inside": (lambda d: d[: header_at(d, 6)] + b"\x07" * 512 + d[header_at(d, 6) :], r"damaged header"),
    "two archives": (lambda d: d + d, r"second archive"),
    "empty": (lambda d: b"", r"is empty"),
    "a web page": (lambda d: b"<!DOCTYPE html>" + bytes(600), r"is not a tar: it begins with `<!DOCTYPE html>"),
    "a short web page": (lambda d: b"<!DOCTYPE html>", r"is not a tar"),
    "gzip": (lambda d: b"\x1f\x8b" + d[2:], r"is compressed \(gzip\)"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_archives_are_refused(shards, damage):
    first, path = shards((3, 8))
    change, message = DAMAGE[damage]
    path.write_bytes(change(path.read_bytes()))
    with pytest.raises(DataError, match=message) as refused:
        index_of([first, path])
    assert f"`{path}`" in str(refused.value)


GOOD = [("a.jpg", b"x"), ("a.cls", b"0")]
MEMBERS = {
    "no extension": ([*GOOD, ("b", b"x")], r"holds `b`, which has no extension"),
    "no label": ([*GOOD, ("b.jpg", b"x")], r"no label for key `b`"),
    "no image": ([*GOOD, ("b.cls", b"0")], r"no image for key `b`"),
    "dotted key": ([*GOOD, ("b.005.jpg", b"x"), ("b.005.cls", b"0")], r"no image for key `b`.*first dot"),
    "image of 0 bytes": ([*GOOD, ("b.jpg", b""), ("b.cls", b"0")], r"`b.jpg` of 0 bytes"),
    "label no integer": ([*GOOD, ("b.jpg", b"x"), ("b.cls", b"cat")], r"`b.cls` with label `cat`.*not an integer"),
    "label empty": ([*GOOD, ("b.jpg", b"x"), ("b.cls", b"")], r"not an integer"),
    "label negative": ([*GOOD, ("b.jpg", b"x"), ("b.cls", b"-1")], r"label `-1`, which must be one of 0..4"),
    "label too large": ([*GOOD, ("b.jpg", b"x"), ("b.cls", b"5")], r"label `5`, which must be one of 0..4.* 5 classes"),
    "label in JSON too large": ([*GOOD, ("b.jpg", b"x"), ("b.json", b'{"label": 5}')], r"label `5`"),
    "label in JSON true": ([*GOOD, ("b.jpg", b"x"), ("b.json", b'{"label": true}')], r"not an integer"),
    "no JSON": ([*GOOD, ("b.jpg", b"x"), ("b.json", b"{")], r"`b.json`, which is not JSON"),
    "key again": ([*GOOD, ("b.jpg", b"x"), ("b.cls", b"0"), *GOOD], r"second image for key `a`"),
    "two images": ([*GOOD, ("a.png", b"x")], r"second image for key `a`, `a.png`"),
    "two labels": ([*GOOD, ("a.cls", b"0")], r"second label for key `a`"),
}


@pytest.mark.parametrize("damage", MEMBERS)
def test_damaged_samples_are_refused(tmp_path, damage):
    members, message = MEMBERS[damage]
    path = tar_of(tmp_path / "a.tar", members)
    with pytest.raises(DataError, match=message) as refused:
        build_index(tmp_path, [path], name="x", classes=tuple("abcde"))
    assert f"`{path}`" in str(refused.value)


def test_links_are_refused(tmp_path):
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "b.jpg"
        tar.addfile(info)
    with pytest.raises(DataError, match=r"holds `a.jpg` as a link"):
        build_index(tmp_path, [path], name="x", classes=None)


def test_damage_is_named_from_other_processes_too(shards):
    paths = shards((3, 4))
    paths[1].write_bytes(b"")
    with pytest.raises(DataError, match=r"train-0001.tar` is empty"):
        index_of(paths, jobs=2)


def test_no_shard_no_samples(tmp_path):
    with pytest.raises(DataError, match="no shards"):
        build_index(tmp_path, [], name="x", classes=None)
    with pytest.raises(DataError, match="hold no samples"):
        build_index(tmp_path, [tar_of(tmp_path / "a.tar", [])], name="x", classes=None)
    with pytest.raises(DataError, match=r"gone.tar` cannot be read \(No such file"):
        build_index(tmp_path, [tmp_path / "gone.tar"], name="x", classes=None)


# reading an index that is not well


def test_an_index_that_is_not_well_is_refused(shards):
    index = index_of(shards((7, 10)))
    write_index(index)
    json_path, rows_path = index.folder / "index.json", index.folder / "index.npy"
    text, rows = json_path.read_text(), rows_path.read_bytes()

    def refused(message):
        with pytest.raises(DataError, match=message) as error:
            read_index(index.folder)
        assert "dist-kd index" in str(error.value)
        json_path.write_text(text), rows_path.write_bytes(rows)

    rows_path.write_bytes(rows[:-1]), refused("damaged")
    rows_path.write_bytes(flipped(rows, len(rows) - 1)), refused("do not belong together")
    np.save(rows_path, np.zeros(17)), refused("damaged")
    np.save(rows_path, np.array([{}] * 17), allow_pickle=True), refused("damaged")
    rows_path.unlink(), refused("damaged")
    json_path.write_text(text[:50]), refused("cannot be read")
    json_path.write_text(text.replace('"schema": 1', '"schema": 2')), refused("schema `2`")
    json_path.write_text("[]"), refused("schema")
    json_path.unlink(), refused(r"has no index.json")
    read_index(index.folder)


# verify


def test_verify_a_good_set(shards):
    index = index_of(shards((7, 10)))
    assert verify_index(index) == []
    assert verify_index(index, jobs=2, decode=len) == []  # spawned processes need no torch then


def test_verify_names_what_is_wrong(shards):
    paths = shards((4, 4, 4))
    index = index_of(paths)
    data = paths[1].read_bytes()
    offset = int(index.rows[5]["offset"])
    paths[1].write_bytes(flipped(data, offset + 100))
    problems = verify_index(index)
    assert [problem.split("train-0001.tar` ")[1] for problem in problems] == [
        "has another sha256 than the index says",
        "sample 5 (row 1) has other bytes than the index says (checksum)",
    ]
    paths[1].write_bytes(data[: offset + 10])
    assert any("inside `k00005.jpg`" in problem for problem in verify_index(index))
    paths[1].unlink()
    assert any("train-0001.tar` cannot be read" in problem for problem in verify_index(index))


def test_verify_decodes_each_image(tmp_path, make_image):
    whole = make_image(2, 64, 64)
    path = tar_of(
        tmp_path / "a.tar",
        [("a.jpg", whole), ("a.cls", b"0"), ("b.jpg", whole[: len(whole) // 2]), ("b.cls", b"0")],
    )
    (problem,) = verify_index(build_index(tmp_path, [path], name="x", classes=None))
    assert "sample 1 (row 1) cannot be decoded" in problem


def test_verify_sees_another_label(shards):
    paths = shards((4,))
    index = index_of(paths)
    data = paths[0].read_bytes()
    with tarfile.open(paths[0]) as tar:
        at = next(member.offset_data for member in tar if member.name.endswith("00001.cls"))
    paths[0].write_bytes(data[:at] + b"3" + data[at + 1 :])
    assert any("has other labels" in problem for problem in verify_index(index))
