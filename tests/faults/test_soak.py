"""The soak: random faults, one after another, against one run that must end as if there had been none.

Bounds: each start ends within 120 s, and 40 s later none of its processes is left.
`make test-long` soaks for 30 minutes; DIST_KD_SOAK_MINUTES and DIST_KD_SOAK_SEED say otherwise. What fails names the
seed of its episode: 0 minutes of that seed play it again.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
import shutil
import subprocess
import time
import uuid
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from dist.launching import launch
from faults import soaking
from faults.ledger import Ledger, steps_of
from faults.soaking import End, Start, sound
from faults.two_ranks import alive
from faults.zygote import Zygote, free_port, pair
from walks.training import assert_same, final_state

pytest.importorskip("wandb")
pytest.importorskip("tensorboard")
MINUTES = float(os.environ.get("DIST_KD_SOAK_MINUTES", "30"))
SEED = int(os.environ.get("DIST_KD_SOAK_SEED", "1"))
MOST_KB = 6000  # by which a run may grow after its first saves; what one save in four holds here would be more
slow = [pytest.mark.slow, pytest.mark.timeout(60 * MINUTES + 1200)]
EVERY, KEPT = 2, 2  # steps between two saves, checkpoints
OTHERS = re.compile("wandb|torchelastic")  # whose folders in TMPDIR stay if they are killed themselves
LIMIT_S = 120  # of one start, however busy the machine is
SETTINGS = [
    "--arch", "cnn_small", "--no-kd", "--image-size", "8", "--batch-size", "32", "--device-batch-size", "16",
    "--lr", "0.01", "--ema-decay", "0.9", "--mixup", "0.2", "--log-steps", "3",
    "--eval-steps", "3", "--keep", str(KEPT), "--cpu",
]  # fmt: skip


@dataclass
class Place:
    """Where runs are made and who makes them. `disk` is a file system of its own if `small`, and can be filled."""

    zygote: Zygote
    data: Path
    disk: Path
    small: bool
    temporary: Path  # TMPDIR of all processes
    mark: str  # in their environment

    def words(self, run: Path, total: int, every: int = EVERY) -> list[str]:
        paths = ["--data", str(self.data), "--save-path", str(run)]
        return [*SETTINGS, "--max-steps", str(total), "--checkpoint-steps", str(every), *paths]

    def variables(self) -> dict[str, str]:
        """No W&B settings of this machine."""
        clean = {name: "" for name in os.environ if name.startswith("WANDB") or name.lower().endswith("_proxy")}
        return clean | {"HOME": f"{self.temporary}-home", "NETRC": f"{self.temporary}-none"}

    def make(self, jobs: list[dict[str, Any]], limit: float = LIMIT_S) -> list[int]:
        """One start of these ranks; their exit codes, or the launcher's."""
        if jobs[0].pop("launched", False):
            variables = self.variables() | {"JOBS": json.dumps(jobs), "TMPDIR": str(self.temporary)}
            said = launch(
                "torchrun", "tests/faults/soaking.py", processes=len(jobs), limit=limit, expected=-9,
                variables=variables | {"LEFT_BEHIND": self.mark},
            )  # fmt: skip
            Path(jobs[0]["out"]).write_text(said)
            return [-9]
        jobs = pair(lambda rank: jobs[rank], free_port()) if len(jobs) == 2 else jobs
        return self.zygote.run(*(job | {"env": job.get("env", {}) | self.variables()} for job in jobs), limit=limit)

    def assert_nobody_left(self) -> None:
        until = time.monotonic() + 40  # workers see within seconds that their process is gone
        while len(left := alive(self.mark)) > 1 and time.monotonic() < until:
            time.sleep(0.1)
        assert len(left) == 1, left  # the zygote

    def left_in_memory(self) -> set[str]:
        return {p.name for p in Path("/dev/shm").glob("*")}


def bytes_of(run: Path) -> dict[str, str]:
    """Digests of what was learned: the last checkpoint's networks and optimizer, the student that is handed on."""
    newest = max((run / "checkpoints").glob("step_*"))
    files = json.loads((newest / "manifest.json").read_text())["files"]
    found = {name: entry["sha256"] for name, entry in files.items() if name != "state.json"}
    student = hashlib.sha256((run / "student" / "model.safetensors").read_bytes()).hexdigest()
    return {"step": newest.name, "student": student, **found}


def status(run: Path) -> tuple[str, str | None] | None:
    try:
        said = json.loads((run / "status.json").read_text())
    except FileNotFoundError:
        return None
    return said["state"], said.get("kind")


class Undisturbed:
    """The run that no fault met: what it learned, what it said, which samples each rank saw in each step."""

    def __init__(self, place: Place, notes: Path, ranks: int, total: int) -> None:
        notes.mkdir()
        self.run, self.ledger = notes / "run", Ledger(notes / "ledger")
        out = notes / "out"
        words = [*place.words(self.run, total), *soaking.IN_MEMORY]
        paths = [self.ledger.next(rank) for rank in range(ranks)]
        codes = place.make([{"words": words, "ledger": path, "out": str(out)} for path in paths])
        assert codes == [0] * ranks, out.read_text()
        assert json.loads((self.run / "run.json").read_text())["starts"][-1]["world_size"] == ranks
        self.seen = [steps_of(path) for path in paths]
        assert all(len(seen) == total for seen in self.seen)
        self.bytes, self.final = bytes_of(self.run), final_state(self.run)
        self.names = {p.name for p in self.run.iterdir()}


@dataclass
class Episode:
    """One run and all that befalls it, by `seed`; `story` tells it."""

    place: Place
    notes: Path
    undisturbed: Undisturbed
    seed: int
    ranks: int
    total: int
    all_ends: bool
    story: list[str] = field(default_factory=list)
    met: list[str] = field(default_factory=list)

    def play(self) -> None:
        """Starts the run until it is done. What every start must leave is asserted after it, and the end at the end."""
        self.notes.mkdir()
        self.chance = random.Random(self.seed)
        self.run, self.ledger = self.place.disk / f"run{self.seed}", Ledger(self.notes / "ledger")
        self.dark: set[int] = set()
        self.damaged: set[tuple[int, int]] = set()
        without = set() if self.place.small else soaking.NEEDS_DISK
        without |= (set() if self.all_ends else soaking.SLOW) | (soaking.NEEDS_TWO if self.ranks == 1 else set())
        self.ends = soaking.Deck([*(soaking.ENDS.keys() - without)], self.chance)
        self.troubles = soaking.Deck([*(soaking.TROUBLES.keys() - without)], self.chance)
        self.damages = soaking.Deck([*soaking.DAMAGES], self.chance)
        shared = self.place.left_in_memory()
        for _ in range(40):
            if self.start():
                break
        else:
            raise AssertionError("40 starts did not come to an end")
        self.assert_same_end()
        until = time.monotonic() + 60  # other programs' come and go
        while (left := self.place.left_in_memory() - shared) and time.monotonic() < until:
            time.sleep(0.2)
        assert not left
        # when a worker dies torch tries whether files can be opened, and may be interrupted: an empty one stays
        left = [p for p in self.place.temporary.iterdir() if p.is_dir() or p.stat().st_size]
        assert not [p.name for p in left if not OTHERS.search(p.name)]

    def start(self) -> bool:
        """One start and all that it meets; whether the run is done."""
        chance = self.chance
        out = self.notes / f"out{self.ledger.starts + 1:02d}"
        jobs = [{"ledger": self.ledger.next(r), "out": f"{out}-{r}"} for r in range(self.ranks)]
        start = Start(self.run, self.place.disk, self.ranks, self.total, chance, jobs, damaged=self.damaged)
        before, met = status(self.run), []
        if before is not None and chance.random() < 0.7:
            met.append(self.damages.draw())
            soaking.DAMAGES[met[-1]](start)
        start.begin = next(iter(start.sound()), 0)
        last = start.begin > self.total - 16  # steps that every end has room in
        end, at = None if last else self.ends.draw(), start.begin + chance.randint(1, 4)
        if end is None or (end in soaking.TIMED and chance.random() < 0.7):
            met.append(self.troubles.draw())
            soaking.TROUBLES[met[-1]](start, at)
            at += 2 + chance.randint(1, 4)
        expected = End([{0}] * self.ranks, {("done", None)}) if end is None else soaking.ENDS[end](start, at)
        met.append(end or "nothing more")
        self.met += met
        self.story.append(f"start {self.ledger.starts} from step {start.begin}: {', '.join(met)} (at {at})")
        for job in jobs:
            job["words"] = [*self.place.words(self.run, self.total), *start.loading, *start.words]
        codes = self.place.make(jobs)
        (self.place.disk / "filler").unlink(missing_ok=True)
        self.place.assert_nobody_left()
        said = Path(f"{out}-0").read_text()[-3000:]
        self.story[-1] += f" -> {codes}, {status(self.run)}"
        assert all(code in fine for code, fine in zip(codes, expected.codes, strict=True)), said
        assert status(self.run) in {s or before for s in expected.status}, said
        self.assert_nothing_lost(start, expected.polite)
        return status(self.run) == ("done", None) and set(codes) == {0}

    def assert_nothing_lost(self, start: Start, polite: bool) -> None:
        """It went on from the newest good checkpoint, on the samples of the undisturbed run, and saved on its way."""
        made = self.total
        for job, seen in zip(start.jobs, self.undisturbed.seen, strict=True):
            steps = steps_of(job["ledger"])
            assert steps.items() <= seen.items(), "trained on other samples"
            assert not steps or min(steps) == start.begin, "went on elsewhere"
            made = min(made, start.begin + len(steps))
        begun = json.loads((self.run / "run.json").read_text())["starts"] if (self.run / "run.json").exists() else []
        assert all(entry["world_size"] == self.ranks for entry in begun)
        assert made == start.begin or begun[-1]["step"] == start.begin
        newest = next(iter(start.sound()), 0)
        assert newest >= start.begin
        self.dark |= {step for step in start.dark if step <= newest}  # what comes after is trained, and said, again
        if polite:
            assert newest == made == json.loads((self.run / "status.json").read_text())["step"]
        else:  # a death in a save loses what that save was to keep; on a full disk nothing could be kept
            assert newest >= min([made, *(step - 1 for step in start.dark)]) - EVERY

    def assert_same_end(self) -> None:
        """Byte for byte what the undisturbed run learned, each of its lines once, and nothing else in the folder."""
        run, twin = self.run, self.undisturbed
        assert bytes_of(run) == twin.bytes
        ours, theirs = final_state(run), dict(twin.final)
        lines, wanted = ours.pop("lines"), theirs.pop("lines")
        assert_same(ours | {"lines": []}, theirs | {"lines": []})
        have = [(line["kind"], line["step"]) for line in lines]
        lost = {line["step"] for line in wanted if (line["kind"], line["step"]) not in have}
        assert lost <= self.dark, "a lost line"
        kept = [line for line in wanted if (line["kind"], line["step"]) in have]
        assert have == [(line["kind"], line["step"]) for line in kept], "a doubled line, or one out of order"
        for mine, other in zip(lines, kept, strict=True):
            # the order in which sums of two ranks are added differs where a window of log points has a resume in it
            assert mine == other or (self.ranks > 1 and _numbers(mine) == pytest.approx(_numbers(other), rel=1e-9))
        assert self.ledger.history(self.ranks).keys() == set(range(self.total))
        assert {p.name for p in run.iterdir()} - {"tensorboard", "wandb"} == twin.names
        names = {p.name for p in (run / "checkpoints").iterdir()} - {"latest", "best"}
        assert all(soaking.CHECKPOINT.fullmatch(name) for name in names), names
        assert len(sound(run, self.damaged)) <= KEPT + 1


def _numbers(line: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in line.items() if key != "kind"}


@pytest.fixture
def place(origin, tmp_path, monkeypatch):
    """A small disk where that can be had, a TMPDIR, and a zygote whose processes all know both."""
    disk, temporary, mark = tmp_path / "disk", tmp_path / "temporary", uuid.uuid4().hex
    disk.mkdir()
    temporary.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=20m", "none", str(disk)]
    small = subprocess.run(mount, capture_output=True, timeout=20).returncode == 0
    monkeypatch.setenv("TMPDIR", str(temporary))
    monkeypatch.setenv("LEFT_BEHIND", mark)
    zygote = Zygote()
    try:
        yield Place(zygote, origin, disk, small, temporary, mark)
    finally:
        zygote.close()
        if small:
            subprocess.run(["umount", "-l", str(disk)], check=True, timeout=20)


@pytest.mark.parametrize(
    ("minutes", "seed", "total", "all_ends"),
    [pytest.param(0, 2, 40, False, marks=pytest.mark.timeout(200)), pytest.param(MINUTES, SEED, 60, True, marks=slow)],
    ids=["short", "long"],
)
def test_random_faults_against_one_run(place, tmp_path, minutes, seed, total, all_ends):
    """An episode after another until the time is over; odd ones with one process, even ones with two."""
    began, twins, met = time.monotonic(), {}, Counter()
    while not met or time.monotonic() < began + 60 * minutes:
        ranks = 2 - seed % 2
        if ranks not in twins:
            twins[ranks] = Undisturbed(place, tmp_path / f"undisturbed{ranks}", ranks, total)
        episode = Episode(place, tmp_path / f"episode{seed}", twins[ranks], seed, ranks, total, all_ends)
        started = time.monotonic()
        try:
            episode.play()
        except BaseException as error:
            error.add_note("\n".join([f"DIST_KD_SOAK_SEED={seed}", *episode.story]))
            raise
        met.update(episode.met)
        print(f"episode {seed}: {episode.ledger.starts} starts, {time.monotonic() - started:.0f} s")
        shutil.rmtree(episode.run)
        shutil.rmtree(episode.notes)
        seed += 1
    print(f"{sum(met.values())} faults: {dict(sorted(met.items()))}")


# files (the least of a few looks: in one of them another thread may be writing a heartbeat), children, kB, threads
MEASURE = """
files=$(for i in 1 2 3 4; do ls /proc/$PPID/fd | wc -l; sleep 0.05; done | sort -n | head -n 1)
children=$(cat /proc/$PPID/task/*/children | wc -w)
echo $files $children $(awk '/^(VmRSS|Threads)/ {{print $2}}' /proc/$PPID/status) >> {0}
"""


@pytest.mark.parametrize(
    ("ranks", "total", "how"),
    [
        pytest.param(1, 140, soaking.IN_MEMORY, marks=pytest.mark.timeout(200)),
        pytest.param(2, 2000, [*soaking.BY_WORKERS, "--tensorboard"], marks=slow),
    ],
    ids=["short", "long"],
)
def test_memory_and_files_of_a_long_lived_run_stay_flat(place, tmp_path, ranks, total, how):
    """A save at each step, an evaluation at each third, a full disk and a pause again and again."""
    run, jobs = place.disk / "run", [{"ledger": str(tmp_path / f"ledger{r}")} for r in range(ranks)]
    words = place.words(run, total, every=1)
    start = Start(run, place.disk, ranks, total, random.Random(1), jobs)
    for job in jobs:
        job |= {"words": [*words, *how], "out": str(tmp_path / "out")}
    for step in range(12, total, total // 10):
        soaking.a_pause(start, step)
        if place.small:
            soaking.a_full_disk(start, step + 4)
        for rank in range(ranks):
            start.at(step + 10, rank, MEASURE.format(tmp_path / f"measured{rank}"))
    assert place.make(jobs, limit=60 + total) == [0] * ranks, (tmp_path / "out").read_text()[-3000:]
    assert json.loads((run / "run.json").read_text())["starts"][-1]["world_size"] == ranks
    for rank in range(ranks):
        lines = [list(map(int, line.split())) for line in (tmp_path / f"measured{rank}").read_text().splitlines()]
        files, children, kilobytes, threads = zip(*lines[1:], strict=True)  # after what is made once
        print(f"rank {rank}: {set(files)} files, {set(threads)} threads, {kilobytes[0]} to {kilobytes[-1]} kB")
        assert len(lines) > 8 and kilobytes[0] > 50_000
        assert len(set(files)) == len(set(children)) == 1, lines
        assert max(threads) <= threads[0] + 1, lines  # the watchdog's last resort is a thread from its first look on
        assert max(kilobytes) - kilobytes[0] < MOST_KB, lines
