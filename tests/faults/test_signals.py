"""SIGTERM, SIGINT and SIGUSR1 in every phase of a run: it stops within its bound, with one save, and says so.

Bound: 60 s from the start, in which the signal comes, to the end; what is asked in a step is obeyed after that step.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faults.zygote import ROOT, SMALL, free_port, pair
from walks.training import assert_same, final_state, status

from dist_kd import checkpoint

PREEMPTED = 75
TEACHER = ["--kd", "--teacher-arch", "cnn_medium", "--teacher-weights", "none", "--teacher-eval-samples", "20"]
PHASES = ["data", "teacher", "step", "evaluation", "save"]


def words(run: Path, data: Path) -> list[str]:
    plain = [word for word in SMALL if word != "--no-kd"]
    return [*plain, *TEACHER, "--data", str(data), "--save-path", str(run)]


@pytest.fixture(scope="module")
def undisturbed(zygote, origin, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    assert zygote.run({"words": words(run, origin)}) == [0]
    return final_state(run)


def saved(run: Path) -> list[int]:
    return [step for step, _ in checkpoint._steps(run / "checkpoints")]


# the step at which a run stands that was asked in this phase; a second signal changes nothing
STOPS = {"data": 0, "teacher": 0, "step": 3, "evaluation": 3, "save": 3}

FAST = [("teacher", "SIGTERM"), ("step", "SIGUSR1"), ("evaluation", "SIGTERM"), ("save", "SIGINT")]


@pytest.mark.parametrize(
    ("phase", "name"),
    [
        pytest.param(phase, name, marks=[] if (phase, name) in FAST else pytest.mark.slow)
        for phase in PHASES
        for name in ("SIGTERM", "SIGINT", "SIGUSR1")
    ],
)
def test_one_process_stops_with_one_save(zygote, origin, tmp_path, phase, name):
    run, out = tmp_path / "run", tmp_path / "out"
    job = {"words": words(run, origin), "signals": [[phase, name]], "out": str(out)}
    assert zygote.run(job) == [PREEMPTED], out.read_text()
    said = status(run)
    assert (said["state"], said["message"]) == ("preempted", f"signal {name}")
    assert out.read_text().count("the same command goes on from there") == 1
    assert checkpoint.find(run / "checkpoints")[1] == []
    assert saved(run)[0] == said["step"]
    assert said["step"] <= STOPS[phase], said


def test_two_signals_the_second_during_the_save(zygote, origin, tmp_path, undisturbed):
    run, out = tmp_path / "run", tmp_path / "out"
    twice = [["step", "SIGTERM"], ["save", "SIGTERM"], ["save", "SIGINT"]]
    job = {"words": words(run, origin), "signals": twice, "out": str(out)}
    assert zygote.run(job) == [PREEMPTED], out.read_text()
    assert "Traceback" not in out.read_text()
    assert saved(run)[0] == status(run)["step"]
    assert zygote.run({"words": words(run, origin), "out": str(out)}) == [0], out.read_text()
    assert_same(final_state(run), undisturbed)


@pytest.mark.parametrize(
    "phase", [p if p in ("data", "evaluation") else pytest.param(p, marks=pytest.mark.slow) for p in PHASES]
)
def test_two_processes_of_which_one_is_asked(zygote, origin, tmp_path, phase):
    run = tmp_path / "run"
    asked = [] if phase == "save" else [[phase, "SIGTERM"]]  # only rank 0 saves

    def job(rank):
        signals = [["save", "SIGTERM"]] if phase == "save" and rank == 0 else asked if rank == 1 else []
        return {"words": words(run, origin), "signals": signals, "out": str(tmp_path / f"out{rank}")}

    assert zygote.run(*pair(job, free_port())) == [PREEMPTED] * 2, (tmp_path / "out0").read_text()
    said = status(run)
    asked_of = "signal SIGTERM" + ("" if phase == "save" else " on rank 1")
    assert (said["state"], said["message"]) == ("preempted", asked_of)
    assert saved(run)[0] == said["step"] <= STOPS[phase] + 1  # the answer of all ranks is one step old
    assert "Traceback" not in (tmp_path / "out1").read_text()


@pytest.mark.parametrize("processes", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stop_in_the_last_evaluation(zygote, origin, tmp_path, undisturbed, processes):
    """All steps are done, the scores are not: it is not called done, and the next start has only them to make."""
    run = tmp_path / "run"

    def jobs(signals):
        job = {"words": words(run, origin), "out": str(tmp_path / "out")}
        if processes == 1:
            return [job | {"signals": signals}]
        return pair(lambda rank: job | {"signals": signals if rank else []}, free_port())

    asked = zygote.run(*jobs([["last evaluation", "SIGTERM"]]))
    assert asked == [PREEMPTED] * processes, (tmp_path / "out").read_text()
    assert (status(run)["state"], status(run)["step"], saved(run)[0]) == ("preempted", 11, 11)
    assert not (run / "summary.json").exists()
    assert final_state(run)["snapshot"].state.evaluated_at == 9
    assert zygote.run(*jobs([])) == [0] * processes, (tmp_path / "out").read_text()
    assert status(run)["state"] == "done" and (run / "summary.json").exists()
    assert [start["step"] for start in json.loads((run / "run.json").read_text())["starts"]] == [0, 11]
    ours = final_state(run)
    assert (ours["snapshot"].state.evaluated_at, ours["lines"][-1]["kind"]) == (11, "val")
    if processes == 1:
        assert_same(ours, undisturbed)


IMPORTING = """
import os, runpy, signal, sys
class Hook:
    def find_spec(self, name, path=None, target=None):
        if name == "torch" and not {asked!r}[1:]:
            os.kill(os.getpid(), signal.{name})
        if name == "torch.nn" and {asked!r}[1:]:
            for again in {asked!r}:
                os.kill(os.getpid(), getattr(signal, again))
sys.meta_path.insert(0, Hook())
sys.argv = ["dist_kd/train.py", *{words!r}]
runpy.run_path("dist_kd/train.py", run_name="__main__")
"""


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "names",
    [["SIGTERM"], *(pytest.param(n, marks=pytest.mark.slow) for n in (["SIGINT"], ["SIGUSR1"], ["SIGTERM"] * 2))],
    ids=" ".join,
)
def test_a_signal_while_torch_is_being_imported(origin, tmp_path, names):
    """Nothing is built any more, nothing is saved, and the exit code is that of a stop."""
    run = tmp_path / "run"
    done = subprocess.run(
        [sys.executable, "-c", IMPORTING.format(asked=names, name=names[0], words=words(run, origin))],
        capture_output=True, text=True, timeout=150, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == PREEMPTED, done.stdout + done.stderr
    assert f"stopped before the first step (signal {names[0]})" in done.stdout
    assert "Traceback" not in done.stderr
    assert (status(run)["state"], status(run)["step"]) == ("preempted", 0)
    assert saved(run) == []
    assert not (run / "lock").exists()


def test_a_second_interrupt_before_anything_is_trained_ends_it(tmp_path):
    """Somebody at the keyboard does not wait for torch."""
    code = """
import os, signal
from dist_kd import stop_signals
with stop_signals.noting():
    os.kill(os.getpid(), signal.SIGUSR1)
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop_signals.noted.reason == "signal SIGUSR1"
    try:
        os.kill(os.getpid(), signal.SIGINT)
    except KeyboardInterrupt:
        print("left")
assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert (done.stdout, done.returncode) == ("left\n", 0), done.stderr
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
