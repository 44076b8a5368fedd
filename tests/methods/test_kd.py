"""ce and kd: golden values computed by an independent float64 program, exact limits, gradients, timm as an oracle."""

import pytest
import torch
from methods.golden import CE, S, T, Y, batch, out, run

from dist_kd.config import Config
from dist_kd.methods import METHODS, build_method
from dist_kd.methods.ce import cross_entropy
from dist_kd.methods.frame import Pair
from dist_kd.methods.kd import kd_loss, standardized


def test_cross_entropy_golden():
    assert cross_entropy(S, batch()).mean().item() == pytest.approx(CE, abs=1e-12)


@pytest.mark.parametrize(
    ("temperature", "value"),
    [
        (1, 0.579200593986369),
        (3, 0.946430557471276),
        (4, 0.997136356689236),
        (5, 1.02545186390551),
        (20, 1.09644036654074),
        (1000, 1.1142494),
    ],
)
def test_kd_golden(temperature, value):
    assert kd_loss(S, T, temperature).mean().item() == pytest.approx(value, abs=1e-6 if temperature == 1000 else 1e-12)


# the losses of four published projects, as their code computes them: w is the weight of the soft term in each
PUBLISHED = [
    ({"T": 20.0, "w": 0.1}, 0.433986699636115),  # junia3/Knowledge-Distillation-With-Pytorch
    ({"T": 5.0, "w": 0.8}, 0.892437638453753),  # hee9joon/Knowledge-Distillation
    ({"T": 3.0, "w": 0.8, "class_mean": True}, 0.261362258823598),  # ooodragon94/KD: KLDivLoss's default reduction
    ({"T": 5.0, "w": 0.7, "t_squared": False}, 0.136826873183368),  # Fronik-Lihaotian/knowledgeDistillation
]


@pytest.mark.parametrize(("settings", "value"), PUBLISHED)
def test_published_recipes_golden(settings, value):
    assert run("kd", **settings).total.item() == pytest.approx(value, abs=1e-12)


def test_what_the_published_recipes_leave_out_is_a_factor():
    full = kd_loss(S, T, 5)
    assert torch.allclose(full, 25 * kd_loss(S, T, 5, t_squared=False), atol=1e-12)
    assert torch.allclose(full, 4 * kd_loss(S, T, 5, class_mean=True), atol=1e-12)
    assert run("kd", w=0.9, weight=10.0).total.item() == pytest.approx(
        0.1 * CE + 9 * run("kd", w=0.9).parts["loss_kd"].item(), abs=1e-12
    )


def test_standardized_golden_and_invariant():
    assert kd_loss(S, T, 2, standardize=True).mean().item() == pytest.approx(0.416524817279659, abs=1e-12)
    moved = kd_loss(3 * S + 7, 0.5 * T - 2, 2, standardize=True)
    assert torch.allclose(moved, kd_loss(S, T, 2, standardize=True), atol=1e-6)
    assert kd_loss(T, 2 * T + 1, 2, standardize=True).abs().max() < 1e-6  # the same but for scale
    assert torch.equal(standardized(S).argmax(1), S.argmax(1))
    constant = torch.zeros(2, 4, requires_grad=True)  # a head that starts at zero
    kd_loss(constant, T[:2].float(), 2, standardize=True).sum().backward()
    assert constant.grad.isfinite().all()


@pytest.mark.parametrize("name", METHODS["kd"].short)
def test_the_table_says_what_the_configuration_says(name):
    rule, field = METHODS["kd"].settings[name], Config.model_fields[name]
    limits = {k: getattr(m, k) for m in field.metadata for k in ("gt", "ge", "lt", "le") if hasattr(m, k)}
    assert rule.default == field.default
    assert limits == {k: getattr(rule, k) for k in ("gt", "ge", "lt", "le") if getattr(rule, k) is not None}


@pytest.mark.parametrize(
    ("classes", "settings", "warned"),
    [
        (1000, {"T": 4.0, "w": 0.9}, True),
        (1000, {"T": 3.0, "w": 0.8}, True),
        (1000, {"T": 2.9, "w": 0.8}, False),
        (1000, {"T": 4.0, "w": 0.79}, False),
        (100, {"T": 4.0, "w": 0.9}, False),
        (1000, {"T": 4.0, "w": 0.9, "class_mean": True}, False),
    ],
)
def test_a_recipe_that_is_known_to_harm_is_told(classes, settings, warned):
    said = " ".join(build_method("kd", Pair(num_classes=classes), **settings).warnings)
    assert ("--config imagenet_dist" in said and "78.0 to 77.4" in said) == warned


def test_large_temperature_is_logit_regression():
    centred = lambda z: z - z.mean(1, keepdim=True)  # noqa: E731
    limit = ((centred(S) - centred(T)) ** 2).sum(1).mean() / (2 * 4)
    assert limit.item() == pytest.approx(1.11458333333333, abs=1e-12)
    assert kd_loss(S, T, 1e4).mean().item() == pytest.approx(limit.item(), abs=1e-4)


def test_equal_logits_cost_nothing_and_shifts_do_not_matter():
    assert kd_loss(T, T, 4).abs().max() < 1e-15
    assert torch.allclose(kd_loss(S + 7, T - 3, 4), kd_loss(S, T, 4), atol=1e-12)


def test_gradient_rows_sum_to_zero():
    student = S.clone().requires_grad_()
    kd_loss(student, T, 4).sum().backward()
    assert student.grad.sum(1).abs().max() < 1e-12


@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize(("name", "settings"), [("ce", {"label_smoothing": 0.1}), ("kd", {"T": 3, "w": 0.7})])
def test_gradcheck_in_float64(name, settings, soft):
    method = build_method(name, **settings)
    b = batch(soft=torch.softmax(T, 1) if soft else None, weights=torch.tensor([1.0, 0.0, 1.0]).double())
    assert torch.autograd.gradcheck(lambda s: method(out(s), out(T), b).total, (S.clone().requires_grad_(),))


def test_temperature_and_weight_change_the_loss():
    totals = {run("kd", T=t, w=w).total.item() for t in (1, 4) for w in (0.1, 0.9)}
    assert len(totals) == 4
    assert run("kd", T=4, w=0).total.item() == pytest.approx(run("ce").total.item(), abs=1e-12)


def test_weights_silence_rows_but_the_divisor_counts_them():
    b = batch(weights=torch.tensor([1.0, 0.0, 1.0]).double())
    per_sample = cross_entropy(S, b)
    assert run("ce", rows=b).total.item() == pytest.approx(((per_sample[0] + per_sample[2]) / 3).item(), abs=1e-12)
    per_sample = kd_loss(S, T, 4)
    assert run("kd", T=4, w=1, rows=b).total.item() == pytest.approx(((per_sample[0] + per_sample[2]) / 3).item())


def test_soft_labels_and_smoothing_by_hand():
    soft = torch.tensor([[0.25, 0.75, 0, 0], [0, 0, 1, 0], [0.5, 0, 0, 0.5]], dtype=torch.float64)
    expected = -(soft * S.log_softmax(1)).sum(1).mean().item()
    assert run("ce", rows=batch(soft=soft)).total.item() == pytest.approx(expected, abs=1e-12)
    hard = torch.nn.functional.one_hot(Y, 4).double() * 0.9 + 0.1 / 4
    expected = -(hard * S.log_softmax(1)).sum(1).mean().item()
    assert run("ce", label_smoothing=0.1).total.item() == pytest.approx(expected, abs=1e-12)


def test_computed_in_float32_inside_autocast():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = run("kd", S.bfloat16(), T.bfloat16(), T=4, w=0.9)
    assert terms.total.dtype == torch.float32
    assert terms.total.item() == pytest.approx(run("kd", T=4, w=0.9).total.item(), rel=0.02)


def test_finite_at_a_logit_gap_of_200():
    s = torch.tensor([[0.0, 200.0, 0.0]], requires_grad=True)
    loss = kd_loss(s, torch.tensor([[200.0, 0.0, 0.0]]), 1.0)
    loss.sum().backward()
    assert loss.item() == pytest.approx(200, rel=1e-6)
    assert s.grad.isfinite().all()


def test_equals_timm():
    """timm's LogitDistillationTask, an independent implementation: (1 - w) * CE + w * T^2 * KL, batchmean."""
    task = pytest.importorskip("timm.task", exc_type=ImportError)

    class Fixed(torch.nn.Module):
        def __init__(self, logits):
            super().__init__()
            self.num_classes, self.in_chans = 4, 3
            self.pretrained_cfg = {"mean": (0.5,) * 3, "std": (0.5,) * 3}
            self.logits = torch.nn.Parameter(logits.float())

        def forward(self, x):
            return self.logits

    oracle = task.LogitDistillationTask(
        Fixed(S), Fixed(T), criterion=torch.nn.CrossEntropyLoss(), distill_loss_weight=0.9, task_loss_weight=0.1,
        temperature=4.0, verbose=False,
    )  # fmt: skip
    theirs = oracle(torch.zeros(3, 3, 8, 8), Y)["loss"].item()
    assert run("kd", S.float(), T.float(), T=4.0, w=0.9).total.item() == pytest.approx(theirs, abs=1e-6)
