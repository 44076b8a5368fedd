"""Owns how `--data` names local shards: a folder, a brace pattern, a list or one tar -> the index of those shards.

Shards without an index are indexed on their first use; the index is kept in a hidden folder beside them, or in the
cache folder if theirs cannot be written. Several processes may do so at once: they write the same bytes.
"""

from __future__ import annotations

import glob
import hashlib
import logging
import math
import os
import re
from collections import Counter
from pathlib import Path

import braceexpand

from dist_kd.data.index import Index, read_facts, read_index, write_index
from dist_kd.data.survey import build_index
from dist_kd.errors import DataError

log = logging.getLogger(__name__)

MOST_SHARDS = 1_000_000  # names a pattern may stand for
SHOWN = 3  # names shown of a long list
JOBS = 8  # most processes that index shards on their first use
SMALL_BYTES = 64 << 20  # shards below this in all are indexed without further processes


def open_data(where: str) -> Index:
    """The index of the shards `where` names. DataError says what was looked for and what to do."""
    if re.match(r"[a-zA-Z][a-zA-Z0-9+.-]*://|pipe:", where):
        raise DataError(f"data `{where}` is remote, but shards are read from local files; copy them first")
    folder = Path(os.path.expanduser(where))
    if os.path.isdir(folder):  # unlike Path.is_dir, no error for what cannot be a path
        if _has_our_index(folder):
            return read_index(folder)
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


def expand(where: str) -> list[Path]:
    """The absolute paths a comma-separated list of brace patterns, globs or names stands for; they need not exist."""
    paths: list[Path] = []
    for pattern in _split_outside_braces(where):
        try:
            if (count := _count(pattern)) > MOST_SHARDS:
                raise DataError(
                    f"data `{pattern}` stands for `{count}` names, but at most {MOST_SHARDS} are looked for"
                )
            names = list(braceexpand.braceexpand(pattern)) if pattern else []
        except (ValueError, RecursionError):
            raise DataError(f"data `{pattern}` has unbalanced braces; a pattern is like `a-{{00..09}}.tar`") from None
        for name in names:
            name = os.path.expanduser(name)
            matches = sorted(glob.glob(name)) if glob.has_magic(name) and not os.path.exists(name) else []
            paths += [Path(match).absolute() for match in matches or [name]]
    return paths


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
    """How many names a brace pattern stands for, counted without making them. ValueError if that has 4,300 digits."""

    def of_text(text: str) -> int:  # braces within it stand there as \0COUNT\0 already
        return math.prod(int(count) for count in re.findall("\0([0-9]+)\0", text))

    def of_braces(match: re.Match) -> str:
        if not (ends := re.fullmatch(r"(-?[0-9]+|[A-Za-z])\.\.(-?[0-9]+|[A-Za-z])(?:\.\.-?([0-9]+))?", match[1])):
            return f"\0{sum(of_text(part) for part in match[1].split(','))}\0"
        first, last = (braceexpand.alphabet.find(end) if end.isalpha() else int(end) for end in ends.groups()[:2])
        return f"\0{abs(last - first) // (int(ends[3] or 1) or 1) + 1}\0"

    rest, found = re.sub(r"\\.|\0", "", pattern), 1
    while found:  # the innermost braces, then those around them
        rest, found = re.subn(r"\{([^{}]*)\}", of_braces, rest)
    return of_text(rest)


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
    stamps = [[stat.st_size, stat.st_mtime_ns] for stat in (shard.stat() for shard in shards)]
    folder = Path(os.path.commonpath([shard.parent for shard in shards]))
    key = hashlib.sha256("\n".join(map(str, shards)).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("DIST_KD_CACHE") or "~/.cache/dist_kd").expanduser()
    places = [folder / ".dist_kd" / key, cache / "index" / key]
    for place in places:
        try:
            if read_facts(place / "index.json")["stamps"] == stamps:
                return read_index(place)
        except (OSError, ValueError, KeyError, TypeError, DataError):
            continue  # none there, or an unusable one: it is made again
    size = sum(stamp[0] for stamp in stamps)
    log.info("indexing %d shards (%.1f GB) in %s for the first time", len(shards), size / 1e9, folder)
    jobs = 1 if size < SMALL_BYTES else min(JOBS, len(os.sched_getaffinity(0)))
    index = build_index(folder, shards, name=name, classes=None, jobs=jobs)
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
