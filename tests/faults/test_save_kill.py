"""kill -9 at every boundary of a save and at random moments of a run: what is found is whole, and the end is the same.

Bounds: each process ends within 60 s (single saves: 20 s); a peer of a killed process within 40 s.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest
from faults.ledger import Ledger
from faults.zygote import NAMED, SMALL, free_port, pair
from walks.training import assert_same, final_state

from dist_kd import checkpoint

LAST, STEPS_AN_EPOCH = 11, 4  # 150 samples in batches of 32


def words(run: Path, data: Path) -> list[str]:
    return [*SMALL, "--data", str(data), "--save-path", str(run)]


def assert_nothing_lost_or_doubled(history: dict[int, list[int]]) -> None:
    assert sorted(history) == list(range(LAST))
    for first in range(0, LAST, STEPS_AN_EPOCH):
        epoch = [i for s in range(first, min(first + STEPS_AN_EPOCH, LAST)) for i in history[s]]
        assert len(set(epoch)) == len(epoch) == 32 * min(STEPS_AN_EPOCH, LAST - first)


@pytest.fixture(scope="module")
def undisturbed(zygote, origin, tmp_path_factory):
    where = tmp_path_factory.mktemp("undisturbed")
    ledger = Ledger(where / "ledger")
    assert zygote.run({"words": words(where / "run", origin), "ledger": ledger.next()}) == [0]
    history = ledger.history()
    assert_nothing_lost_or_doubled(history)
    return final_state(where / "run"), history


def leftovers(folder: Path) -> list[str]:
    known = {"latest", "best"}
    return [p.name for p in folder.iterdir() if p.name not in known and not checkpoint.NAME.fullmatch(p.name)]


@pytest.mark.parametrize("steps", [[1, 2, 3, 4], [1, 2, 3, 3]], ids=["a new step", "the same step again"])
@pytest.mark.parametrize("every", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_killed_at_every_boundary_of_a_save(zygote, tmp_path, steps, every):
    """Before each call that touches the disk and in the middle of each file; a save that prunes, one that replaces."""
    count = tmp_path / "count"
    die = {"save": 4, "count": str(count)}
    assert zygote.run({"save": [str(tmp_path / "whole"), steps], "die": die}, limit=20) == [0]
    boundaries = int(count.read_text())
    assert boundaries > 40
    for number in range(1, boundaries + 1, every):
        folder = tmp_path / f"at {number}"
        dying = {"save": [str(folder), steps], "die": {"save": 4, "number": number}}
        assert zygote.run(dying, limit=20) == [-9], number
        found, refused = checkpoint.find(folder)
        assert not refused, (number, refused)
        snapshot = checkpoint.load(found, "cpu")
        assert snapshot.state.step in (3, 4), number
        assert (snapshot.tensors["model"]["w"] == snapshot.state.step).all(), number
        checkpoint.clean(folder)  # what the next start does
        assert leftovers(folder) == [], number
        assert checkpoint.find(folder)[0].name == checkpoint.folder_name(snapshot.state.step), number
        # the next save puts everything right: what is kept, and both pointers
        assert zygote.run({"save": [str(folder), [steps[-1], 5]]}, limit=20) == [0]
        names = sorted(p.name for p in folder.glob("step_*"))
        assert names == [checkpoint.folder_name(s) for s in (steps[-1], 5)], number
        assert (folder / "latest").read_text() == (folder / "best").read_text() == checkpoint.folder_name(5) + "\n"


FAST = ["mid optimizer", "before the pointer", "during prune"]


@pytest.mark.parametrize(
    "point", [p if p in FAST else pytest.param(p, marks=pytest.mark.slow) for p in NAMED]
)  # fmt: skip
def test_a_run_killed_in_a_save_ends_as_the_undisturbed_one(zygote, origin, tmp_path, undisturbed, point):
    run, ledger = tmp_path / "run", Ledger(tmp_path / "ledger")
    job = {"words": words(run, origin), "ledger": ledger.next(), "die": {"save": 5, "point": point}}
    assert zygote.run(job) == [-9]
    assert not checkpoint.find(run / "checkpoints")[1]
    out = tmp_path / "out"
    assert zygote.run({"words": words(run, origin), "ledger": ledger.next(), "out": str(out)}) == [0], out.read_text()
    expected, history = undisturbed
    assert_same(final_state(run), expected)
    assert ledger.history() == history
    assert leftovers(run / "checkpoints") == []


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("kills", [3, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(zygote, origin, tmp_path, undisturbed, ranks, kills):
    """One of the processes, any of them, at a moment drawn by chance: in a step, an evaluation, a save."""
    chance = random.Random(5 * kills + ranks)
    run, ledger = tmp_path / "run", Ledger(tmp_path / "ledger")
    for kill in range(kills + 1):
        victim = chance.randrange(ranks) if kill < kills else None
        after = [chance.randint(1, 3), chance.random() * 0.05]

        def job(rank, victim=victim, after=after):
            mine = {"words": words(run, origin), "ledger": ledger.next(rank), "out": str(tmp_path / f"out{rank}")}
            return mine | ({"kill_after": after} if rank == victim else {})

        codes = zygote.run(*(pair(job, free_port()) if ranks == 2 else [job(0)]), limit=60 if victim is None else 40)
        said = (tmp_path / "out0").read_text()[-3000:]
        assert (codes == [0] * ranks) if victim is None else (codes[victim] in (-9, 0)), said
    assert len(json.loads((run / "run.json").read_text())["starts"]) == kills + 1
    assert json.loads((run / "run.json").read_text())["starts"][-1]["world_size"] == ranks
    final, (expected, history) = final_state(run), undisturbed
    assert_nothing_lost_or_doubled(ledger.history(ranks))
    assert {s: sorted(ids) for s, ids in ledger.history(ranks).items()} == {s: sorted(i) for s, i in history.items()}
    if ranks == 1:
        assert_same(final, expected)
    else:
        expected = final_state(_of_two(zygote, origin, tmp_path))
        # a log window's sums over the ranks are added in another order if it was interrupted: the last digit
        for ours, theirs in zip(final.pop("lines"), expected.pop("lines"), strict=True):
            assert ours.pop("kind") == theirs.pop("kind")
            assert ours == pytest.approx(theirs, rel=1e-9)
        assert_same(final | {"lines": []}, expected | {"lines": []})


def _of_two(zygote, origin, tmp_path) -> Path:
    run = tmp_path / "undisturbed"
    assert zygote.run(*pair(lambda rank: {"words": words(run, origin)}, free_port())) == [0, 0]
    return run
