"""torchrun and `accelerate launch`, as if on two machines: the world that was asked for, one process's weights."""

import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from dist.launching import launch, world_size
from walks.training import final_state

ROOT = Path(__file__).parent.parent.parent
TRAINING = [
    "dist_kd/train.py", "--arch", "cnn_small", "--no-kd", "--image-size", "8", "--batch-size", "16",
    "--device-batch-size", "8", "--max-steps", "4", "--workers", "0", "--lr", "0.01",
    "--mixed-precision", "no", "--cpu",
]  # fmt: skip
TORCHRUN = ["-m", "torch.distributed.run", "--nproc-per-node", "1", "--nnodes", "2"]
ACCELERATE = [
    "-m", "accelerate.commands.launch", "--config_file", "launch/accelerate_multinode.yaml", "--num_processes", "2",
    "--main_process_ip", "127.0.0.1", "--main_process_port",
]  # fmt: skip
# on each of two machines: {port} is the meeting place, {machine} 0 or 1
MACHINES = {
    "torchrun-c10d": [*TORCHRUN, "--rdzv-backend", "c10d", "--rdzv-id", "7", "--rdzv-endpoint", "127.0.0.1:{port}"],
    "torchrun-static": [
        *TORCHRUN, "--node-rank", "{machine}", "--master-addr", "127.0.0.1", "--master-port", "{port}",
    ],
    "accelerate-static": [*ACCELERATE, "{port}", "--machine_rank", "{machine}"],
}  # fmt: skip


@pytest.fixture(scope="module")
def one_process(odd_digits, tmp_path_factory):
    run = tmp_path_factory.mktemp("one")
    launch("plain", *TRAINING, "--data", str(odd_digits), "--save-path", str(run))
    assert world_size(run) == 1
    return weights(run)


def weights(run: Path) -> dict:
    """Of the student, but for what depends on the micro-batch of rank 0 alone."""
    model = final_state(run)["snapshot"].tensors["model"]
    return {name: value for name, value in model.items() if "running" not in name and "num_batches" not in name}


def assert_two_gave(run: Path, expected: dict) -> None:
    assert world_size(run) == 2
    ours = weights(run)
    assert ours.keys() == expected.keys()
    for name, value in ours.items():
        assert (value - expected[name]).abs().max() < 1e-5, name


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in MACHINES if name.startswith("torchrun")]


@pytest.mark.parametrize("launcher", ["accelerate-static", *SLOW])
def test_two_machines_train_what_one_process_does(odd_digits, tmp_path, one_process, launcher):
    """Both launchers have to end well, within 100 s."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = [*MACHINES[launcher], *TRAINING, "--data", str(odd_digits), "--save-path", str(tmp_path)]
    first, second = ([word.format(port=port, machine=machine) for word in words] for machine in (0, 1))
    other = []

    def start_other(_: subprocess.Popen) -> None:
        other.append(subprocess.Popen([sys.executable, *second], cwd=ROOT, stdout=subprocess.DEVNULL))

    try:
        launch("plain", *first, meanwhile=start_other)
        assert other[0].wait(30) == 0
    finally:
        other[0].kill()
        other[0].wait(10)
    assert_two_gave(tmp_path, one_process)


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_a_line_that_cannot_work_is_told_once_by_two_processes(tmp_path, launcher):
    """Within 100 s. The launcher ends with 1, whatever its processes do, and names the 2 of one of them."""
    run = tmp_path / "run"
    said = launch(launcher, "dist_kd/train.py", "--no-such-flag", "--save-path", str(run), expected=1)
    assert said.count("--no-such-flag: no such flag") == said.count("config error") == 1, said
    assert re.search(r"exitcode +: 2 ", said), said
    assert "dist_kd/cli" not in said  # no traceback of ours
    assert not run.exists()


@pytest.mark.parametrize(
    ("file", "here"),
    [
        ("accelerate_cpu.yaml", []),
        pytest.param(
            "accelerate_8gpu.yaml", ["--num_processes", "2", "--mixed_precision", "no"], marks=pytest.mark.slow
        ),
    ],
)
def test_the_files_of_accelerate(odd_digits, tmp_path, one_process, file, here):
    """By the command in each file's header; `here` is what two cores want otherwise."""
    text = (ROOT / "launch" / file).read_text()
    header = next(line for line in text.splitlines() if "accelerate launch" in line)
    command = shlex.split(header.removeprefix("#").partition("dist_kd/train.py")[0])
    assert command[:2] == ["accelerate", "launch"]
    words = ["-m", "accelerate.commands.launch", *command[2:], *here, *TRAINING]
    launch("plain", *words, "--data", str(odd_digits), "--save-path", str(tmp_path))
    assert_two_gave(tmp_path, one_process)


@pytest.mark.timeout(200)
@pytest.mark.parametrize("rank", [0, 1])
def test_a_meeting_place_that_is_none_is_named(tmp_path, rank):
    """Rank 0 finds its port in use, at once; rank 1 nobody there, by the limit of a wait (here 6 s)."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port = taken.getsockname()[1]
        if rank == 0:
            taken.listen()
        world = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
        script = tmp_path / "start.py"
        script.write_text(
            "import sys\nfrom dist_kd import runtime\nfrom dist_kd.train import main\n"
            "runtime.GROUP_SLACK_S = 2.0\nsys.exit(main())\n"
        )
        said = launch(
            "plain", str(script), *TRAINING[1:], "--data", "digits", "--save-path", str(tmp_path / "run"),
            "--hang-timeout", "1", expected=8, variables=world | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)},
        )  # fmt: skip
    assert f"the processes did not find each other at `127.0.0.1:{port}` (MASTER_ADDR and MASTER_PORT" in said
    assert ("address already in use" in said) == (rank == 0)
    assert said.count("lost error: ") == 1 and "Traceback" not in said and not (tmp_path / "run").exists()
