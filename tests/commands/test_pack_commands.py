"""`dist-kd pack`, `index` and `verify`, as they are called."""

from __future__ import annotations

import io
import json
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from dist_kd.commands import index, pack, verify
from dist_kd.data.finding import open_data
from dist_kd.data.index import read_index
from dist_kd.errors import ConfigError, DataError


@pytest.fixture
def photos(tmp_path):
    """Eight images of each of two classes."""
    for number in range(16):
        path = tmp_path / "photos" / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = io.BytesIO()
        Image.fromarray(np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(content, "PNG")
        path.write_bytes(content.getvalue())
    return tmp_path / "photos"


def packed(photos, *words: str) -> str:
    out = photos.parent / "out"
    assert pack.main([str(photos), str(out), "--jobs", "1", *words]) == 0
    return str(out)


@pytest.mark.parametrize("command", ["pack", "index", "verify"])
def test_help_is_quick(command):
    code = f"import sys; from dist_kd.commands.{command} import main\n"
    code += "try: main(['--help'])\nfinally: print('torch' in sys.modules, 'webdataset' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0 and f"usage: dist-kd {command}" in done.stdout
    assert done.stdout.endswith("False False\n")


def test_pack_says_what_it_made(photos, capsys):
    out = packed(photos, "--val-fraction", "0.25", "--shard-size", "6")
    said = capsys.readouterr().out
    assert "train/photos-train-000001.tar: 12 of 12 samples" in said
    assert f"{out}/train: 12 samples of 2 classes, 8x8 pixels, 2 shards" in said
    assert f"{out}/val: 4 samples" in said and f"train with `--data {out}`" in said
    assert packed(photos, "--val-fraction", "0.25", "--shard-size", "6") == out  # again: nothing to do
    assert "tar:" not in capsys.readouterr().out


def test_pack_says_what_comes_after_a_part(photos, capsys):
    out = packed(photos, "--shard-size", "6", "--part", "1/2")
    said = capsys.readouterr().out
    assert f"{out}: part 1 of 2 packed in" in said and "the same line without --part" in said


def test_pack_holds_out_a_test_set_too(photos, capsys):
    out = packed(photos, "--test-fraction", "0.25", "--val-fraction", "0.2")
    said = capsys.readouterr().out
    for split, samples in (("train", 10), ("val", 2), ("test", 4)):
        assert f"{out}/{split}: {samples} samples of 2 classes" in said


def test_pack_says_that_nothing_is_held_out(photos, capsys):
    packed(photos, "--augment", "flip", "--limit-per-class", "3")
    said = capsys.readouterr().out
    assert "--val-fraction" in said and "6 samples" in said and "usual augmentation flip" in said


@pytest.mark.parametrize(
    "words", [["--jobs", "0"], ["--quality", "96"], ["--resize", "-4"], ["--limit", "3"], ["--part", "3/2"]]
)
def test_impossible_flags(photos, words, capsys):
    with pytest.raises(SystemExit) as stop:
        pack.main([str(photos), str(photos.parent / "out"), *words])
    assert stop.value.code == 2
    assert words[0] in capsys.readouterr().err and not (photos.parent / "out").exists()


def test_an_unknown_augmentation_is_found_before_any_work(photos):
    with pytest.raises(ConfigError, match="flpi"):
        pack.main([str(photos), str(photos.parent / "out"), "--augment", "flpi"])
    assert not (photos.parent / "out").exists()


def test_verify_is_well_then_not(photos, capsys):
    out = packed(photos, "--val-fraction", "0.25")
    assert verify.main([out, "--jobs", "1"]) == 0
    assert capsys.readouterr().out.count(": well (") == 2
    shard = read_index(photos.parent / "out" / "train").shard_path(0)
    content = bytearray(shard.read_bytes())
    content[len(content) // 3] ^= 0xFF
    shard.write_bytes(content)
    assert verify.main([out, "--jobs", "1"]) == 3
    said = capsys.readouterr()
    assert "problems" in said.out and "well" in said.out and shard.name in said.err
    assert verify.main([out, "--jobs", "1", "--json"]) == 3
    results = json.loads(capsys.readouterr().out)
    assert [bool(result["problems"]) for result in results] == [True, False]
    assert verify.main([f"{out}/val", "--jobs", "1"]) == 0


def test_verify_of_nothing(tmp_path, capsys):
    assert verify.main([str(tmp_path / "absent")]) == 3
    assert "absent" in capsys.readouterr().err


def test_index_of_foreign_shards(photos, capsys, tmp_path):
    train = photos.parent / "out" / "train"
    packed(photos, "--shard-size", "6")
    before = read_index(train)
    for name in ("index.json", "index.npy", "pack.json"):
        (train / name).unlink()
    (tmp_path / "classes").write_text("ape\nbee\ncat\n")
    assert index.main([str(train), "--class-list", str(tmp_path / "classes"), "--jobs", "1"]) == 0
    assert "16 samples of 3 classes in 3 shards" in capsys.readouterr().out
    found = open_data(str(train))
    assert found.classes == ("ape", "bee", "cat") and np.array_equal(found.rows, before.rows)
    # again without a list: what is known of the classes stays, though the rows are damaged
    (train / "index.npy").write_bytes(b"damaged")
    assert index.main([f"{train}/photos-train-{{000000..000002}}.tar", "--jobs", "1"]) == 0
    assert read_index(train).classes == ("ape", "bee", "cat")


def test_index_into_another_folder(photos, tmp_path):
    train = photos.parent / "out" / "train"
    packed(photos)
    place = tmp_path / "place"
    words = ["--output", str(place), "--name", "mine", "--augment", "flip", "--image-size", "8", "--jobs", "1"]
    assert index.main([str(train), *words]) == 0
    found = open_data(str(place))
    assert (found.name, found.augment, found.image_size, found.num_samples) == ("mine", "flip", 8, 16)
    assert found.shard_path(0).is_file() and found.classes == ("0", "1")


def test_index_refuses_what_is_not_there(tmp_path, photos):
    with pytest.raises(DataError, match=r"holds no \.tar"):
        index.main([str(tmp_path)])
    with pytest.raises(DataError, match=r"a-001.tar` is not there"):
        index.main([str(tmp_path / "a-{001..002}.tar")])
    packed(photos)
    (tmp_path / "classes").write_text("ape\n")
    with pytest.raises(DataError, match="label `1`"):
        index.main([str(tmp_path / "out" / "train"), "--class-list", str(tmp_path / "classes"), "--jobs", "1"])
