"""Several teachers: the mean of their softmax at the temperature of each loss, whatever the loss makes of it."""

import pytest
import torch
from methods.golden import S, T, Y, batch, large, out

from dist_kd.methods import METHODS, build_method
from dist_kd.methods.ensemble import MEMBERS, at_temperature, mean_logits
from dist_kd.methods.frame import Pair

OTHER = torch.tensor([[0, 1, 2, 0], [3, 0, 0, 0], [1, 1, 1, -4]], dtype=torch.float64)
BOTH = torch.stack([T, OTHER])


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_mean_of_softmax(temperature):
    z = mean_logits(BOTH, temperature)
    expected = ((T / temperature).softmax(1) + (OTHER / temperature).softmax(1)) / 2
    assert torch.allclose((z / temperature).softmax(1), expected, atol=1e-14)
    assert torch.allclose(z.exp().sum(1).log(), z.logsumexp(1))


def test_one_of_them_or_equal_ones_are_that_one():
    for members in (T[None], torch.stack([T, T, T])):
        z = mean_logits(members, 3.0)
        assert torch.allclose(z.softmax(1), T.softmax(1), atol=1e-14)  # but for a constant of each row, T itself
    alone = out(T)
    assert at_temperature(alone, 4.0) is alone


def test_finite_where_a_member_is_sure():
    members = torch.tensor([[[200.0, 0.0, 0.0]], [[0.0, 200.0, 0.0]]])
    z = mean_logits(members, 1.0)
    assert z.isfinite().all() and torch.allclose(z.softmax(1), torch.tensor([[0.5, 0.5, 0.0]]))


TEMPERATURES = {"kd": ({"T": 4.0}, 4.0), "dkd": ({"T": 3.0, "warmup": 0.0}, 3.0), "dist": ({"T": 2.0}, 2.0),
                "wttm": ({"g": 0.25}, 4.0), "hard": ({}, 1.0), "soft_ce": ({"T": 1.5}, 1.5)}  # fmt: skip


@pytest.mark.parametrize("name", [n for n, r in METHODS.items() if r.needs_teacher and not r.features])
def test_every_logit_method_takes_the_mean_at_its_own_temperature(name):
    settings, temperature = TEMPERATURES[name]
    loss = build_method(name, Pair(teachers=2), **settings)
    seen = loss(out(S), out(torch.full_like(T, torch.nan), **{MEMBERS: BOTH}), batch(Y)).total
    expected = loss(out(S), out(mean_logits(BOTH, temperature)), batch(Y)).total
    assert seen.item() == pytest.approx(expected.item(), abs=1e-12)
    assert "mean softmax of 2 teachers" in loss.formula


def test_terms_of_one_loss_have_their_own():
    s, t, y = large()
    members = torch.stack([t, s.flip(0)])
    settings = {"kd.T": 4.0, "dist.T": 1.0}
    both = build_method("kd+dist", Pair(teachers=2), **settings)(out(s), out(t, **{MEMBERS: members}), batch(y))
    for part, temperature in (("loss_kd", 4.0), ("loss_inter", 1.0)):
        single = build_method("kd+dist", **settings)(out(s), out(mean_logits(members, temperature)), batch(y))
        assert both.parts[part].item() == pytest.approx(single.parts[part].item(), abs=1e-12)
