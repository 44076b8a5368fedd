import numpy as np
import pytest
from data.plain_order import philox

from dist_kd.data.order import PIECES, WINDOW, Order, choose_layout, permutation, random_words
from dist_kd.errors import ConfigError

# by plain_order.py
GOLDEN_FULL = [[6, 4, 0, 9], [7, 10, 2, 5], [11, 3, 8, 1]]
GOLDEN_WINDOWS = [[2, 5, 10, 9], [4, 8, 11, 1], [6, 7, 3, 0]]


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


def test_epochs_and_seeds_differ():
    order = Order((50, 47), 8, seed=3, streams=1, window=97)
    epochs = [order.epoch_order(epoch) for epoch in range(4)]
    assert order.steps_per_epoch == 12 and order.left_out == 1 and order.epoch_of(12) == 1
    assert not any(np.array_equal(a, b) for i, a in enumerate(epochs) for b in epochs[:i])
    assert not np.array_equal(epochs[0], Order((50, 47), 8, 4, 1, 97).epoch_order(0))


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
