import itertools
import logging
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch
from data.bad_server import BadServer, cut, status
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_kd.contracts import World
from dist_kd.data import fetch_ahead
from dist_kd.data.fetch_ahead import FetchAhead, check_cache, training_need
from dist_kd.data.index import Index, ShardInfo
from dist_kd.data.order import Order, choose_layout
from dist_kd.data.remote import Limits
from dist_kd.data.shard_cache import ShardCache
from dist_kd.data.tar_scan import ROW
from dist_kd.errors import ConfigError, DataError

QUICK = Limits(connect_s=5, idle_s=5, attempts=2, pause_s=0.05, longest_pause_s=0.1)

# which shards are next

LAYOUTS = st.tuples(
    st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(sum),
    st.integers(1, 24),
    st.integers(0, 2**31 - 1),
    st.integers(1, 6),
    st.integers(1, 60),
).filter(lambda v: v[1] % v[3] == 0 and sum(v[0]) >= v[1])


def shards_of(order: Order, samples: np.ndarray) -> set[int]:
    return set(np.searchsorted(np.cumsum(order.shard_sizes), samples, side="right").tolist())


@settings(max_examples=150, deadline=None)
@given(LAYOUTS, st.integers(0, 60), st.data())
def test_the_shards_ahead_are_those_the_rank_meets(layout, step, data):
    sizes, batch, seed, streams, window = layout
    order = Order(tuple(sizes), batch, seed, streams, window)
    ranks = data.draw(st.sampled_from([ranks for ranks in range(1, batch + 1) if batch % ranks == 0]))
    rank = data.draw(st.integers(0, ranks - 1))
    last = step + 2 * order.steps_per_epoch + 1
    ahead = list(itertools.takewhile(lambda item: item[0] <= last, order.shards_ahead(step, rank, ranks)))
    assert [wanted for wanted, _ in ahead] == sorted(wanted for wanted, _ in ahead) and ahead[0][0] == step
    share = batch // streams
    mine = order.streams_of(rank, 1, ranks)
    for now in range(step, last + 1):
        met = shards_of(order, order.rank_rows(now, rank, ranks))
        assert met <= {shard for wanted, shard in ahead if wanted <= now}
    # and no others: of each step, those of the windows that begin in it, or at first also of the one it is in
    length = order.steps_per_epoch * share
    for wanted in range(step, last + 1):
        epoch, k = divmod(wanted, order.steps_per_epoch)
        first = k * share // window if wanted == step else -(-k * share // window)
        begun = [(w * window, min((w + 1) * window, length)) for w in range(first, -(-(k + 1) * share // window))]
        samples = [order._stream(epoch, p, *span) for p in mine for span in begun]
        met = shards_of(order, np.concatenate(samples)) if samples else set()
        assert {shard for when, shard in ahead if when == wanted} == met


def test_shards_ahead_by_hand():
    """Twelve samples in three shards, one stream, windows of one shard: the pieces as they are laid out."""
    order = Order((4, 4, 4), 4, seed=1, streams=1, window=4)
    first = [shards_of(order, order.global_batch(step)) for step in range(3)]
    ahead = list(itertools.takewhile(lambda item: item[0] < 3, order.shards_ahead(0, 0, 1)))
    assert [{shard for wanted, shard in ahead if wanted == step} for step in range(3)] == first


def test_a_rank_is_told_of_its_own_streams_only():
    order = Order((100,) * 64, 64, 0, *choose_layout((100,) * 64, 64, local=False))
    assert (order.streams, order.window) == (16, 400)
    assert [order.streams_of(rank, 1, 8) for rank in (0, 7)] == [range(2), range(14, 16)]
    assert order.streams_of(3, 1, 32) == range(1, 2) and order.streams_of(0, 4, 8) == range(8)
    shards = [s for _, s in itertools.takewhile(lambda item: item[0] == 0, order.shards_ahead(0, 5, 8))]
    assert len(shards) <= 2 * 5


# what the cache must hold


def index_of(sizes: list[int], samples: int, limit_bytes: int = 0) -> Index:
    shards = tuple(ShardInfo(f"{i}.tar", size, "", samples) for i, size in enumerate(sizes))
    cache = ShardCache("/nowhere", limit_bytes, 1.0)
    return Index("/", "x", ("a",), shards, np.zeros(samples * len(sizes), ROW), url="http://host/set", cache=cache)


def test_the_need_of_a_node_by_hand():
    """100 shards of 1 GB with 1000 samples, batch 64: 16 streams, windows of 4 shards."""
    index = index_of([10**9] * 100, 1000)
    order = Order((1000,) * 100, 64, 0, *choose_layout((1000,) * 100, 64, local=False))
    one = training_need(index, order, World())
    assert one == (16, 4 * 10**9, 10**9, 100 * 10**9) and one.bytes == 96 * 10**9
    eight_nodes = training_need(index, order, World(5, 64, 5, 8))  # each node has 2 streams
    assert eight_nodes.streams == 2 and eight_nodes.bytes == 12 * 10**9
    assert training_need(index, replace(order, window=50_000), World()).bytes == 100 * 10**9  # never above the set
    assert [eight_nodes.shards_ahead(gb * 10**9) for gb in (12, 14, 19, 500)] == [2, 3, 5, 6]


def test_a_cache_too_small_is_refused_with_the_arithmetic():
    order = Order((1000,) * 100, 64, 0, 16, 4000)
    with pytest.raises(
        ConfigError,
        match=r"--cache-gb `95.9` .*http://host/set/0.tar.*16 streams x \(a window of 4000 samples, 4 GB, \+ 2 shards "
        r"of 1 GB\) = 96 GB of the 100 GB of the set; give --cache-gb 96 or more",
    ):
        check_cache(index_of([10**9] * 100, 1000, 95_900_000_000), order, World())
    check_cache(index_of([10**9] * 100, 1000, 96_000_000_000), order, World())
    with pytest.raises(ConfigError, match=r"the whole set of 0.000123 GB; give --cache-gb 0.000123 or more"):
        check_cache(index_of([123_456 - 456], 1000, 1000), Order((1000,), 64, 0, 16, 1000), World())


# the threads


@dataclass
class Shelf:
    """An index whose shards can be held back."""

    delay_s: float = 0.0
    asked: list[int] = field(default_factory=list)
    failing: set[int] = field(default_factory=set)
    go: threading.Event = field(default_factory=threading.Event)

    def open_shard(self, shard: int) -> int:
        self.asked.append(shard)
        if not self.go.wait(10):
            raise DataError("held back for too long")
        if shard in self.failing:
            raise DataError(f"shard {shard} does not come")
        return os.open(os.devnull, os.O_RDONLY)


@pytest.fixture
def shelf(request):
    found = Shelf()
    request.addfinalizer(found.go.set)
    return found


def until(condition, seconds: float = 5.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def plan() -> Iterator[tuple[int, int]]:
    return ((step, 3 * step + i) for step in itertools.count() for i in range(3))


def test_it_stays_as_far_ahead_as_it_may(shelf):
    shelf.go.set()
    ahead = FetchAhead(shelf, plan(), 4)
    ahead.reach(0)
    until(lambda: set(shelf.asked) == set(range(7)))  # 0, 1, 2 are wanted and 4 more may come
    time.sleep(0.05)
    assert max(shelf.asked) == 6
    ahead.reach(2)
    until(lambda: set(shelf.asked) == set(range(13)))
    ahead.close()
    assert not any(thread.is_alive() for thread in ahead._threads)


def test_what_is_wanted_is_waited_for(shelf, monkeypatch, caplog):
    monkeypatch.setattr(fetch_ahead, "SAY_S", 0.04)
    ahead = FetchAhead(shelf, plan(), 2)
    reached = threading.Thread(target=ahead.reach, args=(0,), daemon=True)
    reached.start()
    until(lambda: ahead._passed == 1)  # its clock runs from before this
    time.sleep(0.05)
    assert reached.is_alive()
    shelf.go.set()
    reached.join(5)
    assert not reached.is_alive()
    assert "step 0 waits for its shards: 1 came in" in caplog.text
    ahead.close()


def test_a_shard_that_does_not_come_ends_the_run_when_it_is_wanted(shelf, caplog):
    shelf.go.set()
    shelf.failing = {4, 5}
    ahead = FetchAhead(shelf, plan(), 4)
    with caplog.at_level(logging.WARNING):
        ahead.reach(0)
        until(lambda: {4, 5} <= set(shelf.asked))
        time.sleep(0.05)
    assert len(caplog.records) == 1 and "does not come" in caplog.text  # and nothing was raised
    with pytest.raises(DataError, match="shard 4 does not come"):
        ahead.reach(1)
    ahead.close()


def test_trouble_that_passed_is_no_trouble(shelf):
    shelf.go.set()
    shelf.failing = {4}
    ahead = FetchAhead(shelf, plan(), 4)
    ahead.reach(0)
    until(lambda: 4 in shelf.asked)
    shelf.failing.clear()
    ahead.reach(1)
    ahead.close()


def test_an_end_of_the_plan(shelf):
    shelf.go.set()
    ahead = FetchAhead(shelf, iter([(0, 0), (2, 1)]), 8)
    ahead.reach(5)
    until(lambda: not any(thread.is_alive() for thread in ahead._threads))
    ahead.close()


# loaders over http


@pytest.fixture
def served(index, tmp_path):
    """(server, the index of the same shards behind it with a cold cache)."""
    with BadServer({f"set/{shard.name}": (index.folder / shard.name).read_bytes() for shard in index.shards}) as server:
        cache = ShardCache(tmp_path / "cache", 10**9, 5.0, QUICK)
        yield server, replace(index, url=server.url("set"), cache=cache)


def shards_asked(server: BadServer) -> list[str]:
    return sorted(asked.path for asked in server.asked)


def equal(a, b) -> bool:
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


def copies(batches):
    return [type(batch)(*(None if t is None else t.clone() for t in batch)) for batch in batches]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_memory", [False, True])
def test_remote_equals_local(index, served, train, evaluate, workers, in_memory):
    server, remote = served
    how = {"workers": workers, "in_memory": in_memory}
    local = copies(itertools.islice(train(index, layout=(4, 5), **how).batches(1), 16))
    loader = train(remote, layout=(4, 5), **how)
    for _ in range(2):  # cold, then warm
        ours = copies(itertools.islice(loader.batches(1), 16))
        assert all(equal(a, b) for a, b in zip(ours, local, strict=True))
        assert shards_asked(server) == [f"set/train-000{i}.tar" for i in range(4)]
    loader.close()
    scored = evaluate(remote, **how)
    for _ in range(2):
        assert all(
            equal(a, b) for a, b in zip(copies(scored.batches()), copies(evaluate(index, **how).batches()), strict=True)
        )
    assert len(server.asked) == 4


def test_a_shard_that_cannot_be_had_is_said_by_the_cache(served, train):
    server, remote = served
    server.always["set/train-0002.tar"] = status(500)
    for workers in (0, 2):
        with pytest.raises(DataError, match=r"train-0002.tar` answered 500.*gave up after 2 attempts"):
            list(itertools.islice(train(remote, workers=workers).batches(0), 12))


def test_an_evicted_shard_is_fetched_again(served, train, index):
    """A cache with room for two shards of four: slower, never wrong."""
    server, remote = served
    sizes = sorted(shard.bytes for shard in remote.shards)
    remote = replace(remote, cache=replace(remote.cache, limit_bytes=sizes[-1] + sizes[-2]))
    local = copies(itertools.islice(train(index).batches(0), 12))
    ours = copies(itertools.islice(train(remote).batches(0), 12))
    assert all(equal(a, b) for a, b in zip(ours, local, strict=True))
    assert len(server.asked) > 4


def test_a_cut_is_mended(served, train):
    server, remote = served
    server.first["set/train-0001.tar"] = [cut(after=3000)]
    list(itertools.islice(train(remote).batches(0), 6))
    assert server.offsets("set/train-0001.tar") == [None, 3000]


def test_an_evaluation_left_early_ends_its_threads(served, evaluate):
    _, remote = served
    loader = evaluate(remote)
    batches = loader.batches()
    next(batches)
    threads = loader._fetched.ahead._threads
    batches.close()
    until(lambda: not any(thread.is_alive() for thread in threads))
    assert len(list(loader.batches())) == 5
    assert len(threads) == fetch_ahead.CONNECTIONS
