"""Which runs belong together, and what their figures say about distillation. Pure: no file, no page.

Runs that differ in nothing but the seed are one group. A group is judged by its last evaluations, since the best
one was chosen on the very set it is reported on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from dist_kd.config import Config
from dist_kd.methods import METHODS
from dist_kd.report.folder import RunRecord, at

# two-sided 95 % quantiles of Student's t by degrees of freedom, 1 to 30
T95 = (
    *(12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228),
    *(2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086),
    *(2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042),
)

NO_RESULT = {name for name, f in Config.model_fields.items() if not f.json_schema_extra["result"]}
# what only a method with a teacher looks at: no difference between a distilled run and its plain twin
OF_TEACHERS = {"method", "method_args", "teacher_arch", "teacher_weights"}
OF_TEACHERS |= {field for row in METHODS.values() for field in row.short}


def t95(degrees: float) -> float:
    """Half width of a 95 % interval in standard errors. Fractions round down, to the wider interval."""
    whole = max(1, math.floor(degrees))
    return T95[whole - 1] if whole <= len(T95) else 1.96 + 2.5 / whole


@dataclass(frozen=True)
class Spread:
    """Mean and spread of a figure over the runs of a group. `sd` is None for one run."""

    mean: float
    sd: float | None
    values: tuple[float, ...]

    @classmethod
    def of(cls, values: Sequence[float | None]) -> Spread | None:
        known = [value for value in values if value is not None]
        if not known:
            return None
        return cls(fmean(known), stdev(known) if len(known) > 1 else None, tuple(known))


@dataclass(frozen=True)
class Group:
    """Runs that differ in nothing but seed and place."""

    label: str
    runs: tuple[RunRecord, ...]

    @property
    def is_plain(self) -> bool:
        return self.runs[0].is_plain

    def last(self, figure: str) -> Spread | None:
        return Spread.of([run.last.get(figure) for run in self.runs])

    def best(self, figure: str) -> Spread | None:
        return Spread.of([run.best.get(figure) for run in self.runs])

    def test(self, which: str, figure: str) -> Spread | None:
        """Of the test set at the `last`, the `chosen` or the `highest` evaluation."""
        return Spread.of([run.test(which).get(figure) for run in self.runs])

    def teacher(self, figure: str) -> float | None:
        """The teacher's figure; it is the same network in all runs of a group."""
        return next((run.teacher[figure] for run in self.runs if figure in run.teacher), None)


def identity(run: RunRecord) -> dict[str, Any]:
    """The settings that make the result, but for the seed; data by its fingerprint, wherever it lies."""
    kept = {k: v for k, v in run.settings.items() if k not in NO_RESULT and k != "seed"}
    for setting, split in (("data", "train"), ("val_data", "val")):
        fingerprint = at(run.run, "data", split, "fingerprint")
        if fingerprint and kept:
            kept[setting] = fingerprint
    if run.is_plain:
        kept = {k: v for k, v in kept.items() if k == "method" or k not in OF_TEACHERS}
    return kept


def group_runs(runs: Sequence[RunRecord]) -> list[Group]:
    """Groups in the order of their first run, plain ones before distilled ones; runs by seed."""
    members: dict[str, list[RunRecord]] = {}
    for run in runs:
        # without settings nothing says that two runs belong together
        key = json.dumps(identity(run), sort_keys=True, default=str) if run.settings else str(run.path)
        members.setdefault(key, []).append(run)
    parts = [sorted(part, key=lambda run: (run.seed is None, run.seed or 0)) for part in members.values()]
    parts.sort(key=lambda part: not part[0].is_plain)
    return [Group(_label(part[0], [p[0] for p in parts]), tuple(part)) for part in parts]


def _label(run: RunRecord, firsts: list[RunRecord]) -> str:
    """ARCH, METHOD, and the settings that tell it from other groups of the same two."""
    if not run.settings:
        return run.name
    method = "labels only" if run.is_plain else str(run.settings.get("method"))
    label = f"{run.arch}, {method}"
    own = identity(run)
    others = [
        identity(first)
        for first in firsts
        if first is not run and first.settings and (first.arch, first.is_plain) == (run.arch, run.is_plain)
    ]
    telling = sorted(k for k in own if any(other.get(k) != own[k] for other in others) and k != "method")
    shown = [f"{k} {own[k]}" for k in telling[:4]] + (["..."] if len(telling) > 4 else [])
    return label + (f" ({', '.join(shown)})" if shown else "")


def plain_twin(distilled: Group, groups: Sequence[Group]) -> tuple[Group, list[str]] | None:
    """The plain group nearest to `distilled`, and the settings in which they differ all the same."""
    own = identity(distilled.runs[0])

    def differences(group: Group) -> list[str]:
        other = identity(group.runs[0])
        return sorted(k for k in own.keys() | other.keys() if k not in OF_TEACHERS and own.get(k) != other.get(k))

    twins = [g for g in groups if g.is_plain and g.runs[0].arch == distilled.runs[0].arch and g.last("top1")]
    if not own or not twins:
        return None
    best = min(twins, key=lambda group: len(differences(group)))
    return best, differences(best)


def gap_share(plain: float, distilled: float, teacher: float | None) -> tuple[float | None, str]:
    """Percent of the way from the plain student to its teacher that distillation covers, and a clause saying so."""
    if teacher is None:
        return None, "the share of the gap closed is undefined, because the teacher's score is unknown"
    if teacher - plain < 1e-9:
        return None, (
            f"the share of the gap closed is undefined, because the teacher ({teacher:.2f} %) is not better than "
            f"the student alone"
        )
    share = 100 * (distilled - plain) / (teacher - plain)
    if share < 0:
        return share, f"the gap to the teacher's {teacher:.2f} % grew by {-share:.0f} %"
    beyond = ", and goes beyond it" if share > 100 else ""
    return share, f"that closes {share:.0f} % of the gap to the teacher's {teacher:.2f} %{beyond}"


@dataclass(frozen=True)
class Difference:
    """Distilled minus plain, in points. `half_width` of the 95 % interval is None where one seed shows no spread."""

    plain: float  # mean over the seeds that count
    distilled: float
    half_width: float | None
    seeds: str

    @property
    def points(self) -> float:
        return self.distilled - self.plain

    @property
    def verdict(self) -> str:
        """helped, hurt, none (within the spread) or unknown (no spread to compare with)."""
        if self.half_width is None:
            return "unknown"
        if abs(self.points) <= max(self.half_width, 1e-9):
            return "none"
        return "helped" if self.points > 0 else "hurt"


def difference(plain: Sequence[float], distilled: Sequence[float], paired: bool | None = None) -> Difference | None:
    """Difference of means with its 95 % interval (Student's t), or None if a side is empty.

    Lists of one length are paired by position, seed by seed, unless `paired` says otherwise; else Welch's interval.
    """
    if paired is None:
        paired = len(plain) == len(distilled)
    if paired:
        both = [(p, d) for p, d in zip(plain, distilled, strict=True) if math.isfinite(p) and math.isfinite(d)]
        plain, distilled = [p for p, _ in both], [d for _, d in both]
    else:
        plain, distilled = [p for p in plain if math.isfinite(p)], [d for d in distilled if math.isfinite(d)]
    if not plain or not distilled:
        return None
    means = fmean(plain), fmean(distilled)
    if min(len(plain), len(distilled)) < 2:
        return Difference(*means, None, "1 seed each" if len(plain) == len(distilled) == 1 else "1 seed on one side")
    if paired:
        error = stdev(d - p for p, d in both) / math.sqrt(len(both))
        return Difference(*means, t95(len(both) - 1) * error, f"{len(both)} paired seeds")
    parts = [stdev(side) ** 2 / len(side) for side in (plain, distilled)]
    error = math.sqrt(sum(parts))
    degrees = (
        error**4 / sum(part**2 / (len(s) - 1) for part, s in zip(parts, (plain, distilled), strict=True))
        if error
        else 1
    )
    return Difference(*means, t95(degrees) * error, f"{len(plain)} and {len(distilled)} seeds")


OPENING = {
    "helped": "Distillation helped",
    "hurt": "Distillation hurt",
    "none": "No difference beyond the seeds' spread",
    "unknown": "One seed shows no spread, so this is no evidence yet",
}


def gap_sentence(
    plain: list[float],
    distilled: list[float],
    teacher: float | None,
    *,
    paired: bool | None = None,
    on: str = "",
) -> str:
    """Whether distillation helped, by how much, against the seeds' spread. Top-1 in percent, one value a seed.

    `on` names the set that the figures are of, where that has to be said.
    """
    found = difference(plain, distilled, paired)
    if found is None:
        return "Nothing to compare: it takes finished runs of the student alone and of the distilled student."
    interval = ""
    if found.half_width is not None:
        low, high = found.points - found.half_width, found.points + found.half_width
        interval = f"95 % interval {low:+.2f} to {high:+.2f}, "
    closed = gap_share(found.plain, found.distilled, teacher)[1]
    if found.verdict == "none":  # a share of the gap would be a share of noise
        closed = "the teacher's score is unknown" if teacher is None else f"the teacher has {teacher:.2f} %"
    remedy = " Run at least 3 seeds of each." if found.verdict == "unknown" else ""
    return (
        f"{OPENING[found.verdict]}: top-1{on} is {found.distilled:.2f} % distilled and {found.plain:.2f} % alone, "
        f"{found.points:+.2f} points ({interval}{found.seeds}); {closed}.{remedy}"
    )


def tested_alike(*groups: Group) -> bool:
    """Whether all runs have scores of one and the same test set, which nothing was chosen by."""
    runs = [run for group in groups for run in group.runs]
    sets = {str(at(run.run, "data", "test", "fingerprint")) for run in runs}
    return all("top1" in run.test("last") for run in runs) and len(sets) == 1


def compare(groups: Sequence[Group]) -> list[dict[str, Any]]:
    """One comparison per distilled group that has a plain twin: the sentence and its figures, of the last evaluations.

    They are of the test set where all runs have one and the same, else of the validation set; `set` says which.
    """
    found = []
    for group in (g for g in groups if not g.is_plain and g.last("top1")):
        twin = plain_twin(group, groups)
        if twin is None:
            continue
        plain, differs = twin
        tested = tested_alike(plain, group)
        seeds = [[run.seed for run in g.runs if "top1" in run.last] for g in (plain, group)]
        paired = seeds[0] == seeds[1] and None not in seeds[0]
        values = [list((g.test("last", "top1") if tested else g.last("top1")).values) for g in (plain, group)]
        teacher = group.teacher("test/top1" if tested else "top1")
        result = difference(*values, paired)
        found.append(
            {
                "distilled": group.label,
                "plain": plain.label,
                "set": "test" if tested else "val",
                "teacher_top1": teacher,
                "points": result.points,
                "half_width_95": result.half_width,
                "verdict": result.verdict,
                "gap_closed_percent": gap_share(result.plain, result.distilled, teacher)[0],
                "differs_also_in": differs,
                "sentence": gap_sentence(*values, teacher, paired=paired, on=" on the test set" if tested else ""),
            }
        )
    return found
