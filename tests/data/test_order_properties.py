"""What holds of the order for any shards, batch, streams, window, ranks, micro-batch, seed, epoch and step."""

import itertools
import math
from typing import NamedTuple

import numpy as np
from data.plain_order import plain_epoch
from hypothesis import given, settings
from hypothesis import strategies as st

from dist_kd.config import Config
from dist_kd.contracts import World
from dist_kd.data.loader import _TrainRequests
from dist_kd.data.order import Order
from dist_kd.plan import make_plan


class Case(NamedTuple):
    sizes: tuple[int, ...]
    batch: int
    seed: int
    streams: int
    window: int
    ranks: int  # divides batch
    step: int  # of the first few epochs

    def order(self) -> Order:
        """A new one each time: it remembers nothing."""
        return Order(self.sizes, self.batch, self.seed, self.streams, self.window)

    @property
    def epoch(self) -> int:
        return self.order().epoch_of(self.step)


SHARDS = {
    "any, empty ones too": st.lists(st.integers(0, 40), min_size=1, max_size=8),
    "many of one sample": st.lists(st.just(1), min_size=1, max_size=60),
    "one huge": st.integers(500, 2000).map(lambda size: [size]),
    "one huge among small": st.tuples(
        st.lists(st.integers(0, 3), max_size=4), st.integers(300, 900), st.lists(st.integers(0, 3), max_size=4)
    ).map(lambda parts: [*parts[0], parts[1], *parts[2]]),
    "fewer than ranks": st.lists(st.integers(8, 30), min_size=1, max_size=2),
}


@st.composite
def cases(draw) -> Case:
    sizes = draw(SHARDS[draw(st.sampled_from(sorted(SHARDS)))])
    ranks, streams = draw(st.integers(1, 8)), draw(st.integers(1, 6))
    unit = math.lcm(ranks, streams)
    missing = unit - sum(sizes)
    if missing > 0:
        sizes.append(missing)
    samples = sum(sizes)
    batch = unit * draw(st.integers(1, min(samples // unit, 12)))
    edges = st.sampled_from([1, batch, max(sizes), samples, samples + 1])  # besides any: where cuts meet
    window = draw(st.integers(1, samples) | edges)
    step = draw(st.integers(0, 4 * (samples // batch)))
    return Case(tuple(sizes), batch, draw(st.integers(0, 2**31 - 1)), streams, window, ranks, step)


@settings(max_examples=150, deadline=None)
@given(cases())
def test_equal_to_the_plain_construction(case):
    plain = plain_epoch(case.sizes, case.batch, case.seed, case.streams, case.window, case.epoch)
    assert case.order().epoch_order(case.epoch).tolist() == plain


@settings(max_examples=150, deadline=None)
@given(cases())
def test_each_sample_at_most_once_and_the_rest_is_known(case):
    order, samples = case.order(), sum(case.sizes)
    shown = order.epoch_order(case.epoch)
    assert shown.shape == (samples // case.batch, case.batch) and shown.dtype == np.int64
    assert len(np.unique(shown)) == shown.size == order.steps_per_epoch * case.batch
    assert shown.min() >= 0 and shown.max() < samples
    assert order.left_out == samples - shown.size < case.batch


@settings(max_examples=150, deadline=None)
@given(cases(), st.data())
def test_ranks_share_the_global_batch(case, data):
    """In rank order, for 1 to 8 ranks, whatever each was asked before."""
    whole = case.order().global_batch(case.step).tolist()
    for ranks in {case.ranks, *(ranks for ranks in range(1, 9) if case.batch % ranks == 0)}:
        rows = {}
        for rank in data.draw(st.permutations(range(ranks))):
            order = case.order()
            for earlier in data.draw(st.lists(st.integers(0, 3 * order.steps_per_epoch), max_size=2)):
                order.rank_rows(earlier, rank, ranks)
            rows[rank] = order.rank_rows(case.step, rank, ranks).tolist()
            assert len(rows[rank]) == case.batch // ranks
        assert [sample for rank in range(ranks) for sample in rows[rank]] == whole


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(1, 12))
def test_going_on_at_any_step_is_never_having_stopped(case, count):
    unbroken = case.order()
    for step in range(case.step):
        unbroken.rank_rows(step, case.ranks - 1, case.ranks)
    resumed = case.order()
    for step in range(case.step, case.step + count):
        ours, theirs = (order.rank_rows(step, case.ranks - 1, case.ranks) for order in (resumed, unbroken))
        assert ours.tolist() == theirs.tolist()


@settings(max_examples=100, deadline=None)
@given(cases(), st.integers(1, 64), st.booleans())
def test_micro_batches_are_the_rows_the_plan_says(case, asked, even):
    """Of any size, they join to the rank's rows; each begins at the row from which its networks are seeded."""
    rows = case.batch // case.ranks
    fitting = [m for m in range(1, rows + 1) if rows % m == 0 and m <= asked and not (even and m % 2)]
    if not fitting or 2 * max(fitting) < min(rows, asked):
        return  # refused by the plan; tests of plan.py
    config = Config(batch_size=case.batch, device_batch_size=asked, mixup=0.2 if even else 0.0)
    plan = make_plan(config, case.ranks, sum(case.sizes))
    assert plan.micro_batch == max(fitting)
    joined = []
    for rank in range(case.ranks):
        requests = _TrainRequests(case.order(), World(rank, case.ranks), plan.micro_batch, case.step)
        for number, request in enumerate(itertools.islice(requests, 2 * plan.accum_steps)):
            step, micro = case.step + number // plan.accum_steps, number % plan.accum_steps
            assert (request.epoch, request.step) == (case.order().epoch_of(step), step)
            first = plan.first_row(rank, micro)
            whole = case.order().global_batch(step)
            assert request.samples.tolist() == whole[first : first + plan.micro_batch].tolist()
            joined += request.samples.tolist() if step == case.step else []
    assert joined == case.order().global_batch(case.step).tolist()
