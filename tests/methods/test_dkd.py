"""dkd: golden values, its identity with kd, and logits far apart."""

import math

import pytest
import torch
from methods.golden import CE, S, T, Y, batch, large, run

from dist_kd.methods.dkd import dkd_loss
from dist_kd.methods.kd import kd_loss


@pytest.mark.parametrize(
    ("temperature", "tckd", "nckd"),
    [(1, 0.256624732908392, 0.664568722001932), (4, 0.358142132240792, 0.951232956939466)],
)
def test_golden(temperature, tckd, nckd):
    found = [part.mean().item() for part in dkd_loss(S, T, Y, temperature)]
    assert found == pytest.approx([tckd, nckd], abs=1e-12)


def test_golden_total():
    total = run("dkd", T=4.0, a=1.0, b=8.0, warmup=0.0).total.item()
    assert total == pytest.approx(7.96800578775652 + CE, abs=1e-12)


@pytest.mark.parametrize("temperature", [1, 4])
def test_kd_is_tckd_and_nckd_weighed_by_what_the_teacher_leaves(temperature):
    s, t, y = large()
    tckd, nckd = dkd_loss(s, t, y, temperature)
    left = 1 - (t / temperature).softmax(1).gather(1, y[:, None])[:, 0]
    assert torch.allclose(tckd + left * nckd, kd_loss(s, t, temperature), atol=1e-11)


def test_shifts_and_equal_logits():
    moved = dkd_loss(S + 7, T - 3, Y, 4)
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(moved, dkd_loss(S, T, Y, 4), strict=True))
    assert all(part.abs().max() < 1e-14 for part in dkd_loss(T, T, Y, 4))


def test_finite_at_a_gap_of_200():
    """The teacher is sure of class 0, which the student puts at e^-200: exactly 200, less what NCKD has of it."""
    s = torch.tensor([[0.0, 200.0, 0.0]], requires_grad=True)
    t = torch.tensor([[200.0, 0.0, 0.0]])
    half = math.log(2)  # among the classes but 1 the student knows nothing
    for label, expected in ((0, (200.0, None)), (1, (200 - half, half)), (2, (None, 200.0))):
        parts = dkd_loss(s, t, torch.tensor([label]), 1.0)
        s.grad = None
        sum(parts).sum().backward()
        assert s.grad.isfinite().all() and all(part.isfinite().all() for part in parts)
        for part, value in zip(parts, expected, strict=True):
            assert value is None or part.item() == pytest.approx(value, rel=1e-5)


def test_two_classes_have_no_others():
    s = torch.tensor([[1.0, -2.0], [0.5, 3.0]], requires_grad=True)
    tckd, nckd = dkd_loss(s, torch.tensor([[0.0, 1.0], [2.0, 0.0]]), torch.tensor([0, 1]), 2.0)
    assert (nckd == 0).all() and (tckd > 0).all()
    (tckd + nckd).sum().backward()
    assert s.grad.isfinite().all()


def test_rows_are_weighed():
    weights = torch.tensor([1.0, 0.0, 1.0]).double()
    parts = run("dkd", T=4.0, warmup=0.0, rows=batch(weights=weights)).parts
    tckd, nckd = dkd_loss(S, T, Y, 4)
    assert parts["loss_tckd"].item() == pytest.approx(((tckd[0] + tckd[2]) / 3).item(), abs=1e-12)
    assert parts["loss_nckd"].item() == pytest.approx(((nckd[0] + nckd[2]) / 3).item(), abs=1e-12)
