"""Images -> shards + index: owns how a set becomes DEST/train and DEST/val, by many processes and restartably.

The same images and options give the same bytes, however many processes write and however often it was interrupted.
`selection.py` chooses and names the samples, `tar_writer.py` writes a shard.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from multiprocessing import get_context
from pathlib import Path

import xxhash

from dist_kd.data.index import Index, read_index, write_index
from dist_kd.data.selection import cuts, hold_out, limited, shuffled, unique_keys
from dist_kd.data.sources import Item, Source
from dist_kd.data.survey import build_index
from dist_kd.data.tar_writer import PART, Shard, write_shard
from dist_kd.errors import ConfigError, DataError

SHARD_SAMPLES, SHARD_BYTES = 10_000, 256_000_000  # largest shard by default, whichever is reached first
SMALL_SIDE = 64  # pixels; squares up to this are cropped by shifting, larger images by RandomResizedCrop
STATE = "pack.json"  # beside the index: the options, and each finished shard's digest
PART_STATE = "pack.part-{}-of-{}.json"  # the same of one part, until the whole is put together
Progress = Callable[[str, int, int], None]  # shard just finished, samples done, samples in all


def pack_source(
    source: Source,
    dest: Path,
    *,
    val_fraction: float | None = None,
    test_fraction: float | None = None,
    limit_per_class: int | None = None,
    augment: str | None = None,
    **options,
) -> dict[str, Index | None]:
    """Pack every split of a source into DEST/train, DEST/val (and DEST/test); the indexes by split (None of a part).

    A source's own test split becomes val if it has no other. `val_fraction` holds out that part of each class of train
    (and the source's own held-out split is then test). `test_fraction` holds out test so before, where a source has
    none; val is then of what remains. `limit_per_class` counts in each split. `options` are those of pack_images.
    """
    splits = divided(source, val_fraction, test_fraction)
    if limit_per_class is not None:
        splits = {split: limited(items, limit_per_class) for split, items in splits.items()}
    return {
        split: pack_images(
            items,
            source.classes,
            Path(dest) / split,
            name=source.name,
            augment=augment or source.augment,
            image_size=source.image_size if options.get("resize") is None else None,
            **options,
        )
        for split, items in splits.items()
    }


def divided(source: Source, val_fraction: float | None, test_fraction: float | None = None) -> dict[str, list[Item]]:
    """The splits to be packed, training first, as pack_source says."""
    splits = dict(source.splits)
    if test_fraction is not None:
        if "test" in splits or ("val" in splits and val_fraction is not None):
            own = "test" if "test" in splits else "val"
            raise ConfigError(
                f"`--test-fraction {test_fraction}` is for a source without a test set, but `{source.name}` has {own} "
                "of its own; leave it out"
            )
        splits["train"], splits["test"] = _held_out(source, splits["train"], "--test-fraction", test_fraction)
        if val_fraction is not None:
            splits["train"], splits["val"] = _held_out(source, splits["train"], "--val-fraction", val_fraction)
        return splits
    if val_fraction is None:
        if "val" not in splits and "test" in splits:
            splits["val"] = splits.pop("test")
        return splits
    if "val" in splits and "test" in splits:
        raise ConfigError(
            f"`--val-fraction {val_fraction}` would make a third held-out set of `{source.name}`, which has val and "
            "test already; leave it out"
        )
    own = splits.get("val") or splits.get("test")
    train, val = _held_out(source, splits["train"], "--val-fraction", val_fraction)
    return {"train": train, "val": val, **({"test": own} if own else {})}


def _held_out(source: Source, items: list[Item], flag: str, fraction: float) -> tuple[list[Item], list[Item]]:
    """hold_out's (kept, held out); ConfigError if that is nothing."""
    kept, held = hold_out(items, fraction, flag)
    if not held:
        raise ConfigError(
            f"`{flag} {fraction}` holds out nothing of `{source.name}`: it rounds to 0 images in each class; choose a "
            "larger one"
        )
    return kept, held


def pack_images(
    samples: Iterable[Item],
    classes: tuple[str, ...],
    dest: Path,
    *,
    name: str,
    augment: str = "",
    image_size: int | None = None,
    shard_bytes: int = SHARD_BYTES,
    shard_samples: int = SHARD_SAMPLES,
    seed: int = 0,
    resize: int | None = None,
    quality: int | None = None,
    jobs: int = 1,
    skip_bad: bool = False,
    part: tuple[int, int] | None = None,
    progress: Progress | None = None,
) -> Index | None:
    """Write the images, shuffled by `seed`, to DEST/NAME-SPLIT-000000.tar and so on, with their index; returns that.

    Shards are of even size, up to about `shard_bytes` (before resizing) and `shard_samples`. `resize` brings the
    shorter side down to that many pixels, `quality` encodes anew as JPEG. Without `augment` and `image_size` they
    follow from the images. Finished shards of an interrupted run are kept if their bytes are still right. `part` (i, n)
    writes every n-th shard from the i-th on and no index: with all parts written, packing the whole only makes that.
    Raises ConfigError if DEST holds something else, DataError for an unreadable image (or leaves it out: `skip_bad`).
    """
    dest = Path(dest)
    items = shuffled(samples, seed)
    if not items:
        raise DataError(f"there are no images to pack into `{dest}`")
    sizes = [len(item.image) if isinstance(item.image, bytes) else _file_size(item.image) for item in items]
    keys = unique_keys([item.key for item in items])
    prefix = re.sub(r"[^A-Za-z0-9_-]+", "_", f"{name}-{dest.name}")
    shards = {}
    for number, (first, end) in enumerate(cuts(sizes, shard_bytes, shard_samples)):
        members = tuple((keys[i], items[i].image, items[i].label) for i in range(first, end))
        path = dest / f"{prefix}-{number:06d}.tar"
        shards[path.name] = Shard(path, members, resize, quality, skip_bad)
    options = {
        "name": name,
        "seed": seed,
        "resize": resize,
        "quality": quality,
        "shard_bytes": shard_bytes,
        "shard_samples": shard_samples,
        "classes": _digest(classes),
        "images": _digest(f"{item.key}|{size}|{item.label}" for item, size in zip(items, sizes, strict=True)),
    }

    first, step = (part[0] - 1, part[1]) if part else (0, 1)
    mine = dict(list(shards.items())[first::step])
    state = PART_STATE.format(*part) if part else STATE
    dest.mkdir(parents=True, exist_ok=True)
    with _alone(dest, part):
        done = _finished(dest, options, shards, mine, part)
        if part is None or len(done) < len(mine):
            _write_state(dest / state, options, done)
        count, total = (sum(len(mine[file].samples) for file in some) for some in (done, mine))
        for file, facts in _written([shard for file, shard in mine.items() if file not in done], jobs):
            done[file] = facts
            _write_state(dest / state, options, done)
            count += len(shards[file].samples)
            if progress:
                progress(f"{dest.name}/{file}", count, total)
        if part is not None:
            return None
        for merged in dest.glob(PART_STATE.format("*", "*")):
            merged.unlink()

        filled = {file: done[file] for file in shards if done[file]["samples"]}
        sides = {facts["side"] for facts in filled.values()}
        side = image_size or (sides.pop() if len(sides) == 1 else 0) or None
        if not augment:
            augment = "crop+flip" if side and side <= SMALL_SIDE else "rrc+flip"
        digests = [facts["sha256"] for facts in filled.values()]
        if _has_index(dest, digests, (name, tuple(classes), augment, side)):
            return read_index(dest)
        paths = [dest / file for file in filled]
        index = build_index(
            dest,
            paths,
            name=name,
            classes=tuple(classes),
            augment=augment,
            image_size=side,
            jobs=jobs,
            max_bad_fraction=0,  # what was packed just now has no marks
        )
        write_index(index)
        return read_index(dest)


def left_out(dest: Path) -> list[str]:
    """The unreadable images that a packing with `skip_bad` left out of DEST."""
    shards = json.loads((Path(dest) / STATE).read_text())["shards"]
    return [path for file in sorted(shards) for path in shards[file]["left_out"]]


# by many processes


def _written(shards: list[Shard], jobs: int) -> Iterator[tuple[str, dict]]:
    """Each shard's file name with its facts, as it is finished."""
    jobs = min(jobs, len(shards))
    if jobs <= 1:
        for shard in shards:
            yield shard.path.name, write_shard(shard)
        return
    todo, running = iter(shards), {}
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn")) as pool:  # spawned: a fork copies held locks
        try:
            while True:
                while len(running) < 2 * jobs and (shard := next(todo, None)):  # few: their images travel to the pool
                    running[pool.submit(write_shard, shard)] = shard.path.name
                if not running:
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    yield running.pop(future), future.result()
        except BrokenProcessPool:
            raise DataError(
                f"one of {jobs} packing processes was killed (out of memory?); run the same line again with fewer "
                "`--jobs`: finished shards are kept"
            ) from None
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextmanager
def _alone(dest: Path, part: tuple[int, int] | None) -> Iterator[None]:
    """Holds DEST against a second packing at the same time, or of the same part; the lock goes with the process."""
    handles = [os.open(dest, os.O_RDONLY)]
    kinds = [fcntl.LOCK_SH if part else fcntl.LOCK_EX]  # parts share the folder, the whole does not
    if part:  # the whole removes this file with all else that is partial
        handles.append(os.open(dest / f".{PART_STATE.format(*part)}.lock{PART}", os.O_RDWR | os.O_CREAT, 0o644))
        kinds.append(fcntl.LOCK_EX)
    try:
        try:
            for handle, kind in zip(handles, kinds, strict=True):
                fcntl.flock(handle, kind | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ConfigError(f"another process is packing into `{dest}`; wait for it or give another folder") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        for handle in handles:
            os.close(handle)


# restarting


def _finished(
    dest: Path, options: dict, shards: dict[str, Shard], mine: dict[str, Shard], part: tuple[int, int] | None
) -> dict[str, dict]:
    """Facts of those of `mine` that stand and whose bytes are right. ConfigError if DEST holds something else."""
    for path in dest.glob(f".*{PART}"):
        if part is None or path.name[1:].removesuffix(PART) in mine:
            path.unlink()
    tars = sorted(path.name for path in dest.glob("*.tar"))  # before the states: another part writes its state first
    done = {}
    states = [path for path in (dest / STATE, *sorted(dest.glob(PART_STATE.format("*", "*")))) if path.exists()]
    for path in states:
        try:
            state = json.loads(path.read_text())
            before, finished = state["options"], state["shards"]
        except (ValueError, KeyError) as error:
            raise ConfigError(f"`{path}` is damaged ({error}); remove `{dest}` and pack again") from None
        changed = [name for name, value in options.items() if before.get(name) != value]
        if changed:
            raise ConfigError(
                f"`{dest}` holds a packing with other {', '.join(changed)}; remove it, or give another folder"
            )
        done |= finished
    strange = [name for name in tars if not states or name not in shards]
    if strange:
        raise ConfigError(f"`{dest}` holds `{strange[0]}`, which is of no packing like this; give an empty folder")
    return {file: facts for file, facts in done.items() if file in mine and _is_right(dest / file, facts)}


def _is_right(path: Path, facts: dict) -> bool:
    if not path.is_file() or path.stat().st_size != facts["bytes"]:
        return False
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest() == facts["sha256"]


def _has_index(dest: Path, digests: list[str], facts: tuple) -> bool:
    """Whether DEST's index is of these shards."""
    try:
        index = read_index(dest)
    except DataError:
        return False
    same = facts == (index.name, index.classes, index.augment, index.image_size)
    return same and digests == [shard.sha256 for shard in index.shards]


def _write_state(path: Path, options: dict, done: dict[str, dict]) -> None:
    partial = path.with_name(f".{path.name}{PART}")
    partial.write_text(json.dumps({"options": options, "shards": done}, indent=1, sort_keys=True) + "\n")
    os.replace(partial, path)


def _digest(lines: Iterable[str]) -> str:
    digest = xxhash.xxh3_128()
    for line in lines:
        digest.update(line.encode("utf-8", "surrogateescape") + b"\n")
    return digest.hexdigest()


def _file_size(path: str) -> int:
    try:
        found = os.stat(path)
    except OSError as error:
        raise DataError(f"image `{path}` cannot be read ({error.strerror}); repair or remove it") from None
    if not stat.S_ISREG(found.st_mode):  # opening a pipe would wait for ever, a device never end
        raise DataError(f"image `{path}` is no regular file; remove it")
    return found.st_size
