"""A rank that is slow, and not hung, is named, and trains to the end."""

import pytest
import torch
from faults.two_ranks import LIMIT_S, STEPS, trouble

from dist_kd.contracts import World
from dist_kd.stragglers import AGAIN_S, Stragglers
from dist_kd.tracking.jsonl import read_metrics


@pytest.mark.slow
@pytest.mark.timeout(3 * LIMIT_S)
def test_a_slow_rank_is_named_once(origin, tmp_path):
    """Rank 1 takes 300 ms more for each batch."""
    run = tmp_path / "run"
    end = trouble(run, origin, "dawdle", at=0, expected=0)
    assert (end.status["state"], end.status["step"]) == ("done", STEPS)
    assert end.said.count("is slow: ") == 1 and "WARNING: rank 1 is slow: " in end.said
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["time/slowest_rank"] for line in lines] == [1.0] * (STEPS // 6)
    assert all(line["time/slowest_ms"] >= 300 for line in lines)
    assert all(line["time/median_ms"] < line["time/slowest_ms"] for line in lines)


def looks(stragglers: Stragglers, rows: list[list[float]], step_ms: float = 400.0):
    """What rank 0 is told when the ranks have these parts."""

    def reduce_sum(table: torch.Tensor) -> torch.Tensor:
        assert table[0].tolist() == rows[0] and not table[1:].any()
        return torch.tensor(rows, dtype=torch.float64)

    return stragglers.look(World(0, len(rows), 0, len(rows)), rows[0], step_ms, reduce_sum)


FAST, SLOW = [2.0, 30.0, 68.0], [150.0, 30.0, 70.0]


def test_the_slow_one_is_compared_with_the_median():
    stragglers = Stragglers()
    values, warning = looks(stragglers, [FAST, SLOW, FAST])
    assert values == {"time/slowest_rank": 1, "time/slowest_ms": 250.0, "time/median_ms": 100.0}
    assert warning is None  # the first window has compilation and other first times in it
    _, warning = looks(stragglers, [FAST, SLOW, FAST])
    assert warning == (
        "WARNING: rank 1 is slow: 250.0 ms of its own work a step (data 150.0, teacher 30.0, forward 70.0), the "
        "median rank 100.0 ms; all wait for it, 38 % of each step"
    )
    assert looks(stragglers, [FAST, SLOW, FAST])[1] is None  # said already
    assert "rank 2" in looks(stragglers, [FAST, FAST, SLOW])[1]
    stragglers._warned[1] -= AGAIN_S
    assert "rank 1" in looks(stragglers, [FAST, SLOW, FAST])[1]


def test_of_two_the_faster_one_is_the_median():
    stragglers = Stragglers()
    looks(stragglers, [FAST, SLOW])
    assert "the median rank 100.0 ms" in looks(stragglers, [FAST, SLOW])[1]


def test_little_is_not_worth_a_warning():
    stragglers = Stragglers()
    looks(stragglers, [FAST, FAST])
    assert looks(stragglers, [FAST, [2.0, 30.0, 110.0]])[1] is None  # 1.42 times
    assert looks(stragglers, [FAST, SLOW], step_ms=2000)[1] is None  # 7 % of a step
    assert looks(stragglers, [FAST], step_ms=100) == ({}, None)
