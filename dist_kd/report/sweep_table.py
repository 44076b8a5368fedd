"""Runs of a study -> its table, as text, JSON and page: what each value of a setting gives, over seeds."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from dist_kd.report.compare import Difference, Spread, difference
from dist_kd.report.folder import TEST_SCORES, RunRecord
from dist_kd.report.tables import NONE, Table, spread, with_unit


@dataclass(frozen=True)
class Arm:
    """Runs that differ in the seed alone; None for a seed whose run is not done."""

    label: str
    value: Any
    runs: dict[int, RunRecord | None]
    twin: str | None = None  # label of the twin to compare with

    def figures(self, of: Callable[[RunRecord], float | None]) -> dict[int, float]:
        """A figure by seed, where there is one."""
        found = {seed: of(run) for seed, run in self.runs.items() if run is not None}
        return {seed: value for seed, value in found.items() if value is not None}

    @property
    def top1(self) -> dict[int, float]:
        return self.figures(lambda run: run.last.get("top1"))

    @property
    def best(self) -> dict[int, float]:
        return self.figures(lambda run: run.best.get("top1"))

    def test(self, which: str) -> dict[int, float]:
        return self.figures(lambda run: run.test(which).get("top1"))

    @property
    def missing(self) -> list[int]:
        return [seed for seed, run in self.runs.items() if run is None]


@dataclass(frozen=True)
class Results:
    """What stands in the folders of a study."""

    setting: str
    arms: Sequence[Arm]  # in the order asked for
    twins: Sequence[Arm]
    command: str

    @property
    def name(self) -> str:
        """The setting, with the unit of its values where its name does not say it."""
        name = with_unit(self.setting)
        return self.setting if name == f"{self.setting} ({self.setting})" else name

    @property
    def rows(self) -> list[Arm]:
        """Every value, each twin before the first value that is compared with it."""
        twins, rows = {twin.label: twin for twin in self.twins}, []
        for arm in self.arms:
            if arm.twin in twins:
                rows.append(twins.pop(arm.twin))
            rows.append(arm)
        return rows

    @property
    def tested(self) -> list[str]:
        return [which for which in TEST_SCORES if any(arm.test(which) for arm in self.rows)]

    def against_twin(self, arm: Arm, of: Callable[[Arm], dict[int, float]]) -> Difference | None:
        """Value minus twin in a figure, over the seeds that both have."""
        twin = next((twin for twin in self.twins if twin.label == arm.twin), None)
        if twin is None:
            return None
        plain, own = of(twin), of(arm)
        seeds = [seed for seed in own if seed in plain]
        return difference([plain[seed] for seed in seeds], [own[seed] for seed in seeds], paired=True)


def _points(found: Difference | None) -> str:
    if found is None:
        return NONE
    if found.half_width is None:
        return f"{found.points:+.2f} (1 seed)"
    low, high = found.points - found.half_width, found.points + found.half_width
    return f"{found.points:+.2f} ({low:+.2f} to {high:+.2f})"


def _runs(arm: Arm) -> str:
    text = f"{len(arm.runs) - len(arm.missing)} of {len(arm.runs)}"
    return text + (f", missing: seed {', '.join(map(str, arm.missing))}" if arm.missing else "")


def table(results: Results) -> Table:
    """One row for each value and twin."""
    twins, tested = bool(results.twins), results.tested
    rows = []
    for arm in results.rows:
        scores = [spread(Spread.of(list(found.values()))) for found in (arm.top1, arm.best)]
        against = [_points(results.against_twin(arm, lambda one: one.top1))] if twins else []
        tests = [spread(Spread.of(list(arm.test(which).values()))) for which in tested]
        rows.append((arm.label, *scores, *against, *tests, _runs(arm)))
    columns = (
        results.name,
        ">Last top-1 (%)",
        ">Best top-1 (%)",
        *([">To the twin (points)"] if twins else []),
        *(TEST_SCORES[which] for which in tested),
        "Runs",
    )
    return Table(f"Top-1 over {results.setting}", columns, tuple(rows), _note(results))


def _evaluations(results: Results) -> str:
    """Of how many the best was chosen, if it is the same in all runs."""
    found = {n for arm in results.rows for n in arm.figures(lambda run: run.best.get("evaluations")).values()}
    return f"{found.pop():.0f} " if len(found) == 1 else ""


def _note(results: Results) -> str:
    """What the columns are, and what must not be read out of them."""
    parts = [
        "Top-1 on the validation set, mean \u00b1 standard deviation over seeds. Best: the highest of a run's "
        f"{_evaluations(results)}evaluations, chosen on the set it is reported on, and therefore optimistic."
    ]
    if results.twins:
        parts.append(
            "To the twin: the last epoch's top-1 minus that of the plain twin (same student, budget and seed, no "
            "teacher), paired by seed, with Student's 95 % interval of each row by itself; of many rows some leave "
            "out 0 by chance."
        )
    if "highest" in results.tested:
        parts.append("The highest test score of all epochs is chosen on the test set, and therefore optimistic too.")
    confirm = (
        "as by the test columns of the last or the chosen epoch"
        if results.tested
        else "by `dist-kd evaluate RUN --data TEST`"
    )
    parts.append(
        "To choose a value by this table is to select on the validation set: confirm the winner on data that took no "
        f"part in it, {confirm}."
    )
    return " ".join(parts)


def markdown(found: Table) -> str:
    """The table as Markdown that is also readable as it stands. ASCII."""
    cells = [[column.lstrip(">") for column in found.columns], *found.rows]
    cells = [[text.replace("\u00b1", "+-").replace("|", "\\|") for text in row] for row in cells]
    right = [column.startswith(">") for column in found.columns]
    widths = [max(len(row[k]) for row in cells) for k in range(len(right))]

    def line(row: Sequence[str]) -> str:
        padded = [t.rjust(w) if r else t.ljust(w) for t, w, r in zip(row, widths, right, strict=True)]
        return f"| {' | '.join(padded)} |"

    rule = [f"{'-' * (w - 1)}:" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(cells[0]), line(rule), *(line(row) for row in cells[1:])])


def facts(results: Results) -> dict[str, Any]:
    """The study for machines: figures by seed, spreads, paired differences, and which runs are missing."""

    def spread_of(values: dict[int, float]) -> dict[str, Any] | None:
        found = Spread.of(list(values.values()))
        return found and {"mean": found.mean, "sd": found.sd, "by_seed": values}

    def against(arm: Arm, of: Callable[[Arm], dict[int, float]]) -> dict[str, Any] | None:
        found = results.against_twin(arm, of)
        return found and {**asdict(found), "points": found.points, "verdict": found.verdict}

    def row(arm: Arm) -> dict[str, Any]:
        tests = {which: values for which in results.tested if (values := arm.test(which))}
        return {
            "label": arm.label,
            "value": arm.value,
            "done": len(arm.runs) - len(arm.missing),
            "wanted": len(arm.runs),
            "missing_seeds": arm.missing,
            "runs": {seed: str(run.path) for seed, run in arm.runs.items() if run is not None},
            "top1_last": spread_of(arm.top1),
            "top1_best": spread_of(arm.best),
            "top1_test": {which: spread_of(values) for which, values in tests.items()},
            "twin": arm.twin,
            "to_twin": against(arm, lambda one: one.top1),
            "to_twin_test": {which: against(arm, lambda one, w=which: one.test(w)) for which in tests},
        }

    return {
        "setting": results.setting,
        "command": results.command,
        "values": [row(arm) for arm in results.arms],
        "twins": [row(arm) for arm in results.twins],
        "note": _note(results),
    }


def write(folder: Path, results: Results) -> str:
    """Writes sweep.json, sweep.md and sweep.html into `folder`; the table and its note as text."""
    from dist_kd.report.sweep_page import render  # loads matplotlib

    found = table(results)
    note = found.note.replace("\u00b1", "+-")
    text = f"{markdown(found)}\n\n{note}"  # ASCII, as a terminal of any kind shows it
    files = {
        "sweep.json": json.dumps(facts(results), indent=1) + "\n",
        "sweep.md": f"# {found.name}\n`{results.command}`\n\n{text}\n",
        "sweep.html": render(results, found),
    }
    for name, content in files.items():
        beside = folder / f"{name}.partial"  # so that a page being looked at is never half a page
        beside.write_text(content, encoding="utf-8")
        os.replace(beside, folder / name)
    return text
