"""A real SLURM of two nodes on this host: munged, slurmctld and two slurmd in a folder of their own."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

HOST = socket.gethostname().partition(".")[0]
NODES = (HOST, f"{HOST}-2nd")  # in SLURM's order; processes of all nodes meet at the first, whose name resolves
NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "scontrol", "scancel", "srun")
# cred_expire is also how long a requeued job must wait: 120 s by default
CONF = """
ClusterName=test
GresTypes=gpu
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ctld}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
CredType=cred/munge
MpiDefault=none
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
ReturnToService=2
KillWait=10
SlurmdTimeout=10
MessageTimeout=5
JobRequeue=1
MinJobAge=3600
StateSaveLocation={folder}/state
SlurmctldPidFile={folder}/slurmctld.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdSpoolDir={folder}/spool-%n
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmdLogFile={folder}/slurmd-%n.log
NodeName={host} NodeHostname={host} NodeAddr=127.0.0.1 Port={first} CPUs=2 RealMemory=1000 Gres=gpu:2
NodeName={host}-2nd NodeHostname={host} NodeAddr=127.0.0.1 Port={second} CPUs=2 RealMemory=1000 Gres=gpu:2
PartitionName=all Nodes={host},{host}-2nd Default=YES MaxTime=INFINITE OverSubscribe=NO State=UP
"""


def until(what: str, done: Callable[[], Any], limit: float, hint: Callable[[], str] = str) -> Any:
    """The first true answer of `done()`, asked for `limit` seconds; the test fails with `what` and `hint()` then."""
    deadline = time.monotonic() + limit
    while True:
        answer = done()
        if answer:
            return answer
        if time.monotonic() > deadline:
            pytest.fail(f"not within {limit:.0f} s: {what}\n{hint()}")
        time.sleep(0.2)


class Cluster:
    """Daemons as children of this process, and the commands of SLURM that speak to them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.daemons: dict[str, subprocess.Popen] = {}
        self.env = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM", "SBATCH"))}
        self.env["SLURM_CONF"] = str(folder / "slurm.conf")

    def start(self) -> None:
        self.folder.chmod(0o755)
        (self.folder / "state").mkdir()
        ports = dict(zip(("ctld", "first", "second"), _free_ports(3), strict=True))
        (self.folder / "slurm.conf").write_text(CONF.format(host=HOST, folder=self.folder, **ports))
        # devices that stand for GPUs: SLURM counts them and hands them out, nobody opens them
        gpus = [f"Name=gpu File=/dev/{device}\n" for device in ("null", "zero")]
        (self.folder / "gres.conf").write_text("".join(["AutoDetect=off\n", *gpus]))
        (self.folder / "cgroup.conf").write_text("CgroupPlugin=autodetect\n")
        key = self.folder / "munge.key"
        key.write_bytes(os.urandom(128))
        key.chmod(0o600)
        files = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
        names = [f"--{option}={self.folder}/munge.{ending}" for option, ending in files.items()]
        self._daemon("munged", "munged", "--foreground", "--force", *names)
        until("munged's socket", (self.folder / "munge.socket").exists, 20, self.logs)
        self._daemon("slurmctld", "slurmctld", "-D", "-c")
        for node in NODES:
            self.start_node(node)
        self.until_idle()

    def _daemon(self, name: str, *words: str) -> None:
        with (self.folder / f"{name}.out").open("ab") as out:
            self.daemons[name] = subprocess.Popen(
                words, env=self.env, stdin=subprocess.DEVNULL, stdout=out, stderr=out, start_new_session=True
            )

    def start_node(self, node: str) -> None:
        self._daemon(node, "slurmd", "-D", "-N", node)

    def until_idle(self, limit: float = 60) -> None:
        def idle() -> bool:
            states = self.ask("sinfo", "--noheader", "--Node", "--format=%N %t").split()
            return sorted(states) == sorted([*NODES, "idle", "idle"])

        until("both nodes are idle", idle, limit, self.logs)

    def kill_node(self, node: str) -> None:
        """What a power cut does: slurmd, its step daemons and all that they started, at once."""
        mine = f"SLURMD_NODENAME={node}".encode()
        stepds = [pid for pid in _pids() if b"slurmstepd" in _cmdline(pid)]
        doomed = {pid for pid in _pids() if mine in _environ(pid).split(b"\0") and self._is_ours(pid)}
        parents = {_parent(pid) for pid in doomed}
        for pid in (self.daemons[node].pid, *(pid for pid in stepds if pid in parents), *doomed):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.daemons.pop(node).wait(10)

    def ask(self, *words: str) -> str:
        """Output of a SLURM command; empty if it fails, since daemons may be busy or gone."""
        done = subprocess.run(words, env=self.env, capture_output=True, text=True, timeout=60, check=False)
        return done.stdout if done.returncode == 0 else ""

    def submit(self, *words: str, cwd: Path, variables: dict[str, str] | None = None) -> str:
        """The job's number; sbatch must take it."""
        done = subprocess.run(
            ["sbatch", "--parsable", *words], env=self.env | (variables or {}), cwd=cwd, capture_output=True, text=True,
            timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """`scontrol show job` as a dict."""
        return dict(re.findall(r"(\w+)=(\S*)", self.ask("scontrol", "show", "job", number)))

    def until_ended(self, number: str, limit: float, hint: Callable[[], str] = str) -> str:
        """The job's last state."""
        going = ("", "PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")

        def ended() -> str:
            state = self.job(number).get("JobState", "")
            return "" if state in going else state

        return until(f"job {number} ends", ended, limit, lambda: f"{self.job(number)}\n{hint()}")

    def leftovers(self) -> list[str]:
        """Processes of jobs: whoever has this cluster's settings in its environment, but daemons and their children."""
        daemons = {process.pid for process in self.daemons.values()}
        found = [pid for pid in _pids() if self._is_ours(pid) and not daemons & {pid, _parent(pid)}]
        return [f"{pid} {_cmdline(pid).decode(errors='replace')}" for pid in found]

    def _is_ours(self, pid: int) -> bool:
        return f"SLURM_CONF={self.env['SLURM_CONF']}".encode() in _environ(pid).split(b"\0")

    def logs(self) -> str:
        texts = [f"== {path.name}\n{path.read_text(errors='replace')[-1500:]}" for path in self.folder.glob("*.log")]
        return "\n".join([*texts, self.ask("sinfo"), self.ask("squeue")])

    def stop(self) -> None:
        """Cancels what runs, then ends the daemons, jobs' users first; none is left."""
        if self.daemons.get("slurmctld"):
            self.ask("scancel", "--user=root")
            with contextlib.suppress(Exception):
                until("no job is left", lambda: not self.ask("squeue", "--noheader"), 30)
        for name in (*NODES, "slurmctld", "munged"):
            process = self.daemons.pop(name, None)
            if process is None:
                continue
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(10)


@contextlib.contextmanager
def cluster_in(folder: Path) -> Iterator[Cluster]:
    """A running cluster with its files in `folder`; skips where SLURM is not installed or this is not root."""
    missing = [name for name in NEEDED if shutil.which(name) is None]
    if missing or os.geteuid() != 0:
        pytest.skip(f"needs root and Debian's packages slurm-wlm and munge; missing: {', '.join(missing) or 'root'}")
    cluster = Cluster(folder)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for one in sockets:
        one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _pids() -> list[int]:
    return [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit()]


def _proc(pid: int, name: str) -> bytes:
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def _environ(pid: int) -> bytes:
    return _proc(pid, "environ")


def _cmdline(pid: int) -> bytes:
    return _proc(pid, "cmdline").replace(b"\0", b" ")


def _parent(pid: int) -> int:
    fields = _proc(pid, "stat").rpartition(b") ")[2].split()
    return int(fields[1]) if fields else 0
