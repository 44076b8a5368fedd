import json
import pickle
import tarfile

import numpy as np
import pytest
from data.tars import flipped, tar_of

from dist_kd.data.index import read_index, write_index
from dist_kd.data.survey import build_index
from dist_kd.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIST_KD_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def index_of(paths, **how):
    return build_index(paths[0].parent, paths, **{"name": "x", "classes": None} | how)


# what an index is


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
    json_path.write_text("[]"), refused("no JSON object")
    json_path.unlink(), refused(r"has no index.json")
    read_index(index.folder)
