import json
import pickle
import re

import fsspec
import numpy as np
import pytest
from data.bad_server import BadServer, status

from dist_kd.data import remote_sets
from dist_kd.data.finding import open_data, split_folder
from dist_kd.data.index import read_index, write_index
from dist_kd.data.remote import Limits
from dist_kd.data.shard_cache import ShardCache
from dist_kd.data.survey import build_index
from dist_kd.errors import ConfigError, DataError

QUICK = Limits(connect_s=5, idle_s=5, attempts=2, pause_s=0.05, longest_pause_s=0.1)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIST_KD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote_sets, "JOBS", 1)  # a process more takes seconds to start
    return ShardCache(tmp_path / "cache", 10**9, 5.0, QUICK)


@pytest.fixture
def local(shards):
    """An index of three shards, written beside them."""
    paths = shards((7, 10, 5))
    index = build_index(paths[0].parent, paths, name="x", classes=tuple("abcdefg"), augment="flip", image_size=8)
    write_index(index)
    return index


@pytest.fixture
def server(local):
    with BadServer({f"set/train/{path.name}": path.read_bytes() for path in local.folder.iterdir()}) as server:
        yield server


def asked(server) -> list[str]:
    return [one.path.removeprefix("set/train/") for one in server.asked]


# an index that lies beside the shards


def test_a_packed_folder_is_found_and_no_shard_fetched(server, local, cache):
    index = open_data(server.url("set/train/"), cache)
    assert index.spec == local.spec and index.shards == local.shards
    assert index.location(1) == server.url("set/train/train-0001.tar") and index.cache == cache
    assert asked(server) == ["index.json", "index.npy"]
    again = open_data(server.url("set/train"), cache)
    assert again.fingerprint == index.fingerprint and asked(server)[2:] == ["index.json"]
    assert isinstance(again.rows, np.memmap) and len(pickle.dumps(again)) < 2000
    copy = pickle.loads(pickle.dumps(again))
    assert copy.rows.tolist() == local.rows.tolist() and copy.cache == cache


def test_parts_of_a_packed_folder(server, local, cache):
    part = open_data(server.url("set/train/train-{0001..0002}.tar"), cache)
    assert part.spec.classes == tuple("abcdefg") and part.spec.shard_sizes == (10, 5)
    assert part.rows.tolist() == local.rows[7:].tolist()
    names = f"{server.url('set/train/train-0002.tar')},{server.url('set/train/train-0000.tar')}"
    assert open_data(names, cache).spec.shard_sizes == (5, 7)
    whole = open_data(server.url("set/train/train-{0000..0002}.tar"), cache)
    assert isinstance(whole.rows, np.memmap)
    assert not any(name.endswith(".tar") for name in asked(server))


def test_an_index_written_anew_is_read_anew(server, local, cache):
    open_data(server.url("set/train"), cache)
    fewer = local.select([0, 2])
    write_index(fewer)
    for name in ("index.json", "index.npy"):
        server.files[f"set/train/{name}"] = (local.folder / name).read_bytes()
    assert open_data(server.url("set/train"), cache).spec == fewer.spec


def test_splits(server, cache):
    assert split_folder(server.url("set"), "train") == server.url("set/train")
    assert split_folder(server.url("set"), "val") is None
    assert split_folder(server.url("set/train"), "train") == server.url("set/train")
    pattern = server.url("set/train/train-{0000..0002}.tar")
    before = len(server.asked)
    assert split_folder(pattern, "train") == pattern and split_folder(pattern, "val") is None
    assert len(server.asked) == before
    server.always["set/val/index.json"] = status(403)
    assert split_folder(server.url("set"), "val") is None


def test_a_damaged_or_hostile_index(server, local, cache, tmp_path):
    good = dict(server.files)
    facts = json.loads(good["set/train/index.json"])
    url = server.url("set/train")

    def refused(message, exact=DataError, **files):
        server.files.update(good | {f"set/train/{name.replace('_', '.')}": text for name, text in files.items()})
        with pytest.raises(exact, match=message) as caught:
            open_data(url, cache)
        assert str(tmp_path) not in str(caught.value)

    def changed(**what) -> bytes:
        return json.dumps(facts | what).encode()

    refused(r"index.json` is no JSON", index_json=b"{")
    refused(r"counts `'many'` samples", index_json=changed(num_samples="many"))
    refused(r"index in `http.*set/train` is damaged", index_npy=b"x" * 600)
    refused(r"do not belong together", index_json=changed(fingerprint="0" * 32))
    refused(r"index.npy` is larger than", index_npy=b"\0" * 5000)
    for name in ("../../etc/passwd", "/etc/passwd", "http://elsewhere/a.tar", "file:///etc/passwd"):
        shards = [facts["shards"][0] | {"name": name}, *facts["shards"][1:]]
        refused(r"is outside of the index's folder", index_json=changed(shards=shards))
        refused(r"is outside of the index's folder", index_json=changed(shards=shards, folder="/", url="http://x"))
    server.files.update(good)
    del server.files["set/train/index.npy"]
    with pytest.raises(DataError, match=r"index.npy` answered 404"):
        open_data(url, cache)
    assert not list((tmp_path / "cache").glob("index/.index-*"))


def test_every_process_gets_the_index_that_the_first_read(server, local, cache, tmp_path, monkeypatch):
    """Another node has a cache of its own, and asks the server for nothing."""
    index = open_data(server.url("set/train"), cache)
    sent = pickle.dumps(remote_sets.sent(index))
    before = len(server.asked)
    monkeypatch.setenv("DIST_KD_CACHE", str(tmp_path / "other node"))
    other = ShardCache(tmp_path / "other node", 10**9, 5.0)
    there = remote_sets.received(pickle.loads(sent), other)
    assert there.spec == index.spec and there.url == index.url and there.cache == other
    assert "other node" in str(there.rows.filename) and len(server.asked) == before


# shards without one


def foreign(server) -> str:
    for name in ("index.json", "index.npy"):
        del server.files[f"set/train/{name}"]
    return server.url("set/train/train-{0000..0002}.tar")


def test_foreign_shards_are_read_once(server, local, cache, caplog):
    pattern = foreign(server)
    index = open_data(pattern, cache)
    assert "the 3 shards" in caplog.text and "one-time pass" in caplog.text
    assert index.name == "train" and index.shards == local.shards and index.rows.tolist() == local.rows.tolist()
    assert sorted(asked(server)) == ["index.json", *(f"train-000{i}.tar" for i in range(3))]
    again = open_data(pattern, cache)
    assert again.fingerprint == index.fingerprint and again.url == index.url and again.cache == cache
    assert asked(server)[4:] == ["index.json"]  # there might be one by now


def test_a_foreign_shard_that_changed_is_not_taken_for_the_old_one(server, cache, tmp_path):
    index = open_data(foreign(server), cache)
    for kept in (tmp_path / "cache" / "shards").iterdir():
        kept.unlink()
    server.files["set/train/train-0001.tar"] = server.files["set/train/train-0002.tar"]
    with pytest.raises(DataError, match=r"train-0001.tar` has \d+ bytes, but its index states \d+"):
        index.open_shard(1)


def test_shards_of_several_folders(server, cache):
    foreign(server)
    server.files["else/b-0.tar"] = server.files["set/train/train-0001.tar"]
    index = open_data(f"{server.url('set/train/train-0000.tar')},{server.url('else/b-0.tar')}", cache)
    assert index.spec.shard_sizes == (7, 10)
    assert [index.location(i) for i in (0, 1)] == [server.url("set/train/train-0000.tar"), server.url("else/b-0.tar")]


def test_a_store_that_can_be_listed(local, cache):
    store = fsspec.filesystem("memory")
    for path in local.folder.glob("*.tar"):
        store.pipe_file(f"/bucket/set/train/{path.name}", path.read_bytes())
    try:
        assert split_folder("memory://bucket/set", "train") == "memory://bucket/set/train"
        assert split_folder("memory://bucket/set", "val") is None
        index = open_data("memory://bucket/set/train", cache)
        assert index.shards == local.shards
        assert open_data("memory://bucket/set/train/train-*2.tar", cache).spec.shard_sizes == (5,)
    finally:
        store.rm("/bucket", recursive=True)


def test_a_kept_index_elsewhere(server, local, cache, tmp_path):
    """As `dist-kd index URL --output DIR` leaves it."""
    foreign(server)
    urls = [server.url(f"set/train/train-000{i}.tar") for i in range(3)]
    write_index(remote_sets.index_shards(urls, cache, classes=local.classes), tmp_path / "kept")
    index = open_data(str(tmp_path / "kept"), cache)
    assert index.url == server.url("set/train") and index.cache == cache and index.fingerprint == local.fingerprint
    assert read_index(tmp_path / "kept").cache is None


# what is refused


def test_data_that_is_not_there(server, cache, tmp_path):
    def refused(where, message, exact=DataError):
        with pytest.raises(exact, match=message):
            open_data(where, cache)

    refused(server.url("nothing"), r"nothing` cannot be listed, because http has no listing; .*brace pattern")
    refused(server.url("nothing/a-{00..03}.tar"), r"a-00.tar` answered 404")
    refused(f"{server.url('a.tar')},{server.url('a.tar')}", r"names a shard twice")
    refused(f"{server.url('a.tar')},{tmp_path}/b.tar", r"here and on other machines, such as `.*/b.tar`")
    refused(f"{server.url('a.tar')},{server.url('folder')}", r"names `http.*folder` among shards")
    refused("http://me:hidden@host/a.tar", r"user name or a password", ConfigError)
    refused("pipe:cat a.tar", r"would run a command", ConfigError)
    server.always["set/train/index.json"] = status(403)
    refused(server.url("set/train"), r"answered 403")


def test_file_urls_are_paths(local):
    assert open_data(f"file://{local.folder}").spec == local.spec
    assert open_data(f"file://{local.folder}/train-{{0000..0001}}.tar").spec.shard_sizes == (7, 10)
    assert split_folder(f"file://{local.folder.parent}", "set") == str(local.folder)
    assert open_data(f"file:{local.folder}/train-0000.tar,file:{local.folder}/train-0002.tar").num_samples == 12


def test_a_cache_that_cannot_be_written(server, cache, tmp_path, monkeypatch):
    (tmp_path / "taken").write_text("a file where a folder should be")
    monkeypatch.setenv("DIST_KD_CACHE", str(tmp_path / "taken"))
    with pytest.raises(DataError, match=re.escape(str(tmp_path / "taken")) + r".*cannot be written.*DIST_KD_CACHE"):
        open_data(server.url("set/train"), cache)
