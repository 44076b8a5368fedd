"""hard: golden value, and the cross-entropy it becomes."""

import pytest
import torch
from methods.golden import CE, S, T, Y, batch, run

from dist_kd.methods.hard import hard_loss


def test_golden():
    assert run("hard", w=0.5).total.item() == pytest.approx(0.693714069980046, abs=1e-12)


def test_a_teacher_that_guesses_right_is_the_label():
    right = torch.nn.functional.one_hot(Y, 4).double() * 9
    assert hard_loss(S, right).mean().item() == pytest.approx(CE, abs=1e-12)
    assert run("hard", teacher=right, w=0.3).total.item() == pytest.approx(CE, abs=1e-12)


def test_only_the_first_guess_counts():
    assert torch.equal(hard_loss(S, T), hard_loss(S, 0.1 * T + 3))
    assert run("hard", w=1.0, rows=batch(torch.zeros(3).long())).total == run("hard", w=1.0).total
