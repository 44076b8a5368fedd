"""The order is as good as chance, and where windows make it worse, by how much.

Seeds are fixed, so a test passes always or never. Bounds are those that fair chance would break once in a million
times (FALSE_ALARM, shared among all numbers that a test looks at), mostly exact ones of the binomial distribution.
"""

import numpy as np
import pytest
from scipy import stats

from dist_kd.data.order import Order

FALSE_ALARM = 1e-6
EPOCHS = 3000

UNEVEN, BATCH = (30, 17, 0, 1, 45, 27), 14  # 120 samples: 8 steps, 8 left out
LAYOUTS = {
    "full shuffle": (UNEVEN, BATCH, 1, 120),
    "windows": (UNEVEN, BATCH, 1, 30),
    "streams": (UNEVEN, BATCH, 7, 120),
    "streams of windows": (UNEVEN, BATCH, 2, 20),
    "one shard in pieces": ((120,), BATCH, 1, 16),
}


def steps_of(sizes, batch, streams, window, epochs=EPOCHS, seed=20):
    """[epochs, N]: the step at which each sample is shown, -1 where it is left out; and its place of all, likewise."""
    order = Order(sizes, batch, seed, streams, window)
    places = np.full((epochs, sum(sizes)), -1)
    for epoch in range(epochs):
        shown = order.epoch_order(epoch).ravel()
        places[epoch, shown] = np.arange(shown.size)
    return np.where(places < 0, -1, places // batch), places


@pytest.fixture(scope="module", params=LAYOUTS)
def shown(request):
    sizes, batch, *_ = layout = LAYOUTS[request.param]
    return (sum(sizes), batch, *steps_of(*layout))


def assert_binomial(counts, tries, chance):
    """Each of the counts could be the number of hits of `tries` tries; they may depend on each other."""
    counts = np.asarray(counts)
    share = FALSE_ALARM / 2 / counts.size
    low, high = stats.binom.ppf(share, tries, chance), stats.binom.isf(share, tries, chance)
    assert low <= counts.min() and counts.max() <= high, f"{counts.min()} to {counts.max()}, not {low} to {high}"


def assert_mean(values, mean):
    """The mean of independent values is `mean`, by their own spread (the central limit theorem)."""
    error = np.std(values, ddof=1) / len(values) ** 0.5
    assert abs(np.mean(values) - mean) < stats.norm.isf(FALSE_ALARM / 2) * error


# one sample


def test_no_sample_is_left_out_more_often_than_chance(shown):
    samples, batch, steps, _ = shown
    assert_binomial((steps < 0).sum(0), EPOCHS, samples % batch / samples)


def test_each_sample_has_its_turn_in_every_step(shown):
    samples, batch, steps, _ = shown
    counts = np.stack([(steps == step).sum(0) for step in range(samples // batch)])
    assert_binomial(counts, EPOCHS, batch / samples)


def test_each_sample_has_its_turn_in_every_place(shown):
    """In every row of every batch, so on every rank too."""
    samples, batch, _, places = shown
    counts = np.stack([(places == place).sum(0) for place in range(samples // batch * batch)])
    assert_binomial(counts, EPOCHS, 1 / samples)


@pytest.mark.parametrize("window", [1003, 100])
def test_one_shard_leaves_out_another_rest_each_epoch(window):
    """3 of 1003 samples for 200 epochs: pairs of epochs leave out the same 3 as often as chance, 1 in 1003."""
    order = Order((1003,), 100, 0, 1, window)
    rests = [frozenset(range(1003)) - frozenset(order.epoch_order(epoch).ravel().tolist()) for epoch in range(200)]
    assert all(len(rest) == order.left_out == 3 for rest in rests)
    same = sum(a == b for i, a in enumerate(rests) for b in rests[:i])
    assert same <= stats.binom.isf(FALSE_ALARM, 200 * 199 // 2, 1 / 1003)
    assert len(set().union(*rests)) > 350  # of 600 draws of 1003 samples some 450 differ


# two epochs


def test_the_same_place_rarely_shows_the_same_sample(shown):
    """In two epochs as many places agree as in two random orders: steps x B / N, about one."""
    samples, batch, _, places = shown
    agreeing = ((places[0::2] == places[1::2]) & (places[0::2] >= 0)).sum(1)
    assert_mean(agreeing, samples // batch * batch / samples)


def correlations(a, b):
    """Spearman's, row by row, of the samples that both rows show."""
    both = [(x >= 0) & (y >= 0) for x, y in zip(a, b, strict=True)]
    return np.array([stats.spearmanr(x[keep], y[keep])[0] for x, y, keep in zip(a, b, both, strict=True)])


def test_orders_of_different_epochs_are_uncorrelated(shown):
    _, _, _, places = shown
    assert_mean(correlations(places[0:1000:2], places[1:1000:2]), 0)


def test_orders_are_uncorrelated_with_that_of_the_shards(shown):
    _, _, _, places = shown
    assert_mean(correlations(places[:500], np.broadcast_to(np.arange(places.shape[1]), (500, places.shape[1]))), 0)


@pytest.mark.parametrize("apart", [1, 2, 7])
def test_full_shuffles_correlate_as_random_orders_do(apart):
    """Not only their mean: each of 300 pairs of 1000 samples, and the mean square, 1 / (N - 1) for random orders."""
    _, places = steps_of((600, 400), 100, 1, 1000, epochs=300 + apart)
    rho = correlations(places[:300], places[apart:])
    assert abs(rho).max() < stats.norm.isf(FALSE_ALARM / 2 / 300) / 999**0.5
    assert_mean(rho**2, 1 / 999)


def test_seeds_are_as_far_apart_as_epochs():
    """Seeds and epochs are both counted from 0, and (0, 1) must not resemble (1, 0)."""
    here, there = (steps_of((600, 400), 100, 1, 1000, 100, seed)[1] for seed in (0, 1))
    rho = np.concatenate([correlations(here, there), correlations(here[1:], there[:-1])])
    assert abs(rho).max() < stats.norm.isf(FALSE_ALARM / 2 / len(rho)) / 999**0.5


# two samples


def meetings(steps):
    """[N, N]: in how many epochs each pair of samples was in one batch, for samples that are always shown."""
    return sum((row[:, None] == row[None, :]).astype(np.int64) for row in steps)


@pytest.mark.parametrize("sizes", [(72,), (31, 0, 1, 40)])
def test_in_a_full_shuffle_pairs_meet_as_often_as_chance(sizes):
    """All 2556 pairs of 72 samples in batches of 8, with nothing left out: each meets in 7 of 71 epochs."""
    steps, _ = steps_of(sizes, 8, 1, 72)
    assert_binomial(meetings(steps)[np.triu_indices(72, 1)], EPOCHS, 7 / 71)


def test_a_rest_is_left_out_in_company():
    """What is left out is consecutive: in a full shuffle of one shard the only trace of the shard's order.

    Next neighbours are both shown in N - r - 1 of N epochs (rotations), distant samples in N - 2 r.
    """
    samples, batch, rest = 63, 8, 7
    steps, _ = steps_of((samples,), batch, 1, samples)
    both = (steps >= 0).astype(np.int64).T @ (steps >= 0).astype(np.int64)
    numbers = np.arange(samples)
    assert_binomial(both[numbers, (numbers + 1) % samples], EPOCHS, (samples - rest - 1) / samples)
    assert_binomial(both[numbers, (numbers + 30) % samples], EPOCHS, (samples - 2 * rest) / samples)
    pairs = meetings(np.where(steps < 0, -1 - numbers, steps))  # nobody meets where one is left out
    shown_meet = (batch - 1) / (samples - rest - 1)
    assert_binomial(pairs[numbers, (numbers + 1) % samples], EPOCHS, (samples - rest - 1) / samples * shown_meet)
    assert_binomial(pairs[numbers, (numbers + 30) % samples], EPOCHS, (samples - 2 * rest) / samples * shown_meet)


SHARD, COUNT = 48, 32  # equal shards; 1536 samples, batches of 48


def meeting_chance(samples, batch, streams, window, apart):
    """The exact chance that two samples of one piece, `apart` from each other, are in one batch of an epoch.

    By the rotation the first is at each position alike often, the second `apart` behind it, on a circle. A position is
    known up to its window, in which every place is as likely; batches cut streams, so also windows, at equal steps.
    """
    steps, share = samples // batch, batch // streams
    length = steps * share
    at = np.zeros((samples, steps))  # chance of position x to be in batch k
    alone = np.zeros(samples)  # chance that another one of the same window is in the same batch
    window_of = -np.arange(samples)
    for stream in range(streams):
        for first in range(0, length, window):
            places = np.arange(first, min(first + window, length))
            inside = stream * length + places
            counts = np.bincount(places // share, minlength=steps)
            at[inside] = counts / len(places)
            alone[inside] = (counts * (counts - 1)).sum() / max(1, len(places) * (len(places) - 1))
            window_of[inside] = 1 + inside[0]
    other = (np.arange(samples) + apart) % samples
    return np.where(window_of == window_of[other], alone, (at * at[other]).sum(1)).mean()


@pytest.mark.parametrize(
    ("streams", "window"),
    [(1, SHARD), (1, 4 * SHARD), (1, 100), (1, COUNT * SHARD), (4, 2 * SHARD), (4, 131), (16, SHARD), (16, 4 * SHARD)],
)
def test_windows_let_neighbours_meet_more_often_by_a_known_factor(streams, window):
    """Neighbours in a shard, and samples further and further apart in it: exactly as often as the arithmetic says."""
    steps, _ = steps_of((SHARD,) * COUNT, SHARD, streams, window, 400)
    by_shard = steps.reshape(-1, COUNT, SHARD)
    for apart in (1, 4, 20, 40):
        met = (by_shard[..., :-apart] == by_shard[..., apart:]).mean((1, 2))
        assert_mean(met, meeting_chance(SHARD * COUNT, SHARD, streams, window, apart))


def test_the_arithmetic_by_hand():
    """16 samples, batches of 4, 2 streams of 8: 2 rows of each in each of 4 steps.

    Windows of 4: 3 of 4 neighbours share one, where each of 3 others is a sample's partner; across windows none meet.
    Windows of 8: 7 of 8 share one, each of 7 is the partner; across streams one of 4 steps.
    """
    assert meeting_chance(16, 4, 2, 4, 1) == pytest.approx(3 / 4 / 3)
    assert meeting_chance(16, 4, 2, 8, 1) == pytest.approx(7 / 8 / 7 + 1 / 8 / 4)
