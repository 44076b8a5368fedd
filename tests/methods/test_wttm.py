"""wttm and ttm: golden values, and the ends of the power's range."""

import math

import pytest
import torch
from methods.golden import CE, S, T, run

from dist_kd.methods.kd import kd_loss
from dist_kd.methods.wttm import wttm_loss


@pytest.mark.parametrize(
    ("power", "ttm", "wttm"),
    [(0.25, 0.538571776864282, 1.30310998099381), (0.1, 0.640336835050994, 2.04069968413047)],
)
def test_golden(power, ttm, wttm):
    assert wttm_loss(S, T, power, weighted=False).mean().item() == pytest.approx(ttm, abs=1e-12)
    assert wttm_loss(S, T, power).mean().item() == pytest.approx(wttm, abs=1e-12)
    assert run("wttm", g=power, weight=3.0).total.item() == pytest.approx(CE + 3 * wttm, abs=1e-12)
    assert run("wttm", g=power, weighted=False).total.item() == pytest.approx(CE + ttm, abs=1e-12)


def test_power_1_is_kd_at_temperature_1():
    assert torch.allclose(wttm_loss(S, T, 1.0), kd_loss(S, T, 1), atol=1e-12)
    assert torch.allclose(wttm_loss(S, T, 1.0, weighted=False), kd_loss(S, T, 1), atol=1e-12)


def test_power_0_is_the_uniform_teacher():
    uniform = -S.log_softmax(1).mean(1) - math.log(4)
    assert torch.allclose(wttm_loss(S, T, 1e-9, weighted=False), uniform, atol=1e-8)
    assert torch.allclose(wttm_loss(S, T, 1e-9), 4 * uniform, atol=1e-7)


def test_shifts_do_not_matter():
    assert torch.allclose(wttm_loss(S + 5, T - 2, 0.2), wttm_loss(S, T, 0.2), atol=1e-12)
