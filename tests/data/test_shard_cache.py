"""The cache of a node: what a misbehaving server leads to, each with a bound in seconds, and what is said."""

from __future__ import annotations

import hashlib
import logging
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
from data.bad_server import BadServer, body, chunked, cut, stall, status, trickle, well
from data.node_cache import GOOD, OTHER, QUICK, SHARD, SHORT_SILENCE, SIZE, fetch, left, within

from dist_kd.data.remote import Forbidden, NotThere
from dist_kd.data.shard_cache import cache_folder
from dist_kd.errors import ConfigError, DataError

# answers given first (the server is well afterwards) -> offsets asked for; all end with the right bytes
CURED = {
    "500 twice": ([status(500), status(500)], [None, None, None]),
    "429 with a pause": ([status(429, Retry_After="0")], [None, None]),
    "cut, length known": ([cut(100_000)], [None, 100_000]),
    "cut, no length": ([cut(100_000, length=False)], [None, 100_000]),
    "cut three times": ([cut(100_000), cut(100_000), cut(50_000)], [None, 100_000, 200_000, 250_000]),
    "cut between chunks": ([chunked(100_000)], [None, 100_000]),
    "stalled once": ([stall(100_000)], [None, 100_000]),
    "wrong bytes once": ([body(OTHER, ETag='"v0"')], [None, None]),
    "more bytes than it says": ([body(SHARD + b"x" * 9, Transfer_Encoding="identity")], None),
}


@pytest.mark.parametrize("case", CURED)
def test_trouble_that_passes_is_overcome(case, server, cache):
    answers, offsets = CURED[case]
    server.first["a.tar"] = list(answers)
    if case == "stalled once":
        cache = replace(cache, limits=SHORT_SILENCE)
    with within(15):
        if offsets is None:  # another size than the index states: final, since waiting does not cure it
            with pytest.raises(DataError, match="has 300009 bytes, but its index states 300000"):
                fetch(cache, server.url("a.tar"))
            return
        assert fetch(cache, server.url("a.tar")) == SHARD
    assert server.offsets("a.tar") == offsets
    assert left(cache) == [".tar"]
    assert fetch(cache, server.url("a.tar")) == SHARD and len(server.asked) == len(offsets)  # now from the disk


def test_a_reset_connection_is_resumed(server, cache):
    server.first["a.tar"] = [cut(200_000, reset=True)]
    with within(15):
        assert fetch(cache, server.url("a.tar")) == SHARD
    assert len(server.asked) == 2  # how much had come before a reset is for the kernel to say


def test_a_refused_range_begins_again(server, cache):
    server.ranges = False
    server.first["a.tar"] = [cut(100_000)]
    with within(15):
        assert fetch(cache, server.url("a.tar")) == SHARD
    assert server.offsets("a.tar") == [None, 100_000]


# what the server always does -> words, class, most requests
FINAL = {
    "404": (status(404), "404 Not Found", NotThere, 1),
    "403": (status(403), "403 Forbidden; the credentials", Forbidden, 1),
    "401": (status(401), "401 Unauthorized; it wants credentials", Forbidden, 1),
    "400": (status(400), "400 Bad Request", DataError, 1),
    "500 for ever": (status(500), "500 Internal Server Error; gave up after 3 attempts", DataError, 3),
    "stalled": (stall(0), "nothing came for 1 s; gave up after 3 attempts", DataError, 3),
    "cut at once": (cut(0), "ended after 0 of 300000 bytes|the connection broke", DataError, 3),
    "wrong bytes": (body(OTHER), f"sha256 {hashlib.sha256(OTHER).hexdigest()}.* states {GOOD}", DataError, 2),
    "wrong size": (body(b"x" * 7), "has 7 bytes, but its index states 300000", DataError, 1),
    "redirect loop": (status(302, Location="/a.tar"), "redirected more than 10 times", DataError, 12),
    "redirect to a file": (status(302, Location="file:///etc/passwd"), "redirected to one that is not", DataError, 1),
}


@pytest.mark.parametrize("case", FINAL)
def test_trouble_that_does_not_pass_is_a_sentence_in_time(case, server, cache):
    answer, words, kind, requests = FINAL[case]
    server.always["a.tar"] = answer
    with within(15), pytest.raises(DataError, match=words) as caught:
        fetch(replace(cache, limits=SHORT_SILENCE), server.url("a.tar"))
    assert type(caught.value) is kind and len(server.asked) <= requests
    assert "127.0.0.1" in str(caught.value)
    assert left(cache) in ([], [".json", ".part"])  # bytes that came stay for the next attempt


def test_500_for_ever_is_bounded_by_the_total_limit(server, cache):
    server.always["a.tar"] = status(500)
    patient = replace(cache, timeout_s=1.0, limits=replace(QUICK, attempts=10_000))
    with within(8), pytest.raises(DataError, match="gave up at its time limit"):
        fetch(patient, server.url("a.tar"))


def test_a_trickle_is_bounded_by_the_total_limit(server, cache):
    server.always["a.tar"] = trickle(100, 0.05)
    with within(8), pytest.raises(DataError, match=r"gave up at its time limit.*; \d+ of 300000 bytes came"):
        fetch(replace(cache, timeout_s=1.5), server.url("a.tar"))


def test_a_port_where_nobody_listens(server, cache):
    with BadServer() as gone:
        url = gone.url("a.tar")
    with within(10), pytest.raises(DataError, match="connection refused; gave up after 3 attempts"):
        fetch(cache, url)


def test_a_host_that_does_not_exist(cache):
    with within(60), pytest.raises(DataError, match="name resolution failed"):
        fetch(replace(cache, limits=replace(QUICK, attempts=1)), "http://nowhere.invalid/a.tar")


def test_a_redirect_is_followed(server, cache):
    server.always["moved.tar"] = status(301, Location="/a.tar")
    assert fetch(cache, server.url("moved.tar")) == SHARD


# --- shards no index states anything of


def test_a_foreign_shard_is_fetched_once_while_its_server_says_the_same(server, cache):
    for _ in range(3):
        assert fetch(cache, server.url("a.tar"), None, None) == SHARD
    assert fetch(cache, server.url("a.tar")) == SHARD  # its digest is known by now, and is its name
    server.files["a.tar"], server.etags["a.tar"] = OTHER, '"v2"'
    assert fetch(cache, server.url("a.tar"), None, None) == OTHER


def test_an_object_that_changes_between_two_parts_is_never_mixed(server, cache):
    def cut_and_change(handler):
        cut(100_000)(handler)
        server.files["a.tar"], server.etags["a.tar"] = OTHER, '"v2"'

    server.first["a.tar"] = [cut_and_change]
    assert fetch(cache, server.url("a.tar"), None, None) == OTHER
    assert [asked.if_range for asked in server.asked] == ["", '"v1"']


def test_a_server_that_resumes_another_object_is_noticed(server, cache):
    def cut_and_change(handler):
        cut(100_000)(handler)
        server.files["a.tar"], server.etags["a.tar"] = OTHER, '"v2"'

    def careless(handler):  # takes no notice of If-Range
        server.asked[-1].if_range = ""
        well(handler)

    server.first["a.tar"] = [cut_and_change, careless]
    assert fetch(cache, server.url("a.tar"), None, None) == OTHER
    assert server.offsets("a.tar") == [None, 100_000, None]


def test_without_any_version_a_foreign_shard_begins_again(server, cache):
    server.etags["a.tar"] = ""
    server.first["a.tar"] = [cut(100_000)]
    assert fetch(cache, server.url("a.tar"), None, None) == SHARD
    assert server.offsets("a.tar") == [None, None]


def test_a_chunked_body_is_known_to_be_whole_without_a_length(server, cache):
    server.first["a.tar"] = [chunked(100_000), chunked()]
    assert fetch(cache, server.url("a.tar"), None, None) == SHARD
    assert server.offsets("a.tar") == [None, 100_000]


def test_a_cut_nothing_could_reveal_is_said(server, cache, caplog):
    server.first["a.tar"] = [cut(100_000, length=False)]
    assert fetch(cache, server.url("a.tar"), None, None) == SHARD[:100_000]
    assert "neither its server nor an index states its size" in caplog.text


# --- words


def test_credentials_are_nowhere(server, cache, caplog):
    caplog.set_level(logging.DEBUG)
    with pytest.raises(ConfigError) as caught:
        fetch(cache, server.url("a.tar").replace("//", "//user:k4n4ry@"))
    assert "k4n4ry" not in str(caught.value)
    server.first["a.tar"] = [status(500)]
    server.always["moved.tar"] = status(302, Location=server.url("a.tar?signature=k4n4ry"))
    fetch(cache, server.url("moved.tar?x=k4n4ry"))  # a query that looks harmless is not shown either
    server.always["a.tar"] = status(404)
    with pytest.raises(NotThere) as caught:
        fetch(cache, server.url("a.tar?x=k4n4ry"), SIZE, "0" * 64)
    assert "k4n4ry" not in str(caught.value) + caplog.text and "500 Internal" in caplog.text
    kept = [path.read_bytes() for path in (cache.folder / "shards").iterdir() if path.suffix != ".tar"]
    assert b"k4n4ry" not in b"".join(kept)


def test_a_digest_that_is_none_is_refused(server, cache):
    with pytest.raises(DataError, match="no sha256"):
        cache.open(server.url("a.tar"), SIZE, "../../etc/passwd")


def test_it_travels_to_workers(cache):
    assert pickle.loads(pickle.dumps(cache)) == cache


def test_where_it_lies(monkeypatch):
    monkeypatch.setenv("DIST_KD_CACHE", "/scratch/c")
    assert cache_folder() == Path("/scratch/c")
    monkeypatch.delenv("DIST_KD_CACHE")
    assert cache_folder() == Path.home() / ".cache" / "dist_kd"
