"""Run folders as training leaves them, from synthetic numbers, and a browser to look at a page."""

from __future__ import annotations

import json
import math
import random
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_kd.config import Config

EPOCH = 40  # steps
EPOCHS = 10
TEACHER = {"top1": 91.5, "top5": 99.25, "loss": 0.3125, "ece": 2.5, "samples": 2000.0}


def metric_lines(seed: int, kd: bool, final: float, steps: int, log_every: int) -> list[dict[str, Any]]:
    noise = random.Random(f"{seed}-{kd}")
    lines: list[dict[str, Any]] = []
    if kd:
        teacher = {f"teacher/{k}": v for k, v in TEACHER.items()}
        lines.append({"step": 0, "kind": "teacher", **teacher, "teacher/classes": 10.0})
    for step in range(1, steps + 1):
        done = step / (EPOCH * EPOCHS)
        curve = 1 - math.exp(-4 * done)
        if step % log_every == 0:
            ce = 2.3 - 1.9 * curve + noise.gauss(0, 0.05)
            values = {"train/loss": ce * (0.4 if kd else 1.0), "train/loss_ce": ce}
            if kd:
                values["train/loss_kd"] = 3 - 2.6 * curve + noise.gauss(0, 0.05)
            values |= {
                "train/top1": (final - 3) * curve + 10 * (1 - curve) + noise.gauss(0, 1),
                "train/top5": min(100.0, 50 + 49 * curve + noise.gauss(0, 0.3)),
                "train/lr": 0.05 * (1 + math.cos(math.pi * done)),
                "train/grad_norm": 1 + 2 * (1 - curve) + 0.2 * noise.random(),
                "train/epoch": step / EPOCH,
                "train/samples": step * 128.0,
                "train/skipped_steps": 0.0,
                "time/step_ms": 50.0 if kd else 30.0,
                "time/data_ms": 2.0 + noise.random(),
                "time/teacher_ms": 20.0 if kd else 0.0,
                "time/student_ms": 26.0,
                "time/other_ms": 2.0,
                "time/images_per_s": (2560.0 if kd else 4266.0) + noise.gauss(0, 30),
                "data/bad_samples": 3.0,
            }
            lines.append({"step": step, "kind": "train", **values})
        if step % EPOCH == 0:
            last = step == EPOCH * EPOCHS
            # the epoch before the last is the best one: last and best must not be mixed up
            top1 = final if last else final * curve + (1.0 if step == EPOCH * (EPOCHS - 1) else 0.0) + 0.04 * final
            scores = {"top1": top1, "top5": 60 + (38.5 if kd else 37) * curve}
            scores |= {"loss": 2.0 - (1.6 if kd else 1.45) * curve, "ece": 8 * (1 - curve) + (1 if kd else 2.5)}
            if kd:
                scores["agreement"] = 60 + 30 * curve
            values = {f"val/{k}": v for k, v in scores.items()}
            values |= {"val/samples": 2000.0, "val/seconds": 1.5, "val/epoch": step / EPOCH}
            lines.append({"step": step, "kind": "val", **values})
    return lines


def write_run(
    folder: Path,
    *,
    seed: int = 0,
    kd: bool = True,
    final: float = 88.0,
    steps: int = EPOCH * EPOCHS,
    log_every: int = 5,
    resumed: int | None = None,
    state: str = "done",
    test: str | None = None,
    **settings: Any,
) -> Path:
    """A run folder of `steps` of 400 steps; complete if all are there, else as a running or crashed run leaves it.

    `test` is the fingerprint of a test set, on which the student is two points worse, and best in its fourth epoch.
    """
    folder.mkdir(parents=True)
    finished = steps == EPOCH * EPOCHS
    config = Config(
        data="shards", arch="tiny_cnn", teacher_arch="wide_cnn", teacher_weights="teacher/student", seed=seed
    )
    method = {"method": "kd" if kd else "ce", "save_path": str(folder)}
    values = config.model_dump(mode="json") | method | settings
    text = "".join(f"{k}: {json.dumps(v)}  # default\n" for k, v in values.items())
    (folder / "config.yaml").write_text(text)

    lines = metric_lines(seed, kd, final, steps, log_every)
    tested = [] if test is None else [line for line in lines if line["kind"] == "val"]
    for epoch, line in enumerate(tested, 1):
        line |= {"test/top1": 99.5 if epoch == 4 else line["val/top1"] - 2, "test/loss": 0.5, "test/samples": 1000.0}
    if test is not None and kd:
        lines[0] |= {"teacher/test/top1": TEACHER["top1"] - 2, "teacher/test/samples": 1000.0}
    starts = [{"time": "2026-05-01T10:00:00+0000", "step": 0, "world_size": 2, "device": "Some CPU"}]
    if resumed:
        starts.append({"time": "2026-05-01T10:30:00+0000", "step": resumed, "world_size": 1, "device": "Some CPU"})
        at = next(i for i, line in enumerate(lines) if line["step"] > resumed)
        lines.insert(at, {"step": resumed, "kind": "resume"})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    sets = {
        split: {"name": f"things/{split}", "samples": n, "classes": 10, "fingerprint": f"{split}0123456789"}
        for split, n in (("train", 5130), ("val", 2000))
    }
    if test is not None:
        sets["test"] = {"name": "things/test", "samples": 1000, "classes": 10, "fingerprint": test}
    run = {"run_id": f"id{seed}{kd}", "name": folder.name, "created": starts[0]["time"], "starts": starts, "data": sets}
    run |= {
        "versions": {"python": "3.11.7", "torch": "2.15.0"},
        "git": {"revision": "abcdef0123456789", "changed": False},
    }
    (folder / "run.json").write_text(json.dumps(run | {"parameters": 1_250_000}))
    status = {"state": state, "step": steps, "total_steps": EPOCH * EPOCHS, "message": "" if finished else "SIGTERM"}
    (folder / "status.json").write_text(json.dumps(status))
    if not finished:
        return folder

    student = {"parameters": 1_250_000, "state_dict_bytes": 5_012_345, "flops": 42_000_000, "activations": 310_000}
    student |= {"size_original": 1_560_000, "latency_ms": {"1": 2.5, "32": 40.0}}
    teacher = {"parameters": 10_000_000, "state_dict_bytes": 40_098_760, "flops": 420_000_000, "activations": 930_000}
    teacher |= {"size_original": 10_930_000, "latency_ms": {"1": 10.0, "32": 200.0}}
    sizes = {"student": student, "teacher": teacher, "ratios": {"parameters": 8.0}} if kd else {"student": student}
    (folder / "compression.json").write_text(json.dumps(sizes))

    scored = [line for line in lines if line["kind"] == "val"]
    figures = [
        {k.removeprefix("val/"): v for k, v in line.items() if k != "kind" and "test/" not in k} for line in scored
    ]
    best = max(figures, key=lambda scores: scores["top1"])
    note = "chosen on the validation set by its own top-1"
    summary = {
        "student": {
            "arch": "tiny_cnn",
            "last": figures[-1],
            "best": best | {"evaluations": len(figures), "note": note},
        },
        "teacher": {"arch": "wide_cnn", "weights": "teacher/student", **TEACHER} if kd else None,
        "formula": "0.1 * CE + 0.9 * 4^2 * KL(teacher || student)" if kd else "CE",
        "skipped": {"left_out_per_epoch": 10, "bad_samples": {"truncated": 2, "label": 1}, "retries": 0},
        "timing": {"step_ms": 50.0 if kd else 30.0, "data_ms": 2.0, "teacher_ms": 20.0 if kd else 0.0}
        | {"student_ms": 26.0, "other_ms": 2.0, "images_per_s": 2560.0 if kd else 4266.0, "total_s": 754.0},
        "plan": {"total_steps": EPOCH * EPOCHS},
    }
    if test is not None:
        epochs = {"last": 10, "chosen": 9, "highest": 4}
        summary["student"]["test"] = {
            which: {"top1": tested[epoch - 1]["test/top1"], "samples": 1000.0, "epoch": float(epoch), "evaluations": 10}
            for which, epoch in epochs.items()
        }
        if kd:
            summary["teacher"]["test"] = {"top1": TEACHER["top1"] - 2, "samples": 1000.0}
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder


PLAIN, DISTILLED = (85.0, 85.5, 84.5), (88.0, 88.75, 87.25)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three seeds alone and three distilled; the last was interrupted once. Not to be written to."""
    folder = tmp_path_factory.mktemp("runs")
    made = [write_run(folder / f"plain-s{s}", seed=s, kd=False, final=f) for s, f in enumerate(PLAIN)]
    for s, f in enumerate(DISTILLED):
        made.append(write_run(folder / f"kd-s{s}", seed=s, final=f, resumed=170 if s == 2 else None))
    return made


@pytest.fixture
def make_run(tmp_path: Path) -> Callable[..., Path]:
    def make(name: str, **kwargs: Any) -> Path:
        return write_run(tmp_path / name, **kwargs)

    return make


FLAGS = (
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars"),
    *("--disable-background-networking", "--disable-component-update", "--disable-sync"),
    "--host-resolver-rules=MAP * ~NOTFOUND",
)


@pytest.fixture
def browser(tmp_path: Path) -> Callable[..., str]:
    """Runs headless Chromium with a new profile; what it prints. Skips where there is no Chromium."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("needs chromium")
    counter = iter(range(100))

    def run(page: Path, *options: str) -> str:
        profile = tmp_path / f"profile{next(counter)}"
        command = [program, *FLAGS, f"--user-data-dir={profile}", *options, page.absolute().as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert done.returncode == 0, done.stderr
        return done.stdout

    return run
