"""--compile as it runs: both networks through torch's own compiler to machine code, features by hooks included.

Each method takes three steps of the trainer's own parts, compiled and not, from the same start over the same batches.
Methods that read the same features share the compiler's work, in a cache of this module's own: in the usual one a
process killed while it compiles leaves a torn library behind, on which every later run fails.
"""

import shutil

import pytest
import torch

from dist_kd.cli import parse
from dist_kd.methods import METHODS
from dist_kd.run_folder import RunFolder
from dist_kd.runtime import start_runtime
from dist_kd.wiring import build_run

STEPS, ACCUMULATED = 3, 2
SETTINGS = [
    "--arch", "cnn_small", "--image-size", "8", "--batch-size", "16", "--device-batch-size", "8", "--max-steps",
    str(STEPS), "--lr", "0.01", "--cpu", "--in-memory", "--workers", "0",
]  # fmt: skip
TEACHER = ["--teacher-arch", "cnn_medium", "--teacher-weights", "none", "--teacher-eval-samples", "8"]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(900),
    pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on the CPU: no g++"),
]


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path_factory.mktemp("inductor")))
        yield


def steps(folder, data, *words):
    """What each micro-batch gave: parts of the loss and features of both; and the student's parameters at the end."""
    folder.mkdir()
    parsed = parse([*SETTINGS, "--data", str(data), "--save-path", str(folder), *words], {})
    run, _ = build_run(parsed, start_runtime(parsed.config), RunFolder(folder))
    given = []
    run.student.register_forward_hook(lambda module, images, output: given.append(output.features))
    batches = run.source.batches(0)
    found = []
    try:
        run.learner.train()
        for _ in range(STEPS):
            for _ in range(ACCUMULATED):
                batch = next(batches)
                teacher = run.teacher(batch.images)
                terms = run.learner(batch, teacher)
                (terms.total / ACCUMULATED).backward()
                values = {"total": terms.total, **terms.parts}
                values |= {f"student {name}": value for name, value in given.pop().items()}
                values |= {f"teacher {name}": value for name, value in (teacher.features if teacher else {}).items()}
                found.append({name: value.detach().clone() for name, value in values.items()})
            run.optimizer.step()
            run.optimizer.zero_grad()
    finally:
        batches.close()
        run.tracker.close("test")
        run.source.close()
        run.stop.uninstall()
    compiled = [run.student.net, *(member.network.net for member in run.teacher.members)]
    assert {net._compiled_call_impl is not None for net in compiled} == {"--compile" in words}
    return found, {name: value.detach().clone() for name, value in run.student.named_parameters()}, run.method


@pytest.mark.parametrize("method", METHODS)
def test_compiled_steps_are_the_plain_ones(digits, tmp_path, method):
    words = [
        "--method",
        method,
        *(TEACHER if METHODS[method].needs_teacher else []),
        *(["--method-arg", "negatives=50"] if method == "crd" else []),
    ]
    expected, weights, loss = steps(tmp_path / "plain", digits, *words)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    found, compiled_weights, _ = steps(tmp_path / "compiled", digits, *words, "--compile")
    counters = torch._dynamo.utils.counters
    assert counters["stats"]["unique_graphs"] >= (2 if METHODS[method].needs_teacher else 1)
    assert not counters["graph_break"], "the networks are compiled whole, hooks and all"
    assert len(found) == len(expected) == STEPS * ACCUMULATED
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys()
        assert {f"student {name}" for name in loss.student_taps} <= ours.keys()
        assert {f"teacher {name}" for name in loss.teacher_taps} <= ours.keys()
        for name, value in theirs.items():
            assert torch.allclose(ours[name], value, rtol=1e-4, atol=1e-4), (name, (ours[name] - value).abs().max())
    for name, value in weights.items():
        assert torch.allclose(compiled_weights[name], value, rtol=1e-3, atol=1e-4), name
