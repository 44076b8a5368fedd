"""A study as one command: what is refused at once, what is run, stopping, going on, and a run that fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dist_kd.commands.main import main as console
from dist_kd.commands.sweep import main as sweep
from dist_kd.errors import ConfigError, SaveError
from dist_kd.sweep import _write as write_table
from dist_kd.sweep import running
from dist_kd.sweep.running import places
from dist_kd.sweep.study import Study, read_study

TINY = ["--arch", "cnn_small", "--image-size", "8", "--batch-size", "32", "--workers", "0", "--data", "digits", "--cpu"]
KD = ["--kd", "--teacher-arch", "cnn_small", "--teacher-weights", "none", "--teacher-eval-samples", "20"]
LIMIT = 180  # seconds for what takes some ten


@pytest.fixture(autouse=True)
def packed_once(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("DIST_KD_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


def study(*words: str) -> Study:
    return read_study([*words, *TINY])


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        sweep([*words, *TINY])
    return str(caught.value)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "--over: must be given once, as NAME=V,V,... such as T=1,2,4, but is missing"),
        (["--over", "T=1", "--over", "w=1"], "--over: must be given once, as NAME=V,V,... such as T=1,2,4, but is gi"),
        (["--over", "T=1,,2"], "such as T=1,2,4, got `T=1,,2`"),
        (["--over", "T"], "such as T=1,2,4, got `T`"),
        (["--over", "temprature=1,2"], "--over: there is no setting `temprature`; did you mean temperature?"),
        (["--over", "T=1"], "--T: has no effect with the method `ce` (default); add --kd"),
        (["--over", "lr=0.1,0", *KD], "--lr: must be greater than 0, got `0` (flag --lr)"),
        (["--over", "dkd.b=1", *KD], "`dkd` is not in the method `kd`"),
        (["--over", "T=1,1.0", *KD], "--over: gives T the value `1.0` twice"),
        (["--over", "T=1,2", "--T", "3", *KD], "--over: varies T, and --T gives it one value; leave out one"),
        (["--over", "seed=1,2"], "use --seeds N and --seed FIRST"),
        (["--over", "workers=1,2"], "workers does not change what is learnt"),
        (["--over", "lr=0.1,1", "--seeds", "0"], "--seeds: must be at least 1, got `0` (flag --seeds)"),
        (["--over", "lr=0.1,1", "--twin"], "--twin: has nothing to stand beside, because the method `ce` has no teac"),
        (
            ["--over", "lr=0.1,1", "--epocks", "3"],
            "--epocks: no such flag, got `3` (flag --epocks); did you mean --epo",
        ),
        (["--over", "lr=0.1,1", "--seed", "2147483647"], "--seed: must be at most 2.14748e+09, got `2147483649`"),
        (["no_such_preset", "--over", "lr=0.1,1"], "--config: `no_such_preset` is neither a preset nor a file"),
    ],
)
def test_refused_before_anything_starts(words, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = refusal(*words)
    assert said in found and len(found.splitlines()) == 1
    assert list(tmp_path.iterdir()) == []


def test_all_problems_of_all_runs_at_once():
    found = refusal("--over", "w=0.5,2,-1", "--mixup", "9", *KD).splitlines()
    assert [line[:24] for line in found] == [
        "--mixup: must be at most",
        "--w: must be at most 1, ",
        "--w: must be at least 0,",
    ]


def test_a_launcher_is_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "without a launcher" in refusal("--over", "lr=1,2")


def test_any_spelling_is_one_study():
    ours = study("--over", "T=1,2", *KD)
    assert study("--over", "temperature=1.0,2", *KD).folder == ours.folder
    assert study("--over=--kd-temperature=1,2", *KD).arms == study("--over", "kd_temperature=1,2", *KD).arms
    assert [run.folder.relative_to(ours.folder) for run in ours.runs[:3]] == [
        Path("T=1/seed-0"), Path("T=2/seed-0"), Path("T=1/seed-1"),
    ]  # fmt: skip


def test_more_values_and_seeds_find_the_same_folder(tmp_path):
    ours = study("--over", "T=1,2", *KD)
    more = study("--over", "T=2,1,4", "--seeds", "5", "--twin", "--jobs", "2", *KD)
    assert more.folder == ours.folder and {r.folder for r in ours.runs} < {r.folder for r in more.runs}
    assert study("--over", "T=1,2", "--epochs", "3", *KD).folder != ours.folder
    file = tmp_path / "mine.yaml"
    file.write_text("method: kd\nseed: 7\n")
    named = study(str(file), "--over", "T=1,2", "--seeds", "2")
    assert named.folder.name.startswith("sweep-mine-T-")
    assert [run.seed for run in named.arms[0].runs] == [7, 8]
    assert [r.config.seed for r in study(str(file), "--over", "T=1", "--seed", "3").arms[0].runs] == [3, 4, 5]


def test_settings_of_methods_and_switches_and_texts():
    one = study("--over", "dkd.b=1,2.5", "--method", "dkd")
    assert one.setting == "dkd.b" and [arm.value for arm in one.arms] == [1.0, 2.5]
    assert one.arms[1].runs[0].config.method_args == "dkd.b=2.5"
    assert study("--over", "b=1,2.5", "--method", "dkd").folder == one.folder
    two = study("--over", "channels_last=true,false")
    assert [arm.runs[0].config.channels_last for arm in two.arms] == [True, False]
    three = study("--over", "student_weights=runs/a,runs-a")
    assert len({arm.runs[0].folder for arm in three.arms}) == 2
    assert all(arm.runs[0].folder.parent.parent == three.folder for arm in three.arms)


def test_the_twin_is_the_same_student_without_what_teaches_it(tmp_path):
    """One twin where only the teaching varies, one for each value where the student alone would feel it too."""
    words = ["--twin", "--seeds", "1", "--epochs", "3", *KD]
    ours = study("--over", "T=1,2", *words)
    assert len(ours.twins) == 1 and [arm.twin for arm in ours.arms] == ["without teacher"] * 2
    twin, run = ours.twins[0].runs[0].config, ours.arms[0].runs[0].config
    assert (twin.method, twin.epochs, twin.seed, twin.batch_size) == ("ce", 3, run.seed, run.batch_size)
    ((file, text),) = ours.files.items()
    assert yaml.safe_load(text)["method"] == "ce" and ours.twins[0].runs[0].words[:2] == ("--config", str(file))
    theirs = study("--over", "lr=0.1,0.2", *words)
    assert [twin.runs[0].config.lr for twin in theirs.twins] == [0.1, 0.2]
    assert [arm.twin for arm in theirs.arms] == [twin.label for twin in theirs.twins]
    file = tmp_path / "mine.yaml"
    file.write_text("T: 2\nteacher_arch: cnn_small\n")
    mixed = study(str(file), "--over", "method=ce,kd", "--twin")  # what is plain itself has no twin
    assert [arm.twin for arm in mixed.arms] == [None, "without teacher"] and len(mixed.twins) == 1


def test_places(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    cores = len(os.sched_getaffinity(0))
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(None, ["0", "3"])] == ["0", "3"]
    assert [place["CUDA_VISIBLE_DEVICES"] for place in places(4, ["0", "3"])] == ["0", "3", "0", "3"]
    assert [place["OMP_NUM_THREADS"] for place in places(None, [])] == [str(cores)]
    assert [place["OMP_NUM_THREADS"] for place in places(cores, [])] == ["1"] * cores


@pytest.fixture
def start():
    """Starts a study in a folder, as a user would; what a failed test leaves running is ended, with its trainers."""
    begun: list[subprocess.Popen] = []

    def _start(folder: Path, *words: str) -> subprocess.Popen:
        line = [sys.executable, "-m", "dist_kd.commands.main", "sweep", *words, *TINY, "--save-path", str(folder)]
        begun.append(subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
        return begun[-1]

    yield _start
    for process in begun:
        process.terminate()
        process.communicate(timeout=LIMIT)


def finish(process: subprocess.Popen) -> str:
    return process.communicate(timeout=LIMIT)[0]


def wait_for_steps(run: Path, process: subprocess.Popen) -> None:
    """Until the run has logged a step."""
    deadline = time.monotonic() + LIMIT
    while '"train"' not in ((run / "metrics.jsonl").read_text() if (run / "metrics.jsonl").exists() else ""):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)


def state(run: Path) -> str:
    return json.loads((run / "status.json").read_text())["state"]


def starts(run: Path) -> list[int]:
    return [begun["step"] for begun in json.loads((run / "run.json").read_text())["starts"]]


@pytest.mark.timeout(500)
def test_stopped_and_gone_on_with(start, tmp_path, capsys):
    """SIGTERM while the second of three runs is training: it saves, and the same command does the rest."""
    words = [
        "--over", "T=1,4", "--seeds", "1", "--twin", "--max-steps", "300", "--log-steps", "10", "--lr", "0.01", *KD,
    ]  # fmt: skip
    folder = tmp_path / "study"
    twin, first, second = (folder / name / "seed-0" for name in ("twin", "T=1", "T=4"))
    process = start(folder, *words)
    wait_for_steps(first, process)
    process.send_signal(signal.SIGTERM)
    said = finish(process)
    assert process.returncode == 75, said
    assert (state(twin), state(first)) == ("done", "preempted") and not second.exists()
    assert "stopped  T=1 seed 0; the same command goes on from there" in said
    assert "0 of 1, missing: seed 0" in said

    process = start(folder, *words)
    said = finish(process)
    assert process.returncode == 0, said
    assert "3 runs, 1 done before, 1 at a time" in said and "start    twin" not in said
    assert len(starts(twin)) == 1 and starts(first)[0] == 0 < starts(first)[1] and starts(second) == [0]
    table = json.loads((folder / "sweep.json").read_text())
    for run, row in ((twin, table["twins"][0]), (first, table["values"][0]), (second, table["values"][1])):
        last = json.loads((run / "summary.json").read_text())["student"]["last"]["top1"]
        assert row["top1_last"]["mean"] == last and f"{last:.2f}" in said
    plain, own = (yaml.safe_load((run / "config.yaml").read_text()) for run in (twin, first))
    telling = {k for k in own if plain[k] != own[k]} - {"save_path"}
    assert telling == {"method", "T", "teacher_arch", "teacher_weights"}
    assert all((folder / name).is_file() for name in ("sweep.md", "sweep.html"))

    # nothing is left to do; and under other settings these folders are another study's
    assert console(["sweep", *words, *TINY, "--save-path", str(folder)]) == 0
    assert "3 done before" in (out := capsys.readouterr().out) and "start " not in out
    assert console(["sweep", *words, *TINY, "--lr", "0.02", "--save-path", str(folder)]) == 2
    other = [word if word != "0.01" else "0.02" for word in words]
    assert console(["sweep", *other, *TINY, "--save-path", str(folder)]) == 2
    err = capsys.readouterr().err
    assert f"`{twin}` was trained with other settings: lr `0.01`, and `0.02` asked for now" in err


@pytest.mark.timeout(400)
def test_a_run_that_fails_does_not_stop_the_others(start, tmp_path):
    """A learning rate of 1e30 diverges; two runs side by side."""
    process = start(tmp_path, "--over", "lr=1e30,0.01", "--seeds", "1", "--jobs", "2", "--max-steps", "20")
    said = finish(process)
    assert process.returncode == 1, said
    log = tmp_path / "lr=1e+30" / "seed-0.log"
    assert f"FAILED   lr=1e+30 seed 0: exit code 5; the end of {log}:" in said and "diverged error" in said
    assert "0 of 1, missing: seed 0" in said and "done     lr=0.01 seed 0: top-1" in said
    assert "FAILED   1 of 2 runs: lr=1e+30 seed 0" in said
    assert json.loads((tmp_path / "sweep.json").read_text())["values"][0]["missing_seeds"] == [0]


@pytest.mark.parametrize(("state", "outcome"), [("done", "done"), ("preempted", "stopped")])
def test_under_a_launcher_the_status_says_how_a_run_ended(tmp_path, state, outcome):
    run = study("--over", "lr=0.1,0.01", "--save-path", str(tmp_path)).runs[0]
    run.folder.mkdir(parents=True)
    (run.folder / "status.json").write_text(json.dumps({"state": state}))
    assert running._outcome(run, 0, stopping=False) == outcome


def test_a_table_that_the_disk_refuses_is_said(tmp_path):
    (tmp_path / "sweep.md.partial").mkdir()
    with pytest.raises(SaveError, match=rf"the table of the study could not be written to `{tmp_path}` \(Is a dir"):
        write_table(study("--over", "lr=0.1,0.01", "--save-path", str(tmp_path)), "dist-kd sweep")


@pytest.mark.timeout(400)
@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends a child with its parent")
def test_killed_outright_it_leaves_no_trainer_behind(start, tmp_path):
    process = start(tmp_path, "--over", "lr=0.01", "--seeds", "1", "--max-steps", "1000000", "--log-steps", "10")
    run = tmp_path / "lr=0.01" / "seed-0"
    wait_for_steps(run, process)
    process.kill()
    process.communicate(timeout=LIMIT)
    deadline = time.monotonic() + LIMIT
    while state(run) != "preempted":
        assert time.monotonic() < deadline, state(run)
        time.sleep(0.05)
