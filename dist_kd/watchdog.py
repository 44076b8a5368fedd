"""Nothing waits for ever: threads in every rank end a run in which nothing moves any more, and name who is behind.

The main thread says where it is (`Progress`), and before and after each wait for the others. All ranks say the same
things in the same order, so whoever has said least is behind. Each rank's heart writes that to RUN/heartbeats/rank-N;
when nothing was said for the limit, each rank's judge writes the stacks of its threads to RUN/stacks/rank-N.txt, waits
until the others did the same, finds the culprit in the heartbeats, and ends the process.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import platform
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

from dist_kd.contracts import World
from dist_kd.errors import HungError, one_line

PATIENCE = 4  # times the limit until the first step is done (indexing, downloads, compilation), and after the last
BEAT_S = (0.2, 15.0)  # shortest and longest time between two heartbeats; a twentieth of the limit otherwise
EVIDENCE_S = 15.0  # for stacks and status, on a file system that may be what hangs
ROOM = 2048  # bytes of a heartbeat's file: written in place, so that a network file system shows it at once
CALL = "hung"  # file beside the heartbeats: a rank has found that nothing moves


class Progress:
    """Where a rank's main thread is. One tuple, replaced as a whole: no lock, 0.2 us, readable by any thread."""

    def __init__(self) -> None:
        self.here: tuple[int, str, int | None, bool] = (0, "start", None, False)  # number, section, step, waiting
        self.patient = True  # at the start and at the end, where much is done once
        self.spent: dict[str, float] = {}  # seconds by section, while patient
        self._since = time.monotonic()

    def at(self, section: str, step: int | None = None) -> None:
        """Something new begins, on all ranks."""
        if self.patient:
            self._account()
        self.here = (self.here[0] + 1, section, step, False)

    def beat(self, waiting: bool = False) -> None:
        """The same section goes on; `waiting`: for the other ranks, from now on."""
        number, section, step, _ = self.here
        self.here = (number + 1, section, step, waiting)

    def _account(self) -> None:
        now, section = time.monotonic(), self.here[1]
        self.spent[section] = self.spent.get(section, 0.0) + now - self._since
        self._since = now

    def started(self) -> str:
        """The first step is done, and patience is over; a line that says what the time until then went into."""
        self._account()
        self.patient = False
        parts = ", ".join(f"{section} {seconds:.2f}" for section, seconds in self.spent.items() if seconds >= 0.005)
        return f"started  {sum(self.spent.values()):.2f} s to the end of the first step: {parts}"

    @contextlib.contextmanager
    def waiting(self) -> Iterator[None]:
        """Around whatever waits for the other ranks."""
        self.beat(waiting=True)
        yield
        self.beat()


class Watchdog:
    """The two threads of one rank, from `start` to `stop`.

    Time counts only while this process runs: what is stopped (SIGSTOP, `scontrol suspend`, a closed laptop) and goes
    on again is not hung.
    """

    def __init__(
        self, folder: Path, world: World, progress: Progress, limit_s: float, tell: Callable[[str], None]
    ) -> None:
        """`tell(sentence)` writes the run's status; it is called in one rank, and may be cut off."""
        self.beats, self.stacks = folder / "heartbeats", folder / "stacks"
        self.world, self.progress, self.limit_s, self._tell = world, progress, limit_s, tell
        self.beat_s = min(max(limit_s / 20, BEAT_S[0]), BEAT_S[1])
        self.grace_s = 2 * self.beat_s + 2  # by then every rank that lives has looked for the call
        self.silent_s = 0.0
        self._said: dict[str, Any] = {
            "rank": world.rank, "host": platform.node(), "pid": os.getpid(), "state": "lives", "message": "",
        }  # fmt: skip
        self._number = 0
        self._writing = threading.Lock()  # between the heart and what is said at the end; never the main thread
        self._called, self._ended = threading.Event(), threading.Event()
        self._threads: list[threading.Thread] = []
        self._late: TextIO | None = None

    def clear(self) -> None:
        """Removes what an earlier start left. Rank 0, before any rank starts."""
        for folder in (self.beats, self.stacks):
            shutil.rmtree(folder, ignore_errors=True)

    def start(self) -> None:
        """Begins to watch. A folder that cannot be written (it is only this node's, or full) costs the names only."""
        with contextlib.suppress(OSError):
            self.beats.mkdir(parents=True, exist_ok=True)
            self.stacks.mkdir(exist_ok=True)
            self._late = open(self._stack_file, "w")  # noqa: SIM115 - for as long as this rank lives
        for work in (self._heart, self._judge):
            self._threads.append(threading.Thread(target=work, name=f"watchdog{work.__name__}", daemon=True))
            self._threads[-1].start()

    def stop(self) -> None:
        """Ends the threads. What they wrote stays only where something went wrong."""
        if not self._threads:  # refused before it began: the heartbeats there are those of the run that goes on
            return
        self._ended.set()
        for thread in self._threads:
            thread.join(self.beat_s)  # one that hangs in a write is left to the process's end
        faulthandler.cancel_dump_traceback_later()  # only now: until then the judge may set it anew
        if self._late is not None:
            self._late.close()
            with contextlib.suppress(OSError):
                if not self._stack_file.stat().st_size:
                    self._stack_file.unlink()
        with contextlib.suppress(OSError):
            if self._said["state"] == "lives":
                (self.beats / f"rank-{self.world.rank}").unlink()
            self.beats.rmdir()
        with contextlib.suppress(OSError):
            self.stacks.rmdir()

    @property
    def _stack_file(self) -> Path:
        return self.stacks / f"rank-{self.world.rank}.txt"

    @property
    def limit_now_s(self) -> float:
        return self.limit_s * (PATIENCE if self.progress.patient else 1)

    # ------------------------------------------------------------------------------------------ the heart

    def _heart(self) -> None:
        while not self._ended.is_set():
            self.say()
            if os.path.exists(self.beats / CALL):  # unlike pathlib's, no error: this thread must not end
                self._called.set()
            self._ended.wait(self.beat_s)

    def say(self, state: str | None = None, message: str = "") -> None:
        """Writes this rank's heartbeat; `state` (hung, failed, lost) and `message` stay from then on."""
        with self._writing, contextlib.suppress(OSError):
            if state is not None:
                self._said |= {"state": state, "message": one_line(message)}
            self._number += 1
            number, section, step, waiting = self.progress.here
            place = {"said": number, "section": section, "step": step, "waiting": waiting}
            line = json.dumps(self._said | {"beat": self._number, "silent_s": round(self.silent_s, 1)} | place)
            file = os.open(self.beats / f"rank-{self.world.rank}", os.O_WRONLY | os.O_CREAT, 0o644)
            try:
                os.write(file, f"{line:<{ROOM}}\n".encode())
            finally:
                os.close(file)

    def heard(self) -> list[dict[str, Any] | None]:
        """The heartbeats of all ranks; None of one that cannot be seen from here."""
        return [self._read(rank) for rank in range(self.world.world_size)]

    def _read(self, rank: int) -> dict[str, Any] | None:
        with contextlib.suppress(OSError, ValueError):
            found = json.loads((self.beats / f"rank-{rank}").read_text())
            return found if isinstance(found, dict) and found.get("rank") == rank else None
        return None

    # ------------------------------------------------------------------------------------------ the judge

    def _judge(self) -> None:
        seen, before = -1, time.monotonic()
        while not self._ended.wait(self.beat_s):
            now, number = time.monotonic(), self.progress.here[0]
            # one tick that took long is one in which this whole process stood still
            self.silent_s = 0.0 if number != seen else self.silent_s + min(now - before, 2 * self.beat_s)
            seen, before = number, now
            if self._late is not None:  # needs no interpreter: the stacks of code in C that does not let go of it,
                # for which nothing deserves patience; the other ranks' limit may be shorter a moment after this look
                faulthandler.dump_traceback_later(self.limit_s, file=self._late)
            if self.silent_s >= self.limit_now_s or self._called.is_set():
                self._end()

    def _end(self) -> None:
        # in a thread of its own: whatever hangs may hang this as well
        witness = threading.Thread(target=self._testify, name="watchdog_testify", daemon=True)
        witness.start()
        witness.join(self.grace_s + EVIDENCE_S)
        os._exit(HungError.exit_code)

    def _testify(self) -> None:
        first = self.heard()
        self._dump()
        self.say("hung")
        with contextlib.suppress(OSError):
            (self.beats / CALL).touch()
        until = time.monotonic() + self.grace_s
        while time.monotonic() < until and not all(b and b["state"] != "lives" for b in self.heard()):
            time.sleep(self.beat_s / 4)
        last = self.heard()
        silent = [r for r, b in enumerate(last) if b and b["state"] == "lives" and _beat(first[r]) == b["beat"]]
        sentence = verdict(last, silent, limit_s=self.limit_now_s, stacks=self.stacks)
        if self.world.rank != min((b["rank"] for b in last if b and b["state"] == "hung"), default=self.world.rank):
            time.sleep(2.0)  # the first of those who can speak does; a launcher ends us all when one is gone
            return
        _print(f"{HungError.kind} error: {sentence}\n")
        if not any(beat and beat["state"] == "failed" for beat in last):  # that one has told
            self._tell(sentence)

    def _dump(self) -> None:
        """The stacks of all threads: to stderr and to this rank's file."""
        _, section, step, _ = self.progress.here
        head = f"rank {self.world.rank} ({platform.node()}, process {os.getpid()}) said nothing for "
        head += f"{self.silent_s:.1f} s at {place(section, step)}; its threads:\n"
        with tempfile.TemporaryFile() as file:  # not stderr itself: while it writes, no other thread runs
            faulthandler.dump_traceback(file, all_threads=True)
            file.seek(0)
            text = head + file.read().decode(errors="replace")
        with contextlib.suppress(OSError):
            self._stack_file.write_text(text)
        _print(text)


def _print(text: str) -> None:
    with contextlib.suppress(OSError, ValueError):
        os.write(sys.stderr.fileno(), text.encode())


def _beat(heartbeat: dict[str, Any] | None) -> int | None:
    return heartbeat and heartbeat["beat"]


def place(section: str, step: int | None) -> str:
    """`step 12 (data)`."""
    return section if step is None else f"step {step} ({section})"


def verdict(heartbeats: list[dict[str, Any] | None], silent: list[int], *, limit_s: float, stacks: Path) -> str:
    """One sentence: who is behind, and where everybody is. `silent` are ranks whose heart has stopped."""
    unseen = [rank for rank, beat in enumerate(heartbeats) if beat is None]
    known = [beat for beat in heartbeats if beat]
    counts = [beat["said"] for beat in known] or [0]  # none where no heartbeat could be written
    guilty = [b for b in known if b["state"] == "failed"] or [heartbeats[rank] for rank in silent]
    guilty = guilty or [b for b in known if b["said"] == min(counts) < max(counts)]
    others = [beat for beat in known if beat not in guilty]
    words = [f"nothing moved for {limit_s:g} s (--hang-timeout)"]
    for beat in guilty[:4]:
        who = f"rank {beat['rank']} ({beat['host']}, process {beat['pid']})"
        where = place(beat["section"], beat["step"])
        if beat["state"] == "failed":
            words.append(f"{who} failed at {where}, and did not end: {beat['message']}")
        elif beat["rank"] in silent:
            words.append(
                f"{who} gives no sign of life: stopped, lost, or in code that never lets go; last seen at {where}"
            )
        else:
            words.append(f"{who} is behind, at {where}")
    if len(guilty) > 4:
        words.append(f"and {len(guilty) - 4} more ranks")
    if others:
        places: dict[str, list[str]] = {}
        for beat in others:
            waits = " waiting for the others" if beat["waiting"] else ""
            places.setdefault(place(beat["section"], beat["step"]) + waits, []).append(str(beat["rank"]))
        all_there = "; ".join(f"rank {', '.join(ranks)} at {place}" for place, ranks in list(places.items())[:6])
        words.append(all_there if guilty else f"all ranks came equally far: {all_there}")
    if unseen:
        words.append(f"nothing is known here of rank {', '.join(map(str, unseen[:8]))}")
    return "; ".join(words) + f"; the stacks are in {stacks}; the same command goes on from the last checkpoint"
