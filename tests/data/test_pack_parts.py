"""Packing by parts, as an array of jobs does: together the bytes of one packing."""

from __future__ import annotations

import fcntl
import io
import os
from pathlib import Path

import pytest
from PIL import Image

from dist_kd.data import pack
from dist_kd.data.sources import Item
from dist_kd.errors import ConfigError


def items_of(per_class: dict[int, int]) -> list[Item]:
    """Images of one colour, another for each."""
    items = []
    for label, count in per_class.items():
        for number in range(count):
            content = io.BytesIO()
            Image.new("RGB", (8, 8), (label, number, 0)).save(content, "PNG")
            items.append(Item(f"class{label}/{number:04d}.png", content.getvalue(), label))
    return items


def test_parts_make_the_whole(tmp_path):
    """Whatever their order, and with one of them cut short: the bytes of one packing, index and all."""
    items = items_of({0: 7, 1: 6})
    options = {"name": "x", "shard_samples": 2}
    pack.pack_images(items, ("a", "b"), tmp_path / "one" / "train", **options)
    parts, told = tmp_path / "parts" / "train", []
    for number in (3, 1, 2):
        assert pack.pack_images(items, ("a", "b"), parts, part=(number, 3), **options) is None
    (parts / "x-train-000004.tar").unlink()  # of part 2
    pack.pack_images(items, ("a", "b"), parts, part=(2, 3), progress=lambda *fact: told.append(fact), **options)
    assert told == [("train/x-train-000004.tar", 4, 4)]  # shards 1 and 4, two samples each
    pack.pack_images(items, ("a", "b"), parts, progress=lambda *fact: told.append(fact), **options)
    assert len(told) == 1
    pack.pack_images(items, ("a", "b"), parts, part=(1, 3), **options)  # late, and nothing to do
    assert _files(tmp_path / "parts") == _files(tmp_path / "one")


def _files(folder: Path) -> dict[str, bytes]:
    """All but locks, which the next packing removes."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock.partial")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def test_parts_are_of_one_packing_and_written_once(tmp_path):
    items = items_of({0: 6})
    pack.pack_images(items, ("a",), tmp_path, name="x", shard_samples=2, part=(1, 2))
    with pytest.raises(ConfigError, match="with other seed"):
        pack.pack_images(items, ("a",), tmp_path, name="x", shard_samples=2, part=(2, 2), seed=1)
    with (tmp_path / ".pack.part-2-of-2.json.lock.partial").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        with pytest.raises(ConfigError, match="another process"):
            pack.pack_images(items, ("a",), tmp_path, name="x", shard_samples=2, part=(2, 2))
    handle = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_SH)  # any part, at work
    try:
        pack.pack_images(items, ("a",), tmp_path, name="x", shard_samples=2, part=(2, 2))
        with pytest.raises(ConfigError, match="another process"):
            pack.pack_images(items, ("a",), tmp_path, name="x", shard_samples=2)
    finally:
        os.close(handle)
