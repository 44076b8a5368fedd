"""Stopped at any step and resumed, a run ends bit-identical to the uninterrupted one."""

import subprocess
import sys
from pathlib import Path

import pytest
from walks.training import assert_same, final_state, train

from dist_kd import checkpoint

TESTS = Path(__file__).parent.parent
TARS = ("--no-in-memory", "--workers", "2")
MEMORY = ("--in-memory", "--workers", "0")


@pytest.fixture(scope="module")
def uninterrupted(digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, digits, *MEMORY) == "done"
    return final_state(folder)


def test_tars_and_memory_are_one_path(digits, tmp_path, uninterrupted):
    assert train(tmp_path, digits, *TARS) == "done"
    assert_same(final_state(tmp_path), uninterrupted)


# two micro-batches a step: batch 2k belongs to step k
@pytest.mark.parametrize(
    ("stops", "how", "where"),
    [
        ([0], "SIGTERM", MEMORY),  # in the first step
        ([13], "stop file", MEMORY),  # in the middle of an epoch
        ([18], "SIGINT", MEMORY),  # in the last step of an epoch
        ([25, 5], "SIGUSR1", MEMORY),  # twice in one epoch
        ([13], "SIGTERM", TARS),
    ],
)
def test_stopped_and_resumed(digits, tmp_path, uninterrupted, stops, how, where):
    for at in stops:
        assert train(tmp_path, digits, *where, stop_at_batch=at, how=how) == "preempted"
    assert not (tmp_path / "STOP").exists()
    assert train(tmp_path, digits, *where) == "done"
    assert_same(final_state(tmp_path), uninterrupted)


def test_killed_and_resumed(digits, tmp_path, uninterrupted):
    """SIGKILL in steps 9 and 26; the checkpoints at steps 7 and 21 are what is left."""
    for at in (18, 38):
        code = (
            "from pathlib import Path; from walks.training import train; "
            f"train(Path({str(tmp_path)!r}), Path({str(digits)!r}), *{MEMORY}, stop_at_batch={at}, how='SIGKILL')"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=TESTS)
        assert done.returncode == -9, done.stderr[-2000:]
    assert checkpoint.find(tmp_path / "checkpoints")[0].name == checkpoint.folder_name(21)
    assert train(tmp_path, digits, *MEMORY) == "done"
    assert_same(final_state(tmp_path), uninterrupted)


def test_a_finished_run_is_finished(digits, tmp_path):
    assert train(tmp_path, digits, *MEMORY) == "done"
    before = final_state(tmp_path)
    assert train(tmp_path, digits, *MEMORY) == "done"
    assert_same(final_state(tmp_path), before)


def test_the_time_of_earlier_starts_counts(digits, tmp_path):
    assert train(tmp_path, digits, *MEMORY, stop_at_batch=13) == "preempted"
    found, _ = checkpoint.find(tmp_path / "checkpoints")
    content = checkpoint.load(found, "cpu")
    assert 0 < content.state.seconds < 100
    content.state.seconds += 1e6  # eleven days
    checkpoint.save(tmp_path / "checkpoints", content, keep=2)
    for _ in range(2):  # the second start finds nothing to do
        assert train(tmp_path, digits, *MEMORY) == "done"
        assert 1e6 < final_state(tmp_path)["snapshot"].state.seconds < 1e6 + 200


def test_changes_that_are_allowed_are_in_force(digits, tmp_path):
    assert train(tmp_path, digits, *MEMORY, stop_at_batch=3) == "preempted"
    assert train(tmp_path, digits, *MEMORY, "--weight-decay", "0.5", "--momentum", "0.25", "--allow-changes") == "done"
    groups = final_state(tmp_path)["snapshot"].optimizer["optimizer"]["param_groups"]
    assert [(group["weight_decay"], group["momentum"]) for group in groups] == [(0.5, 0.25), (0.0, 0.25)]


def test_a_checkpoint_of_another_folder_is_a_start(digits, tmp_path, uninterrupted):
    """--resume PATH: a new folder goes on from an old one's checkpoint, and ends as the old one would have."""
    assert train(tmp_path / "old", digits, *MEMORY, stop_at_batch=13) == "preempted"
    assert train(tmp_path / "new", digits, *MEMORY, "--resume", str(tmp_path / "old")) == "done"
    ours = final_state(tmp_path / "new")
    first = ours["lines"][0]["step"]
    rest = [line for line in uninterrupted["lines"] if line["step"] >= first and line["kind"] != "teacher"]
    assert_same(ours, uninterrupted | {"lines": rest})
