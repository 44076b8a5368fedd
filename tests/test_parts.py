"""Optimizer groups, the averaged student, and the learning rate the optimizer is given."""

import pytest
import torch
from torch import nn

from dist_kd.config import Config
from dist_kd.ema import Average
from dist_kd.experiment import DEFAULT_LR
from dist_kd.optimizer import make_optimizer, parameter_groups, set_lr


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))


def test_no_decay_on_norms_and_biases():
    decayed, plain = parameter_groups(net(), 0.1)
    assert [p.ndim for p in decayed["params"]] == [4, 2]
    assert [p.ndim for p in plain["params"]] == [1, 1, 1, 1]
    assert (decayed["weight_decay"], plain["weight_decay"]) == (0.1, 0.0)


@pytest.mark.parametrize("name", list(DEFAULT_LR))
def test_every_optimizer_moves_the_network(name):
    module = net()
    before = [p.detach().clone() for p in module.parameters()]
    optimizer = make_optimizer(Config(optimizer=name), module)
    set_lr(optimizer.param_groups, 0.01)
    module(torch.randn(5, 3, 3, 3)).square().sum().backward()
    optimizer.step()
    assert all(
        not torch.equal(b, p) for b, p in zip(before, module.parameters(), strict=True) if p.grad.abs().sum() > 0
    )
    assert {g["lr"] for g in optimizer.param_groups} == {0.01}


def test_the_head_learns_at_its_own_rate():
    module = net()
    optimizer = make_optimizer(Config(lr=0.1, head_lr=0.5, weight_decay=0.2), module, module[3].parameters())
    set_lr(optimizer.param_groups, 0.04)  # 0.4 of the highest
    rates = {id(p): (g["lr"], g["weight_decay"]) for g in optimizer.param_groups for p in g["params"]}
    assert [rates[id(p)] for p in module.parameters()] == [
        (pytest.approx(0.04), 0.2),
        *[(pytest.approx(0.04), 0.0)] * 3,
        (pytest.approx(0.2), 0.2),
        (pytest.approx(0.2), 0.0),
    ]


def test_what_is_frozen_is_in_no_group():
    module = net()
    module[0].requires_grad_(False)
    assert sum(len(g["params"]) for g in make_optimizer(Config(), module).param_groups) == 4


def test_sgd_is_nesterov_by_hand():
    p = nn.Parameter(torch.tensor([[1.0]]))
    module = nn.Module()
    module.p = p
    optimizer = make_optimizer(Config(lr=0.1, momentum=0.9, weight_decay=0), module)
    for _ in range(2):
        p.grad = torch.ones_like(p)
        optimizer.step()
    # v1 = 1, step 1 + .9; v2 = 1.9, step 1 + 1.71
    assert p.item() == pytest.approx(1 - 0.1 * 1.9 - 0.1 * 2.71)


def test_average_covers_buffers_and_warms_up():
    student = net()
    average = Average(student, 0.99)
    assert average.decay_at(0) == pytest.approx(0.1)
    assert average.decay_at(10_000) == 0.99
    start = average.network.state_dict()["1.running_mean"].clone()
    with torch.no_grad():
        student[1].running_mean += 1
        student[1].num_batches_tracked += 5
    average.update(student, step=0)
    after = average.network.state_dict()
    assert torch.allclose(after["1.running_mean"], start + 0.9)
    assert after["1.num_batches_tracked"] == 5
    assert not any(p.requires_grad for p in average.network.parameters())
