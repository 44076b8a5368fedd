"""An update whose gradients are not finite changes nothing on any rank, and is counted; too many end the run."""

import json
import math

import pytest
import torch
from dist.launching import launch, world_size
from torch import nn

from dist_kd import checkpoint
from dist_kd.config import Config
from dist_kd.errors import DivergedError
from dist_kd.optimizer import make_optimizer
from dist_kd.tracking.jsonl import read_metrics
from dist_kd.train_state import TrainState
from dist_kd.updates import Updates

LIMIT = 200  # seconds for one start on a busy machine; an idle one takes ten
OPTIMIZERS = ["sgd", "adam", "amsgrad", "adamw", "rmsprop"]
NOBODY = -1


def train(run, data, poison, *more, launcher="torchrun", expected=0):
    said = launch(
        launcher, "tests/faults/poisoned.py", "--data", str(data), "--save-path", str(run), "--arch", "cnn_small",
        "--no-kd", "--image-size", "8", "--batch-size", "16", "--device-batch-size", "4", "--max-steps", "12",
        "--lr", "0.01", "--ema-decay", "0.9", "--log-steps", "3", "--checkpoint-steps", "4", "--eval-steps", "6",
        "--cpu", "--keep", "9", *more,
        expected=expected, limit=LIMIT, variables={"POISON": json.dumps(poison)},
    )  # fmt: skip
    assert world_size(run) == (1 if launcher == "plain" else 2)
    return said


def status(run):
    return json.loads((run / "status.json").read_text())


def last(run):
    found, refused = checkpoint.find(run / "checkpoints")
    assert not refused
    return checkpoint.load(found, "cpu")


def same(ours, theirs):
    """Bit for bit, but for the whole numbers that count forwards."""
    assert ours.keys() == theirs.keys()
    for stem, tensors in ours.items():
        for name, tensor in tensors.items():
            if tensor.is_floating_point():
                assert tensor.isfinite().all() and torch.equal(tensor, theirs[stem][name]), f"{stem}: {name}"


@pytest.mark.timeout(4 * LIMIT)
@pytest.mark.parametrize("precision", ["no", pytest.param("bf16", marks=pytest.mark.slow)])
def test_a_poisoned_rank_is_skipped_by_both(origin, tmp_path, precision):
    """NaN on rank 1 in the first step and in two others: as if these updates had been left out by hand."""
    steps, run, hand = [0, 6, 7], tmp_path / "run", tmp_path / "hand"
    words = ("--mixed-precision", precision, "--max-skipped-steps", "2")
    train(run, origin, {"rank": 1, "steps": steps, "dump": str(tmp_path / "state")}, *words)
    train(hand, origin, {"rank": NOBODY, "steps": steps, "drop": True}, *words)
    ours, theirs = last(run), last(hand)
    assert ours.state.step == 12
    same(ours.tensors, theirs.tensors)
    states = [torch.load(tmp_path / f"state.{rank}", weights_only=True) for rank in range(2)]
    parameters = [{k: v for k, v in state["model"].items() if "running" not in k} for state in states]
    same({"model": parameters[0]}, {"model": parameters[1]})
    same(*({"momentum": {str(k): v["momentum_buffer"] for k, v in s["optimizer"]["state"].items()}} for s in states))
    for buffer in (v for state in states for k, v in state["model"].items() if "running" in k):
        assert buffer.isfinite().all()
    assert (ours.state.skipped_steps, ours.state.skipped_in_a_row) == (3, 0)
    lines = [line for line in read_metrics(run / "metrics.jsonl") if line["kind"] == "train"]
    assert [line["train/skipped_steps"] for line in lines] == [1, 1, 3, 3]
    assert all(math.isfinite(line["train/loss"]) for line in lines)  # rank 0's rows of these steps count
    assert json.loads((run / "summary.json").read_text())["skipped"]["skipped_steps"] == 3
    assert status(run)["state"] == "done"


@pytest.mark.timeout(3 * LIMIT)
def test_too_many_in_a_row_end_the_run_and_a_resume_keeps_the_count(origin, tmp_path):
    run = tmp_path / "run"
    words = ("--mixed-precision", "no", "--max-skipped-steps", "3")
    said = train(run, origin, {"rank": 1, "steps": [2, *range(6, 12)]}, *words, expected=1)
    facts = status(run)
    assert (facts["state"], facts["kind"]) == ("failed", "diverged")
    for part in ("the gradients of step 10 are not finite", "4 step(s) in a row", "`3`", "on rank 1 (samples "):
        assert part in facts["message"]
    assert "rank 0" not in facts["message"]
    assert said.count("diverged error: ") == 1 and "exitcode  : 5 " in said
    before = last(run)
    assert (before.state.step, before.state.skipped_steps, before.state.skipped_in_a_row) == (8, 3, 2)
    best = checkpoint.best_of(run / "checkpoints")
    assert all(t.isfinite().all() for t in checkpoint.load(best, "cpu").tensors["model"].values())
    assert all(t.isfinite().all() for t in before.tensors["model"].values() if t.is_floating_point())
    # what the step of that checkpoint counted is still counted: one more, then a good one, then the end
    train(run, origin, {"rank": 1, "steps": [8]}, *words)
    after = last(run).state
    assert (after.step, after.skipped_steps, after.skipped_in_a_row) == (12, 4, 0)


@pytest.mark.timeout(2 * LIMIT)
def test_one_process_ends_with_the_code_for_divergence(origin, tmp_path):
    """With 0 the first one ends the run; told late, as by a GPU, it is the same step that is named."""
    poison = {"rank": 0, "steps": [1], "pending": 64}
    train(tmp_path, origin, poison, "--max-skipped-steps", "0", launcher="plain", expected=5)
    assert "the gradients of step 2 are not finite" in status(tmp_path)["message"]
    assert not list((tmp_path / "checkpoints").glob("step_*"))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4 * 36, 5)).to(
        memory_format=torch.channels_last
    )


def learn(updates, net, state, step, poison=None, scale=1.0):
    chance = torch.Generator().manual_seed(step)
    images = torch.randn(8, 3, 8, 8, generator=chance).to(memory_format=torch.channels_last)
    updates.begin()
    loss = net(images).square().mean()
    (loss * scale).backward()
    if poison is not None:
        list(net.parameters())[-1].grad[0] = poison
    updates.step(state, False, lambda: "")
    state.step += 1


def everything(net, updates):
    tensors = {k: v.clone() for k, v in net.state_dict().items() if v.is_floating_point()}
    for number, values in updates.optimizer.state_dict()["state"].items():
        tensors |= {f"{number} {k}": v.clone() for k, v in values.items() if isinstance(v, torch.Tensor)}
    return tensors


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_every_optimizer_leaves_everything_as_it_was(name, value):
    """The first step too, where torch's SGD would take what lies in memory for a momentum."""
    runs = []
    for poisoned in ([0, 2, 3], []):
        net, state = network(), TrainState()
        updates = Updates(make_optimizer(Config(optimizer=name, lr=0.01), net), net)
        good = 0
        for step in range(6):
            if step in (0, 2, 3) and not poisoned:
                continue
            before = everything(net, updates)
            learn(updates, net, state, step, value if step in poisoned else None)
            if step in poisoned and good:
                assert all(torch.equal(v, before[k]) for k, v in everything(net, updates).items())
            good += step not in poisoned
        assert state.skipped_steps == len(poisoned) and state.skipped_in_a_row == 0
        runs.append(everything(net, updates))
    assert runs[0].keys() == runs[1].keys()
    for key, tensor in runs[0].items():
        assert tensor.isfinite().all() and torch.equal(tensor, runs[1][key]), key


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_the_fused_form_is_the_same_formula(name):
    """Against torch's plain loop over parameters, in float64."""
    made = []
    for fused in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
        optimizer = make_optimizer(Config(optimizer=name, lr=0.01, weight_decay=0.1), net)
        if not fused:
            for group in optimizer.param_groups:
                group["fused"], group["foreach"] = False, False
        for step in range(4):
            chance = torch.Generator().manual_seed(step)
            net(torch.randn(8, 6, generator=chance, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
        made.append(net.state_dict())
    assert all(torch.allclose(tensor, made[1][key], rtol=1e-10, atol=1e-12) for key, tensor in made[0].items())


def test_the_state_of_a_form_that_is_not_fused_goes_on_fused():
    """A checkpoint of an older version says `fused: None`, by which the next step would not be skipped."""
    net = network()
    optimizer = make_optimizer(Config(), net)
    saved = optimizer.state_dict()
    saved["param_groups"] = [group | {"fused": None} for group in saved["param_groups"]]
    saved["state"] = {}  # of a checkpoint before the first step
    optimizer.load_state_dict(saved)
    assert all(group["fused"] is True for group in optimizer.param_groups)
    assert all((optimizer.state[p]["momentum_buffer"] == 0).all() for p in net.parameters())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_scaler_skips_and_counts_in_the_same_place(name):
    """What fp16 does on a GPU, by the scaler of the CPU: scaled, skipped, its scale halved, counted once."""
    results = []
    for scaled in (False, True):
        net, state = network(), TrainState()
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0) if scaled else None
        updates = Updates(make_optimizer(Config(optimizer=name, lr=0.01), net), net, scaler=scaler, clip_norm=1.0)
        if scaled:
            scaler.scale(torch.zeros(()))
        for step in range(4):
            scale = scaler.get_scale() if scaled else 1.0
            assert scale == (1.0 if not scaled else 8.0 if step < 2 else 4.0)
            learn(updates, net, state, step, math.nan if step == 1 else None, scale)
        assert (state.skipped_steps, state.skipped_in_a_row) == (1, 0)
        results.append(everything(net, updates))
        assert scaler is None or scaler.get_scale() == 4.0
    assert all(torch.allclose(t, results[1][k], rtol=1e-6, atol=1e-8) for k, t in results[0].items())


def test_what_is_told_late_is_the_same_and_names_the_same_step():
    """As on a GPU, where the host asks after many steps, at a log point or a save."""
    found = []
    for pending in (1, 64):
        net, state = network(), TrainState()
        updates = Updates(make_optimizer(Config(lr=0.01), net), net, max_skipped=1)
        updates._most_pending = pending
        with pytest.raises(DivergedError, match=r"of step 4 .* 2 step\(s\) in a row; .*`1`") as caught:
            for step in range(8):
                learn(updates, net, state, step, math.nan if step in (0, 2, 3) else None)
            assert state.skipped_steps == 0
            updates.settle(state, state.step)
        assert caught.value.alike
        found.append((state.skipped_steps, state.skipped_in_a_row))
    assert found == [(3, 2), (3, 2)]


def test_a_gradient_that_lies_otherwise_is_refused():
    net = network()
    updates = Updates(make_optimizer(Config(), net), net)
    for p in net.parameters():
        p.grad = torch.ones(p.shape)
    with pytest.raises(AssertionError, match="lies in memory otherwise"):
        updates.step(TrainState(), False, lambda: "")
