"""Owns how `--data` names shards: a folder, a brace pattern, a list or one tar -> the index of those shards.

What lies on other machines is remote_sets.py's. Local shards without an index are indexed on their first use; the index
is kept in a hidden folder beside them, or in the cache folder if theirs cannot be written. Several processes may do so
at once: they write the same bytes.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import math
import os
import re
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import braceexpand

from dist_kd.config import Config
from dist_kd.data import remote_sets
from dist_kd.data.index import Index, read_facts, read_index, write_index
from dist_kd.data.remote_urls import check_url, is_remote, local_path
from dist_kd.data.shard_cache import ShardCache, cache_folder
from dist_kd.data.survey import build_index
from dist_kd.errors import DataError, printable

log = logging.getLogger(__name__)

CACHE_SHARE = 0.9  # of the loader's time limit: the cache gives up first, as it knows what went wrong
MOST_SHARDS = 100_000  # names a pattern may stand for
DEEPEST = 20  # braces within braces
SHOWN = 3  # names shown of a long list
LOOKS = 16  # shards looked at at once
JOBS = 8  # most processes that index shards on their first use
SMALL_BYTES = 64 << 20  # shards below this in all are indexed without further processes


def shard_cache(config: Config | None = None) -> ShardCache:
    """Where this node keeps shards of other machines, within a run's limits, or else those it has by default."""
    config = config or Config()
    return ShardCache(cache_folder(), int(1e9 * config.cache_gb), CACHE_SHARE * config.loader_timeout)


def open_data(where: str, cache: ShardCache | None = None) -> Index:
    """The index of the shards `where` names, remote ones behind `cache`.

    DataError, and ConfigError for a URL that is not opened, say what was looked for and what to do.
    """
    if is_remote(where):
        check_url(where)  # first, so that no later message can repeat a password
        return remote_sets.open_remote(expand_braces(where), cache or shard_cache())
    where = local_path(where)
    folder = Path(os.path.expanduser(where))
    if os.path.isdir(folder):
        if _has_our_index(folder):
            return read_index(folder, cache or shard_cache())
        return _index_of(_shards_of(folder), folder.name)
    shards = expand(where)
    present = [shard for shard in shards if os.path.isfile(shard)]
    if not present:
        raise DataError(f"data `{where}` matches no file; it stands for {_some(shards)}")
    if len(present) < len(shards):
        missing = [shard for shard in shards if not os.path.isfile(shard)]
        raise DataError(f"data `{where}`: {len(missing)} of {len(shards)} shards are missing: {_some(missing)}")
    if double := [shard for shard, count in Counter(shards).items() if count > 1]:
        raise DataError(f"data `{where}` names a shard twice: {_some(double)}")
    return _part_of_our_index(shards) or _index_of(shards, _common_name(shards))


def split_folder(where: str, split: str) -> str | None:
    """What `--data WHERE` means for "train" or "val": the packed subfolder, or WHERE itself (for val: None)."""
    if is_remote(where):
        check_url(where)
        return remote_sets.remote_split(where, split)
    below = os.path.join(os.path.expanduser(local_path(where)), split)
    if os.path.isdir(below):  # unlike pathlib's, no error for what cannot be a path
        return below
    return where if split == "train" else None


def check_present(index: Index) -> None:
    """DataError if a shard of this machine is not there or has not the size that its index says."""

    def look(shard: int) -> str:
        try:
            size, indexed = os.stat(index.shard_path(shard)).st_size, index.shards[shard].bytes
        except OSError as error:
            return f"cannot be read ({error.strerror}); put it back"
        return "" if size == indexed else f"has {size} bytes where its index says {indexed}; copy it again"

    with ThreadPoolExecutor(LOOKS) as pool:  # on a network disk each look takes its time
        for shard, problem in enumerate(pool.map(look, range(len(index.shards)))):
            if problem:
                raise DataError(f"shard `{index.location(shard)}` {problem}, or index the shards anew: `dist-kd index`")


def expand(where: str) -> list[Path]:
    """The absolute paths a comma-separated list of brace patterns, globs or names stands for; they need not exist."""
    paths: list[Path] = []
    for name in expand_braces(where):
        name = os.path.expanduser(local_path(name))
        matches = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else []
        paths += [Path(match).absolute() for match in matches or [name]]
    return paths


def expand_braces(where: str) -> list[str]:
    """The names a comma-separated list of brace patterns stands for, in order."""
    found: list[str] = []
    if "\0" in where:
        raise DataError(f"data `{where}` is no path: it has a null character")
    for pattern in _split_outside_braces(where):
        try:
            if (count := _count(pattern)) > MOST_SHARDS:
                raise DataError(
                    f"data `{pattern}` stands for `{count}` names, but at most {MOST_SHARDS} are looked for"
                )
            found += braceexpand.braceexpand(pattern) if pattern else []
        except (ValueError, RecursionError):
            raise DataError(
                f"data `{pattern}` has unbalanced braces, or too deep ones; one is like `a-{{00..09}}.tar`"
            ) from None
    return found


def _split_outside_braces(where: str) -> list[str]:
    """The parts between commas that stand in no braces."""
    depth, parts = 0, [[]]
    for c in where:
        depth += (c == "{") - (c == "}")
        if c == "," and depth <= 0:
            parts.append([])
        else:
            parts[-1].append(c)
    return ["".join(part).strip() for part in parts]


def _count(pattern: str) -> int:
    """How many names a brace pattern stands for, counted without making them. ValueError if it is no sane pattern."""

    def of_text(text: str) -> int:  # braces within it stand there as \0COUNT\0 already
        return math.prod(int(count) for count in re.findall("\0([0-9]+)\0", text))

    def of_braces(match: re.Match) -> str:
        if not (ends := re.fullmatch(r"(-?[0-9]+|[A-Za-z])\.\.(-?[0-9]+|[A-Za-z])(?:\.\.-?([0-9]+))?", match[1])):
            return f"\0{sum(of_text(part) for part in match[1].split(','))}\0"
        first, last = (braceexpand.alphabet.find(end) if end.isalpha() else int(end) for end in ends.groups()[:2])
        return f"\0{abs(last - first) // (int(ends[3] or 1) or 1) + 1}\0"

    rest = re.sub(r"\\.", "", pattern)
    for _ in range(DEEPEST):  # the innermost braces, then those around them
        rest, found = re.subn(r"\{([^{}]*)\}", of_braces, rest)
        if not found:
            return of_text(rest)
    raise ValueError


def _has_our_index(folder: Path) -> bool:
    """Whether index.json there is ours, not one that webdataset's tools wrote."""
    path = folder / "index.json"
    try:
        return path.exists() and "schema" in read_facts(path)
    except (OSError, ValueError):
        return True  # a damaged one: reading it says so


def _shards_of(folder: Path) -> list[Path]:
    """The tars of a folder without index: one set of them, sorted by name."""
    shards = sorted(path.absolute() for path in folder.glob("*.tar"))
    if not shards:
        raise DataError(
            f"data `{folder}` has neither index.json nor .tar files; make shards of images by "
            f"`dist-kd pack SOURCE {folder}`"
        )
    sets = Counter(re.sub(r"[0-9]+", "*", shard.name) for shard in shards)
    if len(sets) > 1:
        first = next(shard for shard in shards)
        raise DataError(
            f"data `{folder}` has no index.json and shards of several sets ({', '.join(sorted(sets))}); "
            f"name one set, such as `--data '{first.parent}/{re.sub(r'[0-9]+', '*', first.name)}'`"
        )
    return shards


def _part_of_our_index(shards: list[Path]) -> Index | None:
    """The part of a packed folder that these shards are: it knows all its classes, which labels alone do not."""
    folder = shards[0].parent
    if any(shard.parent != folder for shard in shards) or not _has_our_index(folder):
        return None
    index = read_index(folder)
    numbers = {index.shard_path(i).absolute(): i for i in range(len(index.shards))}
    if any(shard not in numbers for shard in shards):
        return None
    return index.select(numbers[shard] for shard in shards)


def _index_of(shards: list[Path], name: str) -> Index:
    """The kept index of foreign shards if they have not changed since, else a new one, which is kept."""
    try:
        stamps = [[stat.st_size, stat.st_mtime_ns] for stat in (shard.stat() for shard in shards)]
    except OSError as error:  # such as a link to nowhere
        raise DataError(f"shard `{error.filename}` cannot be read ({error.strerror}); put it back") from None
    folder = Path(os.path.commonpath([shard.parent for shard in shards]))
    key = hashlib.sha256("\n".join(map(str, shards)).encode()).hexdigest()[:16]
    cache = cache_folder()
    places = [folder / ".dist_kd" / key, cache / "index" / key]
    before = None
    for place in places:
        try:
            facts = read_facts(place / "index.json")
            if facts["stamps"] == stamps:
                return read_index(place)
            before = facts["num_samples"]
        except (OSError, ValueError, KeyError, TypeError, DataError):
            continue  # none there, or an unusable one: it is made again
    size = sum(stamp[0] for stamp in stamps)
    log.info("indexing %d shards (%.1f GB) in %s", len(shards), size / 1e9, folder)
    jobs = 1 if size < SMALL_BYTES else min(JOBS, len(os.sched_getaffinity(0)))
    index = build_index(folder, shards, name=name, classes=None, jobs=jobs)
    if before is not None:
        log.warning(
            "the shards in %s have changed since they were indexed: %s samples then, %d now",
            folder,
            printable(str(before)),
            index.num_samples,
        )
    for place in places:
        try:
            write_index(index, place, stamps=stamps)
            return read_index(place)
        except OSError:
            continue
    log.warning("the index of %s could be kept neither beside the shards nor in %s; set DIST_KD_CACHE", folder, cache)
    return index


def _common_name(shards: list[Path]) -> str:
    """What the shards' names have in common, e.g. `train` of train-0000.tar."""
    common = os.path.commonprefix([shard.stem for shard in shards])  # noqa: RUF071 (letters, not path parts)
    return re.sub(r"[^a-zA-Z]+$", "", common) or shards[0].parent.name


def _some(shards: list[Path]) -> str:
    text = ", ".join(f"`{shard}`" for shard in shards[:SHOWN]) or "no name at all"
    return text if len(shards) <= SHOWN else f"{text} and {len(shards) - SHOWN} more"
