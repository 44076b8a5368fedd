"""overhaul: margins against numerical integrals, partial L2 by hand and as published, limits, refusals."""

import math

import pytest
import torch
from methods.feature_nets import loss_of, networks, pair_of, rows
from scipy import integrate, stats

from dist_kd.errors import ConfigError
from dist_kd.methods import build_method
from dist_kd.methods.overhaul import margins, partial_l2


def margin(mean, std):
    return margins(torch.tensor([mean]).double(), torch.tensor([std]).double()).item()


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 2.0), (-3.0, 0.5), (2.0, 0.7), (-30.0, 0.2)])
def test_margins_are_the_mean_of_what_is_negative(mean, std):
    density = stats.norm(mean, std)
    low = mean - 12 * std
    above, below = (integrate.quad(f, low, 0, points=[min(mean, 0)], epsabs=1e-13)[0] for f in (
        lambda x: x * density.pdf(x), density.pdf,
    ))  # fmt: skip
    assert margin(mean, std) == pytest.approx(above / below, abs=1e-8)


def test_margins_in_known_and_extreme_cases():
    assert margin(0.0, 1.0) == pytest.approx(-math.sqrt(2 / math.pi), abs=1e-12)  # -0.7979
    assert margin(0.0, -1.0) == margin(0.0, 1.0)  # a batch norm's weight may be negative
    assert margin(10.0, 2.0) == -6.0  # P(x < 0) below 1 in 1,000: -3 deviations, as published
    # a channel that batch norm has switched off: its only value, or 0 where that is positive
    assert margin(-2.0, 0.0) == -2.0
    assert margin(2.0, 0.0) == 0.0 and margin(0.0, 0.0) == 0.0
    assert margin(-1.0, 1e-30) == pytest.approx(-1.0)
    assert margin(-100.0, 1e-3) == pytest.approx(-100.0)


def test_partial_l2_by_hand():
    m = torch.tensor([-1.0])
    #         t > 0     t > 0     t <= 0: the target is t or m, and only a student above it pays
    teacher = [2.0, 2.0, -0.5, -0.5, -3.0, -3.0]
    student = [1.0, 3.0, 0.5, -0.9, -0.5, -2.0]
    cost = [1.0, 1.0, 1.0, 0.0, 0.25, 0.0]
    as_map = lambda x: torch.tensor(x, dtype=torch.float64).view(-1, 1, 1, 1)  # noqa: E731
    assert partial_l2(as_map(student), as_map(teacher), m).tolist() == pytest.approx(cost)
    together = partial_l2(as_map(student).view(1, 1, 2, 3), as_map(teacher).view(1, 1, 2, 3), m)
    assert together.tolist() == pytest.approx([sum(cost)])


def drawn():
    generator = torch.Generator().manual_seed(0)
    s, t = (torch.randn(3, 4, 5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
    return s, t, torch.tensor([-0.8, -0.1, -2.0, 0.0], dtype=torch.float64)


def test_equals_the_published_cases():
    """Of the paper's equation: nothing where s <= t <= 0, else the squared distance; t already above the margin."""
    s, t, m = drawn()
    expected = torch.zeros(3, dtype=torch.float64)
    for b, c, i, j in torch.cartesian_prod(*map(torch.arange, s.shape)).tolist():
        target = max(t[b, c, i, j].item(), m[c].item())
        if not s[b, c, i, j].item() <= target <= 0:
            expected[b] += (s[b, c, i, j].item() - target) ** 2
    assert torch.allclose(partial_l2(s, t, m), expected, atol=1e-12)


def test_limits():
    s, t, m = drawn()
    below = m[:, None, None] - s.abs()
    assert partial_l2(below, below - 1, m).abs().max() == 0  # t <= m and s <= m
    assert torch.allclose(partial_l2(s, t.abs() + 0.1, m), (s - t.abs() - 0.1).square().flatten(1).sum(1))  # t > 0
    assert partial_l2(t.abs(), t.abs(), m).abs().max() == 0


def test_gradcheck():
    s, t, m = drawn()
    assert torch.autograd.gradcheck(lambda x: partial_l2(x, t, m), (s.requires_grad_(),))


def test_sums_do_not_overflow_in_half_precision():
    s = torch.full((1, 512, 8, 8), 30.0, dtype=torch.float16)
    assert partial_l2(s, -s, torch.zeros(512)).item() == 512 * 64 * 900


def test_stages_weigh_half_of_the_next():
    student, teacher = networks()
    loss = loss_of("overhaul", student, teacher).eval()
    ours, theirs = student(rows().images), teacher(rows().images)
    term = loss.terms["overhaul"]
    expected = 0.0
    for k, connector in enumerate(term.connectors):
        norm = teacher.norms[k]
        m = margins(norm.bias, norm.weight).float()
        name = f"pre_relu{k + 1}"
        expected += 2.0 ** (k - 2) * partial_l2(connector(ours.features[name]), theirs.features[name], m).mean().item()
    terms = loss(ours, theirs, rows())
    assert terms.parts["loss_overhaul"].item() == pytest.approx(expected, rel=1e-6)
    assert (terms.total - terms.parts["loss_ce"]).item() == pytest.approx(expected / 1000, rel=1e-4)
    assert loss.terms["overhaul"].margin0.dtype == torch.float32
    assert not any("margin" in name for name in loss.state_dict())  # follows from the teacher


def test_a_teacher_without_batch_norm_is_refused():
    student, teacher = networks()
    teacher.margin_norms = dict
    with pytest.raises(ConfigError, match=r"`large` \(--teacher-arch\) has none there"):
        loss_of("overhaul", student, teacher)


def test_teacher_batch_norm():
    """The option reaches the teacher, whose batch norms then take the batch's statistics and keep their own."""
    from dist_kd import models
    from dist_kd.teacher import Teacher

    student, teacher = networks()
    assert loss_of("overhaul", student, teacher, teacher_batch_norm=True).teacher_batch_norm
    assert not loss_of("overhaul", student, teacher).teacher_batch_norm
    torch.manual_seed(0)
    network = models.build("cnn_small", 5, "none", role="teacher")
    network.want(["pre_relu1"])
    prepared = Teacher(network, network.spec, image_size=network.spec.image_size)
    images = 3 + 2 * torch.randn(8, 3, network.spec.image_size, network.spec.image_size)
    norms = lambda: {k: v.clone() for k, v in prepared.network.named_buffers() if "running" in k}  # noqa: E731
    before, plain = norms(), prepared(images).features["pre_relu1"]
    prepared.use_batch_statistics()
    by_batch = prepared(images).features["pre_relu1"]
    tapped = by_batch.transpose(0, 1).flatten(1)
    assert tapped.mean(1).abs().max() < 1e-4 and (tapped.std(1) - 1).abs().max() < 0.01
    assert plain.mean() != by_batch.mean()
    after = norms()
    assert before and all(torch.equal(before[name], after[name]) for name in before)


FAMILIES = [  # student, teacher, pairs before ReLU
    ("resnet8x4_cifar", "resnet20_cifar", "11 22 33"),
    ("vgg8_cifar", "wrn_16_2_cifar", "11 22 33"),
    ("cnn_small", "resnext29_2x64d_cifar", "12 23"),
    ("cnn_small", "densenet40_cifar", "12 23"),
    ("mobilenet_v2_cifar", "cnn_medium", "21 32 43"),
    ("cnn_small", "mobilenet_v2_cifar", "12 23 34"),
    ("efficientnet_b0_cifar", "cnn_medium", "21 32 43"),
    ("cnn_small", "efficientnet_b0_cifar", "12 23 34"),
]


@pytest.mark.parametrize(("student_name", "teacher_name", "pairs"), FAMILIES)
def test_families_of_networks(student_name, teacher_name, pairs):
    """Every adapter and every weight of the student gets a gradient, so that DDP waits for none in vain."""
    from dist_kd import models

    torch.manual_seed(0)
    student, teacher = (models.build(n, 5, "none", role="student") for n in (student_name, teacher_name))
    loss = build_method("overhaul+reviewkd", pair_of(student, teacher))
    student.want(loss.student_taps)
    teacher.want(loss.teacher_taps)
    found = [(one.student, one.teacher) for one in loss.terms["overhaul"].pairs]
    assert found == [(f"pre_relu{a}", f"pre_relu{b}") for a, b in pairs.split()]
    b = rows(2)._replace(images=torch.randn(2, 3, 32, 32))
    with torch.no_grad():
        theirs = teacher(b.images)
    loss(student(b.images), theirs, b).total.backward()
    for name, parameter in [*student.named_parameters(), *loss.named_parameters()]:
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
