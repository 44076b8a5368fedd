import gc
import io
import logging
import tarfile

import numpy as np
import pytest
import webdataset
import xxhash
from data.tars import flipped, tar_of
from PIL import Image

from dist_kd.data.damage import KINDS, damage_of, is_marked
from dist_kd.data.index import ROW, read_index, write_index
from dist_kd.data.survey import build_index, verify_index
from dist_kd.errors import DataError


def index_of(paths, **how):
    return build_index(paths[0].parent, paths, **{"name": "x", "classes": None} | how)


# what an index is built of


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


# content that is damaged

BAD = {  # members of one sample -> its kind
    "missing_label": [("jpg", b"x")],
    "missing_image": [("cls", b"0")],
    "empty": [("jpg", b""), ("cls", b"0")],
    "label": [("jpg", b"x"), ("cls", b"cat")],
}


def with_bad(folder, kinds, good=4):
    """One shard: good samples of label 1, with a bad one of each kind behind the first."""
    members = [(f"a{i}.{kind}", data) for i in range(good) for kind, data in (("jpg", b"x"), ("cls", b"1"))]
    bad = [(f"{kind}.{extension}", data) for kind in kinds for extension, data in BAD[kind]]
    return tar_of(folder / "a.tar", members[:2] + bad + members[2:])


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_sample_is_marked_and_named(tmp_path, caplog, kind):
    path = with_bad(tmp_path, [kind])
    with caplog.at_level(logging.WARNING):
        index = index_of([path], classes=("0", "1"), max_bad_fraction=0.2)
    assert [damage_of(row) for row in index.rows] == ["", kind, "", "", ""]
    assert is_marked(index.rows).tolist() == [False, True, False, False, False]
    (record,) = caplog.records
    assert f"1 of 5 samples in `{tmp_path}` are damaged (1 {kind}); the first of each kind: " in record.message
    assert f"shard `{path}`" in record.message and f"`{kind}`" in record.message
    with pytest.raises(DataError, match=rf"\(1 {kind}\).* more than the share `0.19` that may be.*--max-bad-fraction"):
        index_of([path], classes=("0", "1"), max_bad_fraction=0.19)
    write_index(index)  # schema 1: marks are rows like others
    assert read_index(tmp_path).rows.tolist() == index.rows.tolist()
    (problem,) = verify_index(index, decode=len)
    assert f"`{kind}`" in problem and str(path) in problem


def test_all_kinds_are_counted_over_shards(tmp_path, caplog):
    (tmp_path / "b").mkdir()
    paths = [with_bad(tmp_path, ["label", "empty"]), with_bad(tmp_path / "b", BAD)]
    with pytest.raises(DataError, match=r"6 of 14 samples .*\(2 empty, 1 missing_image, 1 missing_label, 2 label\)"):
        index_of(paths)
    one, two = (index_of(paths, max_bad_fraction=0.5, jobs=jobs) for jobs in (1, 2))
    assert one.rows.tolist() == two.rows.tolist()
    problems = verify_index(one, decode=len)
    assert len(problems) == 6 and all(any(f"key `{kind}`" in p for p in problems) for kind in BAD)


def test_shards_without_any_label_are_refused(tmp_path):
    path = tar_of(tmp_path / "a.tar", [(f"a{i}.jpg", b"x") for i in range(3)])
    with pytest.raises(
        DataError, match=r"3 of 3 samples.*no label for key `a0`; each sample needs KEY.cls, or KEY.json"
    ):
        index_of([path])
    with pytest.raises(DataError, match=r"no sample in .* has a label"):
        index_of([path], max_bad_fraction=1)


def test_a_label_far_above_the_others_is_said(tmp_path, caplog):
    members = [(f"a{i}.{kind}", data) for i in range(3) for kind, data in (("jpg", b"x"), ("cls", b"%d" % i))]
    index_of([tar_of(tmp_path / "a.tar", members)])
    assert not caplog.records
    index = index_of([tar_of(tmp_path / "a.tar", [*members, ("b.jpg", b"x"), ("b.cls", b"9999")])])
    assert "the largest label" in caplog.text and "is 9999, and the next 2" in caplog.text
    assert len(index.classes) == 10000


def test_every_kind_has_a_name_and_marks_are_told_apart():
    assert set(BAD) < set(KINDS) and all(kind.isidentifier() for kind in KINDS)
    rows = np.array([(512, 1, 0, 0), (0, 0, -1, 0), (512, 0, -2, 0), (512, 1, -1, 0), (512, 1, -2, 0)], ROW)
    assert [damage_of(row) for row in rows] == ["", "missing_image", "empty", "missing_label", "label"]


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
        "sample 5 (row 1, key `k00005`) has other bytes than the index says (checksum)",
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
    assert "sample 1 (row 1, key `b`) cannot be decoded" in problem


def test_verify_sees_another_label(shards):
    paths = shards((4,))
    index = index_of(paths)
    data = paths[0].read_bytes()
    with tarfile.open(paths[0]) as tar:
        at = next(member.offset_data for member in tar if member.name.endswith("00001.cls"))
    paths[0].write_bytes(data[:at] + b"3" + data[at + 1 :])
    assert any(
        "has other labels than the index says: 1, the first of key `k00001`, `3` where the index says `1`" in problem
        for problem in verify_index(index)
    )


def test_verify_sees_a_flip_wherever_it_is(shards):
    """In a header, an image, a label, padding or the end: nothing of a shard is passed over."""
    (path,) = shards((2,))
    index = index_of([path])
    data = path.read_bytes()
    for at in range(0, len(data), 97):
        path.write_bytes(flipped(data, at))
        assert verify_index(index, decode=len), f"byte {at}"


def test_verify_sees_another_shard_in_its_place(shards):
    paths = shards((4, 4, 3))
    index = index_of(paths)
    contents = [path.read_bytes() for path in paths]
    paths[0].write_bytes(contents[1])  # as long, all in its place, other images
    problems = verify_index(index)
    assert any("has another sha256" in problem for problem in problems)
    assert sum("(checksum)" in problem for problem in problems) == 4
    paths[0].write_bytes(contents[2])
    problems = verify_index(index)
    assert any("has 3 samples where the index says 4" in problem for problem in problems)
    paths[0].write_bytes(contents[0][:-1024] + bytes(2048))
    assert [problem.split("` ", 1)[1] for problem in verify_index(index)] == [
        f"has {len(contents[0]) + 1024} bytes where the index says {len(contents[0])}"
    ]


def test_verify_sees_rows_that_are_not_those_of_the_shard(shards):
    (path,) = shards((4,))
    index = index_of([path])
    index.rows["offset"][2] += 512
    problems = verify_index(index)
    assert "has images at other places than the index says: 1, the first of key `k00002`" in problems[0]
    assert "sample 2 (row 2, key `k00002`) has other bytes" in problems[1] and len(problems) == 2


def test_verify_spells_out_the_first_of_each_kind(tmp_path):
    members = [(f"a{i:02d}.{kind}", data) for i in range(30) for kind, data in (("jpg", b"no image"), ("cls", b"0"))]
    members += [("b.cls", b"0")]
    problems = verify_index(index_of([tar_of(tmp_path / "a.tar", members)], max_bad_fraction=0.1))
    assert sum("cannot be decoded" in problem for problem in problems) == 20
    assert "no image for key `b`" in problems[-2]  # not hidden behind thirty others
    assert problems[-1] == f"shard `{tmp_path / 'a.tar'}` has 10 more problems of the kind decode"


def test_images_that_are_legal_but_odd_are_well(tmp_path):
    assert verify_index(index_of([tar_of(tmp_path / "a.tar", odd_images())])) == []


def odd_images() -> list[tuple[str, bytes]]:
    """Members: CMYK, grey, 16-bit, palette, alpha, turned by EXIF, animated, progressive."""
    grey = Image.fromarray(np.arange(64, dtype=np.uint8).reshape(8, 8))
    deep = Image.fromarray(np.arange(64, dtype=np.uint16).reshape(8, 8) * 1000)
    turned = Image.Exif()
    turned[0x0112] = 6
    animated = {"save_all": True, "append_images": [grey.rotate(90).convert("RGB")]}
    images = {
        "cmyk.jpg": (grey.convert("CMYK"), {}),
        "grey.jpg": (grey, {}),
        "deep.png": (deep, {}),
        "palette.png": (grey.convert("P"), {"transparency": 3}),
        "alpha.png": (grey.convert("RGBA"), {}),
        "alpha.webp": (grey.convert("RGBA"), {}),
        "bit.png": (grey.convert("1"), {}),
        "turned.jpg": (grey, {"exif": turned}),
        "animated.webp": (grey.convert("RGB"), animated),
        "animated.png": (grey.convert("RGB"), animated),
        "progressive.jpeg": (grey, {"progressive": True}),
    }
    members = []
    for number, (name, (image, options)) in enumerate(images.items()):
        file = io.BytesIO()
        image.save(file, {"jpg": "JPEG", "jpeg": "JPEG"}.get(name.split(".")[1], name.split(".")[1].upper()), **options)
        members += [(f"{number}{name}", file.getvalue()), (f"{number}{name.split('.')[0]}.cls", b"0")]
    return members
