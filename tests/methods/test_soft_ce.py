"""soft_ce: golden value, its distance from kd, and that no label is looked at."""

import pytest
import torch
from methods.golden import S, T, batch, run

from dist_kd.methods.kd import kd_loss
from dist_kd.methods.soft_ce import soft_ce_loss


def test_golden_and_less_the_teachers_entropy_it_is_kd():
    entropy = -(T.softmax(1) * T.log_softmax(1)).sum(1)
    assert soft_ce_loss(S, T).mean().item() == pytest.approx(1.24967353132456, abs=1e-12)
    assert entropy.mean().item() == pytest.approx(0.670472937338187, abs=1e-12)
    assert torch.allclose(soft_ce_loss(S, T) - entropy, kd_loss(S, T, 1), atol=1e-12)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_its_gradient_is_kds(temperature):
    gradients = []
    for loss in (soft_ce_loss, kd_loss):
        s = S.clone().requires_grad_()
        loss(s, T, temperature).sum().backward()
        gradients.append(s.grad)
    assert torch.allclose(*gradients, atol=1e-12)


def test_no_label_is_looked_at():
    impossible = batch(torch.tensor([99, -5, 7]))  # any loss that looked would raise
    terms = run("soft_ce", rows=impossible)
    assert terms.total.item() == pytest.approx(1.24967353132456, abs=1e-12) and list(terms.parts) == ["loss_soft_ce"]
    assert run("kd+soft_ce", rows=impossible).total.isfinite()
