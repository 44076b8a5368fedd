"""Real processes over gloo. Every launch has a hard limit, and every test asserts the world size it wanted."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
LAUNCHERS = {
    "torchrun": [
        "-m", "torch.distributed.run", "--nproc-per-node", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", "127.0.0.1:0",
    ],
    "accelerate": [
        "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
        "--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0",
    ],
    "plain": [],
}  # fmt: skip


def launch(launcher: str, *words: str, limit: float = 100) -> str:
    """Runs a script of the project under `launcher`; its output. The whole process group ends with the limit."""
    env = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(name, None)
    process = subprocess.Popen(
        [sys.executable, *LAUNCHERS[launcher], *words],
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    try:
        output, _ = process.communicate(timeout=limit)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        output, _ = process.communicate()
        pytest.fail(f"{launcher} did not end within {limit} s; it said:\n{output[-3000:]}")
    assert process.returncode == 0, output[-4000:]
    return output


def world_size(run: Path) -> int:
    return json.loads((run / "run.json").read_text())["starts"][-1]["world_size"]
