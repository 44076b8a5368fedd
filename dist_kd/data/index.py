"""Owns what is in the shards: the index beside them, how it is written, read and found. No torch.

index.json: classes and shards, a superset of webdataset's `wids` index. index.npy: one 20-byte row a sample, mapped
into memory, so that all workers of a machine share it.
"""

from __future__ import annotations

import bisect
import hashlib
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from mmap import mmap
from pathlib import Path

import numpy as np
import xxhash

from dist_kd.contracts import DataSpec
from dist_kd.data.tar_scan import ROW, ShardInfo, checksum
from dist_kd.errors import DataError

__all__ = [
    "ROW",
    "Index",
    "ShardInfo",
    "checksum",
    "open_data",
    "read_index",
    "write_index",
]

SCHEMA = 1
HASHED_ROWS = 1 << 20  # rows copied at a time while they are digested


@dataclass(frozen=True, eq=False)
class Index:
    """A set of samples: sample numbers 0..N-1 run through the shards in order. Pickles as a path if mapped."""

    folder: Path  # shard names are relative to it
    name: str
    classes: tuple[str, ...]
    shards: tuple[ShardInfo, ...]
    rows: np.ndarray  # [N] of ROW
    augment: str = "none"  # the augmentation this set is usually trained with
    image_size: int | None = None  # side in pixels if all images are squares of one size

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
        return self.folder / self.shards[shard].name

    def locate(self, sample: int) -> tuple[int, np.void]:
        """(shard number, row) of a sample."""
        if not 0 <= sample < len(self.rows):
            raise IndexError(f"sample {sample} of {len(self.rows)}")
        return bisect.bisect_right(self.ends, sample), self.rows[sample]

    def shard_rows(self, shard: int) -> np.ndarray:
        return self.rows[self.ends[shard] - self.shards[shard].samples : self.ends[shard]]

    def select(self, shards: Iterable[int]) -> Index:
        """The index of some shards, in the order given; classes stay."""
        shards = list(shards)
        rows = np.concatenate([self.shard_rows(i) for i in shards])
        chosen = tuple(self.shards[i] for i in shards)
        return Index(self.folder, self.name, self.classes, chosen, rows, self.augment, self.image_size)

    def __getstate__(self) -> dict:
        state = dict(self.__dict__)
        if isinstance(self.rows, np.memmap) and isinstance(self.rows.base, mmap):
            state["rows"] = Path(self.rows.filename)  # a mapped array would be sent to each worker whole
        return state

    def __setstate__(self, state: dict) -> None:
        if isinstance(state["rows"], Path):
            state["rows"] = np.load(state["rows"], mmap_mode="r", allow_pickle=False)
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
    if place.absolute() != index.folder.absolute():
        facts["folder"] = str(index.folder.absolute())
    _replace(place / "index.npy", lambda file: np.save(file, np.asarray(index.rows), allow_pickle=False))
    text = json.dumps(facts | extra, indent=1) + "\n"
    _replace(place / "index.json", lambda file: file.write(text.encode()))


def read_index(folder: Path) -> Index:
    """The index in a folder. DataError if it is missing, not ours, or its two files do not belong together."""
    path, remedy = Path(folder) / "index.json", f"write it again: `dist-kd index {folder}`"
    try:
        facts = json.loads(path.read_text())
    except FileNotFoundError:
        raise DataError(f"`{folder}` has no index.json; {remedy}") from None
    except (OSError, ValueError) as error:
        raise DataError(f"`{path}` cannot be read ({error}); {remedy}") from None
    if not isinstance(facts, dict) or facts.get("schema") != SCHEMA:
        found = facts.get("schema") if isinstance(facts, dict) else None
        raise DataError(f"`{path}` has schema `{found}`, but this version reads {SCHEMA}; {remedy}")
    try:
        rows = np.load(path.with_name("index.npy"), mmap_mode="r", allow_pickle=False)
        shards = tuple(ShardInfo(s["name"], s["bytes"], s["sha256"], s["samples"]) for s in facts["shards"])
        index = Index(
            folder=Path(facts.get("folder", path.parent)),
            name=facts["name"],
            classes=tuple(facts["classes"]),
            shards=shards,
            rows=rows,
            augment=facts["augment"],
            image_size=facts["image_size"],
        )
        well = rows.dtype == ROW and rows.ndim == 1 and len(rows) == sum(shard.samples for shard in shards)
        fits = well and index.fingerprint == facts["fingerprint"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"the index in `{folder}` is damaged ({type(error).__name__}: {error}); {remedy}") from None
    if not fits:
        raise DataError(f"index.json and index.npy in `{folder}` do not belong together; {remedy}")
    return index


def open_data(where: str) -> Index:
    """The index of a folder, a brace pattern, a comma-separated list of shards, or one tar; see finding.py."""
    from dist_kd.data.finding import find_index  # the other direction too: it reads and writes indexes

    return find_index(where)


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
