"""Where a run's folder is, and whether its job is worth another start: what the batch scripts ask.

again.py folder TRAINER-FLAGS...      prints the folder, and makes it; exit 2 for flags the trainer would refuse
again.py begin FOLDER                 notes this start of the job; exit 1 if its last 3 brought no new step
again.py end FOLDER EXIT-CODE ASKED   prints done, again, stopped or failed, and why
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dist_kd.cli import ended, parse
from dist_kd.errors import DistKDError

STARTS = "slurm_starts.jsonl"  # in the run's folder; a start that fails before the trainer can note it is in it too
MOST_WITHOUT_PROGRESS = 3
PERMANENT = ("config", "data", "checkpoint", "diverged", "memory")  # kinds of errors the same line meets again


class NoProgress(DistKDError):
    """Another start would be one too many."""


def folder(flags: list[str]) -> Path:
    """The run's folder, made."""
    config = parse(flags).config
    found = Path(config.save_path or Path("runs") / config.default_name)
    found.mkdir(parents=True, exist_ok=True)
    return found


def begin(run: Path, job: str) -> None:
    """Notes a start of `job`. NoProgress if it has had MOST_WITHOUT_PROGRESS at this very step."""
    refuse_if_stuck(run, job)
    start = {"job": job, "step": step(run), "status": status(run).get("time")}
    with (run / STARTS).open("a") as file:
        file.write(f"\n{json.dumps(start)}\n")  # not behind a half line


def end(run: Path, job: str, code: int, asked: bool) -> str:
    """What to do now that the trainer has left with `code`; `asked`: the job had told it to stop."""
    now = status(run)
    if now.get("time") == starts(run, job)[-1]["status"]:
        now = {"state": "failed", "message": "the trainer did not get as far as to say why"}
    what = f"{now.get('kind', '')} {now.get('message', '')}".strip()
    if code == 0 and now["state"] == "done":
        return "done"
    if now["state"] == "preempted" and not asked and now["message"] == "file STOP":
        return "stopped: somebody else made the STOP file"
    if now["state"] == "failed" and now.get("kind") in PERMANENT:
        return f"failed, and would again: {what}"
    try:
        refuse_if_stuck(run, job)
    except NoProgress as error:
        return f"failed: {error}; the last: {what}"
    return f"again from step {step(run)}, after: {what or now['state']}"


def refuse_if_stuck(run: Path, job: str) -> None:
    """NoProgress if the last starts of `job` all began at the step that is still the newest saved."""
    last = [start["step"] for start in starts(run, job)][-MOST_WITHOUT_PROGRESS:]
    if last == [step(run)] * MOST_WITHOUT_PROGRESS:
        raise NoProgress(f"{len(last)} starts of job {job} brought no step after {step(run)}")


def starts(run: Path, job: str) -> list[dict]:
    """The starts of `job` in this folder, first to last; a half line, as a crash of the machine leaves it, is none."""
    found = []
    with contextlib.suppress(FileNotFoundError):
        for line in (run / STARTS).read_text(errors="replace").splitlines():
            with contextlib.suppress(ValueError):
                found.append(json.loads(line))
    return [start for start in found if start["job"] == job]


def step(run: Path) -> int:
    """The step of the newest checkpoint, 0 without one."""
    try:
        return int((run / "checkpoints" / "latest").read_text().rpartition("_")[2])
    except FileNotFoundError:
        return 0


def status(run: Path) -> dict:
    """status.json; what a crash of the machine left of it counts as nothing."""
    try:
        return json.loads((run / "status.json").read_text())
    except (FileNotFoundError, ValueError):
        return {}


def main(argv: list[str]) -> None:
    what, *words = argv
    job = os.environ.get("SLURM_JOB_ID", "")
    if what == "folder":
        print(folder(words))
    elif what == "begin":
        begin(Path(words[0]), job)
    else:
        print(end(Path(words[0]), job, int(words[1]), bool(words[2])))


if __name__ == "__main__":
    sys.exit(ended(lambda: main(sys.argv[1:])))
