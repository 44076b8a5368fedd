"""Owns what is in the shards: the index beside them, how it is written, read and found. No torch.

index.json: classes and shards, a superset of webdataset's `wids` index. index.npy: one 20-byte row a sample, mapped
into memory, so that all workers of a machine share it. The shards themselves may lie on another machine: then they
are opened through this machine's cache.
"""

from __future__ import annotations

import bisect
import errno
import hashlib
import json
import os
import re
import stat
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from mmap import mmap
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING

import numpy as np
import xxhash

from dist_kd.contracts import DataSpec
from dist_kd.data.remote_urls import is_remote, shown
from dist_kd.data.tar_scan import ROW, ShardInfo, checksum
from dist_kd.errors import DataError

if TYPE_CHECKING:
    from dist_kd.data.shard_cache import ShardCache

__all__ = [
    "ROW",
    "Index",
    "ShardInfo",
    "checksum",
    "read_facts",
    "read_index",
    "write_index",
]

SCHEMA = 1
HASHED_ROWS = 1 << 20  # rows copied at a time while they are digested
MAX_JSON = 64 << 20  # bytes of an index.json: 150,000 shards; parsed, it may take forty times as much
# The beginning of index.npy as numpy writes it. Matched, never evaluated: nothing in it can name another type or size.
NPY_HEADER = re.compile(
    rb"\x93NUMPY\x01\x00(?P<length>..)\{'descr': "
    + re.escape(repr(ROW.descr).encode())
    + rb", 'fortran_order': False, 'shape': \((?P<count>[0-9]{1,15}),\), \} *\n",
    re.DOTALL,
)


@dataclass(frozen=True, eq=False)
class Index:
    """A set of samples: sample numbers 0..N-1 run through the shards in order. Pickles as a path if mapped."""

    folder: Path  # shard names are relative to it, or to `url`
    name: str
    classes: tuple[str, ...]
    shards: tuple[ShardInfo, ...]
    rows: np.ndarray  # [N] of ROW
    augment: str = "none"  # the augmentation this set is usually trained with
    image_size: int | None = None  # side in pixels if all images are squares of one size
    url: str = ""  # the folder's address if the shards are on another machine; a name may be an address of its own
    cache: ShardCache | None = None  # the way to such shards

    @property
    def num_samples(self) -> int:
        return len(self.rows)

    @cached_property
    def fingerprint(self) -> str:
        """Digest of classes, shard sizes, labels and images: the same samples in the same order give the same."""
        digest = xxhash.xxh3_128()
        for first in range(0, len(self.rows), HASHED_ROWS):
            rows = self.rows[first : first + HASHED_ROWS]
            for column in ("label", "length", "checksum"):  # not the offset: it depends on the tar, not the samples
                digest.update(np.ascontiguousarray(rows[column]))
        facts = [list(self.classes), [shard.samples for shard in self.shards], digest.hexdigest()]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    @cached_property
    def spec(self) -> DataSpec:
        sizes = tuple(shard.samples for shard in self.shards)
        return DataSpec(self.name, self.classes, sizes, self.fingerprint, self.augment, self.image_size)

    @cached_property
    def ends(self) -> list[int]:
        """For each shard, the sample number behind its last."""
        return list(accumulate(shard.samples for shard in self.shards))

    def shard_path(self, shard: int) -> Path:
        """Of a shard on this machine."""
        return self.folder / self.shards[shard].name

    def address(self, shard: int) -> str:
        """The URL of a shard on another machine."""
        name = self.shards[shard].name
        return name if is_remote(name) else f"{self.url}/{name}"

    def location(self, shard: int) -> str:
        """How messages name a shard: its path, or its address without secrets."""
        return shown(self.address(shard)) if self.url else str(self.shard_path(shard))

    def open_shard(self, shard: int) -> int:
        """A descriptor of the whole shard, to be closed. OSError if it is local and cannot be opened.

        A remote one is first fetched into the cache, unless it is there: DataError within the cache's time limit.
        """
        if not self.url:
            return _open_file(self.shard_path(shard))
        info = self.shards[shard]
        return self.cache.open(self.address(shard), info.bytes or None, info.sha256 or None)

    def locate(self, sample: int) -> tuple[int, np.void]:
        """(shard number, row) of a sample."""
        return self.shard_of(sample), self.rows[sample]

    def shard_of(self, sample: int) -> int:
        """The number of a sample's shard."""
        if not 0 <= sample < len(self.rows):
            raise IndexError(f"sample {sample} of {len(self.rows)}")
        return bisect.bisect_right(self.ends, sample)

    def shard_rows(self, shard: int) -> np.ndarray:
        return self.rows[self.ends[shard] - self.shards[shard].samples : self.ends[shard]]

    def select(self, shards: Iterable[int]) -> Index:
        """The index of some shards, in the order given; classes stay."""
        shards = list(shards)
        rows = np.concatenate([self.shard_rows(i) for i in shards])
        chosen = tuple(self.shards[i] for i in shards)
        return replace(self, shards=chosen, rows=rows)

    def __getstate__(self) -> dict:
        state = dict(self.__dict__)
        if isinstance(self.rows, np.memmap) and isinstance(self.rows.base, mmap):
            state["rows"] = Path(self.rows.filename)  # a mapped array would be sent to each worker whole
        return state

    def __setstate__(self, state: dict) -> None:
        if isinstance(state["rows"], Path):
            state["rows"] = _mapped_rows(state["rows"])
        self.__dict__.update(state)


def write_index(index: Index, place: Path | None = None, **extra) -> None:
    """Write index.npy, then index.json, each whole or not at all, into the shards' folder or another `place`."""
    place = Path(place or index.folder)
    place.mkdir(parents=True, exist_ok=True)
    facts = {
        "schema": SCHEMA,
        "__kind__": "wids-shard-index-v1",
        "wids_version": 1,
        "name": index.name,
        "fingerprint": index.fingerprint,
        "num_samples": index.num_samples,
        "augment": index.augment,
        "image_size": index.image_size,
        "classes": list(index.classes),
        "shards": [vars(shard) for shard in index.shards],
        "shardlist": [{"url": s.name, "nsamples": s.samples, "filesize": s.bytes} for s in index.shards],
    }
    if index.url:
        facts["url"] = index.url
    elif place.absolute() != index.folder.absolute():
        facts["folder"] = str(index.folder.absolute())
    _replace(place / "index.npy", lambda file: np.save(file, np.asarray(index.rows), allow_pickle=False))
    text = json.dumps(facts | extra, indent=1) + "\n"
    _replace(place / "index.json", lambda file: file.write(text.encode()))


def read_facts(path: Path) -> dict:
    """What an index.json says. OSError if it is no readable file, ValueError if no JSON object of a sane size."""
    if not path.is_file():  # opening a pipe would wait for ever
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    if (size := path.stat().st_size) > MAX_JSON:
        raise ValueError(f"it has {size} bytes, but at most {MAX_JSON} are read")
    try:
        facts = json.loads(path.read_bytes())
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(facts, dict):
        raise ValueError("it is no JSON object")
    return facts


def read_index(folder: Path, cache: ShardCache | None = None) -> Index:
    """The index in a folder. DataError if it is missing, not ours, or its two files do not belong together.

    Shards named in it lie in its folder, unless it says `folder` or `url`, as one that `dist-kd index --output` wrote
    does. `cache` is the way to shards on another machine.
    """
    path, remedy = Path(folder) / "index.json", f"write it again: `dist-kd index {folder}`"
    try:
        facts = read_facts(path)
    except FileNotFoundError:
        raise DataError(f"`{folder}` has no index.json; {remedy}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"`{path}` cannot be read ({error}); {remedy}") from None
    if facts.get("schema") != SCHEMA:
        raise DataError(f"`{path}` has schema `{facts.get('schema')}`, but this version reads {SCHEMA}; {remedy}")
    try:
        index = Index(
            folder=Path(_text(facts["folder"])) if "folder" in facts else path.parent,
            name=_text(facts["name"]),
            classes=tuple(_text(name) for name in facts["classes"]),
            shards=tuple(_shard(shard, anywhere="folder" in facts or "url" in facts) for shard in facts["shards"]),
            rows=_mapped_rows(path.with_name("index.npy")),
            augment=_text(facts["augment"]),
            image_size=None if facts["image_size"] is None else _count(facts["image_size"], least=1),
            url=_text(facts["url"]) if "url" in facts else "",
            cache=cache if "url" in facts else None,
        )
        _check_rows(index)
        fits = index.fingerprint == facts["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the index in `{folder}` is damaged ({type(error).__name__}: {error}); {remedy}") from None
    if not fits:
        raise DataError(f"index.json and index.npy in `{folder}` do not belong together; {remedy}")
    return index


def _mapped_rows(path: Path) -> np.ndarray:
    """The rows of an index.npy [N], mapped. ValueError if it is anything but what `write_index` writes."""
    if not path.is_file():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(path))
    with open(path, "rb") as file:
        match = NPY_HEADER.match(file.read(4096))
    if match is None:
        raise ValueError("index.npy does not begin as ours do")
    start, count = 10 + int.from_bytes(match["length"], "little"), int(match["count"])
    if start != match.end() or not count or path.stat().st_size != start + count * ROW.itemsize:
        raise ValueError(f"index.npy does not hold the {count} rows that it says")
    return np.memmap(path, ROW, "r", start, (count,))


def _check_rows(index: Index) -> None:
    """ValueError if rows do not fit the shards: another number, bytes outside of their shard, or labels of no class."""
    if len(index.rows) != (index.ends[-1] if index.ends else 0):
        raise ValueError(f"index.npy has {len(index.rows)} rows where the shards have {sum(index.ends[-1:])} samples")
    for number, shard in enumerate(index.shards):
        rows = index.shard_rows(number)
        # compared without a sum, which could overflow
        if (rows["offset"] > shard.bytes).any() or (rows["length"] > shard.bytes - rows["offset"]).any():
            raise ValueError(f"rows lie behind the {shard.bytes} bytes of shard `{shard.name}`")
    if (rows := index.rows["label"].max()) >= len(index.classes):
        raise ValueError(f"it has label {rows}, but {len(index.classes)} classes")


def _shard(facts: dict, *, anywhere: bool) -> ShardInfo:
    """One shard as index.json tells of it. ValueError or TypeError if that is no shard, or outside of the folder."""
    name = _text(facts["name"])
    path = PurePosixPath(name)
    if not anywhere and (path.is_absolute() or ".." in path.parts or re.match(r"[a-zA-Z0-9+.-]+:", name)):
        raise ValueError(f"shard `{name}` is outside of the index's folder")
    return ShardInfo(name, _count(facts["bytes"]), _text(facts["sha256"]), _count(facts["samples"]))


def _text(value: object) -> str:
    if not isinstance(value, str) or not value or "\0" in value:
        raise TypeError(f"`{value!r:.100}` where a text belongs")
    return value


def _count(value: object, least: int = 0) -> int:
    if type(value) is not int or not least <= value < 2**60:
        raise TypeError(f"`{value!r:.100}` where a number of at least {least} belongs")
    return value


def _open_file(path: Path) -> int:
    """A descriptor to read from. OSError if it is no file: opening a pipe would wait for ever, a device never end."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise PermissionError(errno.EPERM, "it is no regular file", str(path))
    return descriptor


def _replace(path: Path, write: Callable) -> None:
    """Write a file so that it is there whole or as before, also after a crash."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(part, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
