"""A run's folder: who the run is (run.json), what was asked (config.yaml), how it stands (status.json), what came out.

Written by rank 0 only. Checkpoints are checkpoint.py's, metrics tracking's.
"""

from __future__ import annotations

import contextlib
import json
import platform
import subprocess
import sys
import tempfile
import time
import uuid
from importlib import metadata
from pathlib import Path
from typing import Any

from dist_kd.checkpoint import write_atomically
from dist_kd.errors import CheckpointError, ConfigError
from dist_kd.run_lock import RunLock

PACKAGES = ("dist-kd", "torch", "torchvision", "accelerate", "webdataset", "numpy", "pillow", "safetensors")


def versions() -> dict[str, str]:
    """Installed versions of what a result may depend on."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def git_revision() -> dict[str, Any]:
    """Revision of this code and whether it has changes; empty outside a checkout."""
    here = Path(__file__).parent

    def ask(*words: str) -> str:
        return subprocess.run(
            ["git", "-C", str(here), *words], capture_output=True, text=True, timeout=10, check=True
        ).stdout.strip()

    try:
        return {"revision": ask("rev-parse", "HEAD"), "changed": bool(ask("status", "--porcelain", "-uno"))}
    except (OSError, subprocess.SubprocessError):
        return {}


class RunFolder:
    """The folder of one run, made or found."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.checkpoints = path / "checkpoints"
        self.metrics = path / "metrics.jsonl"
        self.lock = RunLock(path)
        self.has_said = False  # whether this process wrote the status that stands there

    def occupy(self) -> str | None:
        """Makes the folder and takes its lock; a line if that was taken over. ConfigError if another run holds it."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            line = self.lock.take()
            self.checkpoints.mkdir(exist_ok=True)
            with tempfile.TemporaryFile(dir=self.checkpoints):
                pass  # another user's folder is found out now, not at the first save
        except OSError as error:
            raise ConfigError(
                f"--save_path `{self.path}` cannot be written ({error.strerror or error}); give a folder that can"
            ) from error
        return line

    def read(self, name: str) -> dict[str, Any]:
        """A JSON file of the folder, or {} if it is not there."""
        try:
            content = json.loads((self.path / name).read_text())
            if not isinstance(content, dict):
                raise ValueError("it is no object")
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, RecursionError) as error:
            raise CheckpointError(
                f"`{self.path / name}` cannot be read as JSON ({error}); restore it, or give another --save_path"
            ) from error
        return content

    def write(self, name: str, content: dict[str, Any]) -> None:
        write_atomically(self.path / name, json.dumps(content, indent=1) + "\n")

    def status(self, state: str, **facts: Any) -> None:
        """running | done | preempted | failed: the truth, since launchers hide exit codes."""
        self.has_said = True
        try:
            self.write("status.json", {"state": state, "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), **facts})
        except OSError as error:  # a full disk: what the run does counts for more than that it says so
            with contextlib.suppress(OSError):
                print(f"warning: status.json could not be written ({error}); it is `{state}`", file=sys.stderr)

    def stopped_early(self, why: str) -> None:
        """A start that was asked to stop before it had built anything: only the status says so."""
        before = self.read("status.json")
        self.status("preempted", step=before.get("step", 0), total_steps=before.get("total_steps"), message=why)

    def record_start(self, *, step: int, facts: dict[str, Any], start: dict[str, Any]) -> str:
        """Adds this start to run.json; the run's id, the same over all starts and in W&B."""
        run = self.read("run.json")
        run.setdefault("run_id", uuid.uuid4().hex[:12])
        run.setdefault("name", self.path.name)
        run.setdefault("created", time.strftime("%Y-%m-%dT%H:%M:%S%z"))
        run.update(facts, versions=versions(), git=git_revision())
        run.setdefault("starts", []).append({"time": time.strftime("%Y-%m-%dT%H:%M:%S%z"), "step": step, **start})
        self.write("run.json", run)
        return run["run_id"]
