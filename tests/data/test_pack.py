"""Packing: the bytes that went in, shuffled, labelled, reproducible by any number of processes and after any stop."""

from __future__ import annotations

import fcntl
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from webdataset import tariterators

from dist_kd.data import pack, selection
from dist_kd.data.index import read_index
from dist_kd.data.sources import Item, Source, open_source
from dist_kd.data.survey import verify_index
from dist_kd.errors import ConfigError, DataError


def image_bytes(number: int, width: int = 12, height: int = 10, form: str = "JPEG") -> bytes:
    """Noise, another for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    content = io.BytesIO()
    Image.fromarray(pixels).save(content, form)
    return content.getvalue()


def items_of(per_class: dict[int, int], **size) -> list[Item]:
    numbers = [(label, k) for label, count in per_class.items() for k in range(count)]
    return [Item(f"class{label}/{k:04d}.jpg", image_bytes(label * 10_000 + k, **size), label) for label, k in numbers]


def folder_of(root: Path, per_class: dict[str, int], **size) -> Path:
    """An image folder with many kinds of names."""
    number = 0
    for class_name, count in per_class.items():
        (root / class_name).mkdir(parents=True)
        for k in range(count):
            ending, form = [("jpg", "JPEG"), ("JPEG", "JPEG"), ("PNG", "PNG"), ("webp", "WEBP")][k % 4]
            (root / class_name / f"{k}.{ending}").write_bytes(image_bytes(number, form=form, **size))
            number += 1
        (root / class_name / "notes.txt").write_text("no image")
        (root / class_name / "._0.jpg").write_text("what a file system leaves behind")
    return root


def tar_bytes(dest: Path) -> dict[str, bytes]:
    return {str(path.relative_to(dest)): path.read_bytes() for path in sorted(dest.rglob("*.tar"))}


def samples_of(dest: Path) -> list[dict]:
    """The samples of all shards, as webdataset groups them (its own opener would leave the files open)."""
    found = []
    for path in sorted(dest.glob("*.tar")):
        with open(path, "rb") as file:
            found += tariterators.group_by_keys(tariterators.tar_file_expander([{"url": str(path), "stream": file}]))
    return found


def read_back(dest: Path) -> list[tuple[str, bytes, int]]:
    """(key, image, label) of each sample, in order."""
    found = []
    for sample in samples_of(dest):
        (image,) = (sample[kind] for kind in ("jpg", "png", "webp") if kind in sample)
        found.append((sample["__key__"], image, int(sample["cls"])))
    return found


# end to end


def test_each_image_is_there_once_with_its_bytes_and_label(tmp_path):
    source = folder_of(tmp_path / "photos", {"ape": 9, "bee": 13, "cat": 6})
    indexes = pack.pack_source(open_source(str(source)), tmp_path / "out", shard_samples=10)
    assert list(indexes) == ["train"]
    index, out = indexes["train"], tmp_path / "out" / "train"
    assert index.classes == ("ape", "bee", "cat") and index.augment == "rrc+flip" and index.name == "photos"
    assert [shard.samples for shard in index.shards] == [9, 9, 10]
    samples = read_back(out)
    expected = {
        f"{label_name}/{path.name.split('.')[0]}": (path.read_bytes(), label)
        for label, label_name in enumerate(("ape", "bee", "cat"))
        for path in (source / label_name).iterdir()
        if path.suffix != ".txt" and path.name[0] != "."
    }
    assert {key: (image, label) for key, image, label in samples} == expected
    assert len(samples) == 28
    assert index.rows["label"].tolist() == [label for _, _, label in samples]
    assert verify_index(index) == []
    for first in (0, 9, 18):  # no shard is sorted by class
        labels = [label for _, _, label in samples[first : first + 9]]
        assert labels != sorted(labels)


def test_two_packings_are_the_same_bytes_also_by_two_processes(tmp_path):
    items = items_of({0: 30, 1: 20})
    packed = {}
    for name, given, jobs in (("one", items, 1), ("again", items[::-1], 1), ("two", items, 2)):
        pack.pack_images(given, ("a", "b"), tmp_path / name / "train", name="x", shard_samples=12, jobs=jobs)
        packed[name] = tar_bytes(tmp_path / name)
        time.sleep(0.01)
    assert len(packed["one"]) == 5
    assert packed["one"] == packed["again"] == packed["two"]
    indexes = [(tmp_path / name / "train" / "index.json").read_bytes() for name in packed]
    assert indexes[0] == indexes[1] == indexes[2]


def test_the_seed_shuffles(tmp_path):
    items = items_of({0: 10, 1: 10})
    keys = {}
    for seed in (0, 1):
        pack.pack_images(items, ("a", "b"), tmp_path / str(seed), name="x", seed=seed)
        keys[seed] = [key for key, _, _ in read_back(tmp_path / str(seed))]
    assert sorted(keys[0]) == sorted(keys[1]) and keys[0] != keys[1]


def test_what_follows_from_the_images(tmp_path):
    def facts(name, **size):
        index = pack.pack_images(items_of({0: 4}, **size), ("a",), tmp_path / name, name=name)
        return index.image_size, index.augment

    assert facts("small", width=32, height=32) == (32, "crop+flip")
    assert facts("large", width=65, height=65) == (65, "rrc+flip")
    assert facts("oblong", width=32, height=30) == (None, "rrc+flip")
    mixed = items_of({0: 2}, width=8, height=8) + items_of({1: 2}, width=9, height=9)
    assert pack.pack_images(mixed, ("a", "b"), tmp_path / "mixed", name="m").image_size is None


# restarting


def run_pack(source: Path, dest: Path) -> subprocess.Popen:
    code = "import sys; from dist_kd.commands.pack import main; main(sys.argv[1:])"
    words = [str(source), str(dest), "--jobs", "1", "--shard-size", "4"]
    return subprocess.Popen([sys.executable, "-c", code, *words], stdout=subprocess.DEVNULL)


def test_a_killed_packing_goes_on_where_it_was(tmp_path):
    source = folder_of(tmp_path / "photos", {"a": 300, "b": 200})
    whole = pack.pack_source(open_source(str(source)), tmp_path / "whole", shard_samples=4)["train"]
    out = tmp_path / "out" / "train"
    process = run_pack(source, tmp_path / "out")
    while len(list(out.glob("*.tar"))) < 5:
        assert process.poll() is None, "it ended before it could be killed"
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    done = json.loads((out / "pack.json").read_text())["shards"]
    assert 4 <= len(done) < 125
    (out / ".photos-train-000100.tar.partial").write_bytes(b"half")
    stamps = {name: (out / name).stat().st_mtime_ns for name in done}
    assert run_pack(source, tmp_path / "out").wait() == 0
    assert {name: (out / name).stat().st_mtime_ns for name in done} == stamps  # kept, not written again
    assert tar_bytes(tmp_path / "out") == tar_bytes(tmp_path / "whole")
    assert not list(out.glob(".*"))
    assert read_index(out).fingerprint == whole.fingerprint


def test_a_shard_that_is_not_right_is_written_again(tmp_path):
    items = items_of({0: 12})
    pack.pack_images(items, ("a",), tmp_path / "x", name="x", shard_samples=4)
    before = tar_bytes(tmp_path)
    (tmp_path / "x" / "x-x-000000.tar").unlink()
    damaged = tmp_path / "x" / "x-x-000001.tar"
    content = bytearray(damaged.read_bytes())
    content[700] ^= 1
    damaged.write_bytes(content)
    written = []
    pack.pack_images(
        items, ("a",), tmp_path / "x", name="x", shard_samples=4, progress=lambda *what: written.append(what)
    )
    assert tar_bytes(tmp_path) == before
    assert written == [("x/x-x-000000.tar", 8, 12), ("x/x-x-000001.tar", 12, 12)]


def test_a_finished_packing_is_left_alone(tmp_path):
    items = items_of({0: 12})
    pack.pack_images(items, ("a",), tmp_path / "x", name="x")
    before = {path: path.stat().st_mtime_ns for path in (tmp_path / "x").glob("*") if path.name != "pack.json"}
    pack.pack_images(items, ("a",), tmp_path / "x", name="x")
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize(
    ("change", "named"),
    [({"seed": 1}, "seed"), ({"quality": 50}, "quality"), ({"classes": ("b",)}, "classes"), ({"samples": 1}, "images")],
)
def test_a_folder_holds_one_packing(tmp_path, change, named):
    items = items_of({0: 6})
    pack.pack_images(items, ("a",), tmp_path / "x", name="x")
    before = tar_bytes(tmp_path)
    if "samples" in change:
        change, items = {}, items[:5]
    classes = change.pop("classes", ("a",))
    with pytest.raises(ConfigError, match=f"with other {named}"):
        pack.pack_images(items, classes, tmp_path / "x", name="x", **change)
    assert tar_bytes(tmp_path) == before


def test_other_peoples_shards_are_not_touched(tmp_path):
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "x-train-000000.tar").write_bytes(b"precious")
    with pytest.raises(ConfigError, match=r"x-train-000000\.tar"):
        pack.pack_images(items_of({0: 6}), ("a",), tmp_path / "train", name="x")
    assert (tmp_path / "train" / "x-train-000000.tar").read_bytes() == b"precious"


def test_two_packings_into_one_folder_do_not_meet(tmp_path):
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    try:
        with pytest.raises(ConfigError, match="another process"):
            pack.pack_images(items_of({0: 6}), ("a",), tmp_path, name="x")
    finally:
        os.close(handle)
    pack.pack_images(items_of({0: 6}), ("a",), tmp_path, name="x")


# images


def test_an_unreadable_image_stops_or_is_listed(tmp_path):
    source = folder_of(tmp_path / "photos", {"a": 8})
    (source / "a" / "5.jpg").write_bytes(b"")
    (source / "a" / "6.jpg").write_bytes(b"<html>not found</html>")
    with pytest.raises(DataError, match=r"`[^`]*/a/[56]\.jpg` is not a readable.*--skip-bad"):
        pack.pack_source(open_source(str(source)), tmp_path / "out", shard_samples=2)
    index = pack.pack_source(open_source(str(source)), tmp_path / "out", shard_samples=2, skip_bad=True)["train"]
    assert index.num_samples == 8 and verify_index(index) == []
    assert sorted(pack.left_out(tmp_path / "out" / "train")) == [f"{source}/a/{k}.jpg" for k in (5, 6)]


def test_the_content_names_the_kind(tmp_path):
    items = [Item("a/1.JPEG", image_bytes(1, form="PNG"), 0), Item("a/2.png", image_bytes(2, form="WEBP"), 0)]
    pack.pack_images(items, ("a",), tmp_path / "x", name="x")
    assert {s["__key__"]: {k for k in s if not k.startswith("__")} for s in samples_of(tmp_path / "x")} == {
        "a/1": {"png", "cls"},
        "a/2": {"webp", "cls"},
    }


def test_resize_makes_smaller_never_larger(tmp_path):
    sizes = {"a/wide.jpg": (90, 60), "a/tall.png": (40, 120), "a/small.jpg": (30, 20), "a/exact.jpg": (50, 32)}
    content = {
        key: image_bytes(k, *size, "PNG" if key.endswith("png") else "JPEG")
        for k, (key, size) in enumerate(sizes.items())
    }
    pack.pack_images([Item(k, v, 0) for k, v in content.items()], ("a",), tmp_path / "x", name="x", resize=32)
    found = {key: image for key, image, _ in read_back(tmp_path / "x")}
    opened = {key: Image.open(io.BytesIO(image)) for key, image in found.items()}
    assert {key: image.size for key, image in opened.items()} == {
        "a/wide": (48, 32),
        "a/tall": (32, 96),
        "a/small": (30, 20),
        "a/exact": (50, 32),
    }
    assert found["a/small"] == content["a/small.jpg"] and found["a/exact"] == content["a/exact.jpg"]
    assert opened["a/tall"].format == "PNG" and opened["a/wide"].format == "JPEG"


def test_quality_encodes_anew(tmp_path):
    item = Item("a/1.png", image_bytes(1, 64, 64, "PNG"), 0)
    sizes = {}
    for quality in (20, 90):
        pack.pack_images([item], ("a",), tmp_path / str(quality), name="x", quality=quality)
        ((_, image, _),) = read_back(tmp_path / str(quality))
        assert Image.open(io.BytesIO(image)).format == "JPEG"
        sizes[quality] = len(image)
    assert sizes[20] < 0.6 * sizes[90]


# choosing


def test_hold_out_is_stratified_and_depends_on_paths_alone():
    items = items_of({0: 50, 1: 13, 2: 1}, width=1, height=1)
    kept, held = selection.hold_out(items, 0.2)
    assert [sum(item.label == label for item in held) for label in range(3)] == [10, 3, 0]
    assert {i.key for i in kept} | {i.key for i in held} == {i.key for i in items} and len(kept) + len(held) == 64
    again = selection.hold_out(items[::-1], 0.2)[1]
    assert {i.key for i in again} == {i.key for i in held}
    larger = selection.hold_out(items, 0.4)[1]
    assert {i.key for i in held} < {i.key for i in larger}
    for fraction in (0, 1, -0.1):
        with pytest.raises(ConfigError):
            selection.hold_out(items, fraction)


def test_a_limited_set_keeps_to_its_side_of_the_split(tmp_path):
    source = Source("s", ("a", "b"), "none", {"train": items_of({0: 40, 1: 20}, width=1, height=1)})
    full = pack.pack_source(source, tmp_path / "full", val_fraction=0.25)
    few = pack.pack_source(source, tmp_path / "few", val_fraction=0.25, limit_per_class=3)
    assert [index.num_samples for index in (*full.values(), *few.values())] == [45, 15, 6, 6]
    for split in ("train", "val"):
        keys = [{key for key, _, _ in read_back(tmp_path / which / split)} for which in ("few", "full")]
        assert keys[0] < keys[1]
    assert np.bincount(few["train"].rows["label"]).tolist() == [3, 3]


def test_splits_find_their_names():
    items = items_of({0: 10}, width=1, height=1)

    def splits(fraction, **given):
        source = Source("s", ("a",), "none", {"train": items, **dict.fromkeys(given, items[:3])})
        return {name: len(found) for name, found in pack.divided(source, fraction).items()}

    assert splits(None) == {"train": 10}
    assert splits(None, test=1) == {"train": 10, "val": 3}
    assert splits(None, val=1, test=1) == {"train": 10, "val": 3, "test": 3}
    assert splits(0.2) == {"train": 8, "val": 2}
    assert splits(0.2, test=1) == {"train": 8, "val": 2, "test": 3}
    assert splits(0.2, val=1) == {"train": 8, "val": 2, "test": 3}
    with pytest.raises(ConfigError, match="third"):
        splits(0.2, val=1, test=1)
    with pytest.raises(ConfigError, match="rounds to 0"):
        splits(0.01)


def test_a_test_set_is_held_out_before_the_validation_set():
    items = items_of({0: 50, 1: 20}, width=1, height=1)
    source = Source("s", ("a", "b"), "none", {"train": items})
    keys = lambda found: {split: {item.key for item in of} for split, of in found.items()}  # noqa: E731
    alone, both = (keys(pack.divided(source, fraction, 0.2)) for fraction in (None, 0.1))
    assert keys(pack.divided(source, 0.2)) == {"train": alone["train"], "val": alone["test"]}  # the very same images
    assert alone["test"] == both["test"] and {s: len(of) for s, of in both.items()} == {
        "train": 50, "val": 6, "test": 14,
    }  # fmt: skip
    assert both["train"] | both["val"] == alone["train"] and not both["train"] & both["val"]


def test_a_test_set_is_held_out_only_where_there_is_none():
    items = items_of({0: 10}, width=1, height=1)
    own = {split: Source("s", ("a",), "none", {"train": items, split: items[:3]}) for split in ("val", "test")}
    assert {s: len(of) for s, of in pack.divided(own["val"], None, 0.2).items()} == {"train": 8, "val": 3, "test": 2}
    with pytest.raises(ConfigError, match="`s` has test of its own"):
        pack.divided(own["test"], None, 0.2)
    with pytest.raises(ConfigError, match="`s` has val of its own"):
        pack.divided(own["val"], 0.1, 0.2)
    for fraction, words in ((0.01, "`--test-fraction 0.01` holds out nothing"), (1.0, "`--test-fraction` is `1.0`")):
        with pytest.raises(ConfigError, match=words):
            pack.divided(Source("s", ("a",), "none", {"train": items}), None, fraction)


def test_cuts_are_even_and_within_limits():
    assert list(selection.cuts([1] * 10, 100, 4)) == [(0, 3), (3, 6), (6, 10)]
    assert list(selection.cuts([50] * 10, 200, 100)) == [(0, 3), (3, 6), (6, 10)]
    assert list(selection.cuts([5], 1, 1)) == [(0, 1)]
    assert list(selection.cuts([1] * 8, 100, 8)) == [(0, 8)]


def test_keys_are_what_any_reader_takes():
    paths = [
        "a/x.jpg",
        "a/x.png",
        "a/y.z.jpg",
        "001.dog/1.jpg",
        "__M/1.jpg",
        "b c/\u00e9.jpg",
        "d/" + "n" * 200 + ".jpg",
    ]
    keys = selection.unique_keys(paths)
    assert keys[3] == "001.dog/1"  # a folder's dot does no harm
    assert len(set(keys)) == len(paths)
    for key in keys:
        assert key.isascii() and len(key) <= 90 and key[0] not in "_." and "." not in key.rpartition("/")[2]
    assert selection.unique_keys(["a/x.jpg"]) == ["a/x"]
    with pytest.raises(DataError):
        selection.unique_keys(["a/x.jpg", "a/x.jpg"])


def test_odd_names_are_read_back(tmp_path):
    paths = [
        "a/x.jpg",
        "a/x.png",
        "a/y.z.jpg",
        "001.dog/1.jpg",
        "__M__/1.jpg",
        "b c/\u00e9.jpg",
        "d/" + "n" * 200 + ".jpg",
    ]
    items = [Item(path, image_bytes(k), k) for k, path in enumerate(paths)]
    index = pack.pack_images(items, tuple("abcdefg"), tmp_path / "x", name="my set / one")
    assert sorted((image, label) for _, image, label in read_back(tmp_path / "x")) == sorted(
        (image, label) for _, image, label in items
    )
    assert index.num_samples == 7
