"""The commands as users give them: launchers, signals, refusals, evaluation, the real teacher's counts."""

import json
import os
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import pytest
from dist.launching import launch

from dist_kd.commands.evaluate import main as evaluate
from dist_kd.commands.main import main as command
from dist_kd.config import Config
from dist_kd.runtime import start_runtime
from dist_kd.sets import make_evaluator, open_split
from dist_kd.teacher import Teacher
from dist_kd.teacher_score import teacher_warning
from dist_kd.train import main as train
from dist_kd.wiring import build_student, build_teachers

ROOT = Path(__file__).parent.parent.parent
TINY = ["--arch", "cnn_small", "--image-size", "8", "--batch-size", "32", "--workers", "0", "--cpu"]


@pytest.fixture(scope="module")
def teacher(digits, tmp_path_factory) -> Path:
    """A digits teacher, trained so far that its scores say something."""
    run = tmp_path_factory.mktemp("teacher")
    words = ["--arch", "cnn_medium", *TINY[2:], "--epochs", "2", "--optimizer", "adamw", "--lr", "0.003"]
    assert train([*words, "--data", str(digits), "--save-path", str(run)]) == 0
    return run


def summary(run: Path) -> dict:
    return json.loads((run / "summary.json").read_text())


@pytest.mark.timeout(400)  # two trainings and two evaluations: 11 s alone, minutes on a busy machine
def test_a_run_leaves_what_it_promises(digits, teacher, tmp_path, capsys):
    run = tmp_path / "run"
    words = [*TINY, "--kd", "--teacher-arch", "cnn_medium", "--teacher-weights", str(teacher), "--epochs", "2"]
    assert train([*words, "--log-steps", "5", "--data", str(digits), "--save-path", str(run)]) == 0
    said = capsys.readouterr().out
    assert "0.1 * CE(labels, student) + 0.9 * 4^2 * KL(teacher || student at T=4)" in said
    assert "32 global = 1 process(es) x 1 accumulated x 32" in said
    names = {p.name for p in run.iterdir()}
    assert names >= {
        "config.yaml", "run.json", "status.json", "metrics.jsonl", "checkpoints", "student", "compression.json",
        "summary.json", "report.html",
    }  # fmt: skip
    assert json.loads((run / "status.json").read_text())["state"] == "done"
    result = summary(run)
    assert result["teacher"]["top1"] == pytest.approx(summary(teacher)["student"]["last"]["top1"])
    assert (
        result["skipped"]["left_out_per_epoch"]
        == json.loads((run / "run.json").read_text())["data"]["train"]["samples"] % 32
    )
    sizes = json.loads((run / "compression.json").read_text())
    assert sizes["teacher"]["parameters"] > sizes["student"]["parameters"]
    assert (run / "report.html").stat().st_size < 1_000_000
    # the same line, with the config it left: the finished run is found finished
    assert train(["--config", str(run / "config.yaml")]) == 0

    for subject in (run, run / "student"):
        evaluate([str(subject), "--data", str(digits), "--json", "--workers", "0"])
        answer = json.loads(capsys.readouterr().out.strip().splitlines()[-1])
        for key in ("top1", "top5", "loss", "ece", "samples"):
            assert answer[key] == result["student"]["last"][key]


def test_changed_settings_are_refused_by_name(digits, tmp_path, capsys):
    words = [*TINY, "--no-kd", "--max-steps", "3", "--data", str(digits), "--save-path", str(tmp_path)]
    assert train(words) == 0
    capsys.readouterr()
    assert train([*words, "--lr", "0.05"]) == 2
    assert "lr: None -> 0.05" in capsys.readouterr().err
    assert json.loads((tmp_path / "status.json").read_text())["state"] == "done"  # the refused start changed nothing
    assert train([*words, "--resume", "never"]) == 2
    assert "holds a run already" in capsys.readouterr().err


def test_a_checkpoint_of_another_network_than_the_settings_name(digits, tmp_path, capsys):
    assert train([*TINY, "--no-kd", "--max-steps", "1", "--data", str(digits), "--save-path", str(tmp_path)]) == 0
    settings = tmp_path / "config.yaml"
    text = settings.read_text()
    assert text.count("cnn_small") == 1
    settings.write_text(text.replace("cnn_small", "cnn_medium"))
    capsys.readouterr()
    assert command(["evaluate", str(tmp_path), "--checkpoint", "best", "--workers", "0"]) == 2
    said = capsys.readouterr().err
    assert f"`{settings}` names the network `cnn_medium`, which the checkpoint" in said and said.count("\n") == 1


def test_refusals_before_anything_is_trained(digits, tmp_path, capsys):
    base = [*TINY, "--data", str(digits), "--save-path", str(tmp_path / "run")]
    kd = ["--kd", "--teacher-arch", "resnet18"]
    for words, code, text in (
        ([*base, "--no-kd", "--val-data", str(tmp_path)], 3, "pack"),
        ([*base, *kd, "--teacher-weights", str(tmp_path / "no.pth")], 2, "no.pth"),
        ([*base, *kd, "--teacher-weights", "IMAGENET1K_V1"], 2, "1000 classes"),
        ([*base, "--no-kd", "--batch-size", "5000"], 2, "5000"),
    ):
        assert train(words) == code, words
        assert text in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "failed"
    (tmp_path / "file").touch()
    assert train([*base[:-1], str(tmp_path / "file" / "run"), "--no-kd"]) == 2
    assert "cannot be written" in capsys.readouterr().err


def test_a_teacher_at_chance_is_a_loud_warning(digits, tmp_path, capsys):
    words = [*TINY, "--kd", "--teacher-arch", "cnn_medium", "--teacher-weights", "none", "--max-steps", "2"]
    assert train([*words, "--data", str(digits), "--save-path", str(tmp_path)]) == 0
    assert "WARNING: the teacher is at chance level" in capsys.readouterr().out


@pytest.mark.parametrize(("launcher", "code"), [("plain", 75), ("torchrun", 0)])
def test_a_signal_to_one_process_ends_all_with_a_checkpoint(digits, tmp_path, launcher, code):
    """SIGTERM to one rank only. torchrun reports any code but 0 as a crash, so there the status file tells."""
    run = tmp_path / "run"
    words = [
        *TINY[:-1],
        "--no-kd",
        "--epochs",
        "500",
        "--log-steps",
        "1",
        "--data",
        str(digits),
        "--save-path",
        str(run),
    ]
    starter = [] if launcher == "plain" else ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    starter += [] if launcher == "plain" else ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    env = os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    with subprocess.Popen(
        [sys.executable, *starter, "dist_kd/train.py", *words],
        cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True,
    ) as process:  # fmt: skip
        try:
            deadline = time.monotonic() + 60
            for line in process.stdout:
                assert time.monotonic() < deadline
                if line.startswith("step ") and "epoch" in line:
                    break
            ranks = [process.pid]
            if launcher == "torchrun":
                ranks = [int(p) for p in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()]
                assert len(ranks) == 2
            os.kill(ranks[-1], signal.SIGTERM)
            said = process.stdout.read()
            assert process.wait(timeout=30) == code, said
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    status = json.loads((run / "status.json").read_text())
    assert status["state"] == "preempted"
    assert (run / "checkpoints" / "latest").read_text().strip() == f"step_{status['step']:08d}"


def test_the_real_teacher_before_step_one(real_data, tmp_path):
    """EfficientNet-Lite0 through the view of EfficientNet-B0: the counts of an independent program, 91 and 99."""
    from dist_kd.commands.pack import main as pack

    with tarfile.open(real_data / "imagenet-sample.tar") as archive:
        archive.extractall(tmp_path, filter="data")
    classes = str(real_data / "imagenet_synsets.txt")
    pack([str(tmp_path / "imagenet-sample"), str(tmp_path / "shards"), "--class-list", classes, "--jobs", "1"])
    config = Config(
        arch="efficientnet_b0", teacher_arch="efficientnet_lite0", teacher_weights="lite0", method="kd", batch_size=16,
        device_batch_size=25, workers=0, cpu=True, mixed_precision="no",
    )  # fmt: skip
    runtime = start_runtime(config)
    index = open_split(str(tmp_path / "shards"), "train")
    student = build_student(config, index.spec.num_classes)
    (network,) = build_teachers(config, index.spec.num_classes)
    teacher = Teacher(network, student.spec, image_size=student.spec.image_size)
    scores = make_evaluator(config, runtime, index, student.spec).score(teacher)
    assert (scores.samples, scores.top1_hits, scores.top5_hits) == (100, 91, 99)
    assert teacher_warning(scores, 1000) is None


def test_accelerate_launches_the_module(digits, tmp_path):
    """`accelerate launch -m dist_kd.train`, one process."""
    words = [*TINY, "--no-kd", "--max-steps", "2", "--data", str(digits), "--save-path", str(tmp_path / "run")]
    launch("plain", "-m", "accelerate.commands.launch", "--num_processes", "1", "-m", "dist_kd.train", *words)
    assert summary(tmp_path / "run")["student"]["last"]["step"] == 2
