"""One rank of two fails or dies: the first failure is told, the others leave in time, and the run goes on from disk."""

import json
import re

import pytest
from faults.two_ranks import BOUND_S, LIMIT_S, STEPS, assert_same_end, start, trouble
from walks.training import status

from dist_kd import first_failure
from dist_kd.contracts import World
from dist_kd.errors import DataError
from dist_kd.run_folder import RunFolder
from dist_kd.watchdog import Progress, Watchdog

pytestmark = pytest.mark.timeout(3 * LIMIT_S)
slow = pytest.mark.slow


def test_the_error_of_the_first_rank_that_fails_is_told(origin, tmp_path):
    """An assertion on rank 1: rank 0 only lost its connection, and says so last, naming rank 1 and its error."""
    run = tmp_path / "run"
    end = trouble(run, origin, "raise")
    expected = {"state": "failed", "kind": "crash", "rank": 1, "message": "AssertionError: the trouble of this test"}
    assert {key: end.status[key] for key in expected} == expected
    assert end.seconds < BOUND_S
    traceback, told = (end.said.index(text) for text in ("Traceback (most", "lost error: rank 1 ("))
    assert traceback < told
    assert "failed at step 11 (data): AssertionError: the trouble of this test" in end.said[told:]
    assert "Connection" not in end.said  # which is all that rank 0 met


def test_who_says_that_it_failed_has_the_status_for_itself(tmp_path):
    """The other rank looks for who failed all the time: between the word and the claim it wrote "lost"."""
    said = []

    class Other(Watchdog):
        def say(self, state, message=""):
            super().say(state, message)
            said.append(first_failure._claim(self))

    watch = Other(tmp_path, World(1, 2, 1, 2), Progress(), 100, lambda sentence: None)
    watch.beats.mkdir()
    first_failure.record(World(1, 2, 1, 2), RunFolder(tmp_path), watch, 7, DataError("a loader process died"))
    assert said == [False]
    assert status(tmp_path)["kind"] == "data"


def test_a_rank_that_is_killed_is_named(origin, tmp_path):
    run = tmp_path / "run"
    end = trouble(run, origin, "die")
    assert (end.status["state"], end.status["kind"]) == ("failed", "lost")
    assert "a rank was lost: rank 1 (" in end.status["message"]
    assert re.search(r"last seen at (start|step \d+)\b", end.status["message"])
    assert f"lost error: {end.status['message']}" in end.said and "[rank0]: Traceback" not in end.said
    assert end.seconds < BOUND_S


@slow
def test_rank_0_may_be_the_one_that_is_killed(origin, tmp_path):
    run = tmp_path / "run"
    end = trouble(run, origin, "die", rank=0)
    assert end.status["kind"] == "lost" and "a rank was lost: rank 0 (" in end.status["message"]
    assert f"rank 1: lost error: {end.status['message']}" in end.said
    start(run, origin)
    assert status(run)["state"] == "done"


@slow
def test_a_launcher_that_may_restart_them_goes_on_from_disk(origin, tmp_path, monkeypatch):
    """`--max-restarts 1`: killed in step 11, all go on from the best one's checkpoint (10), to the undisturbed end."""
    run, undisturbed = tmp_path / "run", tmp_path / "undisturbed"
    monkeypatch.setenv("PET_MAX_RESTARTS", "1")  # torchrun's own variable for the flag
    # or the second attempt finds the addresses of the first one's processes in torchrun's store (torch 2.15)
    monkeypatch.setenv("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
    trouble(run, origin, "die", expected=0)
    monkeypatch.delenv("PET_MAX_RESTARTS")
    starts = json.loads((run / "run.json").read_text())["starts"]
    assert [entry["step"] for entry in starts] == [0, 10]
    assert (status(run)["state"], status(run)["step"]) == ("done", STEPS)
    start(undisturbed, origin)
    assert_same_end(run, undisturbed)
