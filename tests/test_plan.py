"""Derived numbers against hand arithmetic."""

import math

import pytest

from dist_kd.config import Config
from dist_kd.errors import ConfigError
from dist_kd.plan import due, make_plan, micro_batch_size


def plan(world_size=1, train_samples=1000, **settings):
    return make_plan(Config(**{"batch_size": 100, "epochs": 3, **settings}), world_size, train_samples)


def test_steps_are_whole_batches_of_an_epoch():
    p = plan(train_samples=1099)
    assert (p.steps_per_epoch, p.total_steps, p.eval_steps) == (10, 30, 10)
    assert plan(max_steps=4).total_steps == 4
    assert plan(epochs=0.25).total_steps == 2  # round(2.5) to even, as Python does


@pytest.mark.parametrize(
    ("rank_batch", "largest", "even", "micro"),
    [
        (100, 128, False, 100),
        (100, 64, False, 50),
        (96, 64, False, 48),
        (97, 64, False, 1),
        (6, 3, True, 2),
        (5, 5, True, 0),
    ],
)
def test_micro_batch_is_the_largest_divisor(rank_batch, largest, even, micro):
    assert micro_batch_size(rank_batch, largest, even) == micro


def test_layout_of_rows():
    p = plan(world_size=4, batch_size=64, device_batch_size=8)
    assert (p.rank_batch, p.micro_batch, p.accum_steps) == (16, 8, 2)
    assert p.first_row(rank=3, micro_step=1) == 3 * 16 + 8


@pytest.mark.parametrize(
    ("world_size", "settings", "words"),
    [
        (3, {}, ["`100`", "3 processes", "`99`", "`102`"]),
        (
            1,
            {"batch_size": 97, "device_batch_size": 64},
            ["97", "`--device-batch-size `97`".strip("`"), "less than half"],
        ),
        (1, {"batch_size": 2000}, ["`2000`", "1000 samples", "`1000`"]),
        (1, {"batch_size": 25, "mixup": 0.2}, ["pairs", "`24`", "`26`"]),
        (1, {"device_batch_size": 1, "mixup": 0.2}, ["at least 2"]),
        (1, {"warmup_epochs": 3}, ["30 steps"]),
        (1, {"schedule": "restarts", "lr_gamma": 0.5}, ["periods"]),
    ],
)
def test_refusals_name_numbers_that_work(world_size, settings, words):
    with pytest.raises(ConfigError) as error:
        plan(world_size, **settings)
    assert all(w in str(error.value) for w in words), str(error.value)


def test_learning_rates_at_the_ends():
    p = plan(lr=1.0, warmup_epochs=1, lr_floor=0.1)
    assert p.lr_at(0) == pytest.approx(0.1)
    assert p.lr_at(9) == pytest.approx(1.0)  # the last warm-up update is the peak
    assert p.lr_at(10) == pytest.approx(1.0)
    assert p.lr_at(20) == pytest.approx(0.55)  # half way down to 0.1
    assert p.lr_at(29) == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 19 / 20)))


def test_step_restarts_and_swing():
    p = plan(schedule="step", lr=1.0, lr_step_epochs=1, lr_gamma=0.1)
    assert [p.lr_at(k) for k in (9, 10, 20)] == pytest.approx([1, 0.1, 0.01])
    p = plan(schedule="restarts", lr=1.0, lr_step_epochs=1, lr_gamma=2)  # periods of 10, then 20 steps
    assert [p.lr_at(k) for k in (0, 5, 10, 20)] == pytest.approx([1, 0.5, 1, 0.5])
    p = plan(schedule="swing", lr=1.0, lr_step_epochs=1, lr_floor=0.2)  # 10 steps down, 10 up, 10 down
    assert [p.lr_at(k) for k in (0, 5, 10, 15, 20, 25)] == pytest.approx([1, 0.6, 0.2, 0.6, 1, 0.6])
    assert plan(schedule="constant", lr=0.3).lr_at(29) == 0.3


def test_evaluation_is_due_at_epoch_ends_and_at_the_end():
    p = plan(max_steps=14)
    assert [s for s in range(15) if p.eval_due(s)] == [10, 14]
    assert not due(0, 5)
    assert due(5, 5)
