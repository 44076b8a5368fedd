import json
import os

import numpy as np
import pytest

from dist_kd.data.finding import open_data, split_folder
from dist_kd.data.index import write_index
from dist_kd.data.survey import build_index
from dist_kd.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIST_KD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def index_of(paths, **how):
    return build_index(paths[0].parent, paths, **{"name": "x", "classes": None} | how)


def test_open_a_packed_folder_and_parts_of_it(shards):
    paths = shards((7, 10, 5))
    index = index_of(paths, classes=tuple("abcdefg"))
    write_index(index)
    folder = index.folder
    assert open_data(str(folder)).spec == index.spec
    part = open_data(f"{folder}/train-{{0001..0002}}.tar")
    assert part.spec.classes == tuple("abcdefg") and part.spec.shard_sizes == (10, 5)
    assert part.rows.tolist() == index.rows[7:].tolist()
    assert open_data(f"{paths[2]}, {paths[0]}").spec.shard_sizes == (5, 7)
    assert open_data(f"{folder}/train-{{0000,0002}}.tar").spec.shard_sizes == (7, 5)
    assert open_data(f"{folder}/train-*1.tar").spec.shard_sizes == (10,)
    assert not (folder / ".dist_kd").exists()


def test_foreign_shards_are_indexed_once(shards, cache):
    paths = shards((7, 10))
    folder = paths[0].parent
    index = open_data(str(folder))
    assert index.spec.shard_sizes == (7, 10) and index.name == "set"
    (kept,) = (folder / ".dist_kd").glob("*/index.npy")
    before = kept.stat().st_mtime_ns
    again = open_data(f"{folder}/train-{{0000..0001}}.tar")
    assert again.fingerprint == index.fingerprint and again.shard_path(1) == paths[1]
    assert kept.stat().st_mtime_ns == before
    assert not (folder / "index.json").exists() and not cache.exists()
    shards((7, 9))  # written anew
    assert open_data(str(folder)).spec.shard_sizes == (7, 9)


def test_foreign_shards_in_a_folder_that_cannot_be_written(shards, cache):
    paths = shards((7, 10))
    (paths[0].parent / ".dist_kd").write_text("in the way of a folder of this name, as a read-only disk would be")
    index = open_data(str(paths[0].parent))
    assert [path.name for path in cache.glob("index/*/*")] and index.shard_path(0) == paths[0]
    assert isinstance(index.rows, np.memmap)


def test_a_foreign_index_json_is_left_alone(shards):
    paths = shards((3,))
    wids = json.dumps({"wids_version": 1, "shardlist": [{"url": "train-0000.tar", "nsamples": 3}]})
    (paths[0].parent / "index.json").write_text(wids)
    assert open_data(str(paths[0].parent)).num_samples == 3
    assert open_data(str(paths[0])).num_samples == 3
    assert (paths[0].parent / "index.json").read_text() == wids


def test_data_that_is_not_there(shards, tmp_path):
    paths = shards((3, 4))
    folder = paths[0].parent

    def refused(where, message):
        with pytest.raises(DataError, match=message):
            open_data(where)

    refused(f"{folder}/val-{{00..11}}.tar", r"matches no file; it stands for .*val-00.tar`, .* and 9 more")
    refused(f"{folder}/train-{{0000..0004}}.tar", r"3 of 5 shards are missing: .*train-0002.tar")
    refused(f"{paths[0]},{paths[0]}", r"names a shard twice")
    refused(f"{folder}/{{a", r"unbalanced braces")
    refused(",", r"matches no file")
    (tmp_path / "empty").mkdir()
    refused(str(tmp_path / "empty"), r"neither index.json nor .tar files.*`dist-kd pack SOURCE .*empty`")
    os.rename(paths[1], folder / "val-0000.tar")
    refused(str(folder), r"several sets \(train-\*.tar, val-\*.tar\).*train-\*.tar")


def test_data_names_its_splits(tmp_path):
    (tmp_path / "train").mkdir()
    assert split_folder(str(tmp_path), "train") == str(tmp_path / "train")
    assert split_folder(str(tmp_path), "val") is None
    (tmp_path / "val").mkdir()
    assert split_folder(str(tmp_path), "val") == str(tmp_path / "val")
    assert split_folder(str(tmp_path / "train"), "train") == str(tmp_path / "train")
    assert split_folder("x-{000..009}.tar", "train") == "x-{000..009}.tar"
    assert split_folder("x-{000..009}.tar", "val") is None
