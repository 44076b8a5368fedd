"""Owns bytes from other machines: how a URL is opened, listed and streamed, within which limits, and what went wrong.

http and https go through requests, all else through fsspec.
"""

from __future__ import annotations

import errno
import glob
import logging
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from dist_kd.data.remote_urls import STORES, WEB, check_url, is_remote, local_path, scheme_of, shown
from dist_kd.data.transfer import (
    ADVICE,
    LIMITS,
    Changed,
    Forbidden,
    Head,
    Limits,
    NotThere,
    Patience,
    Stream,
    TryAgain,
    raise_status,
)
from dist_kd.errors import DataError

__all__ = [
    "Changed",
    "Forbidden",
    "Limits",
    "NotThere",
    "Patience",
    "Stream",
    "TryAgain",
    "check_url",
    "is_remote",
    "list_tars",
    "local_path",
    "open_stream",
    "read_small",
    "shown",
]

log = logging.getLogger(__name__)

WEB_CHUNK = 1 << 20  # most bytes taken from a socket at once; less if less is there
STORE_CHUNK = 4 << 20  # bytes asked of a store at once
MOST_REDIRECTS = 10
SMALL_TIMEOUT_S = 120.0
# what a store's library means by these cannot pass by waiting
FINAL_ERRNO = (errno.EINVAL, errno.EPERM, errno.ENOSYS, errno.ENAMETOOLONG, errno.EISDIR, errno.EREMCHG)


def open_stream(
    url: str, offset: int = 0, version: str = "", limits: Limits = LIMITS, deadline: float = float("inf")
) -> Stream:
    """The object's bytes from `offset` on, or from 0 if `version` says that it is another object by now.

    `deadline` is on the monotonic clock. TryAgain, here and while reading: it may pass; other DataErrors are final.
    """
    check_url(url)
    opener = _from_web if scheme_of(url) in WEB else _from_store
    return Stream(opener(url, offset, version, limits), url, limits, deadline)


def read_small(url: str, limit_bytes: int, limits: Limits = LIMITS, timeout_s: float = SMALL_TIMEOUT_S) -> bytes:
    """All bytes of a small object, such as an index. NotThere if there is none; DataError above `limit_bytes`."""
    deadline = time.monotonic() + timeout_s
    patience = Patience(limits, deadline)
    while True:
        try:
            with open_stream(url, limits=limits, deadline=deadline) as stream:
                content = bytearray()
                for chunk in stream:
                    content += chunk
                    if len(content) > limit_bytes:
                        raise DataError(f"`{shown(url)}` is larger than {limit_bytes} bytes, the limit for such a file")
            if stream.head.total not in (None, len(content)):
                raise TryAgain(f"`{shown(url)}` ended after {len(content)} of {stream.head.total} bytes")
            return bytes(content)
        except TryAgain as error:
            patience.pause(error)


def list_tars(url: str, limits: Limits = LIMITS, timeout_s: float = SMALL_TIMEOUT_S) -> list[str]:
    """URLs of the .tar files in a folder of a store, or of those that match a glob, sorted.

    DataError for http(s), which lists nothing, and if there is none.
    """
    check_url(url)
    if scheme_of(url) in WEB:
        raise DataError(
            f"`{shown(url)}` cannot be listed, because http has no listing; name the shards by a brace pattern such as "
            f"a-{{0000..0099}}.tar, or put the index.json of `dist-kd index` beside them"
        )
    deadline = time.monotonic() + timeout_s
    patience = Patience(limits, deadline)
    while True:
        try:
            with Stream(_listing(url, limits), url, limits, deadline) as stream:
                return stream.head
        except TryAgain as error:
            patience.pause(error)


def _listing(url: str, limits: Limits) -> Iterator[Any]:
    with _store_words(url):
        store, path = _store(url, limits)
        # a store's library takes the host off some URLs and leaves it in others: what it took comes back in front
        whole, inside = url.rstrip("/"), path.rstrip("/")
        front = whole.removesuffix(inside) if whole.endswith(inside) else None
        pattern = path if glob.has_magic(path) else path.rstrip("/") + "/*.tar"
        found = sorted(name for name in store.glob(pattern) if name.endswith(".tar"))
        if not found:
            raise NotThere(f"`{shown(url)}` holds no .tar file")
        yield [store.unstrip_protocol(name) if front is None else front + name for name in found]


# --- http(s)


def _from_web(url: str, offset: int, version: str, limits: Limits) -> Iterator[Head | bytes]:
    import requests

    headers = {"Accept-Encoding": "identity", "User-Agent": "dist_kd"}
    if offset:
        headers["Range"] = f"bytes={offset}-"
        if version:
            headers["If-Range"] = version
    with _web_words(url, limits), requests.Session() as session:
        session.max_redirects = MOST_REDIRECTS
        with session.get(url, headers=headers, stream=True, timeout=(limits.connect_s, limits.idle_s)) as answer:
            yield _web_head(url, answer, offset, version)
            while chunk := answer.raw.read1(WEB_CHUNK):
                yield chunk


def _web_head(url: str, answer: Any, offset: int, version: str) -> Head:
    headers, status = answer.headers, answer.status_code
    if offset and status == 416:
        raise Changed(f"`{shown(url)}` has no bytes from {offset} on")
    if status not in (200, 206):
        raise_status(url, status, answer.reason or "", headers.get("Retry-After", ""))
    if headers.get("Content-Encoding", "identity") != "identity":
        raise DataError(f"`{shown(url)}` is sent compressed although plain bytes were asked for; store it uncompressed")
    etag = headers.get("ETag", "")
    now = etag if etag and not etag.startswith("W/") else headers.get("Last-Modified", "")
    if status == 200:
        length = headers.get("Content-Length", "")
        return Head(int(length) if length.isdecimal() else None, 0, now)
    match = re.fullmatch(r"bytes (\d+)-\d+/(\d+|\*)", headers.get("Content-Range", "").strip())
    if not match or int(match[1]) != offset:
        raise DataError(f"`{shown(url)}` answered with another range of bytes than from {offset} on")
    if version and now and now != version:
        raise Changed(f"`{shown(url)}` has changed since its first {offset} bytes were fetched")
    return Head(int(match[2]) if match[2] != "*" else None, offset, now)


@contextmanager
def _web_words(url: str, limits: Limits) -> Iterator[None]:
    """Errors of requests and urllib3 as ours. Their own texts quote URLs, so none of them is passed on."""
    import requests
    import urllib3

    # it logs the targets of redirects, which for stores are signed
    logging.getLogger("urllib3.connectionpool").setLevel(logging.INFO)
    here = f"`{shown(url)}`"
    try:
        yield
    except requests.TooManyRedirects:
        raise DataError(
            f"{here} is redirected more than {MOST_REDIRECTS} times, perhaps in a circle; check it"
        ) from None
    except requests.exceptions.SSLError:
        raise DataError(
            f"{here} has a certificate that cannot be trusted; REQUESTS_CA_BUNDLE names other roots"
        ) from None
    except (requests.exceptions.InvalidURL, requests.exceptions.InvalidSchema, requests.exceptions.MissingSchema):
        raise DataError(f"{here} is no usable http(s) URL, or is redirected to one that is not") from None
    except requests.exceptions.ConnectTimeout:
        raise TryAgain(f"{here} gave no connection within {limits.connect_s:g} s") from None
    except (requests.exceptions.ReadTimeout, urllib3.exceptions.ReadTimeoutError):
        raise TryAgain(f"{here}: nothing came for {limits.idle_s:g} s") from None
    except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
        raise TryAgain(f"{here}: {_cause(error)}") from None


def _cause(error: BaseException) -> str:
    """The reason at the bottom of a chain of errors, in the system's words."""
    seen, found = set(), "the connection broke"
    stack = [error]
    while stack:
        this = stack.pop()
        if id(this) in seen or not isinstance(this, BaseException):
            continue
        seen.add(id(this))
        if isinstance(this, OSError) and this.errno and this.errno > 0:
            found = os.strerror(this.errno).lower()
        elif type(this).__name__ in ("gaierror", "NameResolutionError"):
            return "its host has no address (name resolution failed)"
        stack += [this.__cause__, this.__context__, getattr(this, "reason", None), *this.args]
    return found


# --- stores, by fsspec


def _from_store(url: str, offset: int, version: str, limits: Limits) -> Iterator[Head | bytes]:
    with _store_words(url):
        store, path = _store(url, limits)
        with store.open(path, "rb", block_size=STORE_CHUNK, cache_type="none") as file:
            # what the file itself was opened as, if it says so: another object may come between two questions
            info = getattr(file, "details", None) or store.info(path)
            if info.get("type") == "directory":
                raise IsADirectoryError
            now = _store_version(info)
            if offset and version and now != version:
                offset = 0
            yield Head(info.get("size"), offset, now)
            file.seek(offset)
            while chunk := file.read(STORE_CHUNK):
                yield chunk


def _store(url: str, limits: Limits) -> tuple[Any, str]:
    """fsspec's file system for a URL, with its own time limits where it has any, and the path inside."""
    import fsspec

    scheme, connect, idle = scheme_of(url), limits.connect_s, limits.idle_s
    settings = {
        "s3": {"config_kwargs": {"connect_timeout": connect, "read_timeout": idle, "retries": {"max_attempts": 0}}},
        "gs": {"requests_timeout": idle},
        "az": {"connection_timeout": int(connect + 1), "read_timeout": int(idle + 1)},
        "ftp": {"timeout": idle},
    }
    same = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az"}
    return fsspec.core.url_to_fs(url, use_listings_cache=False, **settings.get(same.get(scheme, scheme), {}))


def _store_version(info: dict) -> str:
    """What tells two objects of one name apart; "" if the store says nothing."""
    for name in ("ETag", "etag", "generation", "blob_id", "LastModified", "last_modified", "mtime", "created"):
        if info.get(name):
            return str(info[name])
    return ""


@contextmanager
def _store_words(url: str) -> Iterator[None]:
    """Errors of fsspec and the libraries behind it as ours."""
    here = f"`{shown(url)}`"
    try:
        yield
    except (DataError, GeneratorExit):
        raise
    except ImportError:
        package = STORES[scheme_of(url)]
        raise DataError(f"{here} needs a package that is not installed; `pip install '{package}'`") from None
    except IsADirectoryError:
        raise NotThere(f"{here} is a folder, not a file") from None
    except FileNotFoundError:
        raise NotThere(f"{here} is not there; {ADVICE[404]}") from None
    except Exception as error:
        status = _status(error)
        text = f"{here}: {_plain(error)}"
        if isinstance(error, PermissionError) or "Credentials" in type(error).__name__:
            public = "; FSSPEC_S3_ANON=true asks a public bucket without any" if scheme_of(url) in ("s3", "s3a") else ""
            raise Forbidden(f"{text}; {ADVICE[403]}{public}") from None
        if type(error).__name__ == "FileExpired":
            raise Changed(f"{here} has changed while it was fetched") from None
        if status is not None:
            raise_status(url, status, type(error).__name__)
        if isinstance(error, (ValueError, TypeError, NotImplementedError)) or getattr(error, "errno", 0) in FINAL_ERRNO:
            raise DataError(text) from None
        raise TryAgain(text) from None


def _status(error: Exception) -> int | None:
    """The HTTP status some libraries' errors carry."""
    for holder in (error, getattr(error, "response", None)):
        for name in ("status_code", "status", "code"):
            value = getattr(holder, name, None)
            if isinstance(value, int) and 400 <= value < 600:
                return value
    return None


def _plain(error: Exception) -> str:
    """First line of a foreign error, its URLs shown as ours are."""
    text = (str(error).strip() or type(error).__name__).splitlines()[0]
    return re.sub(r"\S+://\S+", lambda match: shown(match[0]), text)[:300]
