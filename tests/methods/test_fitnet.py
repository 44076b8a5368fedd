"""fitnet: by hand, its limits, which maps it takes, and how it is refused."""

import pytest
import torch
from methods.feature_nets import loss_of, networks, pair_of, rows

from dist_kd.errors import ConfigError
from dist_kd.methods.fitnet import hint_loss, hint_pair


def test_by_hand():
    student = torch.tensor([[[[1.0, 2.0], [3.0, 4.0]]], [[[0.0, 0.0], [0.0, 0.0]]]])
    teacher = torch.tensor([[[[1.0, 0.0], [3.0, 7.0]]], [[[2.0, 2.0], [2.0, 2.0]]]])
    assert hint_loss(student, teacher).tolist() == [(4 + 9) / 4, 4.0]


def test_limits():
    student, teacher = torch.randn(2, 3, 4, 5, 5, dtype=torch.float64).unbind()
    assert hint_loss(teacher, teacher).tolist() == [0, 0, 0]
    assert torch.allclose(hint_loss(3 * student, 3 * teacher), 9 * hint_loss(student, teacher))
    assert torch.allclose(hint_loss(student + 1, teacher + 1), hint_loss(student, teacher))


def test_gradcheck():
    student, teacher = torch.randn(2, 2, 2, 3, 3, dtype=torch.float64).unbind()
    assert torch.autograd.gradcheck(hint_loss, (student.requires_grad_(), teacher))


def test_the_hint_is_the_middle_stage_and_may_be_chosen():
    pair = pair_of(*networks())
    assert hint_pair(pair, "", "") == ("stage2", "stage2")
    assert hint_pair(pair, "stage1", "") == ("stage1", "stage1")
    assert hint_pair(pair, "", "stage3") == ("stage3", "stage3")
    assert hint_pair(pair, "pre_relu1", "stage3") == ("pre_relu1", "stage3")
    with pytest.raises(ConfigError, match=r"student_tap is `pre_relu1`, which is none of.*give teacher_tap too"):
        hint_pair(pair, "pre_relu1", "")


def test_a_vector_is_no_map():
    with pytest.raises(ConfigError, match=r"student_tap is `pooled`, whose shape is \(5,\)"):
        loss_of("fitnet", *networks(), student_tap="pooled", teacher_tap="stage3")


def test_channels_and_sides_that_differ():
    """The larger map is averaged down; channels are regressed only where they differ."""
    student, teacher = networks()
    same = loss_of("fitnet", student, teacher, student_tap="stage1", teacher_tap="stage1")
    assert not list(same.parameters()) and "MSE(student stage1, teacher stage1)" in same.formula
    for ours, theirs in (("stage1", "stage3"), ("stage3", "stage1")):
        loss = loss_of("fitnet", student, teacher, student_tap=ours, teacher_tap=theirs).eval()
        features, hints = student(rows().images).features, teacher(rows().images).features
        term = loss.terms["fitnet"]
        part = loss(student(rows().images), teacher(rows().images), rows()).parts["loss_fitnet"]
        small = lambda maps: maps.unflatten(2, (1, -1)).unflatten(4, (1, -1)).mean(dim=(3, 5))  # noqa: E731 - 1 x 1
        expected = (term.regressor(small(features[ours])) - small(hints[theirs])).square().mean()
        assert part.item() == pytest.approx(expected.item(), rel=1e-5)


def test_weight_in_the_total():
    student, teacher = networks()
    loss = loss_of("fitnet", student, teacher, weight=7.0, ce=0.5).eval()
    terms = loss(student(rows().images), teacher(rows().images), rows())
    expected = 0.5 * terms.parts["loss_ce"] + 7 * terms.parts["loss_fitnet"]
    assert terms.total.item() == pytest.approx(expected.item(), rel=1e-6)
