"""--freeze and --head-lr, from the command line to the checkpoint."""

from functools import partial

import pytest
from walks import training
from walks.training import final_state, settings_without

from dist_kd.cli import parse
from dist_kd.errors import CheckpointError
from dist_kd.wiring import build_student

HEAD = ("net.14.weight", "net.14.bias")  # of cnn_small
USUAL = settings_without("--lr", "--epochs")
train = partial(training.train, settings=USUAL)


@pytest.fixture(scope="module")
def start():
    """The student before its first step."""
    return build_student(parse([*USUAL, "--max-steps", "1", "--data", "none"], {}).config, 10).state_dict()


def moved(before: dict, after: dict, name: str) -> bool:
    return float((before[name] - after[name]).abs().max()) > 1e-20


@pytest.mark.parametrize(("freeze", "moves"), [("backbone", False), ("backbone_but_norms", True)])
def test_the_backbone_stays(freeze, moves, start, digits, tmp_path, capsys):
    more = ("--max-steps", "6", "--freeze", freeze, "--lr", "0.1")
    assert train(tmp_path / "run", digits, *more, stop_at_batch=8) == "preempted"  # two micro-batches a step
    assert train(tmp_path / "run", digits, *more) == "done"
    assert f"--freeze {freeze}: 650 parameters learn" in capsys.readouterr().out  # 64 x 10 + 10
    trained = final_state(tmp_path / "run")["snapshot"].tensors["model"]
    learnt = {name for name in start if moved(start, trained, name)}
    statistics = {name for name in start if name.endswith(("running_mean", "running_var", "num_batches_tracked"))}
    assert learnt - statistics == set(HEAD)
    if moves:
        assert learnt & statistics == statistics
    else:
        assert not learnt & statistics - {n for n in statistics if n.endswith("num_batches_tracked")}


def test_the_head_alone_moves_at_its_own_rate(start, digits, tmp_path):
    more = ("--max-steps", "2", "--lr", "1e-30", "--head-lr", "0.1")
    assert train(tmp_path / "run", digits, *more) == "done"
    trained = final_state(tmp_path / "run")["snapshot"].tensors["model"]
    assert moved(start, trained, HEAD[0])
    assert not moved(start, trained, "net.0.weight")
    with pytest.raises(CheckpointError, match=r"is for other parameters than learn now .* --freeze and --head-lr"):
        train(tmp_path / "run", digits, "--max-steps", "3", "--lr", "1e-30", "--allow-changes")
