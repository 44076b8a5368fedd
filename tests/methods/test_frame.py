"""What every method keeps, alone and added up: one cross-entropy, parts and weights, full precision, its gradients."""

from __future__ import annotations

import itertools

import pytest
import torch
from methods.golden import CE, S, T, Y, batch, large, out, run
from torch import nn

from dist_kd.contracts import Batch
from dist_kd.methods import METHODS, build_chosen, build_method, fields_of, needs_labels, parts_of, read_args
from dist_kd.methods.frame import Loss, Pair, Term
from dist_kd.tracking.keys import KEYS

NAMES = list(METHODS)
LOGITS = [name for name in NAMES if not METHODS[name].features]  # what needs no network around it
SUMS = [*LOGITS, "kd+dkd+dist+wttm+hard", "kd+soft_ce"]
STILL = {"dkd": {"warmup": 0.0}}  # at full strength from the first step


def still(method: str) -> dict:
    return {f"{name}.{k}": v for name in method.split("+") for k, v in STILL.get(name, {}).items()}


def graded(method: str, student, teacher, b: Batch) -> torch.Tensor:
    """The gradient of the loss with respect to the student's logits."""
    student = student.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(run(method, student, teacher, b, **still(method)).total, student)
    return gradient


@pytest.mark.parametrize("name", NAMES)
def test_a_row_tells_all_that_help_shows(name):
    row = METHODS[name]
    assert row.formula and row.when.endswith(".") and (row.paper or name == "ce")
    for setting, rule in row.settings.items():
        assert rule.text.endswith("."), f"{setting} is not explained"
        assert rule.check(rule.default) == rule.default
        assert rule.read(str(rule.default)) == rule.default
    assert {f"train/{part}" for part in parts_of(name)} <= KEYS.keys()


@pytest.mark.parametrize("method", SUMS)
def test_the_contract(method):
    s, t, y = large(5, 7, torch.float32)
    loss = build_method(method)
    student, teacher = s.clone().requires_grad_(), t.clone().requires_grad_()
    terms = loss(out(student), out(teacher) if loss.needs_teacher else None, batch(y))
    assert tuple(terms.parts) == parts_of(method)
    assert loss.needs_teacher == any(METHODS[name].needs_teacher for name in method.split("+"))
    assert "loss = " in loss.formula and loss.formula.isascii()
    assert terms.total.isfinite() and terms.total.shape == () and terms.total.dtype == torch.float32
    assert torch.equal(terms.logits, s) and not terms.logits.requires_grad
    assert not any(part.requires_grad for part in terms.parts.values())
    terms.total.backward()
    assert student.grad.isfinite().all()
    assert student.grad.abs().sum() > 0
    assert not list(loss.parameters()), "a logit method has nothing of its own to train"


@pytest.mark.parametrize("method", SUMS)
def test_gradcheck(method):
    s, t, y = large(4, 5)
    b = batch(y, weights=torch.tensor([1.0, 0.0, 1.0, 1.0]).double())
    loss = build_method(method, **still(method)).eval()
    assert torch.autograd.gradcheck(lambda z: loss(out(z), out(t), b).total, (s.requires_grad_(),))


@pytest.mark.parametrize("method", SUMS)
def test_rows_of_weight_0_contribute_nothing(method):
    s, t, y = large(6, 5)
    weights = torch.tensor([1.0, 0, 1, 1, 0, 1]).double()
    good = weights.bool()
    b = batch(y, weights)
    other = s.clone()
    other[~good] = 50.0 * torch.randn(2, 5, dtype=torch.float64)
    terms, wild = (run(method, z, t, b, **still(method)) for z in (s, other))
    assert wild.total.item() == pytest.approx(terms.total.item(), abs=1e-12)
    assert graded(method, s, t, b)[~good].abs().max() == 0
    # the divisor counts all rows: what the good ones alone cost, times their share
    alone = run(method, s[good], t[good], batch(y[good], torch.ones(4).double()), **still(method))
    assert terms.total.item() == pytest.approx(alone.total.item() * 4 / 6, abs=1e-12)
    none = run(method, s, t, batch(y, torch.zeros(6).double()), **still(method))
    assert none.total.item() == 0


@pytest.mark.parametrize("method", SUMS)
def test_a_batch_of_one(method):
    assert run(method, S[:1], T[:1], batch(Y[:1]), **still(method)).total.isfinite()


@pytest.mark.parametrize("method", SUMS)
def test_half_precision_is_only_of_the_logits(method):
    """Inside autocast, what is computed is what float32 gives for the same logits."""
    s, t, y = large(8, 6, torch.float32)
    s, t = s.bfloat16(), t.bfloat16()
    plain = run(method, s.float(), t.float(), batch(y), **still(method))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        lowered = run(method, s, t, batch(y), **still(method))
    assert torch.equal(lowered.total, plain.total)
    assert all(torch.equal(lowered.parts[part], plain.parts[part]) for part in plain.parts)


def test_pure_functions_compute_in_float32_wherever_they_are_called():
    from dist_kd.methods import dist, dkd, hard, kd, soft_ce, wttm

    s, t, y = large(8, 6, torch.float32)
    s, t, ones = s.bfloat16(), t.bfloat16(), torch.ones(8)
    calls = [
        lambda s, t: kd.kd_loss(s, t, 4.0),
        lambda s, t: sum(dkd.dkd_loss(s, t, y, 4.0)),
        lambda s, t: dist.inter_loss(s, t, 4.0),
        lambda s, t: dist.intra_loss(s, t, ones, 4.0),
        lambda s, t: wttm.wttm_loss(s, t, 0.1),
        lambda s, t: hard.hard_loss(s, t),
        lambda s, t: soft_ce.soft_ce_loss(s, t),
    ]
    for call in calls:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            lowered = call(s, t)
        assert lowered.dtype == torch.float32
        assert torch.equal(lowered, call(s.float(), t.float()))


@pytest.mark.parametrize("method", ["dkd", "dist", "wttm", "hard", "soft_ce", "kd+dist+wttm"])
def test_one_cross_entropy_and_each_part_with_its_weight(method):
    loss = build_method(method, **still(method))
    terms = run(method, **still(method))
    shares = {"kd": 1 - 0.9, "hard": 0.5}
    ce = min(shares.get(name, 1.0) for name in method.split("+")) if needs_labels(method) else 0
    weights = {part: w for term in loss.terms.values() for part, w in term.weights.items()}
    parts = {name: value.item() for name, value in terms.parts.items() if name != "loss_ce"}
    assert terms.total.item() == pytest.approx(ce * CE + sum(weights[k] * v for k, v in parts.items()), abs=1e-12)
    assert loss.formula.count("CE(labels, student)") == (1 if ce else 0)
    if ce:
        assert terms.parts["loss_ce"].item() == pytest.approx(CE, abs=1e-12)


def test_sums_add_terms():
    single = {name: run(name, **still(name)) for name in ("kd", "dist")}
    both = run("kd+dist")
    expected = single["kd"].total + single["dist"].total - CE  # of the two cross-entropies kd's smaller one stays
    assert both.total.item() == pytest.approx(expected.item(), abs=1e-12)
    assert run("kd+soft_ce").total.item() == pytest.approx(
        (single["kd"].total - 0.1 * CE + run("soft_ce").total).item(), abs=1e-12
    )


@pytest.mark.parametrize("name", LOGITS)
def test_every_setting_changes_the_loss(name):
    row = METHODS[name]
    usual = run(name, **still(name)).total.item()
    for setting, rule in row.settings.items():
        if setting == "warmup":
            continue
        value = not rule.default if isinstance(rule.default, bool) else 0.7 * rule.default
        assert run(name, **still(name) | {f"{name}.{setting}": value}).total.item() != pytest.approx(usual, abs=1e-6)


def test_label_smoothing_is_of_the_cross_entropy_alone():
    plain, smoothed = run("dist"), run("dist", label_smoothing=0.1)
    assert smoothed.parts["loss_inter"] == plain.parts["loss_inter"]
    assert smoothed.parts["loss_ce"] == run("ce", label_smoothing=0.1).parts["loss_ce"] != plain.parts["loss_ce"]
    assert "smoothed" not in build_method("soft_ce", label_smoothing=0.1).formula


def test_a_configuration_chooses_the_numbers():
    from dist_kd.config import Config

    config = Config(method="kd+dkd", T=3, w=0.25, label_smoothing=0.1, method_args="dkd.T=2.0,kd.standardize=true")
    loss = build_chosen(config)
    assert loss.formula == (
        "loss = 0.75 * CE(labels, student) + 0.25 * 3^2 * KL(standardized teacher || standardized student at T=3) + "
        "1 * 2^2 * TCKD + 8 * 2^2 * NCKD at T=2, labels smoothed by 0.1, dkd rising over 1 epochs"
    )
    assert read_args(config.method_args) == {"dkd.T": 2.0, "kd.standardize": True}
    assert fields_of("kd+dkd") == ("T", "w", "label_smoothing") and fields_of("soft_ce") == ()
    with pytest.raises(ValueError, match="at most 1"):
        build_method("kd", w=1.5)
    with pytest.raises(ValueError):
        build_method("kd+dkd", T=3)  # whose?


class Adapting(Term):
    """A method with adapter, bank and taps, as one on features is."""

    coupled = True

    def __init__(self, pair):
        super().__init__("2 * MSE", {"loss_x": 2.0}, ce=0.5)
        self.student_taps, self.teacher_taps = frozenset({"stage2"}), frozenset({"stage3"})
        self.adapter = nn.Linear(3, 4, dtype=torch.float32)
        self.register_buffer("bank", torch.zeros(pair.train_samples, 4))

    def forward(self, student, teacher, batch):
        assert student.features["stage2"].dtype == teacher.features["stage3"].dtype == torch.float32
        adapted = self.adapter(student.features["stage2"])
        assert adapted.dtype == torch.float32, "autocast is off"
        self.bank[batch.samples] = adapted.detach()
        return {"loss_x": (adapted - teacher.features["stage3"]).square().mean()}


def test_a_method_on_features_fits():
    torch.manual_seed(0)
    loss = Loss({"x": Adapting(Pair(train_samples=3))}, Pair())
    assert (loss.student_taps, loss.teacher_taps, loss.coupled) == ({"stage2"}, {"stage3"}, ("x",))
    assert loss.formula == "loss = 0.5 * CE(labels, student) + 2 * MSE"
    teacher_map = torch.randn(3, 4, dtype=torch.bfloat16, requires_grad=True).detach()
    feature = torch.randn(3, 3, dtype=torch.bfloat16, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        terms = loss(out(S, stage2=feature), out(T, stage3=teacher_map), batch())
    terms.total.backward()
    assert feature.grad.abs().sum() > 0 and loss.terms["x"].adapter.weight.grad.abs().sum() > 0
    state = loss.state_dict()
    assert set(state) == {"terms.x.adapter.weight", "terms.x.adapter.bias", "terms.x.bank"}
    assert state["terms.x.bank"].abs().sum() > 0


def test_a_warm_up_counts_rows_and_is_saved():
    """By whole steps: one process that accumulates, and two that do not, weigh every row of a step alike."""
    pair = Pair(train_samples=60, batch_size=6)
    loss = build_method("dkd", pair, warmup=0.5)  # 30 rows: 5 steps of two micro-batches
    full = run("dkd", warmup=0.0).total.item() - CE
    rises = []
    for _ in range(14):
        rises.append((loss(out(S), out(T), batch()).total.item() - CE) / full)
    expected = [min(1.0, step / 5) for step in range(7) for _ in range(2)]
    assert rises == pytest.approx(expected, abs=1e-6)
    other = build_method("dkd", pair, warmup=0.5)
    assert set(loss.state_dict()) == {"rows_seen"}
    other.load_state_dict(loss.state_dict())
    assert other.rows_seen == 42
    loss.eval()
    loss(out(S), out(T), batch())
    assert loss.rows_seen == 42
    assert not build_method("dkd", pair, warmup=0.0).state_dict() and not build_method("kd", pair).state_dict()


def test_mixed_labels():
    soft = torch.softmax(T, 1)
    for method in (name for name in LOGITS if not METHODS[name].hard_labels):
        mixed, plain = run(method, rows=batch(soft=soft)), run(method)
        same = {p for p in plain.parts if torch.equal(plain.parts[p], mixed.parts[p])}
        assert set(plain.parts) - same == ({"loss_ce"} if needs_labels(method) else set())
    with pytest.raises(AssertionError, match="refuses dkd"):
        run("dkd", rows=batch(soft=soft))


@pytest.mark.parametrize("name", LOGITS)
def test_a_loss_is_one_graph(name):
    """torch.compile takes it whole, forward and backward; the last step, to machine code, is left out for its time."""
    s, t, y = large(8, 6, torch.float32)
    loss = build_method(name, **still(name))
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    results = []
    for function in (loss, compiled):
        student = s.clone().requires_grad_()
        total = function(out(student), out(t), batch(y)).total
        total.backward()
        results.append((total.detach(), student.grad))
    assert torch.allclose(results[0][0], results[1][0], atol=1e-6)
    assert torch.allclose(results[0][1], results[1][1], atol=1e-6)


def test_names_of_parts_are_of_one_method_each():
    parts = list(itertools.chain.from_iterable(row.parts for row in METHODS.values()))
    assert len(set(parts)) == len(parts)
