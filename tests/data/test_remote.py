"""URLs that may be opened, what messages show of them, and small objects and listings from real servers."""

from __future__ import annotations

import subprocess
import sys
import time

import fsspec
import pytest
from data.bad_server import BadServer, body, cut, slow_headers, stall, status

from dist_kd.data.remote import (
    Forbidden,
    Limits,
    NotThere,
    TryAgain,
    is_remote,
    list_tars,
    local_path,
    open_stream,
    read_small,
    shown,
)
from dist_kd.data.remote_urls import check_url
from dist_kd.data.transfer import Head, Stream
from dist_kd.errors import ConfigError, DataError

CANARY = "k4n4ry"
QUICK = Limits(connect_s=1, idle_s=1, attempts=2, pause_s=0.05, longest_pause_s=0.2)


@pytest.fixture
def server():
    with BadServer({"index.json": b"0123456789"}) as server:
        yield server


@pytest.mark.parametrize(
    ("where", "remote"),
    [
        ("shards", False),
        ("/data/a-{000..009}.tar", False),
        ("a:b/shards", False),
        ("run-12:00/a.tar", False),
        ("file:///data/a.tar", False),
        ("https://host/a.tar", True),
        ("S3://bucket/a.tar", True),
        ("a.tar,s3://bucket/a.tar", True),
        ("a-{0,1}.tar", False),
        ("{https://host/a.tar,b.tar}", True),
        ("pipe:cat a.tar", True),
        ("nonsense://x", True),
    ],
)
def test_a_scheme_makes_data_remote(where, remote):
    assert is_remote(where) is remote


@pytest.mark.parametrize(
    "url",
    [
        "https://host/a-{000..009}.tar",
        "http://host:8080/a.tar?version=3&part=1",
        "http://[::1]:8080/a.tar",
        "s3://bucket/folder/*.tar",
        "hf://datasets/name/set@main/a.tar",
        "abfs://container@account.dfs.core.windows.net/a.tar",
        "memory://a/b.tar",
        "/local/a.tar?token=1",
        "file:///a.tar",
        "ftp://host/a.tar,gs://bucket/b.tar",
    ],
)
def test_these_may_be_opened(url):
    check_url(url)


@pytest.mark.parametrize(
    ("url", "word"),
    [
        (f"pipe:curl -H 'Authorization: {CANARY}' https://host/a.tar", "would run a command"),
        (f"https://user:{CANARY}@host/a.tar", "user name or a password"),
        (f"https://{CANARY}@host/a.tar", "user name or a password"),
        (f"https://user:{CANARY}/x@host/a.tar", "credentials"),
        (f"a.tar,https://user:{CANARY}@host/a.tar", "user name or a password"),
        (f"{{https://host/a.tar,https://user:{CANARY}@host/b.tar}}", "braces"),
        (f"s3://key:{CANARY}@bucket/a.tar", "user name or a password"),
        (f"abfs://container:{CANARY}@account/a.tar", "user name or a password"),
        (f"https://host/a.tar?sig={CANARY}", "credential"),
        (f"https://host/a.tar?X-Amz-Signature={CANARY}", "credential"),
        (f"https://host/a.tar?x=1&AWSAccessKeyId={CANARY}", "credential"),
        (f"https://host/a.tar?x=1;access_token={CANARY}", "credential"),
        (f"https://host/a.tar?%74oken={CANARY}", "credential"),
        (f"https://host/a.tar#secret={CANARY}", "credential"),
        ("simplecache::s3://bucket/a.tar", "chain"),
        ("local:///a.tar", "scheme `local:`"),
        ("python://a", "scheme `python:`"),
        ("github://o:r@main/a.tar", "scheme `github:`"),
        ("jupyter://host/a", "scheme `jupyter:`"),
        ("dask://host/a", "scheme `dask:`"),
        ("reference://a", "scheme `reference:`"),
        ("https:host/a.tar", "names no host"),
        ("s3:///a.tar", "names no host"),
    ],
)
def test_these_are_refused_and_no_secret_is_told(url, word):
    with pytest.raises(ConfigError) as caught:
        check_url(url)
    assert word in str(caught.value) and CANARY not in str(caught.value)
    with pytest.raises(ConfigError):
        read_small(url.split(",")[-1] if "{" not in url else url, 10)


def test_what_is_shown_has_no_secret():
    assert shown(f"https://u:{CANARY}@host:1/a.tar?x={CANARY}#y{CANARY}") == "https://host:1/a.tar"


def test_file_urls_are_paths_of_this_machine():
    assert local_path("file:///a%20b/c.tar") == "/a b/c.tar" == local_path("file://localhost/a%20b/c.tar")
    assert local_path("/a%20b") == "/a%20b"
    with pytest.raises(ConfigError, match="this machine only"):
        local_path("file://elsewhere/a.tar")


def test_urls_are_checked_before_anything_heavy_is_loaded():
    code = (
        "import sys, dist_kd.data.remote_urls, dist_kd.data.remote, dist_kd.data.shard_cache\n"
        "sys.exit(bool({'torch', 'numpy', 'requests', 'fsspec', 'pydantic'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0


def test_small_files_come_whole(server):
    server.first["index.json"] = [status(503), cut(4), cut(4, reset=True), status(429, Retry_After="0")]
    assert read_small(server.url("index.json"), 10, Limits(pause_s=0.01)) == b"0123456789"
    assert len(server.asked) == 5


def test_what_is_not_there_is_told_apart(server):
    with pytest.raises(NotThere, match="404 Not Found"):
        read_small(server.url("other.json"), 10)
    server.always["index.json"] = status(403)
    with pytest.raises(Forbidden, match=r"403.*netrc"):
        read_small(server.url("index.json"), 10)
    assert len(server.asked) == 2  # neither was tried again


def test_a_large_file_is_not_read_as_a_small_one(server):
    with pytest.raises(DataError, match="larger than 9 bytes"):
        read_small(server.url("index.json"), 9)


def test_compressed_bytes_are_refused(server):
    server.always["index.json"] = body(b"zzz", Content_Encoding="gzip")
    with pytest.raises(DataError, match="compressed"):
        read_small(server.url("index.json"), 10)


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (stall(3), r"nothing came for 1 s; gave up after 2 attempts"),
        (slow_headers(0.2), r"gave up at its time limit"),
        (status(500), r"500 Internal Server Error; gave up after 2 attempts"),
    ],
    ids=["stalled", "headers without end", "500 for ever"],
)
def test_a_server_that_never_answers_well_ends_in_time(server, answer, words):
    server.always["index.json"] = answer
    began = time.monotonic()
    with pytest.raises(DataError, match=words):
        read_small(server.url("index.json"), 10, QUICK, timeout_s=3)
    assert time.monotonic() - began < 10


def test_a_time_limit_holds_while_bytes_still_come(server):
    server.files["long"] = bytes(50_000_000)
    with open_stream(server.url("long"), deadline=time.monotonic() + 1.0) as stream:
        chunks = iter(stream)
        next(chunks)
        time.sleep(1.1)
        with pytest.raises(TryAgain, match="did not come in time"):
            next(chunks)  # the thread has some ready


def test_no_byte_is_fetched_before_one_is_asked_for():
    taken = []

    def source():
        for item in (Head(2, 0, "v1"), b"a", b"b"):
            taken.append(item)
            yield item

    with Stream(source(), "https://host/a.tar", Limits(), time.monotonic() + 10) as stream:
        assert stream.head.version == "v1"
        time.sleep(0.1)  # a thread that would read ahead has long begun
        assert taken == [stream.head]
        assert list(stream) == [b"a", b"b"]


def test_credentials_come_from_netrc(server, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login user password word\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    read_small(server.url("index.json"), 10)
    assert server.asked[-1].authorization == "Basic dXNlcjp3b3Jk"


def test_the_folder_of_a_store_is_listed():
    store = fsspec.filesystem("memory")
    names = ["b.tar", "a.tar", "index.json", "deep/c.tar"]
    for name in names:
        store.pipe(f"/listed/{name}", b"x")
    both = ["memory://listed/a.tar", "memory://listed/b.tar"]
    try:
        assert list_tars("memory://listed") == list_tars("memory://listed/") == list_tars("memory://listed/*") == both
        assert list_tars("memory://listed/b*.tar") == both[1:]
        assert read_small(both[0], 10) == b"x"
        with pytest.raises(NotThere, match=r"no \.tar file"):
            list_tars("memory://listed/deeper")
        with pytest.raises(NotThere):
            read_small("memory://listed/c.tar", 10)
        with pytest.raises(NotThere):
            read_small("memory://listed/deep", 10)
    finally:
        store.rm("/listed", recursive=True)


def test_http_lists_nothing_and_says_what_to_do(server):
    for url in (server.url("folder/"), server.url("a-*.tar")):
        with pytest.raises(DataError, match="brace pattern"):
            list_tars(url)
    assert not server.asked


@pytest.mark.parametrize(
    ("url", "module", "package"),
    [("gs://b/a.tar", "gcsfs", r"dist-kd\[gs\]"), ("oss://b/a.tar", "ossfs", "ossfs"), ("az://b/a", "adlfs", "adlfs")],
)
def test_a_missing_package_is_named(url, module, package, monkeypatch):
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(DataError, match=f"pip install '{package}'"):
        read_small(url, 10)
