"""Which samples a run has trained on, start by start: what zygote.py:keep_ledger writes is read here."""

from __future__ import annotations

import json
from pathlib import Path


def steps_of(path: str | Path) -> dict[int, list[int]]:
    """Step -> the samples of one rank, of one start; {} if it did not come to a step."""
    lines = Path(path).read_text().splitlines() if Path(path).exists() else []
    return {int(step): json.loads(ids) for step, ids in (line.split(" ", 1) for line in lines)}


class Ledger:
    """What each start of a run has trained on."""

    def __init__(self, where: Path) -> None:
        self.where, self.starts = where, 0
        where.mkdir(exist_ok=True)

    def next(self, rank: int = 0) -> str:
        self.starts += rank == 0
        return str(self.where / f"{self.starts:02d}-{rank}")

    def history(self, ranks: int = 1) -> dict[int, list[int]]:
        """Step -> sample numbers of all ranks, of the starts whose steps count in the end: the last to make them."""
        steps: dict[int, list[int]] = {}
        for start in range(1, self.starts + 1):
            theirs = []
            for rank in range(ranks):
                theirs.append(steps_of(self.where / f"{start:02d}-{rank}"))
            # only what all ranks finished; a start goes on where a checkpoint stood, so none may leave a gap
            for step in sorted(set.intersection(*(set(t) for t in theirs))):
                assert step <= len(steps), f"start {start} left out steps before {step}"
                steps[step] = [i for t in theirs for i in t[step]]
        return steps
