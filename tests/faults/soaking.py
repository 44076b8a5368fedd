"""Faults by chance against one run: what is drawn, and what every start that met some must have left.

An episode is one run from its first start to its end, and all of it follows from one number. Before each start
something may be wrong with the folder (DAMAGES); while it trains something may go wrong that it must bear (TROUBLES);
and all but the last one are ended (ENDS). Run as a script, under a launcher, this is one rank of a start.
"""

from __future__ import annotations

import json
import os
import random
import re
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))

from faults.zygote import NAMED, keep_ledger

FILES = ["model.safetensors", "ema.safetensors", "optimizer.pt", "state.json", "manifest.json"]
IN_MEMORY, BY_WORKERS = ["--workers", "0", "--in-memory"], ["--workers", "1", "--no-in-memory"]
CHECKPOINT = re.compile(r"step_(\d{8})(\.replaced)?")


class End(NamedTuple):
    """How a start may end: the exit codes of each rank, and (state, kind) in status.json; None: what stood there."""

    codes: list[set[int]]
    status: set[tuple[str, str | None] | None]
    polite: bool = False  # it saved what it had done


@dataclass
class Start:
    """One start that is about to be made. The tables below change it."""

    run: Path
    disk: Path
    ranks: int
    total: int
    chance: random.Random
    jobs: list[dict[str, Any]]
    begin: int = 0  # the step it must go on from
    loading: list[str] = field(default_factory=lambda: IN_MEMORY)
    words: list[str] = field(default_factory=list)  # further ones of the trainer's line
    dark: set[int] = field(default_factory=set)  # steps at which nothing can be written
    damaged: set[tuple[int, int]] = field(default_factory=set)  # checkpoints that must not be gone on from

    @property
    def a_rank(self) -> int:
        return self.chance.randrange(self.ranks)

    def at(self, step: int, rank: int, command: str) -> None:
        """Runs a shell command in this rank before this step; $PPID is the trainer."""
        commands = self.jobs[rank].setdefault("at_step", {})
        commands[str(step)] = "\n".join(filter(None, [commands.get(str(step)), command]))

    def sound(self) -> list[int]:
        return sound(self.run, self.damaged)


def identity(folder: Path) -> tuple[int, int]:
    """What a checkpoint's folder keeps when it is renamed, and no other one has."""
    return folder.stat().st_ino, folder.stat().st_mtime_ns


def sound(run: Path, damaged: set[tuple[int, int]]) -> list[int]:
    """Steps of the checkpoints there that nobody has damaged, the newest first."""
    there = [(match, p) for p in (run / "checkpoints").glob("*") if (match := CHECKPOINT.fullmatch(p.name))]
    return sorted({int(match[1]) for match, p in there if identity(p) not in damaged}, reverse=True)


# ------------------------------------------------------------------------------- before a start: no process lives


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def a_damaged_checkpoint(start: Start) -> None:
    steps = start.sound()
    if len(steps) < 2:
        return  # where none is left a start is refused, which is another test's
    folder = start.run / "checkpoints" / f"step_{steps[0]:08d}"
    hurt = start.chance.choice([_flip, Path.unlink, lambda p: os.truncate(p, p.stat().st_size // 2)])
    if folder.is_dir():
        hurt(folder / start.chance.choice(FILES))
        start.damaged.add(identity(folder))


def a_damaged_pointer(start: Start) -> None:
    where = start.run / "checkpoints" / start.chance.choice(["latest", "best"])
    if where.exists():
        where.write_bytes(start.chance.choice([b"", b"\xff\x00", b"step_00000099\n", b"../../etc\n"]))


def half_a_line(start: Start) -> None:
    lines = start.run / "metrics.jsonl"
    if lines.exists():
        with lines.open("ab") as file:
            file.write(b'{"step": 4, "kind": "train", "train/lo')


def a_silent_lock(start: Start) -> None:
    """Of a machine that has given no sign of life for ten minutes."""
    lock = start.run / "lock"
    lock.write_text(json.dumps({"host": "n17", "machine": "n17 of another boot", "pid": 1, "time": "then"}))
    os.utime(lock, (time.time() - 600,) * 2)


def what_a_dead_start_leaves(start: Start) -> None:
    for folder in ("checkpoints/.step_00000004.0a1b2c3d.partial", "heartbeats", "stacks"):
        (start.run / folder).mkdir(exist_ok=True)
    for name in ("checkpoints/.latest.77", "heartbeats/rank-7", "heartbeats/hung", "heartbeats/first-failure"):
        (start.run / name).write_text("{")
    (start.run / "checkpoints/.step_00000004.0a1b2c3d.partial/model.safetensors").write_bytes(b"half")


def a_stale_stop_file(start: Start) -> None:
    (start.run / "STOP").touch()


DAMAGES = {
    f.__name__: f
    for f in (
        a_damaged_checkpoint, a_damaged_pointer, half_a_line, a_silent_lock, what_a_dead_start_leaves,
        a_stale_stop_file,
    )
}  # fmt: skip

# ------------------------------------------------------------------------------- while it trains, and goes on

END_SERVICE = (
    "for p in $(cat /proc/$PPID/task/*/children); do grep -q wandb-core /proc/$p/comm && kill -KILL $p; done; :"
)


def a_full_disk(start: Start, at: int) -> None:
    """For two steps: two saves fail at most, and three in a row would end the run."""
    start.at(at, 0, f"head -c 30000000 /dev/zero > {start.disk}/filler; true")
    start.at(at + 2, 0, f"rm -f {start.disk}/filler")
    start.dark |= {at + 1, at + 2}


def a_pause(start: Start, at: int) -> None:
    start.at(at, start.a_rank, "(kill -STOP $PPID; sleep 0.5; kill -CONT $PPID) > /dev/null 2>&1 &")


def a_dead_service(start: Start, at: int) -> None:
    start.words.append("--wandb")
    start.at(at, 0, END_SERVICE)


def a_tracker_without_a_folder(start: Start, at: int) -> None:
    start.words.append("--tensorboard")
    start.run.mkdir(exist_ok=True)
    if not (start.run / "tensorboard").exists():
        (start.run / "tensorboard").write_text("a file where a folder belongs")


def another_way_of_loading(start: Start, at: int) -> None:
    """No trouble, but the end that comes meets other processes."""
    start.loading = BY_WORKERS


TROUBLES = {
    f.__name__: f for f in (a_full_disk, a_pause, a_dead_service, a_tracker_without_a_folder, another_way_of_loading)
}

# ------------------------------------------------------------------------------- what ends it

LOST = ("failed", "lost")


def _killed(start: Start, victims: set[int], *more) -> End:
    """Those that are left find that one was lost; where none is left, nobody can say anything."""
    codes = [{-9} if rank in victims else {8} for rank in range(start.ranks)]
    return End(codes, {("running", None) if len(victims) == start.ranks else LOST, *more})


def kill_a_rank(start: Start, at: int) -> End:
    victim = start.a_rank
    start.at(at, victim, "kill -KILL $PPID")
    return _killed(start, {victim})


def kill_all(start: Start, at: int) -> End:
    for rank in range(start.ranks):
        start.at(at, rank, "kill -KILL $PPID")
    codes = [{-9, 8} for _ in range(start.ranks)]  # the first one's death may be seen before the own comes
    return End(codes, {("running", None), LOST})


def kill_in_a_save(start: Start, at: int) -> End:
    start.jobs[0]["die"] = {"save": start.chance.randint(1, 3), "point": start.chance.choice(list(NAMED)[:6])}
    return _killed(start, {0})


def kill_at_a_moment(start: Start, at: int) -> End:
    """Drawn by chance: it may have ended before."""
    victim = start.a_rank
    start.jobs[victim]["kill_after"] = [start.chance.randint(1, 3), start.chance.random() * 0.05]
    codes = [{-9, 0} if rank == victim else {8, 0} for rank in range(start.ranks)]
    return End(codes, {("running", None), LOST, ("done", None)})


def kill_while_it_starts(start: Start, at: int) -> End:
    victim = start.a_rank
    start.jobs[victim]["signals"] = [["data", "SIGKILL"]]
    return _killed(start, {victim}, None)


def kill_in_an_evaluation(start: Start, at: int) -> End:
    victim = start.a_rank
    start.jobs[victim]["signals"] = [["evaluation", "SIGKILL"]]
    return _killed(start, {victim})


def _asked(start: Start) -> End:
    return End([{75}] * start.ranks, {("preempted", None)}, polite=True)


def a_signal(start: Start, at: int) -> End:
    name = start.chance.choice(["TERM", "INT", "USR1"])
    for rank in range(start.ranks) if start.chance.random() < 0.5 else [start.a_rank]:
        start.at(at, rank, f"kill -{name} $PPID")
    return _asked(start)


def a_signal_while_it_starts(start: Start, at: int) -> End:
    start.jobs[start.a_rank]["signals"] = [["data", start.chance.choice(["SIGTERM", "SIGINT", "SIGUSR1"])]]
    return _asked(start)


def two_signals(start: Start, at: int) -> End:
    """The second while it saves, or the first if it saves before: a disk must not be full then, so it is not TIMED."""
    start.at(at, start.a_rank, "kill -USR1 $PPID")
    start.jobs[0]["signals"] = [["save", "SIGTERM"]]
    return _asked(start)


def a_stop_file(start: Start, at: int) -> End:
    start.at(at, 0, f"touch {start.run}/STOP; sleep 0.3")  # it is looked for four times a second
    return _asked(start)


def a_hang(start: Start, at: int) -> End:
    start.loading = IN_MEMORY  # a worker may take longer than this
    start.words += ["--hang-timeout", "5"]
    start.at(at, start.a_rank, "while kill -0 $PPID 2> /dev/null; do sleep 0.1; done")
    # a rank may see the other's end before its own watchdog has ended it
    return End([{7, 8} if start.ranks > 1 else {7}] * start.ranks, {("failed", "hung")})


def an_error(start: Start, at: int) -> End:
    victim = start.a_rank
    start.at(at, victim, "false")
    codes = [{1, 70} if rank == victim else {8} for rank in range(start.ranks)]
    return End(codes, {("failed", "crash")})


def kill_the_workers(start: Start, at: int) -> End:
    start.loading, victim = BY_WORKERS, start.a_rank
    start.at(at, victim, "for p in $(cat /proc/$PPID/task/*/children); do [ $p = $$ ] || kill -KILL $p; done; :")
    # found out while rank 0 does something for all, it is everybody's error
    return End([{3} if rank == victim else {3, 8} for rank in range(start.ranks)], {("failed", "data")})


def a_disk_that_stays_full(start: Start, at: int) -> End:
    start.at(at, 0, f"head -c 30000000 /dev/zero > {start.disk}/filler; true")
    start.dark |= set(range(at + 1, start.total + 1))
    # what the status says needs room as well
    return End([{6}] * start.ranks, {("failed", "save"), ("running", None)})


def kill_the_launcher(start: Start, at: int) -> End:
    """Its processes find out within a second, and stop as if asked; by then they may be done."""
    start.at(at, 0, "kill -KILL $(cut -d' ' -f4 /proc/$PPID/stat)")
    for step in range(at + 1, start.total):
        start.at(step, 0, "sleep 0.2")
    start.jobs[0]["launched"] = True
    return End([{-9}], {("preempted", None), ("done", None)}, polite=True)


ENDS: dict[str, Callable[[Start, int], End]] = {
    f.__name__: f
    for f in (
        kill_a_rank, kill_all, kill_in_a_save, kill_at_a_moment, kill_while_it_starts, kill_in_an_evaluation, a_signal,
        a_signal_while_it_starts, two_signals, a_stop_file, a_hang, an_error, kill_the_workers,
        a_disk_that_stays_full, kill_the_launcher,
    )
}  # fmt: skip
# those that come when `at` says, and so after whatever troubles the start
TIMED = {
    "kill_a_rank", "kill_all", "a_signal", "a_stop_file", "a_hang", "an_error", "kill_the_workers",
    "a_disk_that_stays_full", "kill_the_launcher",
}  # fmt: skip
SLOW = {"kill_the_launcher"}  # starts processes of its own, which import torch
NEEDS_TWO = {"kill_the_launcher"}
NEEDS_DISK = {"a_full_disk", "a_disk_that_stays_full"}


class Deck:
    """Names drawn one after another, each once before any comes again."""

    def __init__(self, names: list[str], chance: random.Random) -> None:
        self.names, self.chance, self.left = sorted(names), chance, []

    def draw(self) -> str:
        if not self.left:
            self.left = self.chance.sample(self.names, len(self.names))
        return self.left.pop()


if __name__ == "__main__":
    job = json.loads(os.environ["JOBS"])[int(os.environ["RANK"])]
    keep_ledger(job["ledger"], job.get("at_step", {}), [])
    from dist_kd.train import main

    sys.exit(main(job["words"]))
