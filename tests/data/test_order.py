import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_kd.data.order import PIECES, WINDOW, Order, choose_layout, permutation, random_words
from dist_kd.errors import ConfigError

# by plain_epoch below
GOLDEN_FULL = [[6, 4, 0, 9], [7, 10, 2, 5], [11, 3, 8, 1]]
GOLDEN_WINDOWS = [[2, 5, 10, 9], [4, 8, 11, 1], [6, 7, 3, 0]]


def philox(seed, epoch, purpose, count, stream=0, window=0):
    """Philox4x64-10 (Salmon et al. 2011) in plain integers: an independent program for the golden values."""
    words, mask = [], 2**64 - 1
    block = 0
    while len(words) < count:
        block += 1  # numpy counts up before the first block
        c, k = [block, window, stream, purpose], [seed, epoch]
        for _ in range(10):
            p0, p1 = 0xD2E7470EE14C6C93 * c[0], 0xCA5A826395121157 * c[2]
            c = [p1 >> 64 ^ c[1] ^ k[0], p1 & mask, p0 >> 64 ^ c[3] ^ k[1], p0 & mask]
            k = [(k[0] + 0x9E3779B97F4A7C15) & mask, (k[1] + 0xBB67AE8584CAA73B) & mask]
        words += c
    return words[:count]


def plain_epoch(sizes, batch, seed, streams, window, epoch):
    """The construction of an epoch, written once more with lists: pieces, rotation, streams, windows."""
    pieces, first = [], 0
    for size in sizes:
        samples = list(range(first, first + size))
        pieces += [samples[cut : cut + window] for cut in range(0, size, window)]
        first += size
    words = philox(seed, epoch, 1, len(pieces))
    laid = [sample for piece in sorted(range(len(pieces)), key=lambda i: (words[i], i)) for sample in pieces[piece]]
    rotation = philox(seed, epoch, 2, 1)[0] % len(laid)
    laid = laid[rotation:] + laid[:rotation]
    steps = len(laid) // batch
    length = steps * batch // streams
    shuffled = []
    for stream in range(streams):
        positions = laid[stream * length : (stream + 1) * length]
        out = []
        for number, cut in enumerate(range(0, length, window)):
            part = positions[cut : cut + window]
            words = philox(seed, epoch, 3, len(part), stream, number)
            out += [part[i] for i in sorted(range(len(part)), key=lambda i: (words[i], i))]
        shuffled.append(out)
    share = batch // streams
    return [[s for out in shuffled for s in out[k * share : (k + 1) * share]] for k in range(steps)]


def test_words_are_those_of_philox():
    assert random_words(7, 3, WINDOW, 9, stream=2, window=5).tolist() == philox(7, 3, 3, 9, 2, 5)
    assert random_words(2**31 - 1, 0, PIECES, 4).tolist() == philox(2**31 - 1, 0, 1, 4)


def test_golden_full_shuffle():
    order = Order((4, 3, 5), 4, seed=1, streams=1, window=12)
    assert order.epoch_order(0).tolist() == GOLDEN_FULL
    assert order.epoch_order(0).dtype == np.int64


def test_golden_streams_and_windows():
    order = Order((4, 3, 5), 4, seed=1, streams=2, window=3)
    assert order.epoch_order(2).tolist() == GOLDEN_WINDOWS


LAYOUTS = st.tuples(
    st.lists(st.integers(0, 40), min_size=1, max_size=8).filter(sum),
    st.integers(1, 24),
    st.integers(0, 2**31 - 1),
    st.integers(1, 6),
    st.integers(1, 60),
).filter(lambda v: v[1] % v[3] == 0 and sum(v[0]) >= v[1])


@settings(max_examples=150, deadline=None)
@given(LAYOUTS, st.integers(0, 3))
def test_equal_to_the_plain_construction(layout, epoch):
    sizes, batch, seed, streams, window = layout
    order = Order(tuple(sizes), batch, seed, streams, window)
    assert order.epoch_order(epoch).tolist() == plain_epoch(sizes, batch, seed, streams, window, epoch)


@settings(max_examples=150, deadline=None)
@given(LAYOUTS, st.integers(0, 3))
def test_each_sample_at_most_once_an_epoch(layout, epoch):
    sizes, batch, seed, streams, window = layout
    order = Order(tuple(sizes), batch, seed, streams, window)
    shown = order.epoch_order(epoch)
    assert shown.shape == (sum(sizes) // batch, batch)
    assert len(np.unique(shown)) == shown.size == sum(sizes) - order.left_out
    assert shown.min() >= 0 and shown.max() < sum(sizes)


@settings(max_examples=100, deadline=None)
@given(LAYOUTS, st.integers(0, 200))
def test_ranks_share_the_global_batch(layout, step):
    sizes, batch, seed, streams, window = layout
    order = Order(tuple(sizes), batch, seed, streams, window)
    whole = order.global_batch(step).tolist()
    fresh = Order(tuple(sizes), batch, seed, streams, window)  # nothing computed before
    for ranks in (ranks for ranks in range(1, batch + 1) if batch % ranks == 0):
        rows = [fresh.rank_rows(step, rank, ranks).tolist() for rank in reversed(range(ranks))]
        assert [sample for part in reversed(rows) for sample in part] == whole


@settings(max_examples=50, deadline=None)
@given(LAYOUTS, st.lists(st.integers(0, 100), min_size=1, max_size=10))
def test_steps_can_be_asked_in_any_order(layout, steps):
    sizes, batch, seed, streams, window = layout
    order = Order(tuple(sizes), batch, seed, streams, window)
    for step in steps:
        fresh = Order(tuple(sizes), batch, seed, streams, window)
        assert order.global_batch(step).tolist() == fresh.global_batch(step).tolist()


def test_epochs_and_seeds_differ():
    order = Order((50, 47), 8, seed=3, streams=1, window=97)
    epochs = [order.epoch_order(epoch) for epoch in range(4)]
    assert order.steps_per_epoch == 12 and order.left_out == 1 and order.epoch_of(12) == 1
    assert not any(np.array_equal(a, b) for i, a in enumerate(epochs) for b in epochs[:i])
    assert not np.array_equal(epochs[0], Order((50, 47), 8, 4, 1, 97).epoch_order(0))


def test_one_shard_leaves_out_another_rest_each_epoch():
    order = Order((1003,), 100, seed=0, streams=1, window=1003)
    rests = {frozenset(range(1003)) - frozenset(order.epoch_order(epoch).ravel().tolist()) for epoch in range(8)}
    assert len(rests) >= 7 and all(len(rest) == 3 for rest in rests)


def test_every_sample_gets_its_turn_in_every_place():
    """Mean place in the epoch of each sample over 400 epochs: within 6 sigma of the middle, full shuffle or not."""
    for streams, window in ((1, 60), (2, 24)):
        order = Order((20, 20, 20), 4, 11, streams, window)
        places = np.zeros(60)
        for epoch in range(400):
            places[order.epoch_order(epoch).ravel()] += np.arange(60)
        assert abs(places / 400 - 29.5).max() < 6 * (60 / 12**0.5) / 400**0.5


def test_a_window_mixes_only_a_few_shards():
    order = Order((100,) * 50, 10, seed=0, streams=1, window=400)
    first_window = np.concatenate([order.global_batch(step) for step in range(40)])
    assert len(np.unique(first_window // 100)) <= 6


def test_layout_chosen():
    assert choose_layout((1000, 500), 256, local=True) == (1, 1500)
    assert choose_layout((16_000_001,), 256, local=True)[0] == 16
    assert choose_layout((1000,) * 100, 96, local=False) == (16, 4000)
    assert choose_layout((1000,) * 100, 18, local=False) == (9, 4000)
    assert choose_layout((1000,) * 100, 17, local=False) == (1, 4000)
    assert choose_layout((10, 0, 5), 4, local=False) == (4, 15)


def test_too_few_samples_for_a_batch():
    with pytest.raises(ConfigError, match=r"`100`.*60 samples.*--batch-size 60"):
        Order((30, 30), 100, 0, 1, 60)


def test_ranks_must_divide_the_batch():
    with pytest.raises(ConfigError, match=r"`10` is not a multiple of 4.*--batch-size 8"):
        Order((30,), 10, 0, 1, 30).rank_rows(0, 1, 4)


def test_a_billion_samples_need_only_a_window():
    order = Order((10_000,) * 100_000, 1024, 0, *choose_layout((10_000,) * 100_000, 1024, local=False))
    batch = order.rank_rows(12_345_678, 3, 64)
    assert len(np.unique(batch)) == 16
    assert sum(samples.nbytes for _, samples in order._windows.values()) == 40_000 * 8  # one stream's window


def test_equal_words_keep_their_order():
    assert permutation(np.array([3, 1, 3, 1], np.uint64)).tolist() == [1, 3, 0, 2]
    words = np.arange(5000, dtype=np.uint64) % 2
    assert permutation(words).tolist() == [*range(0, 5000, 2), *range(1, 5000, 2)]
