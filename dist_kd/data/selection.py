"""Which images are packed, in which order, under which keys and in how many shards: pure functions.

Choices are made by hashes of the images' relative paths, so they depend on nothing else: not on the machine, the
order in which a folder is listed, or how many images there are of other classes.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator

import xxhash

from dist_kd.data.sources import Item
from dist_kd.errors import ConfigError, DataError


def hold_out(items: list[Item], fraction: float, flag: str = "--val-fraction") -> tuple[list[Item], list[Item]]:
    """(kept, held out): of each class the nearest whole number to its `fraction`, the first by a hash of their keys.

    So the split depends on the images' relative paths alone: not on a seed, the machine or the order of listing.
    """
    if not 0 < fraction < 1:
        raise ConfigError(f"`{flag}` is `{fraction}`, but must be between 0 and 1, such as 0.2")
    chosen: set[str] = set()
    for of_class in _by_class(items).values():
        count = min(int(fraction * len(of_class) + 0.5), len(of_class) - 1)  # training keeps at least one
        chosen.update(item.key for item in of_class[:count])
    return [i for i in items if i.key not in chosen], [i for i in items if i.key in chosen]


def limited(items: list[Item], per_class: int) -> list[Item]:
    """At most `per_class` items of each class, the first by the hash of their keys."""
    if per_class < 1:
        raise ConfigError(f"`--limit-per-class` is `{per_class}`, but must be at least 1")
    chosen = {item.key for of_class in _by_class(items).values() for item in of_class[:per_class]}
    return [item for item in items if item.key in chosen]


def _by_class(items: Iterable[Item]) -> dict[int, list[Item]]:
    """Label -> its items in the order of a hash of their keys."""
    classes = defaultdict(list)
    for item in items:
        classes[item.label].append(item)
    return {label: sorted(found, key=lambda item: _rank("choose", item.key)) for label, found in classes.items()}


def shuffled(items: Iterable[Item], seed: int) -> list[Item]:
    """The items in the order of a hash of seed and key: random, and the same for any order of listing."""
    return sorted(items, key=lambda item: _rank(str(seed), item.key))


def _rank(purpose: str, key: str) -> tuple[int, str]:
    return xxhash.xxh3_64_intdigest(f"{purpose}/{key}".encode("utf-8", "surrogateescape")), key


def cuts(sizes: list[int], shard_bytes: int, shard_samples: int) -> Iterator[tuple[int, int]]:
    """(first, end) of as few shards as the limits allow, their sample counts equal to within one."""
    if shard_bytes < 1 or shard_samples < 1:
        raise ConfigError("shards must hold at least one sample; give `--shard-size` and `--shard-mb` of 1 or more")
    count = min(len(sizes), max(-(-len(sizes) // shard_samples), -(-sum(sizes) // shard_bytes)))
    for number in range(count):
        yield len(sizes) * number // count, len(sizes) * (number + 1) // count


def unique_keys(paths: list[str]) -> list[str]:
    """For each relative path a key any tar reader takes: ASCII, no dot in its last part, at most 90 characters.

    A path that has to be changed, or would share its key with another, gets eight digits of its hash.
    """
    plain = [_plain_key(path) for path in paths]
    times = Counter(key for key, _ in plain)
    keys = []
    for path, (key, changed) in zip(paths, plain, strict=True):
        if changed or times[key] > 1:
            digest = f"{xxhash.xxh3_64_intdigest(path.encode('utf-8', 'surrogateescape')):016x}"
            key = f"{key[:80]}-{digest[:8]}"
        keys.append(key)
    if len(set(keys)) < len(keys):
        raise DataError("two images have the same path, or names too much alike; rename one")
    return keys


def _plain_key(path: str) -> tuple[str, bool]:
    stem = path.rpartition(".")[0]
    folder, slash, base = stem.rpartition("/")
    key = re.sub(r"[^A-Za-z0-9_./-]", "_", folder) + slash + re.sub(r"[^A-Za-z0-9_-]", "_", base)
    key = re.sub(r"^[_.]", "x", key)  # readers pass over names such as __MACOSX/a and ._a
    return key[:90], key[:90] != stem
