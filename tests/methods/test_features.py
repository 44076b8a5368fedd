"""What all methods over features keep: who gets gradients, damaged rows, half precision, saved state, two processes."""

import json
from pathlib import Path

import pytest
import torch
from dist.launching import launch
from methods.feature_nets import FEATURE_METHODS, Toy, loss_of, networks, pair_of, rows

from dist_kd.contracts import ModelOutput
from dist_kd.errors import ConfigError
from dist_kd.learner import Learner
from dist_kd.methods import METHODS, build_method, parts_of
from dist_kd.methods.stages import stage_pairs

SUM = "+".join(["kd", *FEATURE_METHODS])
ADAPTED = {"fitnet", "crd", "overhaul", "reviewkd"}


def test_these_are_all_methods_over_features():
    assert {name for name, row in METHODS.items() if row.features} == set(FEATURE_METHODS)


def asked(output: ModelOutput, taps) -> ModelOutput:
    return ModelOutput(output.logits, {name: output.features[name] for name in taps})


@pytest.mark.parametrize("name", [*FEATURE_METHODS, SUM])
def test_gradients_reach_student_and_adapters_only(name):
    student, teacher = networks()
    loss = loss_of(name, student, teacher)
    b = rows()
    theirs = teacher(b.images)
    theirs = ModelOutput(theirs.logits, {k: v.clone().requires_grad_() for k, v in theirs.features.items()})
    terms = loss(asked(student(b.images), loss.student_taps), asked(theirs, loss.teacher_taps), b)
    assert tuple(terms.parts) == parts_of(name) and terms.total.isfinite() and terms.total.dtype == torch.float32
    assert all(value > 0 for value in terms.parts.values())
    terms.total.backward()
    trained = [*student.head.parameters(), *student.convs.parameters()]
    assert all(p.grad is not None and p.grad.isfinite().all() for p in trained)
    adapters = dict(loss.named_parameters())
    assert bool(adapters) == (name in ADAPTED or name == SUM)
    assert all(p.grad is not None and p.grad.isfinite().all() for p in adapters.values())
    assert not any(p.requires_grad or p.grad is not None for p in teacher.parameters())
    assert not {id(p) for p in adapters.values()} & {id(p) for p in teacher.parameters()}


@pytest.mark.parametrize("name", FEATURE_METHODS)
def test_the_term_trains_the_student_without_labels(name):
    """With ce = 0 the gradient of the student's first layer is the term's alone, and is not 0."""
    student, teacher = networks()
    loss = loss_of(name, student, teacher, ce=0.0, **({"warmup": 0.0} if name == "reviewkd" else {}))
    loss(student(rows().images), teacher(rows().images), rows()).total.backward()
    assert student.convs[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("name", FEATURE_METHODS)
def test_rows_of_weight_0_contribute_nothing(name):
    """Adapters' batch norms at rest: in training, as in the student itself, all rows shape their statistics."""
    weights = torch.tensor([1.0, 0, 1, 1, 0, 1, 1, 1])
    found = []
    for noise in (0.0, 9.0):
        student, teacher = networks()
        loss = loss_of(name, student, teacher)
        for module in loss.modules():
            if isinstance(module, torch.nn.BatchNorm2d):
                module.eval()
        b = rows(weights=weights)
        b = b._replace(images=b.images + noise * (weights == 0)[:, None, None, None])
        loss(student(b.images), teacher(b.images), b).total.backward()
        found.append([p.grad for p in [*student.convs.parameters(), *loss.parameters()]] + list(loss.buffers()))
    assert len(found[0]) >= 6
    assert all(torch.allclose(a, c, atol=1e-6, equal_nan=True) for a, c in zip(*found, strict=True))


@pytest.mark.parametrize("name", FEATURE_METHODS)
def test_gradcheck_of_the_whole_loss(name):
    student, teacher = networks(dtype=torch.float64)
    loss = loss_of(name, student, teacher, **({"warmup": 0.0} if name == "reviewkd" else {}))
    student, teacher = student.double(), teacher.double()
    b = rows(4, dtype=torch.float64, weights=torch.tensor([1, 0, 1, 1]).double())
    loss(student(b.images), teacher(b.images), b)  # crd keeps the means of the first rows as constants
    loss.eval()
    with torch.no_grad():
        ours, theirs = asked(student(b.images), loss.student_taps), asked(teacher(b.images), loss.teacher_taps)
    names = sorted(ours.features)

    def total(*features):
        return loss(ModelOutput(ours.logits, dict(zip(names, features, strict=True))), theirs, b).total

    inputs = [ours.features[tap].clone().requires_grad_() for tap in names]
    assert torch.autograd.gradcheck(total, inputs, fast_mode=True)


@pytest.mark.parametrize("name", FEATURE_METHODS)
def test_in_full_precision_inside_autocast(name):
    results = []
    for half in (False, True):
        student, teacher = networks()
        loss = loss_of(name, student, teacher)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=half):
            terms = loss(student(rows().images), teacher(rows().images), rows())
        terms.total.backward()
        assert terms.total.dtype == torch.float32
        results.append(terms.total.item())
    assert results[1] == pytest.approx(results[0], rel=0.05)


@pytest.mark.parametrize("name", ["fitnet", "attention", "crd", "overhaul"])
def test_one_row_where_it_is_defined(name):
    student, teacher = networks((4, 6), (4, 8))  # sides 4 and 2: an adapter's batch norm has several values
    loss = loss_of(name, student, teacher)
    b = rows(1)
    terms = loss(student(b.images), teacher(b.images), b)
    terms.total.backward()
    assert terms.total.isfinite()


def test_all_that_grows_is_in_the_state():
    """Three steps, saved, restored into a loss of another seed, two more: as five steps in a row."""

    def step(student, teacher, loss, number):
        b = rows(8, 8 * number)
        optimizer = torch.optim.SGD([*student.parameters(), *loss.parameters()], lr=0.01)
        loss(student(b.images), teacher(b.images), b).total.backward()
        optimizer.step()
        optimizer.zero_grad()

    student, teacher = networks()
    loss = loss_of(SUM, student, teacher)
    for number in range(5):
        if number == 3:
            saved = [{k: v.clone() for k, v in part.state_dict().items()} for part in (student, loss)]
        step(student, teacher, loss, number)
    again, _ = networks()
    torch.manual_seed(99)
    restored = build_method(SUM, pair_of(again, teacher), **{"crd.negatives": 12})
    for part, state in zip((again, restored), saved, strict=True):
        part.load_state_dict(state)
    for number in (3, 4):
        step(again, teacher, restored, number)
    for ours, theirs in ((student, again), (loss, restored)):
        assert all(torch.equal(value, theirs.state_dict()[key]) for key, value in ours.state_dict().items())


def test_stages_of_equal_side_belong_together():
    def pairs(student, teacher, side=8):
        ours, theirs = networks(student, teacher)
        theirs.side = side
        return [(one.student, one.teacher) for one in stage_pairs(pair_of(ours, theirs), "stage", "attention")]

    same = [("stage1", "stage1"), ("stage2", "stage2")]
    assert pairs((4, 5), (4, 5)) == same
    assert pairs((4, 5, 6), (4, 5)) == same and pairs((4, 5), (4, 5, 6)) == same
    # the teacher sees views of 32 px: from the end
    assert pairs((4, 5, 6), (4, 5), side=64) == [("stage2", "stage1"), ("stage3", "stage2")]
    assert pairs((4,), (4, 5, 6), side=64) == [("stage1", "stage3")]


@pytest.mark.parametrize("name", ["fitnet", "attention", "overhaul", "reviewkd"])
@pytest.mark.parametrize("flag", ["--arch", "--teacher-arch"])
def test_a_network_without_stages_is_refused(name, flag):
    student, teacher = networks()
    bare: Toy = student if flag == "--arch" else teacher
    bare.taps = {"pooled": None}
    with pytest.raises(
        ConfigError, match=rf"--method `{name}` compares maps .* `{bare.spec.arch}` \({flag}\) has none"
    ):
        loss_of(name, student, teacher)


def test_learner_holds_the_adapters():
    student, teacher = networks()
    learner = Learner(student, loss_of(SUM, student, teacher))
    assert {id(p) for p in learner.method.parameters()} <= {id(p) for p in learner.parameters()}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    launch("torchrun", str(Path(__file__).parent / "feature_ranks.py"), str(folder), limit=120)
    found = json.loads((folder / "found.json").read_text())
    assert found["world"] == 2
    return found


@pytest.mark.parametrize("name", FEATURE_METHODS)
def test_two_processes_are_one_with_twice_the_rows(two_processes, name):
    """After four steps under DDP: loss, student, adapters and memories, the same on both ranks."""
    found = two_processes[name]
    assert found["loss"] < 1e-5 and found["student"] < 1e-5
    assert found["state"] < 1e-5 and found["ranks"] == 0
    assert found["moved"] > 1e-3
    if name in ("rkd", "crd"):
        assert found["alone"] > 1e-4  # half of the rows, or their memories alone, would be another loss
