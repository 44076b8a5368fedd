"""Owns how `--data` names shards on other machines: a folder's URL, a pattern or a list -> their index.

An index that lies beside them is fetched; shards without one are indexed once, through the cache. Either is kept in
the cache folder, under a name that follows from the URLs and what the index said when it was read.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple
from urllib.parse import urlsplit

import numpy as np

from dist_kd.data.index import MAX_JSON, ROW, Index, read_index, write_index
from dist_kd.data.remote import Forbidden, NotThere, list_tars, read_small
from dist_kd.data.remote_urls import check_url, is_remote, shown
from dist_kd.data.shard_cache import LEFTOVER_S, ShardCache, cache_folder
from dist_kd.data.survey import build_index
from dist_kd.errors import DataError

log = logging.getLogger(__name__)

JOBS = 4  # processes that fetch and read shards which have no index
NPY_HEADER_BYTES = 4096
ASIDE = ".index-"  # folders in which a fetched index is looked at before it is believed
SHOWN = 3  # names shown of a long list


def open_remote(urls: list[str], cache: ShardCache) -> Index:
    """The index of the shards that URLs name: one of a folder, or some of shards; the last part may be a glob.

    DataError and ConfigError say what was looked for and what to do.
    """
    if _is_folder(urls):
        return _fetched(urls[0].rstrip("/"), cache) or _indexed(named_shards(urls), cache)
    shards = named_shards(urls)
    return _part_of_our_index(shards, cache) or _indexed(shards, cache)


def named_shards(urls: list[str]) -> list[str]:
    """The shards that URLs name: all of a folder that can be listed, or the shards themselves; errors as above."""
    if local := [url for url in urls if not is_remote(url)]:
        raise DataError(f"data names shards here and on other machines, such as `{local[0]}`; name one or the other")
    for url in urls:
        check_url(url)
    if _is_folder(urls):
        return list_tars(urls[0].rstrip("/"))
    shards = [shard for url in urls for shard in (list_tars(url) if "*" in url.rpartition("/")[2] else [url])]
    if strange := [shard for shard in shards if not _is_shard(shard)]:
        raise DataError(f"data names `{shown(strange[0])}` among shards, which end in .tar; name one folder, or shards")
    if double := [shard for shard, count in Counter(shards).items() if count > 1]:
        raise DataError(f"data names a shard twice: {_some(double)}")
    return shards


def index_shards(shards: list[str], cache: ShardCache, *, name: str | None = None, **options) -> Index:
    """The index of remote shards, each fetched and read once; nothing is kept. `options` are those of build_index."""
    folder = shards[0].rpartition("/")[0]
    log.warning(
        "the %d shards of %s are read for their index: one-time pass over all of them, through the cache in %s "
        "(`dist-kd index URLS --output DIR` does it beforehand)",
        len(shards),
        shown(folder),
        cache.folder,
    )
    names = [shard.removeprefix(f"{folder}/") for shard in shards]
    return build_index(Path("/"), names, name=name or _common_name(shards), url=folder, cache=cache, **options)


def remote_split(where: str, split: str) -> str | None:
    """What `--data URL` means for "train" or "val": the folder below it, or itself (for val: None)."""
    below = f"{where.rstrip('/')}/{split}"
    if not _is_shard(where) and not re.search(r"[{,*]", where) and _holds_shards(below):
        return below
    return where if split == "train" else None


class Sent(NamedTuple):
    """A remote index on its way to other processes, which may be on other nodes."""

    index: Index  # whole, not mapped
    key: str


def sent(index: Index) -> Sent:
    return Sent(replace(index, rows=np.array(index.rows), cache=None), _key(index.fingerprint, *_addresses(index)))


def received(this: Sent, cache: ShardCache) -> Index:
    """The same index, kept on this node, whose shards come through this node's cache."""
    return _kept(replace(this.index, cache=cache), this.key)


# the index beside the shards


def _fetched(folder: str, cache: ShardCache) -> Index | None:
    """The index that lies in a remote folder, if it is one of ours."""
    try:
        text = read_small(f"{folder}/index.json", MAX_JSON)
    except NotThere:
        return None
    try:
        facts = json.loads(text)
    except (ValueError, RecursionError):
        raise DataError(f"`{shown(folder)}/index.json` is no JSON; put the index there again") from None
    if not isinstance(facts, dict) or "schema" not in facts:
        return None
    key = _key(folder, hashlib.sha256(text).hexdigest())
    if (known := _known(key, cache)) is not None:
        return known
    count = facts.get("num_samples")
    if type(count) is not int or not 0 < count < 1 << 40:
        raise DataError(f"`{shown(folder)}/index.json` counts `{count!r:.40}` samples; put the index there again")
    rows = read_small(f"{folder}/index.npy", NPY_HEADER_BYTES + count * ROW.itemsize)
    # what it says of places is not believed: names are those of neighbours, checked as of an index beside its shards
    facts = {name: value for name, value in facts.items() if name not in ("folder", "url")}
    aside = Path(tempfile.mkdtemp(prefix=ASIDE, dir=_root()))
    now = aside.stat().st_mtime  # by the file system's clock, which all who share the cache have in common
    for left in _root().glob(f"{ASIDE}*"):  # by a process that was killed
        with contextlib.suppress(FileNotFoundError):
            if now - left.stat().st_mtime > LEFTOVER_S:
                shutil.rmtree(left, ignore_errors=True)
    try:
        (aside / "index.npy").write_bytes(rows)
        (aside / "index.json").write_text(json.dumps(facts))
        return _kept(replace(read_index(aside), folder=Path("/"), url=folder, cache=cache), key)
    except DataError as error:
        raise DataError(str(error).replace(str(aside), shown(folder))) from None
    finally:
        shutil.rmtree(aside, ignore_errors=True)


def _part_of_our_index(shards: list[str], cache: ShardCache) -> Index | None:
    """The part of a packed folder that these shards are: it knows all its classes, which labels alone do not."""
    folder = shards[0].rpartition("/")[0]
    if any(shard.rpartition("/")[0] != folder for shard in shards):
        return None
    try:
        index = _fetched(folder, cache)
    except Forbidden:
        return None
    if index is None:
        return None
    numbers = {name: number for number, name in enumerate(_addresses(index))}
    if any(shard not in numbers for shard in shards):
        return None
    return index if shards == list(numbers) else index.select(numbers[shard] for shard in shards)


def _holds_shards(folder: str) -> bool:
    try:
        read_small(f"{folder}/index.json", MAX_JSON)
        return True
    except (NotThere, Forbidden):
        pass
    try:
        return bool(list_tars(folder))
    except DataError:  # nothing there, or nothing that can be listed
        return False


# shards without one


def _indexed(shards: list[str], cache: ShardCache) -> Index:
    """The kept index of foreign shards, else a new one, which is kept."""
    key = _key(*shards)
    if (known := _known(key, cache)) is not None:
        return known
    return _kept(index_shards(shards, cache, classes=None, jobs=JOBS), key)


# what is kept


def _root() -> Path:
    root = cache_folder() / "index"
    try:
        root.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise DataError(
            f"the cache `{root}` cannot be written ({error.strerror}); set DIST_KD_CACHE to a folder that can"
        ) from None
    return root


def _known(key: str, cache: ShardCache) -> Index | None:
    place = _root() / key
    try:
        return read_index(place, cache) if (place / "index.json").exists() else None
    except DataError:  # damaged: it is made again
        return None


def _kept(index: Index, key: str) -> Index:
    """The index as it is kept under `key`, mapped. Any number of processes may keep it at once: they write the same."""
    if (known := _known(key, index.cache)) is not None:
        return known
    place = _root() / key
    try:
        write_index(index, place)
    except OSError as error:
        raise DataError(
            f"the index cannot be kept in `{place}` ({error.strerror}); make room, or set DIST_KD_CACHE"
        ) from None
    return read_index(place, index.cache)


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _addresses(index: Index) -> list[str]:
    return [index.address(shard) for shard in range(len(index.shards))]


def _is_folder(urls: list[str]) -> bool:
    return len(urls) == 1 and not _is_shard(urls[0])


def _is_shard(url: str) -> bool:
    return urlsplit(url).path.endswith(".tar")


def _common_name(shards: list[str]) -> str:
    stems = [urlsplit(shard).path.rpartition("/")[2].removesuffix(".tar") for shard in shards]
    folder = urlsplit(shards[0]).path.rstrip("/").split("/")[-2:][0]
    return re.sub(r"[^a-zA-Z]+$", "", os.path.commonprefix(stems)) or folder or "remote"  # noqa: RUF071


def _some(shards: list[str]) -> str:
    text = ", ".join(f"`{shown(shard)}`" for shard in shards[:SHOWN])
    return text if len(shards) <= SHOWN else f"{text} and {len(shards) - SHOWN} more"
