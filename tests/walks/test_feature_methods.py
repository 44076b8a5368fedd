"""Methods over features in real runs: twenty steps lower the loss, and a stopped run ends as one in a row does."""

import pytest
import torch
from methods.feature_nets import FEATURE_METHODS
from walks.training import Interrupting, assert_same, final_state

from dist_kd.cli import parse
from dist_kd.loop import fit
from dist_kd.run_folder import RunFolder
from dist_kd.runtime import start_runtime
from dist_kd.wiring import build_run

SETTINGS = [
    "--arch", "resnet8x4_cifar", "--teacher-arch", "resnet20_cifar", "--teacher-weights", "none", "--image-size", "8",
    "--batch-size", "16", "--device-batch-size", "8", "--epochs", "1", "--lr", "0.01", "--optimizer", "sgd",
    "--log-steps", "4", "--checkpoint-steps", "5", "--teacher-eval-samples", "20", "--cpu", "--in-memory",
    "--workers", "0",
]  # fmt: skip
EVERYTHING = "+".join(["kd", *FEATURE_METHODS])


def wired(folder, data, *more):
    folder.mkdir(parents=True, exist_ok=True)
    parsed = parse([*SETTINGS, "--data", str(data), "--save-path", str(folder), *more], {})
    run, _ = build_run(parsed, start_runtime(parsed.config), RunFolder(folder))
    return run


def finish(run, stop_at_batch=None):
    if stop_at_batch is not None:
        run.source = Interrupting(run.source, stop_at_batch, "SIGTERM", run.folder)
    try:
        return fit(run)
    finally:
        close(run)


def close(run):
    run.tracker.close("test")
    run.source.close()
    run.stop.uninstall()


@pytest.mark.parametrize("method", FEATURE_METHODS)
def test_twenty_steps_lower_the_loss_on_a_fixed_batch(digits, tmp_path, method):
    strong = ["--method-arg", "warmup=0"] if method == "reviewkd" else []
    run = wired(tmp_path, digits, "--method", method, *strong)
    assert run.plan.total_steps >= 20
    batches = run.source.batches(0)
    batch = next(batches)
    batches.close()
    start = {name: value.clone() for name, value in run.method.state_dict().items()}

    def loss():
        """Of the batch, by the state that the method began with: crd's task itself changes with its memories."""
        with torch.no_grad():
            run.learner.train()
            method, student = ({k: v.clone() for k, v in m.state_dict().items()} for m in (run.method, run.student))
            if method.keys() == start.keys():
                kept = {k: v for k, v in start.items() if k.rpartition(".")[2].startswith(("bank", "log", "rows"))}
                run.method.load_state_dict(method | kept)
            terms = run.learner(batch, run.teacher(batch.images))
            run.method.load_state_dict(method)
            run.student.load_state_dict(student)
        return {"total": terms.total.item()} | {name: value.item() for name, value in terms.parts.items()}

    before = loss()
    assert finish(run) == "done"
    after = loss()
    assert after["total"] < before["total"], (before, after)
    term = [name for name in before if name not in ("total", "loss_ce")]
    assert sum(after[name] for name in term) < sum(before[name] for name in term), (before, after)


@pytest.mark.slow
def test_stopped_and_resumed_with_adapters_and_memories(digits, tmp_path):
    """In the middle of an epoch, in the second of two micro-batches: the same bits at the end."""
    words = ["--method", EVERYTHING, "--method-arg", "crd.negatives=50"]
    assert finish(wired(tmp_path / "whole", digits, *words)) == "done"
    assert finish(wired(tmp_path / "cut", digits, *words), stop_at_batch=17) == "preempted"
    assert finish(wired(tmp_path / "cut", digits, *words)) == "done"
    ours, theirs = final_state(tmp_path / "cut"), final_state(tmp_path / "whole")
    saved = theirs["snapshot"].tensors["method"]
    assert {"terms.crd.bank_student", "terms.crd.rows_seen", "rows_seen", "terms.fitnet.regressor.0.weight"} < set(
        saved
    )
    assert saved["terms.crd.rows_seen"] == 16 * theirs["snapshot"].state.step
    assert_same(ours, theirs)


def test_the_command_says_what_runs(digits, tmp_path, capsys):
    """The switch --overhaul, the teacher's batch norms by the batch, and the lines at the start."""
    run = wired(tmp_path / "a", digits, "--overhaul", "--method-arg", "teacher_batch_norm=true")
    norms = [m for m in run.teacher.network.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert norms and all(m.training and m.momentum == 0 for m in norms)
    before = [m.running_mean.clone() for m in norms]
    assert finish(run) == "done"
    assert all(torch.equal(mean, m.running_mean) for mean, m in zip(before, norms, strict=True))
    for name, words in (("b", ["--overhaul"]), ("c", ["--method", "crd"])):
        capsys.readouterr()
        run = wired(tmp_path / name, digits, *words)
        close(run)
        assert not any(m.training for m in run.teacher.network.modules())
    out = capsys.readouterr().out
    assert "crd keeps two memories of" in out and "group    crd works over 8 rows" in out
