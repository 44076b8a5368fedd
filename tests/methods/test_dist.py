"""dist: golden values, an independent program, exact limits; two processes make one of twice the size."""

import json
from pathlib import Path

import pytest
import torch
from dist.launching import launch
from methods.golden import S, T, batch, large, run

from dist_kd.methods.dist import inter_loss, intra_loss

ONES = torch.ones(3, dtype=torch.float64)


def reference(s, t, temperature, eps):
    """As published: Pearson as the cosine of centred vectors, eps beside the norms."""

    def cosine(a, b):
        return (a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1) + eps)

    def pearson(a, b):
        return cosine(a - a.mean(1, keepdim=True), b - b.mean(1, keepdim=True))

    s, t = ((z / temperature).softmax(1) for z in (s, t))
    return [temperature**2 * (1 - pearson(a, b).mean()).item() for a, b in ((s, t), (s.T, t.T))]


def ours(s, t, temperature):
    weights = torch.ones(len(s), dtype=s.dtype)
    return [inter_loss(s, t, temperature).mean().item(), intra_loss(s, t, weights, temperature).item()]


@pytest.mark.parametrize(
    ("temperature", "golden"),
    [(1, [0.481689821881955, 0.783581167208388]), (4, [8.64966714199948, 11.6799792684583])],
)
def test_golden(temperature, golden):
    # the golden values have the published eps; without it they are ours
    assert reference(S, T, temperature, 1e-8) == pytest.approx(golden, abs=2e-6)
    assert ours(S, T, temperature) == pytest.approx(golden, abs=4e-6)
    assert ours(S, T, temperature) == pytest.approx(reference(S, T, temperature, 0), abs=1e-11)


def test_equals_the_published_program_on_many_rows():
    s, t, _ = large(128, 50)
    assert ours(s, t, 1) == pytest.approx(reference(s, t, 1, 0), abs=1e-11)


def test_equal_and_opposite():
    s, t, _ = large()
    assert ours(t, t, 4) == pytest.approx([0, 0], abs=1e-12)
    two = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).double()
    assert ours(two, -two, 3) == pytest.approx([18, 18], abs=1e-9)  # the upper limit 2 T^2
    total = run("dist", two, -two, batch(torch.tensor([0, 1])), T=3.0, b=1.5, g=0.5, ce=0.0).total.item()
    assert total == pytest.approx(2 * 9 * (1.5 + 0.5), abs=1e-9)
    found = ours(s, t, 4)
    assert all(0 <= value <= 2 * 16 for value in found)


def test_one_row_has_no_columns_to_compare():
    s = S[:1].clone().requires_grad_()
    loss = intra_loss(s, T[:1], ONES[:1], 4)
    loss.backward()
    assert loss.item() == 16 and s.grad.abs().max() == 0


def test_constant_columns_and_rows_cost_1_without_gradient():
    s = S[:1].repeat(3, 1).requires_grad_()  # every row the same
    loss = intra_loss(s, T, ONES, 1)
    loss.backward()
    assert loss.item() == pytest.approx(1, abs=1e-12) and s.grad.abs().max() == 0
    flat = torch.zeros(3, 4, dtype=torch.float32, requires_grad=True)  # a head that starts at zero
    loss = inter_loss(flat, T.float(), 1).sum()
    loss.backward()
    assert loss.item() == 3 and flat.grad.abs().max() == 0


def test_float32_resolves_small_spreads():
    """An untrained student on 1,000 classes: each probability is 0.001 and varies by a hundredth of that."""
    generator = torch.Generator().manual_seed(0)
    s, t = (0.01 * torch.randn(256, 1000, generator=generator, dtype=torch.float64) for _ in range(2))
    t += s
    assert ours(s.float(), t.float(), 1) == pytest.approx(ours(s, t, 1), abs=2e-5)


def test_two_processes_are_one_of_twice_the_size(tmp_path):
    """Value and gradient, in float64, with bad rows; DDP's mean of both gradients is the gradient of the one loss."""
    said = launch("torchrun", "tests/methods/two_ranks.py", str(tmp_path))
    found = json.loads((Path(tmp_path) / "found.json").read_text())
    assert found["world"] == 2, said
    assert found["loss"] < 1e-12 and found["gradient"] < 1e-12, found
    assert found["rows"] < 1e-12 and found["rows_gradient"] < 1e-12, found
    # and by halves it would not be the same: the test can fail
    assert found["halves"] > 1e-3
    assert found["trained"] < 1e-6 and found["moved"] > 1e-3, found
