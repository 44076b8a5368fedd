"""Data sets as a run uses them: which shards --data means, whether they fit memory, the exact evaluator of a set."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

from dist_kd.config import Config
from dist_kd.contracts import NetworkSpec, World
from dist_kd.data import fetch_ahead, memory, remote_sets, sources
from dist_kd.data.finding import check_present, open_data, shard_cache, split_folder
from dist_kd.data.index import Index
from dist_kd.data.loader import EvalLoader
from dist_kd.data.order import Order
from dist_kd.data.shard_cache import ShardCache, cache_folder
from dist_kd.data.views import EvalView
from dist_kd.errors import ConfigError
from dist_kd.evaluation import Evaluator
from dist_kd.runtime import Runtime

LARGE_REST = 0.05  # of the training set left out in each epoch
MEMORY_BUDGET = 1 << 30  # bytes of decoded pixels kept in memory without being asked
NO_TEST = "none"  # the value of --test-data that leaves DATA/test alone


class Sets(NamedTuple):
    """What a run is trained on, what it is chosen by, and what it is only scored on, where there is such a set."""

    train: Index
    val: Index
    test: Index | None


def open_split(where: str, split: str, cache: ShardCache | None = None) -> Index | None:
    """The index of one split of `where`: a known set, a folder with train/ and val/, shards, or a pattern."""
    known = sources.ensure_known(where)
    folder = split_folder(str(known or where), split)
    return None if folder is None else open_data(folder, cache)


def on_every_rank(runtime: Runtime, cache: ShardCache, opened: Callable[[], Index | None]) -> Index | None:
    """What `opened` opens, on every rank. Rank 0 goes first: it may have to pack or index, and sees that local shards
    are all there; a remote index it sends to the others, which may be on nodes that have not got it."""

    index: Index | None = None

    def first() -> remote_sets.Sent | None:
        nonlocal index
        index = opened()
        if index is not None and not index.url:
            check_present(index)
        return remote_sets.sent(index) if index is not None and index.url else None

    remote = runtime.on_main(first)
    if remote:
        return remote_sets.received(remote, cache)
    return index if runtime.world.is_main else opened()


def open_sets(config: Config, runtime: Runtime) -> Sets:
    """The indexes of the two or three sets. ConfigError unless all have the same classes in the same order."""
    cache = shard_cache(config)

    def validation() -> Index:
        val = open_split(config.val_data or config.data, "val", cache)
        if val is None and config.val_data:
            val = open_data(config.val_data, cache)
        if val is None:
            raise ConfigError(
                f"--data `{config.data}` has no folder `val`; give --val-data, or pack it with "
                "`dist-kd pack SOURCE DEST --val-fraction 0.1`"
            )
        return val

    def third() -> Index | None:
        if config.test_data == NO_TEST:
            return None
        test = open_split(config.test_data or config.data, "test", cache)
        return open_data(config.test_data, cache) if test is None and config.test_data else test

    train = on_every_rank(runtime, cache, lambda: open_split(config.data, "train", cache))
    val = on_every_rank(runtime, cache, validation)
    test = on_every_rank(runtime, cache, third)
    if runtime.world.local_rank == 0 and any(index.url for index in (train, val, test) if index is not None):
        cache.clean()  # of what killed runs left
    for name, index in (("--val-data", val), ("--test-data", test)):
        if index is not None and index.classes != train.classes:
            off = f", or leave it out with --test-data {NO_TEST}" if index is test else ""
            raise ConfigError(
                f"--data has {len(train.classes)} classes and {name} {len(index.classes)}, or in another order; "
                f"pack both with the same --class-list{off}"
            )
    return Sets(train, val, test)


def keep_in_memory(config: Config, index: Index) -> bool:
    if config.in_memory is not None:
        return config.in_memory
    if index.url and index.image_size is None:  # an estimate would fetch shards from all over the set
        return False
    return memory.fits(index, MEMORY_BUDGET)


def loader_settings(config: Config, index: Index) -> dict:
    """How a loader of `index` works, the same for training and evaluation."""
    in_memory = keep_in_memory(config, index)
    return {
        # whole batches of views are indexed out of memory faster than a worker could send them
        "workers": 0 if in_memory else config.workers,
        "in_memory": in_memory,
        "channels_last": config.channels_last,
        "timeout_s": config.loader_timeout,
        "max_bad_fraction": config.max_bad_fraction,
    }


def check_cache(config: Config, world: World, train: Index, order: Order) -> None:
    """ConfigError, with the arithmetic, if --cache-gb is too little for this order of remote shards."""
    if train.url and not keep_in_memory(config, train):
        fetch_ahead.check_cache(train, order, world)


def rest_warning(order: Order) -> list[str]:
    """A loud line if each epoch leaves out so much of the set that another batch should be thought of."""
    share = order.left_out / order.num_samples
    if share <= LARGE_REST:
        return []
    return [
        f"WARNING: an epoch leaves out {order.left_out:,} of {order.num_samples:,} samples ({100 * share:.1f} %): too "
        f"few for one more batch of `{order.batch}`; a smaller --batch-size leaves out fewer"
    ]


def data_lines(config: Config, world: World, sets: Sets, order: Order, augment: str) -> list[str]:
    """What the header says of the data."""
    train, val, test = sets
    mixed = "".join(f", {n} {v:g}" for n, v in (("mixup", config.mixup), ("cutmix", config.cutmix)) if v)
    where = (
        "in memory" if keep_in_memory(config, train) else f"{len(train.shards)} shard(s), {config.workers} worker(s)"
    )
    lines = [
        f"data     {train.spec.name}: {train.spec.num_samples:,} training samples, {train.spec.num_classes} classes, "
        f"{where}; {order.left_out} left out per epoch, others each time",
        f"         {val.spec.num_samples:,} validation samples; augmentation {augment}{mixed}",
        *rest_warning(order),
    ]
    if test is not None:
        lines.insert(2, f"         {test.spec.num_samples:,} test samples, scored at each evaluation, never chosen by")
    if train.url and not keep_in_memory(config, train):
        lines.append(f"         {fetch_ahead.cache_line(train, order, world)}")
    elif any(index.url for index in sets if index is not None):
        lines.append(f"         remote, through {cache_folder()}: up to {config.cache_gb:g} GB")
    elif config.cache_gb != Config.model_fields["cache_gb"].default:
        lines.append(f"         --cache-gb {config.cache_gb:g} has no effect: the shards are on this machine")
    return lines


def make_evaluator(
    config: Config,
    runtime: Runtime,
    index: Index,
    spec: NetworkSpec,
    stopped: Callable[[], bool] = lambda: False,
    limit: int | None = None,
    ledger: str = "evaluation-",
) -> Evaluator:
    """The exact evaluator of `index` with the view and constants of the network `spec`."""
    loader = EvalLoader(
        index,
        EvalView(spec.image_size, spec.crop_pct, spec.interpolation),
        world=runtime.world,
        batch_size=config.device_batch_size,
        device=runtime.device,
        mean=spec.mean,
        std=spec.std,
        limit=limit,
        ledger=ledger,
        **loader_settings(config, index),
    )
    batches = math.ceil(loader.num_samples / config.device_batch_size)
    return Evaluator(
        loader,
        device=runtime.device,
        rounds=math.ceil(batches / runtime.world.world_size),
        autocast=runtime.autocast,
        reduce_sum=runtime.reduce_sum,
        reduce_max=runtime.reduce_max,
        gather=runtime.gather,
        stopped=stopped,
    )
