"""A process that has imported the trainer and forks a real one per job: seconds of importing are spent once.

Run as a script it reads jobs, one JSON object a line, and answers each with how its processes ended. A job's faults
are done from here, in the forked process: the product knows nothing of them.
"""

from __future__ import annotations

import io
import json
import os
import resource
import signal
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
SMALL = [
    "--arch", "cnn_small", "--no-kd", "--image-size", "8", "--batch-size", "32", "--device-batch-size", "16",
    "--max-steps", "11", "--lr", "0.01", "--ema-decay", "0.9", "--log-steps", "2", "--checkpoint-steps", "2",
    "--eval-steps", "3", "--keep", "2", "--workers", "0", "--in-memory", "--cpu",
]  # fmt: skip


class Zygote:
    """The test's end. `run` has a limit, and nothing that it started outlives it."""

    def __init__(self) -> None:
        env = {k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "DIST_KD_DATA")}
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=ROOT,
            env=env | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)},
        )

    def run(self, *jobs: dict[str, Any], limit: float = 60) -> list[int]:
        """Starts one process per job at the same time; their exit codes, -9 for SIGKILL. Fails after `limit` s.

        A job: words (of the trainer) or save (a folder and steps), and optionally env, cwd, out, ledger, and faults:
        die, signals, at_step, fsize, kill_after (lines of the ledger, seconds).
        """
        print(json.dumps({"jobs": jobs, "limit": limit}), file=self._process.stdin, flush=True)
        answer = json.loads(self._process.stdout.readline())
        assert not answer["late"], f"did not end within {limit} s: {answer}"
        return answer["codes"]

    def close(self) -> None:
        self._process.kill()  # between two jobs it has nothing to lose, and an interpreter's end takes its time
        self._process.communicate(timeout=30)


def pair(jobs_of, port: int) -> list[dict]:
    """The jobs of two ranks that train together; `jobs_of(rank)` says what each does."""
    env = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    ranks = [env | {"RANK": str(r), "LOCAL_RANK": str(r), "ACCELERATE_USE_CPU": "true"} for r in (0, 1)]
    return [jobs_of(rank) | {"env": own} for rank, own in enumerate(ranks)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ------------------------------------------------------------------------------------- in the forked process

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.chmod", "os.listdir", "os.scandir")
NAMED = {  # point of a save -> (event, end of the path, which of them)
    "before anything": ("save", "", 1),
    "mid model": ("half", "model.safetensors", 1),
    "mid optimizer": ("half", "optimizer.pt", 1),
    "before the manifest": ("open", "manifest.json", 1),
    "before the rename": ("os.rename", ".partial", 1),
    "before the pointer": ("half", ".latest", 1),
    "during prune": ("os.remove", "", 2),
}


class Dying:
    """SIGKILL to itself before the `number`-th event, or at the `point`, of save number `save`."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec, self.saves, self.events, self.seen = spec, 0, 0, {}
        self.active = False

    def __call__(self, event: str, detail: str = "") -> None:
        if not self.active:
            return
        self.events += 1
        number = self.spec.get("number")
        if "point" in self.spec:
            wanted, end, which = NAMED[self.spec["point"]]
            if event == wanted and (detail.endswith(end) or f"/{end}." in detail):
                self.seen[event] = self.seen.get(event, 0) + 1
                number = self.events if self.seen[event] == which else None
        if self.events == number:
            os.kill(os.getpid(), signal.SIGKILL)

    def install(self) -> None:
        import torch

        from dist_kd import checkpoint

        save, save_file, torch_save, fsync = checkpoint.save, checkpoint.save_file, torch.save, os.fsync

        def counted(*args, **kwargs):
            self.saves += 1
            self.active = self.saves == self.spec["save"]
            self("save")
            result = save(*args, **kwargs)
            if self.active and "count" in self.spec:
                Path(self.spec["count"]).write_text(str(self.events))
            self.active = False
            return result

        def halves(write, data, where):
            write(data[: len(data) // 2])
            self("half", where)
            write(data[len(data) // 2 :])

        def file_in_halves(tensors, path):
            save_file(tensors, path)
            data = Path(path).read_bytes()
            with open(path, "wb", buffering=0) as file:
                halves(file.write, data, str(path))

        def torch_in_halves(content, file):
            buffer = io.BytesIO()
            torch_save(content, buffer)
            halves(lambda data: (file.write(data), file.flush()), buffer.getvalue(), file.name)

        def text_in_halves(path, text):
            with open(path, "wb", buffering=0) as file:
                halves(file.write, text.encode(), str(path))

        def synced(number):
            self("fsync", "")
            fsync(number)

        checkpoint.save, checkpoint.save_file, torch.save, os.fsync = counted, file_in_halves, torch_in_halves, synced
        Path.write_text = text_in_halves
        sys.addaudithook(lambda event, args: self(event, str(args[0])) if event in EVENTS else None)


def keep_ledger(path: str, at_step: dict[str, str], signals: list[list[str]]) -> None:
    """Writes `step ids` to `path` after each step; runs a shell command before a step, sends signals in phases."""
    from dist_kd import checkpoint, loop, teacher_score, wiring
    from dist_kd.evaluation import Evaluator

    step, ids = loop._train_step, []

    def recorded(run, batches):
        def seen():
            for batch in batches:
                ids.append(batch.samples.tolist())
                yield batch

        ids.clear()
        command = at_step.get(str(run.state.step))
        if command:
            subprocess.run(command, shell=True, check=True, timeout=30)
        result = step(run, seen())
        with open(path, "a") as file:
            file.write(f"{run.state.step - 1} {json.dumps([i for batch in ids for i in batch])}\n")
        return result

    loop._train_step = recorded
    places = {
        "data": (wiring, "open_sets", 1),
        "teacher": (teacher_score, "score_teacher", 1),
        "step": (loop, "_train_step", 3),
        "evaluation": (Evaluator, "score", 2),  # the first is the teacher's
        "last evaluation": (Evaluator, "score", 5),  # of SMALL's steps 3, 6, 9 and 11
        "save": (checkpoint, "_write_files", 1),
    }
    for phase, name in signals:
        owner, attribute, which = places[phase]
        setattr(owner, attribute, _signalling(getattr(owner, attribute), getattr(signal, name), which))


def _signalling(call, number: int, which: int):
    calls = []

    def wrapped(*args, **kwargs):
        calls.append(1)
        if len(calls) == which:
            os.kill(os.getpid(), number)
        return call(*args, **kwargs)

    return wrapped


def _save_only(folder: str, steps: list[int]) -> int:
    import torch

    from dist_kd import checkpoint
    from dist_kd.train_state import TrainState

    facts = {"settings": {}, "layout": dict.fromkeys(checkpoint.LAYOUT, 1), "data": "f"}
    for number, step in enumerate(steps):
        tensors = {"model": {"w": torch.full((1000,), float(step))}, "ema": {"w": torch.full((9,), float(number))}}
        state = TrainState(step=step, best_step=step, evaluations=number)
        checkpoint.save(Path(folder), checkpoint.Snapshot(state, tensors, {"optimizer": {}}, facts), keep=2)
    return 0


def _forked(job: dict[str, Any]) -> int:
    os.environ.update(job.get("env", {}))
    os.chdir(job.get("cwd", ROOT))
    out = os.open(job.get("out", os.devnull), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(out, 1)
    os.dup2(out, 2)
    if "user" in job:
        os.setgroups([])
        os.setgid(job["user"])
        os.setuid(job["user"])
    if "fsize" in job:
        resource.setrlimit(resource.RLIMIT_FSIZE, (job["fsize"], job["fsize"]))
    if "die" in job:
        Dying(job["die"]).install()
    if "save" in job:
        return _save_only(*job["save"])
    keep_ledger(job.get("ledger", os.devnull), job.get("at_step", {}), job.get("signals", []))
    from dist_kd.train import main

    return main(job["words"])


def _answer(jobs: list[dict[str, Any]], limit: float) -> dict[str, Any]:
    pids, kills = [], []
    for job in jobs:
        pid = os.fork()
        if pid == 0:
            code = 70
            try:
                code = _forked(job)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        pids.append(pid)
        kills.append(job.get("kill_after"))
    end, codes = time.monotonic() + limit, {}
    while len(codes) < len(pids) and time.monotonic() < end:
        for pid, job, kill in zip(pids, jobs, kills, strict=True):
            if pid in codes:
                continue
            done, status = os.waitpid(pid, os.WNOHANG)
            if done:
                codes[pid] = os.waitstatus_to_exitcode(status)
            elif kill and os.path.exists(job["ledger"]) and len(Path(job["ledger"]).read_text().split("\n")) > kill[0]:
                time.sleep(kill[1])
                os.kill(pid, signal.SIGKILL)
                kill[0] = 10**9
        time.sleep(0.005)
    late = [pid for pid in pids if pid not in codes]
    for pid in late:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    return {"codes": [codes.get(pid) for pid in pids], "late": late}


if __name__ == "__main__":
    import dist_kd.lifetime
    import dist_kd.train  # noqa: F401

    answers = os.dup(1)
    os.dup2(2, 1)  # only answers on the pipe
    for line in sys.stdin:
        os.write(answers, (json.dumps(_answer(**json.loads(line))) + "\n").encode())
