"""A test set beside the validation set: scored at every evaluation, chosen by never, and the same after any stop."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from walks.training import SETTINGS, assert_same, final_state, train

from dist_kd import checkpoint
from dist_kd.cli import parse
from dist_kd.commands.evaluate import main as evaluate
from dist_kd.commands.pack import main as pack
from dist_kd.data.index import read_index
from dist_kd.errors import ConfigError
from dist_kd.loop import fit
from dist_kd.run_folder import RunFolder
from dist_kd.runtime import start_runtime
from dist_kd.tracking.jsonl import read_metrics
from dist_kd.train import main as train_command
from dist_kd.train_state import ThirdSet
from dist_kd.wiring import build_run

TESTS = Path(__file__).parent.parent
MEMORY = ("--in-memory", "--workers", "0")


@pytest.fixture(scope="module")
def three(tmp_path_factory) -> Path:
    """Digits in train/, val/ and test/, the test set that of the source."""
    where = tmp_path_factory.mktemp("three")
    pack(["digits", str(where), "--val-fraction", "0.2", "--limit-per-class", "22", "--jobs", "1"])
    return where


@pytest.fixture(scope="module")
def uninterrupted(three, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole")
    assert train(folder, three, *MEMORY) == "done"
    return final_state(folder)


def by_hand(lines: list[dict]) -> tuple[float, float, float]:
    """Test top-1 of the last evaluation, of the best on the validation set, and the highest."""
    scored = [line for line in lines if "test/top1" in line]
    chosen = max(scored, key=lambda line: line["val/top1"])  # the first of equals
    return scored[-1]["test/top1"], chosen["test/top1"], max(line["test/top1"] for line in scored)


def test_killed_and_resumed(three, tmp_path, uninterrupted):
    """SIGKILL after the first epoch: figures of all three epochs are those of a run that nobody disturbed."""
    code = (
        "from pathlib import Path; from walks.training import train; "
        f"train(Path({str(tmp_path)!r}), Path({str(three)!r}), *{MEMORY}, stop_at_batch=16, how='SIGKILL')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, cwd=TESTS)
    assert done.returncode == -9, done.stderr[-2000:]
    assert checkpoint.find(tmp_path / "checkpoints")[0] is not None
    assert train(tmp_path, three, *MEMORY) == "done"
    ours = final_state(tmp_path)
    assert_same(ours, uninterrupted)
    test = ours["snapshot"].state.test
    assert test.evaluations == len([line for line in ours["lines"] if line["kind"] == "val"]) == 3
    assert (test.last["top1"], test.chosen["top1"], test.highest["top1"]) == by_hand(ours["lines"])


class Stopping:
    """An evaluation source that sends SIGTERM to its own process as its first batch is asked for."""

    def __init__(self, source) -> None:
        self._source = source

    def __getattr__(self, name):
        return getattr(self._source, name)

    def batches(self):
        for batch in self._source.batches():
            os.kill(os.getpid(), signal.SIGTERM)
            yield batch


def test_a_stop_while_the_test_set_is_scored_repeats_both(three, tmp_path, uninterrupted):
    parsed = parse([*SETTINGS, "--data", str(three), "--save-path", str(tmp_path), *MEMORY], {})
    run, _ = build_run(parsed, start_runtime(parsed.config), RunFolder(tmp_path))
    # so that the request is seen before the second batch
    assert run.tester._rounds > 1
    run.tester.source = Stopping(run.tester.source)
    assert fit(run) == "preempted"
    run.stop.obeyed()
    run.tracker.close("test")
    run.source.close()
    run.stop.uninstall()
    stopped = final_state(tmp_path)
    assert stopped["snapshot"].state.evaluations == stopped["snapshot"].state.test.evaluations == 0
    assert not [line for line in stopped["lines"] if line["kind"] == "val"]
    assert train(tmp_path, three, *MEMORY) == "done"
    assert_same(final_state(tmp_path), uninterrupted)


TINY = ["--arch", "cnn_small", "--image-size", "8", "--batch-size", "32", "--workers", "0", "--cpu"]


def test_one_run_says_all_three_and_evaluate_repeats_the_last(three, tmp_path, capsys):
    run = tmp_path / "run"
    words = [*TINY, "--kd", "--teacher-arch", "cnn_medium", "--teacher-weights", "none", "--epochs", "3"]
    assert train_command([*words, "--data", str(three), "--save-path", str(run)]) == 0
    said = capsys.readouterr().out
    samples = json.loads((three / "test" / "index.json").read_text())["shardlist"][0]["nsamples"]
    assert f"{samples} test samples, scored at each evaluation, never chosen by" in said
    assert f"on {samples} test samples: top-1" in said and "  test top-1 " in said
    summary = json.loads((run / "summary.json").read_text())
    test = summary["student"]["test"]
    lines = read_metrics(run / "metrics.jsonl")
    assert tuple(test[which]["top1"] for which in ("last", "chosen", "highest")) == by_hand(lines)
    assert test["last"]["epoch"] == 3 and test["last"]["samples"] == samples
    assert all(entry["evaluations"] == 3 for entry in test.values()) and "optimistic" in test["highest"]["note"]
    assert test["chosen"]["step"] == summary["student"]["best"]["step"]
    assert summary["teacher"]["test"]["samples"] == samples and "agreement" in test["last"]
    highest = f"the highest of 3 was {test['highest']['top1']:.2f} %"
    assert highest in said and highest in (run / "student" / "README.md").read_text()
    assert json.loads((run / "run.json").read_text())["data"]["test"]["samples"] == samples

    evaluate([str(run), "--data", str(three / "test"), "--json", "--workers", "0"])
    answer = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
    assert all(answer[key] == test["last"][key] for key in ("top1", "top5", "loss", "ece", "samples"))


def test_a_test_set_comes_and_goes_and_changes_nothing_else(three, tmp_path, uninterrupted):
    """None for the first epoch of 6 steps, the real one for the second, another for the third."""
    assert train(tmp_path, three, *MEMORY, "--test-data", "none", stop_at_batch=14) == "preempted"
    first = final_state(tmp_path)
    assert first["snapshot"].state.test == ThirdSet()
    assert not [key for line in first["lines"] for key in line if "test/" in key]
    assert train(tmp_path, three, *MEMORY, stop_at_batch=10) == "preempted"
    second = final_state(tmp_path)["snapshot"].state
    assert (second.evaluations, second.test.evaluations) == (2, 1)
    assert second.test.last == second.test.chosen == second.test.highest  # best validation was without a test set
    assert train(tmp_path, three, *MEMORY, "--test-data", str(three / "val")) == "done"
    ours = final_state(tmp_path)
    test = ours["snapshot"].state.test
    assert test.evaluations == 1 and test.last["top1"] == test.last["val_top1"] == ours["lines"][-1]["val/top1"]
    for result in (ours, uninterrupted):
        result["snapshot"].state.test = ThirdSet()
        result["lines"] = [{k: v for k, v in line.items() if "test/" not in k} for line in result["lines"]]
    assert_same(ours, uninterrupted)


def test_damaged_test_samples_are_counted_and_not_scored(three, tmp_path, capsys):
    shutil.copytree(three, tmp_path / "data")
    index = read_index(tmp_path / "data" / "test")
    with open(index.shard_path(0), "r+b") as file:
        file.seek(int(index.rows[7]["offset"]) + 40)
        file.write(b"damage")
    words = [*TINY, "--no-kd", "--max-steps", "2", "--data", str(tmp_path / "data")]
    assert train_command([*words, "--save-path", str(tmp_path / "run")]) == 0
    assert "sample 7 " in capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    last = summary["student"]["test"]["last"]
    assert (last["samples"], last["bad_samples"]) == (index.num_samples - 1, 1)
    assert summary["skipped"]["test_bad_samples"] == {"checksum": 1} and summary["skipped"]["val_bad_samples"] == {}
    assert train_command([*words, "--save-path", str(tmp_path / "strict"), "--max-bad-fraction", "0"]) == 3


def test_other_classes_are_refused(three, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"{digit}\n" for digit in "1023456789"))
    pack(["digits", str(tmp_path / "other"), "--class-list", str(names), "--limit-per-class", "2", "--jobs", "1"])
    with pytest.raises(ConfigError, match=r"--test-data 10, or in another order.*leave it out with --test-data none"):
        train(tmp_path / "run", three, *MEMORY, "--test-data", str(tmp_path / "other" / "val"))
