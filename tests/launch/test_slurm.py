"""Batch scripts under a real SLURM: two nodes on this host, two processes over gloo, real shards."""

import json
import re
import sys
from pathlib import Path

import pytest
from dist.launching import launch, world_size
from launch.cluster import NODES, cluster_in, until
from walks.training import assert_same, final_state

from dist_kd import checkpoint

pytestmark = [pytest.mark.slurm, pytest.mark.timeout(900)]

ROOT = Path(__file__).parent.parent.parent
# one epoch has 89 steps
SETTINGS = [
    "--arch", "cnn_medium", "--teacher-arch", "cnn_medium", "--teacher-weights", "none", "--kd", "--T", "4", "--w",
    "0.9", "--image-size", "32", "--batch-size", "16", "--device-batch-size", "8", "--workers", "0", "--lr", "0.01",
    "--log-steps", "5", "--checkpoint-steps", "10", "--keep", "3", "--ema-decay", "0.9", "--teacher-eval-samples", "20",
    "--cpu",
]  # fmt: skip
SHORT = [*SETTINGS, "--max-steps", "85"]
ENDLESS = [*SETTINGS, "--max-steps", "100000"]
CANARY = "canary-d41d8cd98f"
IMPORTABLE = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    with cluster_in(tmp_path_factory.mktemp("slurm")) as running:
        yield running


@pytest.fixture(autouse=True)
def nothing_left(cluster):
    """Each test leaves idle nodes and no process of a job."""
    yield
    cluster.ask("scancel", "--user=root")
    cluster.until_idle()
    until("no process of a job is left", lambda: not cluster.leftovers(), 30, lambda: "\n".join(cluster.leftovers()))


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    from dist_kd.commands.pack import main

    where = tmp_path_factory.mktemp("digits")
    main(["digits", str(where), "--shard-size", "300", "--jobs", "1"])
    return where


@pytest.fixture(scope="module")
def undisturbed(digits, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed")
    launch("torchrun", "dist_kd/train.py", *SHORT, "--data", str(digits), "--save-path", str(run), limit=300)
    assert world_size(run) == 2
    return final_state(run)


class Job:
    """A submitted training: its number, run folder and output."""

    def __init__(self, cluster, folder: Path, *flags: str, script: str = "slurm_multinode", options=(), variables=None):
        self.cluster, self.run, self.log = cluster, folder / "run", folder / "log"
        self.number = cluster.submit(
            "--gpus-per-node=1", "--cpus-per-task=1", f"--output={self.log}", *options,
            f"{ROOT}/launch/{script}.sbatch", *flags, "--save-path", "run", cwd=folder,
            variables={
                "CODE": str(ROOT), "PYTHON": sys.executable, "OMP_NUM_THREADS": "1", "WANDB_API_KEY": CANARY,
            } | (variables or {}),
        )  # fmt: skip

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""

    def until_said(self, pattern: str, limit: float = 200) -> None:
        until(f"the job says {pattern}", lambda: re.search(pattern, self.said()), limit, self.hint)

    def until_ended(self, limit: float = 300) -> str:
        return self.cluster.until_ended(self.number, limit, self.hint)

    def hint(self) -> str:
        return f"{self.said()[-3000:]}\n{self.cluster.logs()[-3000:]}"

    def starts(self) -> list[int]:
        """The step at which each start began."""
        return [start["step"] for start in json.loads((self.run / "run.json").read_text())["starts"]]

    def status(self) -> dict:
        return json.loads((self.run / "status.json").read_text())

    def warn(self) -> None:
        """What SLURM does before the time is over."""
        self.cluster.ask("scancel", "--batch", "--signal=USR1", self.number)


def test_preempted_twice_in_one_epoch(cluster, digits, undisturbed, tmp_path):
    """Once in training, once while torch is still being imported; then it ends as if nothing had been."""
    job = Job(cluster, tmp_path, *SHORT, "--data", str(digits))
    job.until_said(r"step +5/85")
    assert any("train.py" in line for line in cluster.leftovers())
    assert not any(CANARY in line for line in cluster.leftovers())
    job.warn()
    job.until_said(r"slurm: job \d+, start 1")
    job.warn()
    assert job.until_ended() == "COMPLETED", job.hint()
    first, second, third = job.starts()
    assert first == 0 and 5 <= second <= third < 85
    assert world_size(job.run) == 2
    assert len(re.findall(r"slurm: again from step \d+, after: file STOP", job.said())) == 2
    assert cluster.job(job.number)["Restarts"] == "2" and job.status()["state"] == "done"
    assert not (job.run / "STOP").exists()
    assert_same(final_state(job.run), undisturbed)
    for path in (job.log, *job.run.rglob("*")):
        assert not path.is_file() or CANARY.encode() not in path.read_bytes(), path


def test_a_node_is_lost(cluster, digits, undisturbed, tmp_path):
    """A power cut of one node: the job leaves the other, waits for the node, and goes on from the last checkpoint."""
    job = Job(cluster, tmp_path, *SHORT, "--data", str(digits))
    job.until_said(r"step +15/85")
    cluster.kill_node(NODES[1])
    until("the job is not running", lambda: cluster.job(job.number).get("JobState") != "RUNNING", 60, job.hint)
    cluster.start_node(NODES[1])
    assert job.until_ended() == "COMPLETED", job.hint()
    # what SLURM still had to tell the lost step may reach the next one, of the same name, if the node is back within a
    # minute: then there is one start more
    first, second, *_ = job.starts()
    assert first == 0 and second % 10 == 0 and 10 <= second < 85
    assert world_size(job.run) == 2
    assert_same(final_state(job.run), undisturbed)


def test_the_time_is_over_and_then_it_is_cancelled(cluster, digits, tmp_path):
    """SLURM's own warning makes it save and queue again; scancel makes it save, and ends it for good."""
    job = Job(cluster, tmp_path, *ENDLESS, "--data", str(digits), options=["--time=60"])
    job.until_said(r"step +5/")
    cluster.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=2")  # less than the 300 s of the warning
    job.until_said(r"slurm: again from step \d+, after: file STOP")  # SLURM looks every 30 s
    cluster.ask("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    job.until_said(r"start 1,(.|\n)*step +\d+/100000")
    first, second = job.starts()
    assert first == 0 and second >= 5
    cluster.ask("scancel", job.number)
    assert job.until_ended() == "CANCELLED"
    assert job.status()["state"] == "preempted" and "SIGTERM" in job.status()["message"]
    found, refused = checkpoint.find(job.run / "checkpoints")
    assert not refused and found.name == checkpoint.folder_name(job.status()["step"])
    assert job.status()["step"] > second


SLOW_DISK = """
import os, time
fsync = os.fsync
def slow(number):
    while os.path.exists({flag!r}):
        time.sleep(0.1)
    fsync(number)
os.fsync = slow
"""


def test_cancelled_with_less_time_than_a_save_takes(cluster, digits, undisturbed, tmp_path):
    """A disk that takes longer than SLURM's KillWait of 10 s: killed in mid-save, the next job goes on from the last
    good checkpoint."""
    flag = tmp_path / "slow"
    (tmp_path / "sitecustomize.py").write_text(SLOW_DISK.format(flag=str(flag)))
    words, options = [*SHORT, "--data", str(digits)], {"variables": {"PYTHONPATH": str(tmp_path)}}
    job = Job(cluster, tmp_path, *words, **options)
    job.until_said(r"step +15/85")
    flag.touch()
    cluster.ask("scancel", job.number)
    assert job.until_ended(100) == "CANCELLED"
    until("no process of the job is left", lambda: not cluster.leftovers(), 30, job.hint)
    flag.unlink()
    left = sorted((job.run / "checkpoints").glob(".step_*.partial"))
    assert len(left) == 1 and job.status()["state"] == "running", job.hint()
    found, refused = checkpoint.find(job.run / "checkpoints")
    good = int(found.name.removeprefix("step_"))
    assert not refused and good >= 10 and good % 10 == 0
    again = Job(cluster, tmp_path, *words, **options)
    assert again.until_ended() == "COMPLETED", again.hint()
    assert again.starts() == [0, good] and world_size(again.run) == 2
    assert not left[0].exists()
    assert_same(final_state(again.run), undisturbed)


def test_an_error_that_another_start_would_meet_again(cluster, digits, tmp_path):
    for name, flags, code, words in [
        ("flag", ["--data", str(digits), "--T", "-1"], "2:0", "config error"),
        ("data", ["--data", str(tmp_path / "nowhere")], "1:0", "slurm: failed, and would again"),
    ]:
        (tmp_path / name).mkdir()
        job = Job(cluster, tmp_path / name, *SHORT, *flags, script="slurm_1node")
        assert job.until_ended() == "FAILED"
        facts = cluster.job(job.number)
        assert (facts["NumNodes"], facts["Restarts"], facts["ExitCode"]) == ("1", "0", code), job.hint()
        assert words in job.said()


def test_three_starts_without_a_step_are_the_last(cluster, digits, tmp_path):
    """Processes that die before the trainer can say anything; run.json knows nothing of them."""
    (tmp_path / "sitecustomize.py").write_text("import os\nif 'RANK' in os.environ:\n    os._exit(9)\n")
    options = {"variables": {"PYTHONPATH": str(tmp_path)}, "script": "slurm_1node"}
    job = Job(cluster, tmp_path, *SHORT, "--data", str(digits), **options)
    assert job.until_ended() == "FAILED"
    assert cluster.job(job.number)["Restarts"] == "2", job.hint()
    assert f"3 starts of job {job.number} brought no step after 0" in job.said()


def test_a_set_is_packed_by_an_array_of_jobs(cluster, tmp_path):
    """The bytes are those of one process, whichever part is finished first."""
    pack = f"{sys.executable} -m dist_kd.commands.main pack digits"
    options = "--shard-size 200 --jobs 1"
    part = f"{pack} {tmp_path}/parts {options} --part $SLURM_ARRAY_TASK_ID/$SLURM_ARRAY_TASK_COUNT"
    array = cluster.submit("--array=1-3", "--output=%a.log", f"--wrap={part}", cwd=tmp_path, variables=IMPORTABLE)
    whole = cluster.submit(
        f"--dependency=afterok:{array}", "--output=merge.log", f"--wrap={pack} {tmp_path}/parts {options}",
        cwd=tmp_path, variables=IMPORTABLE,
    )  # fmt: skip
    single = cluster.submit(f"--wrap={pack} {tmp_path}/single {options}", cwd=tmp_path, variables=IMPORTABLE)
    said = lambda: "\n".join(path.read_text() for path in tmp_path.glob("*.log"))  # noqa: E731
    assert cluster.until_ended(whole, 200, said) == "COMPLETED", said()
    assert cluster.until_ended(single, 100, said) == "COMPLETED"
    ours, theirs = (
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "parts", tmp_path / "single")
    )
    assert ours.keys() == theirs.keys() and len(ours) == 8 + 2 + 2 * 3
    assert ours == theirs
    assert ".tar" not in (tmp_path / "merge.log").read_text()  # nothing was left to pack
