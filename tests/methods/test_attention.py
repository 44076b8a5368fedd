"""attention: by hand, against numpy, its limits."""

import numpy as np
import pytest
import torch
from methods.feature_nets import loss_of, networks, rows

from dist_kd.methods.attention import attention_loss, attention_map


def reference(student, teacher):
    """As the paper has it, p = 2: maps of mean squares over channels, each of length 1; mean squared difference."""
    values = []
    for s, t in zip(student.numpy(), teacher.numpy(), strict=True):
        q_s, q_t = (np.mean(f**2, axis=0).ravel() for f in (s, t))
        values.append(np.mean((q_s / np.linalg.norm(q_s) - q_t / np.linalg.norm(q_t)) ** 2))
    return values


def drawn(*channels, side=4, n=3):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(n, c, side, side, generator=generator, dtype=torch.float64) for c in channels]


def test_by_hand():
    maps = torch.tensor([[[[1.0, 0.0]], [[1.0, 2.0]]]])  # squares averaged: 1 and 2
    assert attention_map(maps)[0].tolist() == pytest.approx([1 / 5**0.5, 2 / 5**0.5])
    flat = torch.tensor([[[[1.0, 1.0]]]])
    expected = ((1 / 5**0.5 - 0.5**0.5) ** 2 + (2 / 5**0.5 - 0.5**0.5) ** 2) / 2
    assert attention_loss(maps, flat).tolist() == pytest.approx([expected])


def test_equals_numpy_with_other_channels():
    student, teacher = drawn(3, 7)
    assert attention_loss(student, teacher).tolist() == pytest.approx(reference(student, teacher), abs=1e-14)


def test_scale_does_not_matter():
    student, teacher = drawn(3, 7)
    expected = attention_loss(student, teacher)
    assert torch.allclose(attention_loss(1e3 * student, 1e-3 * teacher), expected, atol=1e-14)
    tiny, huge = (
        attention_loss(1e-18 * student.float(), teacher.float()),
        attention_loss(1e18 * student.float(), teacher),
    )
    assert torch.allclose(tiny.double(), expected, rtol=1e-4) and torch.allclose(huge.double(), expected, rtol=1e-4)
    assert attention_loss(teacher, 5 * teacher).abs().max() < 1e-15


def test_gradcheck_and_dead_maps():
    student, teacher = drawn(2, 3, side=3)
    assert torch.autograd.gradcheck(attention_loss, (student.requires_grad_(), teacher))
    dead = torch.zeros(1, 2, 3, 3, requires_grad=True)
    loss = attention_loss(dead, teacher[:1].float())
    loss.sum().backward()
    assert loss.isfinite().all() and dead.grad.isfinite().all()


def test_stages_are_summed_and_the_larger_map_is_averaged_down():
    student, teacher = networks()
    teacher_b = networks(teacher=(4, 8))[1]  # sides 4, 2 beside 4, 2, 1
    for other, pairs in ((teacher, "123"), (teacher_b, "12")):
        loss = loss_of("attention", student, other)
        ours, theirs = student(rows().images), other(rows().images)
        found = loss(ours, theirs, rows()).parts["loss_attention"].item()
        stages = [f"stage{k}" for k in pairs]
        expected = sum(attention_loss(ours.features[s], theirs.features[s]).mean().item() for s in stages)
        assert found == pytest.approx(expected, rel=1e-6)
    larger = networks(teacher=(4, 8))[1]
    larger.side = 32  # it sees views of 32 px: no side is the same, the last belong together
    loss = loss_of("attention", student, larger)
    assert "stage2-stage1, stage3-stage2" in loss.formula
    big = torch.nn.functional.interpolate(rows().images, size=32)
    ours, theirs = student(rows().images), larger(big)
    pooled = [torch.nn.functional.adaptive_avg_pool2d(theirs.features[f"stage{k}"], 3 - k) for k in (1, 2)]
    expected = sum(attention_loss(ours.features[f"stage{k + 2}"], pooled[k]).mean().item() for k in (0, 1))
    assert loss(ours, theirs, rows()).parts["loss_attention"].item() == pytest.approx(expected, rel=1e-6)


def test_torch_compile():
    student, teacher = drawn(3, 7)
    compiled = torch.compile(attention_loss, fullgraph=True, backend="aot_eager")
    assert torch.allclose(compiled(student, teacher), attention_loss(student, teacher))
