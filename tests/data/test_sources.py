"""Where images come from: folders, class lists, the known sets and the digits that pack themselves."""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from dist_kd.data import pack, sources
from dist_kd.data.finding import open_data
from dist_kd.data.index import read_index
from dist_kd.data.sources import cifar, open_source, read_class_list
from dist_kd.data.survey import verify_index
from dist_kd.errors import ConfigError, DataError


@pytest.fixture
def given_data() -> Path:
    """Real archives beside the repository; they are not part of it."""
    beside = Path(__file__).resolve().parents[3] / "shared" / "data"
    folder = Path(os.environ.get("DIST_KD_TEST_DATA", beside))
    if not (folder / "imagenet-sample.tar").exists():
        pytest.skip(f"no test data at {folder}")
    return folder


def touch(folder: Path, *names: str) -> Path:
    """Tiny images, each of another colour."""
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "wb") as file:
            Image.new("RGB", (4, 4), (len(list(folder.rglob("*"))) % 256, 0, 0)).save(file, "JPEG")
    return folder


# folders


def test_a_folder_of_class_folders(tmp_path):
    touch(tmp_path, "b/2.JPG", "b/1.jpeg", "a/x/deep.png", "a/3.WebP", "a/no.gif", "a/.hidden.jpg", ".git/c/1.jpg")
    source = open_source(str(tmp_path))
    assert source.classes == ("a", "b") and list(source.splits) == ["train"]
    assert [(item.key, item.label) for item in source.splits["train"]] == [
        ("a/3.WebP", 0),
        ("a/x/deep.png", 0),
        ("b/1.jpeg", 1),
        ("b/2.JPG", 1),
    ]
    assert all(Path(item.image) == tmp_path / item.key for item in source.splits["train"])


@pytest.mark.parametrize(
    ("folders", "splits"),
    [
        (["train", "val"], {"train", "val"}),
        (["train", "test"], {"train", "test"}),
        (["train", "validation", "test"], {"train", "val", "test"}),
        (["train"], {"train"}),
    ],
)
def test_a_folder_with_splits(tmp_path, folders, splits):
    touch(tmp_path, *(f"{folder}/{name}/1.jpg" for folder in folders for name in "ab"))
    source = open_source(str(tmp_path))
    assert set(source.splits) == splits and source.classes == ("a", "b")
    assert [item.key for item in source.splits["train"]] == ["a/1.jpg", "b/1.jpg"]


def test_a_class_may_be_called_train(tmp_path):
    assert open_source(str(touch(tmp_path, "train/1.jpg", "bus/1.jpg"))).classes == ("bus", "train")


def test_test_becomes_val(tmp_path):
    touch(tmp_path / "set", "train/a/1.jpg", "train/a/2.jpg", "train/b/1.jpg", "test/b/7.jpg")
    indexes = pack.pack_source(open_source(str(tmp_path / "set")), tmp_path / "out")
    assert {split: index.num_samples for split, index in indexes.items()} == {"train": 3, "val": 1}
    assert indexes["val"].rows["label"].tolist() == [1]  # the numbers are those of train, though val has no `a`
    assert indexes["val"].classes == ("a", "b")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["1.jpg", "2.jpg"], "2 images but no class folders"),
        ([], "no class folders"),
        (["train/a/1.jpg", "val/a/1.jpg", "val/z/1.jpg"], r"val/z` is in val but not in train"),
        (["a/1.jpg", "b/1.txt"], r"/b` holds no image"),
    ],
)
def test_folders_that_cannot_be_packed(tmp_path, names, said):
    with pytest.raises(DataError, match=said):
        open_source(str(touch(tmp_path, *names)))


def test_what_is_no_source(tmp_path):
    with pytest.raises(ConfigError, match="did you mean `cifar10`"):
        open_source("cifa10")
    with pytest.raises(ConfigError, match="belong to a known set"):
        open_source(str(touch(tmp_path, "a/1.jpg")), root=tmp_path)


# class lists


def test_a_class_list_gives_the_numbers(tmp_path):
    touch(tmp_path / "set", "cat/1.jpg", "ant/1.jpg")
    (tmp_path / "list").write_text("zebra\ncat\nbee\nant\n")
    source = open_source(str(tmp_path / "set"), class_list=tmp_path / "list")
    assert source.classes == ("zebra", "cat", "bee", "ant")
    assert {item.key: item.label for item in source.splits["train"]} == {"cat/1.jpg": 1, "ant/1.jpg": 3}


def test_a_class_list_may_describe_its_classes(tmp_path):
    touch(tmp_path / "set", "n02/1.jpg", "n03/1.jpg")
    (tmp_path / "list").write_text("n01 great white shark\nn02 tench\nn03 great auk\n")
    source = open_source(str(tmp_path / "set"), class_list=tmp_path / "list")
    assert source.classes == ("n01", "n02", "n03")
    assert [item.label for item in source.splits["train"]] == [1, 2]
    touch(tmp_path / "words", "great auk/1.jpg")
    (tmp_path / "list").write_text("great white shark\ngreat auk\n")
    assert open_source(str(tmp_path / "words"), class_list=tmp_path / "list").splits["train"][0].label == 1


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("tench\ngoldfihs\n", r"class `goldfish` of `set` is not among the 2 of the class list .*`goldfihs`"),
        ("x\ny\n", r"`goldfish` \(and 1 more\).*nothing close"),
        ("tench\n\ngoldfish\n", "empty line 2"),
        ("tench\ngoldfish\ntench\n", "names `tench` twice"),
    ],
)
def test_class_lists_that_do_not_fit(tmp_path, text, said):
    touch(tmp_path / "set", "goldfish/1.jpg", "tench/1.jpg")
    (tmp_path / "list").write_text(text)
    with pytest.raises(ConfigError, match=said):
        open_source(str(tmp_path / "set"), class_list=tmp_path / "list")


def test_no_class_list(tmp_path):
    with pytest.raises(ConfigError, match="cannot be read"):
        read_class_list(tmp_path / "absent")


# known sets


def test_digits(tmp_path):
    from sklearn.datasets import load_digits

    source = open_source("digits")
    assert {split: len(items) for split, items in source.splits.items()} == {"train": 1438, "val": 359}
    digits = load_digits()
    for item in source.splits["val"] + source.splits["train"][:100]:
        number = int(Path(item.key).stem)
        pixels = np.asarray(Image.open(io.BytesIO(item.image)))
        assert item.label == digits.target[number]
        assert pixels.dtype == np.uint8 and np.abs(pixels * (16 / 255) - digits.images[number]).max() < 0.04
    counts = np.bincount([item.label for item in source.splits["val"]], minlength=10)
    assert counts.min() >= 34 and counts.max() <= 37  # a fifth of each class
    with pytest.raises(ConfigError, match="embedded"):
        open_source("digits", root=tmp_path)


def test_digits_pack_themselves_once(tmp_path, monkeypatch):
    monkeypatch.setenv("DIST_KD_CACHE", str(tmp_path / "cache"))
    packed = sources.ensure_known("digits")
    assert packed == tmp_path / "cache" / "digits"
    train, val = open_data(str(packed / "train")), open_data(str(packed / "val"))
    assert (train.num_samples, val.num_samples) == (1438, 359)
    assert (train.augment, train.image_size, train.classes) == ("crop", 8, tuple("0123456789"))
    assert verify_index(train) == [] and verify_index(val) == []
    before = (packed / "train" / "index.json").stat().st_mtime_ns
    assert sources.ensure_known("digits") == packed
    assert (packed / "train" / "index.json").stat().st_mtime_ns == before
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["digits"]


def test_digits_pack_themselves_for_several_processes_at_once(tmp_path):
    code = "from dist_kd.data.sources import ensure_known; print(ensure_known('digits'))"
    environment = {**os.environ, "DIST_KD_CACHE": str(tmp_path / "cache")}
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=environment, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    assert [(process.communicate()[0].strip(), process.returncode) for process in running] == [
        (str(tmp_path / "cache" / "digits"), 0)
    ] * 2
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["digits"]
    assert read_index(tmp_path / "cache" / "digits" / "train").num_samples == 1438


def test_other_names(tmp_path, monkeypatch):
    monkeypatch.setenv("DIST_KD_CACHE", str(tmp_path))
    assert sources.ensure_known("no-set") is None and sources.ensure_known("/some/folder") is None
    with pytest.raises(ConfigError, match=rf"run `dist-kd pack cifar10 {tmp_path}/cifar10 --root DIR`"):
        sources.ensure_known("cifar10")
    touch(tmp_path / "photos", "a/1.jpg", "b/1.jpg")
    pack.pack_source(open_source(str(tmp_path / "photos")), tmp_path / "cifar10")
    assert sources.ensure_known("cifar10") == tmp_path / "cifar10"


def test_every_known_set_has_its_file():
    for name in sources.SOURCES:
        if name != "digits":
            with pytest.raises(ConfigError, match=f"`{name}` needs `--root DIR`"):
                open_source(name)


def test_cifar_is_kept_without_loss(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (6, 32, 32, 3), dtype=np.uint8)
    items = cifar.items_of(pixels, [1, 0, 1, 1, 0, 1], ("cat", "dog"))
    assert [(item.key, item.label) for item in items[:2]] == [("dog/00000.png", 1), ("cat/00001.png", 0)]
    for item, image in zip(items, pixels, strict=True):
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(item.image))), image)
    with pytest.raises(DataError, match="torchvision cannot read `cifar10`"):
        open_source("cifar10", root=tmp_path)


@pytest.mark.parametrize("place", ["caltech101/101_ObjectCategories", "101_ObjectCategories", "caltech101"])
def test_caltech_leaves_the_background_out(tmp_path, place):
    touch(tmp_path / place, "Faces/1.jpg", "BACKGROUND_Google/1.jpg", "ant/1.jpg", "yin_yang/1.jpg")
    source = open_source("caltech101", root=tmp_path)
    assert source.classes == ("Faces", "ant", "yin_yang") and source.augment == "rrc+flip"
    assert [(item.key, item.label) for item in source.splits["train"]] == [
        ("Faces/1.jpg", 0),
        ("ant/1.jpg", 1),
        ("yin_yang/1.jpg", 2),
    ]


def test_caltech_must_be_there(tmp_path):
    with pytest.raises(DataError, match="holds no `caltech256/256_ObjectCategories`"):
        open_source("caltech256", root=tmp_path)


def test_imagenet_has_1000_classes(tmp_path):
    touch(tmp_path, *(f"{split}/n{number}/x.JPEG" for split in ("train", "val") for number in (2, 1)))
    with pytest.raises(DataError, match=r"2 class folders.*--class-list"):
        open_source("imagenet", root=tmp_path)
    with pytest.raises(ConfigError, match="cannot be downloaded"):
        open_source("imagenet", root=tmp_path, download=True)


def test_imagenet_in_torchvisions_layout(tmp_path):
    for split in ("train", "val"):
        for number in range(1000):
            folder = tmp_path / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            (folder / "x.JPEG").touch()
    source = open_source("imagenet", root=tmp_path)
    assert len(source.classes) == 1000 and list(source.classes) == sorted(source.classes)
    assert [len(items) for items in source.splits.values()] == [1000, 1000]
    assert source.augment == "rrc+flip"


# real photographs


def test_imagenet_photographs_get_their_true_numbers(tmp_path, given_data):
    with tarfile.open(given_data / "imagenet-sample.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    synsets = [line.split()[0] for line in (given_data / "imagenet_synsets.txt").read_text().splitlines()]
    source = open_source(str(tmp_path / "imagenet-sample"), class_list=given_data / "imagenet_synsets.txt")
    index = pack.pack_source(source, tmp_path / "out")["train"]
    assert len(index.classes) == 1000 and index.num_samples == 100 and index.image_size is None
    assert index.augment == "rrc+flip"
    with tarfile.open(index.shard_path(0)) as shard:
        labels = {m.name: int(shard.extractfile(m).read()) for m in shard if m.name.endswith(".cls")}
    assert all(name.split("/")[0] == synsets[label] for name, label in labels.items()) and len(labels) == 100
    # every tenth class, from torchvision's fifth, the electric ray
    assert sorted(labels.values()) == list(range(5, 1000, 10))
