"""Real processes over gloo. Every launch has a hard limit, and every test asserts the world size it wanted."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LAUNCHERS = {
    "torchrun": [
        "-m", "torch.distributed.run", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "--nproc-per-node",
    ],
    "accelerate": [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_machines", "1", "--mixed_precision", "no",
        "--dynamo_backend", "no", "--main_process_port", "0", "--num_processes",
    ],
    "plain": [],
}  # fmt: skip


def launch(
    launcher: str,
    *words: str,
    processes: int = 2,
    limit: float = 100,
    expected: int | None = 0,
    variables: dict[str, str] | None = None,
    meanwhile: Callable[[subprocess.Popen], None] | None = None,
) -> str:
    """Runs a script of the project under `launcher`; its output. The whole process group ends with the limit.

    Its exit code is `expected`, which is any if that is None.
    `meanwhile` is called once it has started, and has limits of its own.
    """
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    count = [] if launcher == "plain" else [str(processes)]
    process = subprocess.Popen(
        [sys.executable, *LAUNCHERS[launcher], *count, *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env | (variables or {}), cwd=ROOT,
        start_new_session=True,
    )  # fmt: skip
    try:
        if meanwhile is not None:
            meanwhile(process)
        output, _ = process.communicate(timeout=limit)
    except BaseException as error:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        if isinstance(error, subprocess.TimeoutExpired):
            pytest.fail(f"{launcher} did not end within {limit} s; it said:\n{output[-3000:]}")
        print(output[-3000:])
        raise
    assert expected in (None, process.returncode), output[-4000:]
    return output


def train_here(*words: str, variables: dict[str, str]) -> None:
    """Trains in this very process: one process without the seconds that a new one takes to import torch."""
    from dist_kd.cli import parse
    from dist_kd.lifetime import run_training

    with pytest.MonkeyPatch.context() as patch:
        for name, value in variables.items():
            patch.setenv(name, value)
        assert run_training(parse(list(words))) == 0


def world_size(run: Path) -> int:
    return json.loads((run / "run.json").read_text())["starts"][-1]["world_size"]
