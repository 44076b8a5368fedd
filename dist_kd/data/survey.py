"""Owns reading shards from end to end: an index built from them, or what is wrong with them. No torch."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from dist_kd.data.damage import KINDS, damage_of
from dist_kd.data.index import Index
from dist_kd.data.tar_scan import MOST_IMAGE_BYTES, ROW, Marked, Scan, ShardInfo, checksum, scan_shard
from dist_kd.data.tar_walk import shown
from dist_kd.errors import DataError, printable

if TYPE_CHECKING:
    from dist_kd.data.shard_cache import ShardCache

log = logging.getLogger(__name__)

MAX_BAD_FRACTION = 0.01  # of samples that an index may mark, unless asked otherwise
MOST_PROBLEMS = 20  # listed of one kind in one shard
OUTLYING = 2  # a largest label this many times the next is taken for damage, and said


def build_index(
    folder: Path,
    shards: list[Path] | list[str],
    *,
    name: str,
    classes: tuple[str, ...] | None,
    augment: str = "none",
    image_size: int | None = None,
    jobs: int = 1,
    max_bad_fraction: float = MAX_BAD_FRACTION,
    url: str = "",
    cache: ShardCache | None = None,
) -> Index:
    """The index of shards, read once from end to end by `jobs` processes; nothing is written.

    With `url` the shards are names below it, or addresses, and come through `cache`; else they are paths.
    Without `classes`, they are the numbers from 0 to the largest label. Samples with bad content are marked, counted
    and named in the log; DataError if they are more than `max_bad_fraction` of all. DataError naming the shard and
    member at the first damage to structure: a bad header, a cut or doubled archive, a key that comes twice.
    """
    if not shards:
        raise DataError(f"`{url or folder}` was given no shards to index")
    folder = Path(folder).absolute()
    names = [str(shard) if url else _name_in(folder, Path(shard).absolute()) for shard in shards]
    unread = tuple(ShardInfo(name, 0, "", 0) for name in names)
    index = Index(folder, name, tuple(classes or ()), unread, np.empty(0, ROW), augment, image_size, url, cache)
    where = index.url or str(folder)
    scan = partial(_scan, index, num_classes=len(classes) if classes is not None else None)
    scanned = _each(scan, list(range(len(shards))), jobs)
    rows = np.concatenate([rows for _, rows, _ in scanned])
    if not len(rows):
        raise DataError(f"the {len(shards)} shards of `{where}` hold no samples")
    _account(where, len(rows), [marked for _, _, marked in scanned], max_bad_fraction)
    if classes is None:
        classes = tuple(str(label) for label in range(_largest_label(where, rows["label"]) + 1))
    return replace(index, classes=tuple(classes), shards=tuple(info for info, _, _ in scanned), rows=rows)


def verify_index(index: Index, jobs: int = 1, decode: Callable[[bytes], object] | None = None) -> list[str]:
    """Problems of the shards against their index, one sentence each; [] if all is well.

    Looks at sizes, sha256, the structure of each tar, each row, label and checksum, and decodes each image.
    """
    check = partial(_check_shard, index, decode=decode)
    found = _each(check, list(range(len(index.shards))), jobs)
    return [problem for problems in found for problem in problems]


@contextmanager
def _opened(index: Index, shard: int) -> Iterator[BinaryIO]:
    try:
        with open(index.open_shard(shard), "rb", buffering=0) as file:
            yield file
    except OSError as error:
        raise DataError(
            f"shard `{index.location(shard)}` cannot be read ({error.strerror}); check its path and permissions"
        ) from None


def _scan(index: Index, shard: int, num_classes: int | None) -> tuple[ShardInfo, np.ndarray, dict[str, Marked]]:
    with _opened(index, shard) as file:
        info, rows, _, marked = scan_shard(file, index.location(shard), index.shards[shard].name, num_classes)
    return info, rows, marked


def _account(where: str, samples: int, marked: list[dict[str, Marked]], max_bad_fraction: float) -> None:
    """Says what is marked, by kind, with the first of each. DataError if it is more than may be."""
    counts, first = dict.fromkeys(KINDS, 0), {}
    for shard in marked:
        for kind, (count, sentences) in shard.items():
            counts[kind] += count
            first.setdefault(kind, next(iter(sentences.values())))
    bad = sum(counts.values())
    if not bad:
        return
    kinds = ", ".join(f"{count} {kind}" for kind, count in counts.items() if count)
    what = f"{bad} of {samples} samples in `{where}` are damaged ({kinds}); the first of each kind: "
    what += "; ".join(first.values())
    if bad > max_bad_fraction * samples:
        raise DataError(
            f"{what}; that is more than the share `{max_bad_fraction:g}` that may be: mend the shards, or allow more "
            "by `dist-kd index SHARDS --max-bad-fraction`"
        )
    log.warning("%s; they keep their numbers, and training shows others in their place", printable(what))


def _largest_label(where: str, labels: np.ndarray) -> int:
    found = np.unique(labels[labels >= 0])
    if not len(found):
        raise DataError(f"no sample in `{where}` has a label; each needs KEY.cls, or KEY.json with `label`")
    largest, below = int(found[-1]), int(found[-2]) if len(found) > 1 else 0
    if largest + 1 > OUTLYING * (below + 1):
        log.warning(
            "the largest label in %s is %d, and the next %d: if that is damage, mend it; there are %d classes now",
            where,
            largest,
            below,
            largest + 1,
        )
    return largest


def _check_shard(index: Index, shard: int, decode: Callable[[bytes], object] | None) -> list[str]:
    """Problems of one shard; at most MOST_PROBLEMS of a kind are spelled out."""
    if decode is None:
        from dist_kd.data.decode import decode_image, most_pixels  # needs torch, which nothing else here does

        decode = partial(decode_image, max_pixels=most_pixels(index))
    try:
        with _opened(index, shard) as file:
            return list(_spelled_out(index.location(shard), _problems(index, shard, file, decode)))
    except DataError as error:
        return [str(error)]


def _problems(index: Index, shard: int, file: BinaryIO, decode: Callable[[bytes], object]) -> Iterator[tuple[str, str]]:
    """(kind, sentence) of all that is wrong with a shard."""
    info, rows, where = index.shards[shard], index.shard_rows(shard), index.location(shard)
    keys: list[str] = []
    marks, said = rows, {}  # what is marked: as the shard is now, if its rows are those of the index
    try:
        scan = scan_shard(file, where, info.name, len(index.classes))
    except DataError as error:
        yield "structure", str(error)
    else:
        yield from (("index", f"shard `{where}` {what}") for what in _differences(scan, info, rows))
        if len(scan.rows) == len(rows):
            keys, marks = scan.keys, scan.rows
            said = {row: sentence for marked in scan.marked.values() for row, sentence in marked.sentences.items()}
    first = index.ends[shard] - info.samples
    for i, row in enumerate(rows):
        kind = damage_of(marks[i])
        fault = (kind, f"is damaged: {KINDS[kind]}") if kind else _sample_fault(file, row, decode)
        if fault:
            kind, what = fault
            key = f", key `{shown(keys[i])}`" if keys else ""
            yield kind, said.get(i) or f"shard `{where}` sample {first + i} (row {i}{key}) {what}"


def _differences(scan: Scan, info: ShardInfo, rows: np.ndarray) -> Iterator[str]:
    """What a shard is that its index does not say."""
    found = scan.info
    if info.bytes and found.bytes != info.bytes:
        yield f"has {found.bytes} bytes where the index says {info.bytes}"
    elif info.sha256 and found.sha256 != info.sha256:  # an index of remote shards may know neither
        yield "has another sha256 than the index says"
    if found.samples != info.samples:
        yield f"has {found.samples} samples where the index says {info.samples}"
        return
    moved = np.flatnonzero((scan.rows["offset"] != rows["offset"]) | (scan.rows["length"] != rows["length"]))
    if len(moved):
        first = scan.keys[moved[0]]
        yield f"has images at other places than the index says: {len(moved)}, the first of key `{shown(first)}`"
    other = np.flatnonzero(scan.rows["label"] != rows["label"])
    if len(other):
        here, there = (int(some["label"][other[0]]) for some in (scan.rows, rows))
        yield (
            f"has other labels than the index says: {len(other)}, the first of key `{shown(scan.keys[other[0]])}`, "
            f"`{here if here >= 0 else 'none'}` where the index says `{there if there >= 0 else 'none'}`"
        )


def _sample_fault(file: BinaryIO, row: np.void, decode: Callable[[bytes], object]) -> tuple[str, str] | None:
    """(kind, what is wrong) with the image that a row of the index speaks of; None if nothing."""
    if row["length"] > MOST_IMAGE_BYTES:
        return "decode", f"has `{row['length']}` bytes, but at most {MOST_IMAGE_BYTES} are decoded"
    file.seek(int(row["offset"]))
    image = file.read(int(row["length"]))
    if len(image) != row["length"]:
        return "checksum", "is cut off"
    if checksum(image) != row["checksum"]:
        return "checksum", "has other bytes than the index says (checksum)"
    try:
        decode(image)
    except DataError as error:
        return "decode", f"cannot be decoded: {error}"
    return None


def _spelled_out(where: str, problems: Iterable[tuple[str, str]]) -> Iterator[str]:
    """The sentences, without those of a kind above MOST_PROBLEMS: these are only counted."""
    listed: Counter[str] = Counter()
    for kind, sentence in problems:
        listed[kind] += 1
        if listed[kind] <= MOST_PROBLEMS:
            yield sentence
    for kind, count in listed.items():
        if count > MOST_PROBLEMS:
            yield f"shard `{where}` has {count - MOST_PROBLEMS} more problems of the kind {kind}"


def _each(work: Callable, items: list, jobs: int) -> list:
    """work(item) for each, in order, by up to `jobs` processes."""
    jobs = min(jobs, len(items))
    if jobs <= 1:
        return [work(item) for item in items]
    # spawned, not forked: a fork copies the locks of whatever threads the caller has
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:
        try:
            return list(pool.map(work, items))
        except BrokenProcessPool:
            raise DataError(
                f"one of {jobs} processes that read shards was killed (out of memory?); try again with fewer `--jobs`"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _name_in(folder: Path, shard: Path) -> str:
    return str(shard.relative_to(folder) if shard.is_relative_to(folder) else shard)
