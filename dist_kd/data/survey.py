"""Owns reading shards from end to end: an index built from them, or what is wrong with them. No torch."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from dist_kd.data.index import Index
from dist_kd.data.tar_scan import ShardInfo, checksum, scan_shard
from dist_kd.errors import DataError

MOST_PROBLEMS = 20  # listed of one shard


def build_index(
    folder: Path,
    shards: list[Path],
    *,
    name: str,
    classes: tuple[str, ...] | None,
    augment: str = "none",
    image_size: int | None = None,
    jobs: int = 1,
) -> Index:
    """The index of shards, read once from end to end by `jobs` processes; nothing is written.

    Without `classes`, they are the numbers from 0 to the largest label. DataError naming the shard, and the member if
    there is one, at the first damage: a bad header, a cut or doubled archive, a sample without image or label, a label
    that is no class, a key that comes twice.
    """
    if not shards:
        raise DataError(f"`{folder}` was given no shards to index")
    folder = Path(folder).absolute()
    names = [_name_in(folder, Path(shard).absolute()) for shard in shards]
    scan = partial(_scan, folder, num_classes=len(classes) if classes is not None else None)
    scanned = _each(scan, names, jobs)
    rows = np.concatenate([rows for _, rows in scanned])
    if not len(rows):
        raise DataError(f"the {len(shards)} shards of `{folder}` hold no samples")
    if classes is None:
        classes = tuple(str(label) for label in range(int(rows["label"].max()) + 1))
    return Index(folder, name, tuple(classes), tuple(info for info, _ in scanned), rows, augment, image_size)


def verify_index(index: Index, jobs: int = 1, decode: Callable[[bytes], object] | None = None) -> list[str]:
    """Problems of the shards against their index, one sentence each; [] if all is well.

    Looks at sizes, sha256, the structure of each tar, each label and checksum, and decodes each image.
    """
    check = partial(_check_shard, index, decode=decode)
    found = _each(check, list(range(len(index.shards))), jobs)
    return [problem for problems in found for problem in problems]


def _scan(folder: Path, name: str, num_classes: int | None) -> tuple[ShardInfo, np.ndarray]:
    return scan_shard(folder / name, name, num_classes)


def _check_shard(index: Index, shard: int, decode: Callable[[bytes], object] | None) -> list[str]:
    """Problems of one shard; at most MOST_PROBLEMS are spelled out."""
    if decode is None:
        from dist_kd.data.decode import decode_image as decode  # needs torch, which nothing else here does
    info, rows, path = index.shards[shard], index.shard_rows(shard), index.shard_path(shard)
    problems = []
    try:
        found, found_rows = scan_shard(path, info.name, len(index.classes))
    except DataError as error:
        problems.append(str(error))
    else:
        if found.bytes != info.bytes:
            problems.append(f"shard `{path}` has {found.bytes} bytes where the index says {info.bytes}")
        elif found.sha256 != info.sha256:
            problems.append(f"shard `{path}` has another sha256 than the index says")
        if found.samples != info.samples:
            problems.append(f"shard `{path}` has {found.samples} samples where the index says {info.samples}")
        elif not np.array_equal(found_rows["label"], rows["label"]):
            problems.append(f"shard `{path}` has other labels than the index says")
    first = index.ends[shard] - info.samples
    try:
        with open(path, "rb") as file:
            for i, row in enumerate(rows):
                if fault := _sample_fault(file, row, decode):
                    problems.append(f"shard `{path}` sample {first + i} (row {i}) {fault}")
    except OSError as error:
        problems.append(f"shard `{path}` cannot be read ({error.strerror})")
    if len(problems) > MOST_PROBLEMS:
        problems[MOST_PROBLEMS:] = [f"shard `{path}` has {len(problems) - MOST_PROBLEMS} more problems"]
    return list(dict.fromkeys(problems))


def _sample_fault(file, row: np.void, decode: Callable[[bytes], object]) -> str:
    file.seek(int(row["offset"]))
    image = file.read(int(row["length"]))
    if len(image) != row["length"]:
        return "is cut off"
    if checksum(image) != row["checksum"]:
        return "has other bytes than the index says (checksum)"
    try:
        decode(image)
    except DataError as error:
        return f"cannot be decoded: {error}"
    return ""


def _each(work: Callable, items: list, jobs: int) -> list:
    """work(item) for each, in order, by up to `jobs` processes."""
    if min(jobs, len(items)) <= 1:
        return [work(item) for item in items]
    # spawned, not forked: a fork copies the locks of whatever threads the caller has
    with ProcessPoolExecutor(min(jobs, len(items)), mp_context=get_context("spawn")) as pool:
        try:
            return list(pool.map(work, items))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _name_in(folder: Path, shard: Path) -> str:
    return str(shard.relative_to(folder) if shard.is_relative_to(folder) else shard)
