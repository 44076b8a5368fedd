"""Sums against hand counts, and the same sums whenever they are read."""

import pytest
import torch

from dist_kd.contracts import Batch, LossTerms
from dist_kd.meters import KEPT, Meters


def as_it_is(sums):
    return sums.clone()


def micro_batch(logits, labels, weights, total):
    empty = torch.empty(0)
    batch = Batch(empty, torch.tensor(labels), torch.tensor(weights), empty)
    return LossTerms(torch.tensor(total, requires_grad=True), {"loss_ce": torch.tensor(2 * total)}, logits), batch


def random_ones(count):
    generator = torch.Generator().manual_seed(0)
    for _ in range(count):
        logits = torch.randn(6, 10, generator=generator)
        yield micro_batch(logits, [0, 1, 2, 3, 4, 5], [1.0] * 6, float(torch.rand((), generator=generator)))


def test_hand_counts():
    meters = Meters(torch.device("cpu"), ("loss_ce",))
    # the classes in falling order are 0..6, so label k stands at place k
    falling = torch.arange(7.0, 0.0, -1.0).expand(4, 7)
    meters.add(*micro_batch(falling, [0, 4, 5, 0], [1.0, 1.0, 1.0, 0.0], 0.5))  # hits at 1: one, at 5: two, one bad
    meters.add(*micro_batch(falling[:2], [0, 1], [1.0, 1.0], 2.0))
    assert meters.state().tolist() == [0.5 * 4 + 2.0 * 2, 2 * (0.5 * 4 + 2.0 * 2), 2.0, 4.0, 5.0, 1.0]
    values = meters.drain(as_it_is)
    assert values["train/loss"] == pytest.approx(6 / 6) and values["train/loss_ce"] == pytest.approx(2.0)
    assert values["train/top1"] == pytest.approx(100 * 2 / 5) and values["train/top5"] == pytest.approx(100 * 4 / 5)
    assert meters.state().tolist() == [0.0] * 6


def test_fewer_than_five_classes():
    meters = Meters(torch.device("cpu"), ("loss_ce",))
    meters.add(*micro_batch(torch.tensor([[1.0, 2.0, 3.0]]), [0], [1.0], 1.0))
    assert meters.state().tolist()[2:4] == [0.0, 1.0]


def test_sums_do_not_depend_on_when_they_are_read():
    read, unread, resumed = (Meters(torch.device("cpu"), ("loss_ce",)) for _ in range(3))
    for number, (terms, batch) in enumerate(random_ones(2 * KEPT + 3)):
        read.add(terms, batch)
        unread.add(terms, batch)
        if number % 5 == 3:
            saved = read.state()
            resumed.add(terms, batch)  # dropped by the load, as what a restored run had not counted yet
            resumed.load(saved.tolist())
        else:
            resumed.add(terms, batch)
    assert torch.equal(read.state(), unread.state()) and torch.equal(read.state(), resumed.state())


def test_no_graph_and_few_batches_are_held():
    meters = Meters(torch.device("cpu"), ("loss_ce",))
    for terms, batch in random_ones(3 * KEPT):
        meters.add(terms, batch)
        assert len(meters._kept) < KEPT and not any(kept.total.requires_grad for kept, _, _ in meters._kept)
