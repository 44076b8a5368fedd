"""`dist-kd demo`: the whole story on small digits. Each step is a command a user could give, and is printed as one."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from dist_kd.commands.pack import count
from dist_kd.errors import ConfigError, DistKDError

# A student that must learn from few labelled images: ten of each digit, while its teacher has learnt from all 1,438.
# The student alone and the distilled one get the same images, steps and settings. Chosen on a part of the training
# digits held out for that (docs/results.md), never on the validation digits.
PER_CLASS = 10
COMMON = ["--image-size", "8", "--optimizer", "adamw", "--lr", "0.003", "--weight-decay", "0.05", "--cpu"]
TEACHER = ["--arch", "cnn_medium", "--no-kd", "--batch-size", "64", "--epochs", "30", "--log-steps", "66"]
STUDENT = ["--arch", "cnn_small", "--batch-size", "50", "--epochs", "200", "--mixup", "0.5"]
STUDENT += ["--log-steps", "10", "--eval-steps", "100"]
KD = ["--kd", "--T", "4", "--w", "0.9", "--teacher-arch", "cnn_medium"]
INTERRUPT_AFTER = 0.55  # of the last distilled run's steps
STEP_S = 600  # for one command; on two idle cores none takes a minute
END_S = 60  # in which a command that was told to end has saved


class DemoError(DistKDError):
    """A step of the demo failed; its own output says why."""

    kind = "demo"


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-kd demo",
        description="Pack scikit-learn's handwritten digits into shards, train a teacher, train a student alone and "
        "distilled over several seeds, interrupt and resume the last run, evaluate all, and print the table. Nothing "
        "is downloaded; about two minutes on two CPU cores.",
    )
    parser.add_argument(
        "--save-path", type=Path, default=Path("runs/demo"), help="folder (default: runs/demo; of a demo: emptied)"
    )
    parser.add_argument("--seeds", type=count, default=3, help="students of each kind (default: 3)")
    return parser


def _environment() -> dict[str, str]:
    """One thread per process: two runs go side by side, and small networks gain nothing from more."""
    return os.environ | {"OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}


def _finish(process: subprocess.Popen, log: Path, expected: int = 0) -> None:
    try:
        code = process.wait(timeout=STEP_S)
    except subprocess.TimeoutExpired:
        code = None
    if code != expected:
        how = f"did not end within {STEP_S} s" if code is None else f"ended with exit code {code}"
        raise DemoError(f"a step {how}; its last lines ({log}):", *log.read_text().splitlines()[-15:])


class Demo:
    """The folders and commands of one demo."""

    def __init__(self, folder: Path, seeds: int) -> None:
        self.folder, self.seeds = folder, seeds
        self._begun: list[subprocess.Popen] = []

    def empty(self) -> None:
        """Makes the folder anew. ConfigError if it holds anything but an earlier demo, or cannot be made."""
        try:
            if self.folder.exists() and any(self.folder.iterdir()):
                if not self.log("pack").is_file():
                    raise ConfigError(
                        f"--save-path `{self.folder}` would be emptied, and it is not an earlier demo that is in it; "
                        "give a new folder"
                    )
                shutil.rmtree(self.folder)
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"--save-path `{self.folder}` cannot be emptied or made ({error.strerror}); give another folder"
            ) from error

    def log(self, name: str) -> Path:
        return self.folder / f"{name}.log"

    def start(self, words: list[str], log: Path) -> subprocess.Popen:
        """Starts `dist-kd WORDS` with its output in `log`."""
        print("  $ dist-kd " + " ".join(words), flush=True)
        with log.open("a") as file:
            command = [sys.executable, "-m", "dist_kd.commands.main", *words]
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=_environment())
        self._begun.append(process)
        return process

    def end(self) -> None:
        """Ends what still runs, which is something only after an error."""
        running = [process for process in self._begun if process.poll() is None]
        for process in running:
            process.terminate()
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=END_S)
            process.kill()
            process.wait()

    def pack(self, name: str, *more: str) -> None:
        _finish(self.start(["pack", "digits", str(self.folder / name), *more], self.log("pack")), self.log("pack"))

    def train(self, name: str, data: str, settings: list[str]) -> subprocess.Popen:
        val = str(self.folder / "digits" / "val")
        where = ["--data", str(self.folder / data), "--val-data", val, "--save-path", str(self.folder / name)]
        words = ["train", *settings, *COMMON, *where]
        return self.start(words, self.log(name))

    def student(self, kind: str, seed: int) -> subprocess.Popen:
        more = ["--no-kd"] if kind == "plain" else [*KD, "--teacher-weights", str(self.folder / "teacher")]
        return self.train(f"{kind}-{seed}", "few", [*STUDENT, *more, "--seed", str(seed)])

    def run_pair(self, seed: int) -> None:
        """A student alone and a distilled one of one seed, side by side."""
        started = {kind: self.student(kind, seed) for kind in ("plain", "distilled")}
        for kind, process in started.items():
            _finish(process, self.log(f"{kind}-{seed}"))

    def interrupt_and_resume(self, seed: int) -> None:
        """The last pair: the distilled run gets SIGTERM in mid-epoch and is started again by the same command."""
        name, plain = f"distilled-{seed}", self.student("plain", seed)
        process = self.student("distilled", seed)
        metrics = self.folder / name / "metrics.jsonl"
        deadline = time.monotonic() + 120
        while process.poll() is None and time.monotonic() < deadline:
            if self._step(metrics) >= INTERRUPT_AFTER * self._total(name):
                process.send_signal(signal.SIGTERM)
                break
            time.sleep(0.01)
        _finish(process, self.log(name), expected=75)
        status = json.loads((self.folder / name / "status.json").read_text())
        print(f"  SIGTERM: checkpoint at step {status['step']} of {status['total_steps']}; the same command again:")
        _finish(self.student("distilled", seed), self.log(name))
        _finish(plain, self.log(f"plain-{seed}"))

    @staticmethod
    def _step(metrics: Path) -> int:
        from dist_kd.tracking.jsonl import read_metrics

        return max((line["step"] for line in read_metrics(metrics)), default=0)

    def _total(self, name: str) -> float:
        try:
            return json.loads((self.folder / name / "status.json").read_text())["total_steps"]
        except (OSError, ValueError):
            return float("inf")


def _evaluate(run: Path) -> dict[str, Any]:
    """`dist-kd evaluate RUN --json`, in this process: torch is imported once instead of once per network."""
    from dist_kd.commands import evaluate

    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        evaluate.main([str(run), "--json", "--workers", "0"])
    return json.loads(out.getvalue())


def _mean(values: list[float]) -> str:
    spread = f" +- {statistics.stdev(values):.2f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.2f}{spread}"


def table(scores: dict[str, list[dict[str, Any]]], sizes: dict[str, Any]) -> str:
    """Teacher, student alone, student distilled: accuracy over seeds, sizes and speed with their units."""
    rows = [("", "top-1 %", "top-5 %", "parameters", "bytes", "MFLOP", "CPU ms (1)", "CPU ms (32)")]
    for label, kind, role in (
        ("teacher", "teacher", "teacher"),
        ("student alone", "plain", "student"),
        ("student distilled", "distilled", "student"),
    ):
        size = sizes[role]
        rows.append(
            (
                label,
                _mean([s["top1"] for s in scores[kind]]),
                _mean([s["top5"] for s in scores[kind]]),
                f"{size['parameters']:,}",
                f"{size['state_dict_bytes']:,}",
                f"{size['flops'] / 1e6:.2f}",
                *(f"{size['latency_ms'][b]:.2f}" for b in ("1", "32")),
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for label, *cells in rows:
        lines.append("  ".join([label.ljust(widths[0]), *(c.rjust(w) for c, w in zip(cells, widths[1:], strict=True))]))
    return "\n".join(lines)


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    demo = Demo(args.save_path, args.seeds)
    demo.empty()
    try:
        _show(demo)
    finally:
        demo.end()
    return 0


def _show(demo: Demo) -> None:
    begun = time.monotonic()
    print("1. Pack scikit-learn's 1,797 handwritten digits into indexed shards: all, and ten of each to learn from")
    demo.pack("digits")
    demo.pack("few", "--limit-per-class", str(PER_CLASS))
    print("2. Train the teacher on all training digits", flush=True)
    _finish(demo.train("teacher", "digits", TEACHER), demo.log("teacher"))
    print(f"3. Train the student on {10 * PER_CLASS} of them, alone and distilled, {demo.seeds} seeds", flush=True)
    for seed in range(demo.seeds - 1):
        demo.run_pair(seed)
    print("4. The last pair; its distilled run is interrupted and resumed", flush=True)
    demo.interrupt_and_resume(demo.seeds - 1)
    print("5. Evaluate all from their exported folders", flush=True)
    runs = {
        "teacher": [demo.folder / "teacher"],
        **{k: [demo.folder / f"{k}-{s}" for s in range(demo.seeds)] for k in ("plain", "distilled")},
    }
    scores = {kind: [_evaluate(run) for run in folders] for kind, folders in runs.items()}
    for kind, folders in runs.items():
        for run, score in zip(folders, scores[kind], strict=True):
            trained = json.loads((run / "summary.json").read_text())["student"]["last"]
            if (trained["top1"], trained["top5"]) != (score["top1"], score["top5"]):
                raise DemoError(f"{run}: evaluate says top-1 {score['top1']}, the trainer said {trained['top1']}")
    print("   the counts are the trainer's own\n")
    from dist_kd.report import write_report
    from dist_kd.report.compare import gap_sentence

    sizes = json.loads((runs["distilled"][-1] / "compression.json").read_text())
    print(table(scores, sizes))
    n = scores["teacher"][0]["samples"]
    ratio = sizes["teacher"]["parameters"] / sizes["student"]["parameters"]
    print(
        f"\n{n} validation digits; +- is the standard deviation over {demo.seeds} seeds; last epoch, nothing selected"
    )
    print(f"compression: {ratio:.1f}x fewer parameters")
    page = demo.folder / "report.html"
    write_report([run for folders in runs.values() for run in folders], page)
    print(f"report: {page}  ({time.monotonic() - begun:.0f} s in all)")
    top1 = {kind: [s["top1"] for s in found] for kind, found in scores.items()}
    print(gap_sentence(top1["plain"], top1["distilled"], top1["teacher"][0]))
