"""rkd: against plain loops, by hand, its limits, and one row."""

import itertools

import numpy as np
import pytest
import torch
from methods.feature_nets import loss_of, networks, rows

from dist_kd.errors import ConfigError
from dist_kd.methods.rkd import rkd_losses


def smooth_l1(a, b):
    gap = abs(a - b)
    return 0.5 * gap**2 if gap < 1 else gap - 0.5


def reference(student, teacher, weights):
    """The paper's sums in loops: psi_D over pairs, normalized by their mean; psi_A the cosine at the middle row."""
    n, w = len(weights), weights.tolist()
    distances, cosines = [], []
    for x in (student.numpy(), teacher.numpy()):
        d = np.array([[np.linalg.norm(a - b) for b in x] for a in x])
        good = [d[i, j] for i, j in itertools.permutations(range(n), 2) if w[i] and w[j]]
        distances.append(d / np.mean(good))
        unit = lambda v: v / np.linalg.norm(v) if np.linalg.norm(v) else v  # noqa: E731
        cosines.append({
            (i, j, k): unit(x[i] - x[j]) @ unit(x[k] - x[j]) for i, j, k in itertools.product(range(n), repeat=3)
        })  # fmt: skip
    pairs, triples = (list(itertools.product(range(n), repeat=r)) for r in (2, 3))
    distance = sum(w[i] * w[j] * smooth_l1(distances[0][i, j], distances[1][i, j]) for i, j in pairs)
    angle = sum(np.prod([w[m] for m in ijk]) * smooth_l1(cosines[0][ijk], cosines[1][ijk]) for ijk in triples)
    return distance / n**2, angle / n**3


def drawn(n=6, widths=(3, 5)):
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(n, width, generator=generator, dtype=torch.float64) for width in widths)
    return s, t, torch.ones(n, dtype=torch.float64)


def values(*given):
    return [value.item() for value in rkd_losses(*given)]


@pytest.mark.parametrize("bad", [[], [1], [0, 4]])
def test_equals_plain_loops(bad):
    s, t, w = drawn()
    w[bad] = 0
    assert values(s, t, w) == pytest.approx(reference(s, t, w), abs=1e-12)


def test_by_hand():
    """A right angle with equal sides beside three points on a line, one step apart."""
    s = torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    t = torch.tensor([[0.0], [1.0], [2.0]], dtype=torch.float64)
    mean_s, mean_t = (2 + 2**0.5) / 3, 4 / 3
    gaps = [1 / mean_s - 1 / mean_t, 1 / mean_s - 2 / mean_t, 2**0.5 / mean_s - 1 / mean_t]
    distance = 2 * sum(0.5 * gap**2 for gap in gaps) / 9
    # cosines at rows 0, 1, 2: student 0, 1/sqrt2, 1/sqrt2; teacher 1, -1, 1; each twice, for both orders of the legs
    root = 0.5**0.5
    angle = 2 * (0.5 + (root + 1 - 0.5) + 0.5 * (1 - root) ** 2) / 27
    assert values(s, t, torch.ones(3, dtype=torch.float64)) == pytest.approx([distance, angle], abs=1e-14)


def test_invariance():
    s, t, w = drawn()
    expected = values(s, t, w)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64))[0]
    assert values(4 * s @ turn + 3, 0.1 * t - 5, w) == pytest.approx(expected, abs=1e-12)
    assert values(t, 2 * t + 1, w) == pytest.approx([0, 0], abs=1e-15)


def test_gradcheck():
    s, t, w = drawn(5)
    w[2] = 0
    assert torch.autograd.gradcheck(lambda x: sum(rkd_losses(x, t, w)), (s[:5].requires_grad_(),))


def test_rows_that_are_the_same():
    s, t, w = drawn()
    s[3], t[3] = s[0], t[0]  # a sample beside itself
    s = s.requires_grad_()
    sum(rkd_losses(s, t, w)).backward()
    assert s.grad.isfinite().all() and values(s.detach(), t, w) == pytest.approx(reference(s.detach(), t, w), abs=1e-12)
    collapsed = torch.ones(4, 3, requires_grad=True)
    total = sum(rkd_losses(collapsed, t[:4].float(), torch.ones(4)))
    total.backward()
    assert total.isfinite() and collapsed.grad.abs().max() == 0


@pytest.mark.parametrize("good", [0, 1])
def test_too_few_good_rows_cost_nothing(good):
    s, t, w = drawn()
    w[good:] = 0
    s.requires_grad_()
    distance, angle = rkd_losses(s, t, w)
    (distance + angle).backward()
    assert distance.item() == angle.item() == 0 and s.grad.abs().max() == 0


def test_one_row_is_refused():
    student, teacher = networks()
    loss = loss_of("rkd", student, teacher)
    assert loss.coupled == ("rkd",)
    b = rows(1)
    with pytest.raises(ConfigError, match="only `1` row runs at a time; use a larger --device-batch-size"):
        loss(student(b.images), teacher(b.images), b)


def test_published_weights():
    student, teacher = networks()
    terms = loss_of("rkd", student, teacher)(student(rows().images), teacher(rows().images), rows())
    parts = terms.parts
    expected = parts["loss_ce"] + 25 * parts["loss_rkd_distance"] + 50 * parts["loss_rkd_angle"]
    assert terms.total.item() == pytest.approx(expected.item(), rel=1e-6)
    assert parts["loss_rkd_angle"] > 0


def test_torch_compile():
    s, t, w = drawn()
    compiled = torch.compile(rkd_losses, fullgraph=True, backend="aot_eager")
    assert [value.item() for value in compiled(s, t, w)] == pytest.approx(values(s, t, w))
