"""The sets as a run opens them, how fast samples come out of them, and how many of some hundred are damaged."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dist_kd.config import Config
from dist_kd.contracts import World
from dist_kd.data.cache_files import free_on, gb
from dist_kd.data.decode import TarSamples
from dist_kd.data.feed import Feed
from dist_kd.data.index import Index
from dist_kd.data.order import Order, choose_layout
from dist_kd.data.rows import Request, Shown
from dist_kd.data.shard_cache import cache_folder
from dist_kd.data.views import TrainView
from dist_kd.doctor import BAD, LOOK, OK, Finding
from dist_kd.doctor.save_path import nearest
from dist_kd.doctor.student import on_meta
from dist_kd.errors import DataError
from dist_kd.runtime import start_runtime
from dist_kd.sets import Sets, check_cache, keep_in_memory, open_sets, rest_warning

SAMPLES, AT_ONCE = 384, 16
LOOK_S = 4.0  # for each way of loading


class Seen(NamedTuple):
    """What a look at some samples gave. `first` is about the first damaged one."""

    samples: int
    per_second: float
    bad: int
    first: str


def check(config: Config, facts: dict[str, Any]) -> Iterator[Finding]:
    if config.data is None:
        yield Finding(LOOK, "data", "no --data given: not looked at, and 1000 classes are assumed below")
        return
    started = time.monotonic()
    # opening needs no GPU, and the workers of this look need none either
    sets = open_sets(config, start_runtime(config.model_copy(update={"cpu": True, "mixed_precision": "no"})))
    train = sets.train
    counts = ", ".join(f"{index.spec.num_samples:,} {split}" for split, index in sets._asdict().items() if index)
    yield Finding(
        OK,
        "data",
        f"{train.spec.name}: {counts} samples in {train.spec.num_classes} classes, opened in "
        f"{time.monotonic() - started:.1f} s",
        {"classes": train.spec.num_classes, "samples": train.spec.num_samples},
    )
    layout = choose_layout(train.spec.shard_sizes, config.batch_size, local=not train.url)
    order = Order(train.spec.shard_sizes, config.batch_size, config.seed, *layout)
    for warning in rest_warning(order):
        yield Finding(LOOK, "data rest", warning.removeprefix("WARNING: "))
    if train.url:
        check_cache(config, World(), train, order)
        yield _cache(config, sets)
    else:
        yield from _local(config, train, facts.get("cores", 1))


def _cache(config: Config, sets: Sets) -> Finding:
    """Its speed is the network's: no shard is fetched only to be timed."""
    folder, limit = cache_folder(), 1e9 * config.cache_gb
    total = sum(shard.bytes for index in sets if index is not None and index.url for shard in index.shards)
    free, need = free_on(nearest(folder)), min(total, limit)
    text = (
        f"shards of other machines ({gb(total)}) come through `{folder}`: {gb(free)} free, --cache-gb "
        f"{config.cache_gb:g}; none was fetched to be timed"
    )
    if free >= need:
        return Finding(OK, "data cache", text)
    return Finding(LOOK, "data cache", f"{text}; make room, lower --cache-gb, or name another disk by DIST_KD_CACHE")


def _local(config: Config, index: Index, cores: int) -> Iterator[Finding]:
    spec = on_meta(config, index.spec.num_classes).spec
    view = TrainView(config.augment or index.spec.augment, spec.image_size, config.seed)
    alone = look(index, view, 0)
    yield _damage(config, alone)
    in_memory = keep_in_memory(config, index)
    if in_memory or not config.workers:
        text = f"{alone.per_second:,.0f} images/s read, decoded and augmented by the training process itself"
        more = f"; the set is kept in memory, decoded once in about {index.spec.num_samples / alone.per_second:.1f} s"
        yield Finding(OK, "data speed", text + (more if in_memory else ""), {} if in_memory else _rate(alone))
        return
    shared = look(index, view, config.workers)
    text = (
        f"{shared.per_second:,.0f} images/s with --workers {config.workers} for each training process, "
        f"{alone.per_second:,.0f} with none"
    )
    crowded = config.workers > cores
    more = f"; there are only {cores} core(s) for them: --workers {cores}" if crowded else ""
    yield Finding(LOOK if crowded else OK, "data speed", text + more, _rate(shared))


def _rate(seen: Seen) -> dict[str, Any]:
    return {"loader": seen.per_second}


def _damage(config: Config, seen: Seen) -> Finding:
    if not seen.bad:
        return Finding(OK, "samples", f"{seen.samples} samples from all over the training set can be read and decoded")
    text = f"{seen.bad} of {seen.samples} samples are damaged ({seen.first})"
    if seen.bad > config.max_bad_fraction * seen.samples:
        text += f"; --max-bad-fraction is {config.max_bad_fraction:g}, so a run would stop: `dist-kd verify` lists them"
        return Finding(BAD, "samples", text)
    return Finding(
        LOOK, "samples", f"{text}; fewer than --max-bad-fraction {config.max_bad_fraction:g}: they are skipped"
    )


def look(index: Index, view: TrainView, workers: int) -> Seen:
    """Some hundred evenly spaced samples as training shows them, for at most LOOK_S. DataError if one is not there."""
    count = min(SAMPLES, index.num_samples)
    chosen = np.arange(count, dtype=np.int64) * index.num_samples // count
    requests = [Request(0, at, chosen[at : at + AT_ONCE]) for at in range(0, count, AT_ONCE)]
    feed = Feed(Shown(index, TarSamples(index), view, train=True, strict=False), workers, LOOK_S, pin=False)
    seen, bad = 0, []
    try:
        rows_of = iter(feed.start(requests))
        first = next(rows_of)  # with workers: once they are there
        started, timed = time.perf_counter(), 0
        for number, rows in enumerate(itertools.chain([first], rows_of)):
            if rows.failure:
                raise DataError(rows.failure)
            seen += len(rows.samples)
            timed += len(rows.samples) if number else 0
            bad += rows.bad
            if time.perf_counter() - started > LOOK_S:
                break
        took = time.perf_counter() - started
    finally:
        feed.close()
    return Seen(seen, (timed or seen) / max(took, 1e-6), len(bad), bad[0][2] if bad else "")
