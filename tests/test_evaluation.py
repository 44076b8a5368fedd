"""Exact evaluation: hand-counted scores, calibration against torchmetrics' definition, agreement, early stop."""

import pytest
import torch

from dist_kd.contracts import Batch, DataCounters, DataSpec, ModelOutput
from dist_kd.evaluation import Evaluator, expected_calibration_error


class Undamaged:
    def clear(self): ...

    def of_all(self, reduce_sum, gather):
        return DataCounters()

    def check(self, counters): ...


class Source:
    """Logits travel as images, so that the network is the identity."""

    def __init__(self, logits, labels, size):
        self.logits, self.labels, self.size = logits, labels, size
        self.account = Undamaged()
        self.spec = DataSpec("test", tuple(str(c) for c in range(logits.shape[1])), (len(labels),), "f")

    def batches(self):
        for i in range(0, len(self.labels), self.size):
            rows = slice(i, i + self.size)
            n = len(self.labels[rows])
            yield Batch(self.logits[rows], self.labels[rows], torch.ones(n), torch.arange(i, i + n))


def evaluator(logits, labels, size=3, rounds=None, **more):
    from contextlib import nullcontext

    rounds = rounds or -(-len(labels) // size)
    return Evaluator(
        Source(logits, labels, size), device=torch.device("cpu"), rounds=rounds, autocast=nullcontext,
        reduce_sum=lambda t: t.clone(), reduce_max=lambda t: t.clone(),
        gather=lambda value: [value], **more,
    )  # fmt: skip


LOGITS = torch.eye(7) * 10
LABELS = torch.tensor([0, 1, 2, 3, 0, 0, 6])  # rows 4 and 5 are wrong


def network(images):
    return ModelOutput(images, {})


def test_counts_by_hand():
    scores = evaluator(LOGITS, LABELS).score(network)
    assert (scores.samples, scores.top1_hits) == (7, 5)
    assert scores.values("val")["val/top1"] == pytest.approx(100 * 5 / 7)
    # e^10 against six zeros: right rows cost log(1 + 6 e^-10), wrong ones 10 more
    right = torch.log1p(6 * torch.tensor(-10.0, dtype=torch.float64).exp()).item()
    assert scores.values("val")["val/loss"] == pytest.approx((7 * right + 2 * 10) / 7, rel=1e-6)
    assert "val/agreement" not in scores.values("val")


def test_more_rounds_than_batches_changes_nothing():
    few, many = evaluator(LOGITS, LABELS).score(network), evaluator(LOGITS, LABELS, rounds=9).score(network)
    assert (few.samples, few.top1_hits, few.loss_sum) == (many.samples, many.top1_hits, many.loss_sum)


def test_agreement_with_the_remembered_teacher():
    e = evaluator(LOGITS, LABELS)
    e.score(network, remember=True)
    student = LOGITS.clone()
    student[2] = student[2].roll(1)
    scores = evaluator(student, LABELS)
    scores.answers = e.answers
    result = scores.score(network)
    assert (result.agreements, result.compared) == (6, 7)


def test_calibration_error_by_hand():
    # one bin: 4 samples of mean confidence 0.9, 3 of them right; another: 1 sample, 0.2, wrong
    bins = torch.tensor([[3.6, 0.2], [3.0, 0.0], [4.0, 1.0]])
    assert expected_calibration_error(bins) == pytest.approx(100 * (4 / 5 * 0.15 + 1 / 5 * 0.2))


def test_a_stop_request_ends_it_and_says_so():
    calls = iter([False, True])
    scores = evaluator(LOGITS, LABELS, stopped=lambda: next(calls)).score(network)
    assert not scores.complete
    assert scores.samples == 3
