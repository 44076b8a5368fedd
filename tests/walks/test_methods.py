"""Whole runs with methods other than kd: several of them, several teachers, what grows, what is printed and saved."""

import json
from functools import partial

import pytest
from walks import training
from walks.training import assert_same, final_state, settings_without

from dist_kd.errors import ConfigError

# a term with a warm-up (a buffer that grows), one that couples rows, and kd; dkd takes no mixup
train = partial(training.train, settings=settings_without("--kd", "--mixup", "--epochs"))
SUM = ["--method", "kd+dkd+dist", "--method-arg", "dist.T=2", "--max-steps", "30"]


@pytest.fixture(scope="module")
def unbroken(digits, tmp_path_factory):
    where = tmp_path_factory.mktemp("methods") / "a"
    assert train(where, digits, *SUM, "--method-arg", "warmup=2") == "done"
    return final_state(where)


def test_resumed_runs_end_bit_identical(unbroken, digits, tmp_path):
    where = tmp_path / "b"
    assert train(where, digits, *SUM, "--method-arg", "warmup=2", stop_at_batch=25) == "preempted"
    half = final_state(where)["snapshot"]
    assert half.tensors["method"]["rows_seen"] == half.state.step * 32 > 0
    with pytest.raises(ConfigError, match=r"method_args: .*dkd.warmup=2.0' -> .*dkd.warmup=3.0'"):
        train(where, digits, *SUM, "--method-arg", "warmup=3")
    assert train(where, digits, *SUM, "--method-arg", "warmup=2") == "done"
    assert_same(final_state(where), unbroken)
    assert unbroken["snapshot"].tensors["method"]["rows_seen"] == 30 * 32


def test_parts_are_logged(unbroken):
    line = next(line for line in unbroken["lines"] if line["kind"] == "train")
    for part in ("loss_ce", "loss_kd", "loss_tckd", "loss_nckd", "loss_inter", "loss_intra"):
        assert line[f"train/{part}"] > 0


def test_two_teachers(digits, tmp_path, capsys):
    """Each is scored and said before step 1, then their mean; the loss in force, the group and its warning too."""
    from dist_kd.cli import parse
    from dist_kd.lifetime import run_training

    line = [
        "--arch", "cnn_small", "--teacher-arch", "cnn_medium", "cnn_small", "--teacher-weights", "none", "--method",
        "soft_ce+dist", "--data", str(digits), "--image-size", "8", "--batch-size", "32", "--device-batch-size", "16",
        "--max-steps", "3", "--cpu", "--save-path", str(tmp_path / "run"),
    ]  # fmt: skip
    assert run_training(parse(line, {})) == 0
    said = capsys.readouterr().out
    scored = [x for x in said.splitlines() if x.startswith("teacher ") and " validation samples: " in x]
    assert [x.split(" on ")[0].split()[1:] for x in scored] == [
        ["cnn_medium"],
        ["cnn_small"],
        ["cnn_medium,", "cnn_small"],
    ]
    assert said.index(scored[2]) < said.index("step 3/3")
    assert "group    dist works over 16 rows = 1 process(es) x 16" in said
    assert "WARNING: dist sees 16 of the 32 rows of a step together" in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["formula"] in said and "mean softmax of 2 teachers" in summary["formula"]
    assert "CE(labels" not in summary["formula"]
    assert summary["teacher"]["arch"] == "cnn_medium, cnn_small" and summary["coupled_rows"] == 16
    table = json.loads((tmp_path / "run" / "compression.json").read_text())
    assert table["teacher"]["parameters"] == 217_338 + 24_346
    assert (tmp_path / "run" / "report.html").exists()
