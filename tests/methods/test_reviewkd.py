"""reviewkd: the context loss against numpy, the fusion by hand, the warm-up, one pixel and one row."""

import numpy as np
import pytest
import torch
from methods.feature_nets import loss_of, networks, rows
from torch.nn import functional as F

from dist_kd.errors import ConfigError
from dist_kd.methods.reviewkd import Fusion, context_loss


def reference(s, t):
    """Hierarchical context loss in numpy: levels of the map itself and of 4 x 4, 2 x 2, 1 x 1 averages."""
    total, weights, weight = np.mean((s - t) ** 2), 1.0, 1.0
    for side in (4, 2, 1):
        if side < s.shape[1]:
            step = s.shape[1] // side
            blocks = [x.reshape(len(x), side, step, side, step).mean(axis=(2, 4)) for x in (s, t)]
            weight /= 2
            weights += weight
            total += weight * np.mean((blocks[0] - blocks[1]) ** 2)
    return total / weights


def drawn(side, n=3, channels=4):
    generator = torch.Generator().manual_seed(side)
    return torch.randn(2, n, channels, side, side, generator=generator, dtype=torch.float64).unbind()


@pytest.mark.parametrize("side", [1, 2, 4, 8])
def test_equals_numpy(side):
    s, t = drawn(side)
    expected = [reference(a, b) for a, b in zip(s.numpy(), t.numpy(), strict=True)]
    assert context_loss(s, t).tolist() == pytest.approx(expected, abs=1e-14)


def test_limits_and_odd_sides():
    s, t = drawn(7)
    assert context_loss(t, t).abs().max() == 0
    assert torch.allclose(context_loss(s + 2, s), torch.full((3,), 4.0).double())  # every level sees the same gap
    pooled = [F.adaptive_avg_pool2d(s - t, side).square().mean(dim=(1, 2, 3)) for side in (4, 2, 1)]
    expected = ((s - t).square().mean(dim=(1, 2, 3)) + pooled[0] / 2 + pooled[1] / 4 + pooled[2] / 8) / 1.875
    assert torch.allclose(context_loss(s, t), expected, atol=1e-14)


def test_gradcheck():
    s, t = drawn(4, 2, 2)
    assert torch.autograd.gradcheck(context_loss, (s.requires_grad_(), t))
    fusion = Fusion(2, 3, 2, (4, 4), first=False).double().eval()
    later = torch.randn(2, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda a, b: context_loss(fusion(a, b)[0], t), (s, later))


def test_fusion_by_hand():
    fusion = Fusion(2, 3, 5, (8, 8), first=False).eval()
    maps, later = torch.randn(2, 2, 4, 4), torch.randn(2, 3, 2, 2)
    imitated, passed = fusion(maps, later)
    x = fusion.inward[1](fusion.inward[0](maps))
    y = later.repeat_interleave(2, 2).repeat_interleave(2, 3)  # nearest
    share = torch.sigmoid(fusion.attention(torch.cat([x, y], 1)))
    fused = x * share[:, 0:1] + y * share[:, 1:2]
    assert torch.allclose(passed, fused.repeat_interleave(2, 2).repeat_interleave(2, 3), atol=1e-6)
    assert torch.allclose(imitated, fusion.outward[1](fusion.outward[0](passed)), atol=1e-6)
    assert imitated.shape == (2, 5, 8, 8)
    first, _ = Fusion(2, 3, 5, (4, 4), first=True).eval()(maps, None)
    assert first.shape == (2, 5, 4, 4)


def test_it_rises_over_the_warm_up():
    """Epochs of 40 samples in batches of 8: after one of two epochs at half its weight."""
    student, teacher = networks()
    loss = loss_of("reviewkd", student, teacher, warmup=2.0, weight=3.0)
    ours, theirs = student(rows().images), teacher(rows().images)
    found = []
    for _ in range(12):
        terms = loss(ours, theirs, rows())
        found.append(((terms.total - terms.parts["loss_ce"]) / terms.parts["loss_reviewkd"]).item())
    assert found == pytest.approx([3 * min(1, k / 10) for k in range(12)], abs=1e-3)
    assert "rising over 2 epochs" in loss.formula and loss.state_dict()["rows_seen"] == 96


def test_one_row_is_refused_for_its_pooled_features():
    student, teacher = networks()
    b = rows(1)
    with pytest.raises(ConfigError, match="the micro-batch is `1` row and the map 1 x 1 pixel"):
        loss_of("reviewkd", student, teacher)(student(b.images), teacher(b.images), b)
