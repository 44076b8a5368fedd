"""Groups of runs -> tables of text, each figure with its unit. Knows no HTML; a test or another page can read them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from dist_kd.config import Config
from dist_kd.report.compare import Group, Spread
from dist_kd.report.curves import PARTS
from dist_kd.report.folder import TEST_SCORES, RunRecord, at, mapping, number

NONE = "-"


@dataclass(frozen=True)
class Table:
    """Columns beginning with `>` hold figures and are set to the right. `strong` rows are the ones to look at."""

    name: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    note: str = ""
    strong: frozenset[int] = frozenset()


def percent(value: float | None) -> str:
    return NONE if value is None else f"{value:.2f}"


def spread(found: Spread | None, digits: int = 2) -> str:
    """`mean` or `mean +- sd`."""
    if found is None:
        return NONE
    return f"{found.mean:.{digits}f}" + ("" if found.sd is None else f" \u00b1 {found.sd:.{digits}f}")


def count(value: float | None) -> str:
    return NONE if value is None else f"{value:,.0f}"


def scaled(
    value: float | None, unit: str, step: float = 1000.0, prefixes: Sequence[str] = ("", "k", "M", "G", "T")
) -> str:
    """A figure with the prefix that leaves 1 to 4 digits before the point."""
    if value is None:
        return NONE
    power = 0
    while abs(value) >= step and power < len(prefixes) - 1:
        value, power = value / step, power + 1
    return f"{value:.4g} {prefixes[power]}{unit}".strip()


def size(value: float | None) -> str:
    return scaled(value, "B", 1024.0, ("", "Ki", "Mi", "Gi", "Ti"))


def duration(seconds: float | None) -> str:
    if seconds is None:
        return NONE
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def shown(value: Any) -> str:
    if value is None:
        return "not set"
    return {True: "yes", False: "no"}[value] if isinstance(value, bool) else str(value)


def headline(groups: Sequence[Group]) -> Table:
    """Teacher, students alone, students distilled: the last evaluation, and beside it the best, named as what it is."""
    tested = [which for which in TEST_SCORES if any(group.test(which, "top1") for group in groups)]
    rows: list[tuple[str, ...]] = []
    teachers = {}
    for group in groups:
        run = next((run for run in group.runs if "top1" in run.teacher), None)
        if run is not None:
            teachers.setdefault((run.teacher_arch, round(run.teacher["top1"], 4)), run)
    for (arch, _), run in teachers.items():
        scores = run.teacher
        figures = [percent(scores.get(k)) for k in ("top1", "top5")]
        loss = f"{scores['loss']:.4f}" if "loss" in scores else NONE
        cells = [f"Teacher: {arch}", "before training", NONE, *figures, NONE, loss, count(scores.get("samples"))]
        tests = [percent(scores.get("test/top1")) if which == "last" else NONE for which in tested]
        rows.append((*cells, *tests))
    strong = set()
    for group in groups:
        evaluations = [int(run.best["evaluations"]) for run in group.runs if "evaluations" in run.best]
        best = spread(group.best("top1")) + (f" (best of {_range(evaluations)})" if evaluations else "")
        samples = group.last("samples")
        if not group.is_plain:
            strong.add(len(rows))
        rows.append(
            (
                f"{_role(group, groups)}: {group.label}",
                _unfinished(group),
                _seeds(group),
                spread(group.last("top1")),
                spread(group.last("top5")),
                best,
                spread(group.last("loss"), 4),
                count(samples.mean if samples else None),
                *(spread(group.test(which, "top1")) for which in tested),
            )
        )
    columns = (
        "Network",
        "Evaluated",
        "Runs",
        ">Top-1 (%)",
        ">Top-5 (%)",
        ">Best top-1 (%)",
        ">Loss (nats)",
        ">Samples",
        *(TEST_SCORES[which] for which in tested),
    )
    note = (
        "Top-1, top-5 and loss are of the last evaluation: mean \u00b1 standard deviation over runs that differ in "
        "nothing but the seed. Best is the highest of several evaluations, chosen on the very set it is reported on, "
        "and therefore optimistic."
    )
    if tested:
        note += (
            " The test set took no part in training or choosing; its highest score of all epochs is chosen on the "
            "test set itself, as published figures often are, and therefore optimistic too."
        )
    return Table("Results", columns, tuple(rows), note, frozenset(strong))


def _role(group: Group, groups: Sequence[Group]) -> str:
    if not group.is_plain:
        return "Student distilled"
    students = {other.runs[0].arch for other in groups if not other.is_plain}
    # a teacher's own training may be among the runs
    return "Student alone" if not students or group.runs[0].arch in students else "Another network"


def _range(values: list[int]) -> str:
    low, high = min(values), max(values)
    return f"{low}" if low == high else f"{low} to {high}"


def _seeds(group: Group) -> str:
    seeds = [str(run.seed) for run in group.runs if run.seed is not None]
    shown = seeds if len(seeds) <= 6 else [*seeds[:5], "..."]
    return f"{len(group.runs)}" + (f" (seed{'s' if len(seeds) > 1 else ''} {', '.join(shown)})" if seeds else "")


def _unfinished(group: Group) -> str:
    open_ = [run for run in group.runs if run.state != "done"]
    if not open_:
        return "at the end"
    return "so far" if len(open_) == len(group.runs) else f"so far in {len(open_)} of {len(group.runs)}"


def calibration(groups: Sequence[Group]) -> Table | None:
    """ECE and agreement, teacher beside students."""
    rows = []
    for group in groups:
        ece, agreement, own = group.last("ece"), group.last("agreement"), group.teacher("ece")
        if ece or agreement or own is not None:
            rows.append((group.label, spread(ece), percent(own), spread(agreement)))
    if not rows:
        return None
    columns = ("Student", ">ECE, student (%)", ">ECE, teacher (%)", ">Agrees with teacher (%)")
    note = (
        "ECE: mean gap between confidence and accuracy over 15 bins; lower is better. Agreement: share of validation "
        "samples where student and teacher make the same first guess."
    )
    return Table("Calibration and agreement", columns, tuple(rows), note)


SIZES = (
    ("Parameters", ("parameters",), count),
    ("State dict", ("state_dict_bytes",), lambda value: scaled(value, "B")),
    ("FLOPs, one image", ("flops",), lambda value: scaled(value, "FLOP")),
    ("Activations, one image", ("activations",), count),
    ("Size as parameters + activations", ("size_original",), count),
    ("CPU latency, batch 1", ("latency_ms", "1"), lambda value: NONE if value is None else f"{value:.4g} ms"),
    ("CPU latency, batch 32", ("latency_ms", "32"), lambda value: NONE if value is None else f"{value:.4g} ms"),
)


def compression(groups: Sequence[Group]) -> list[Table]:
    """One table for each pair of networks: teacher, student, how many times smaller, share that is left."""
    tables: dict[tuple[str, str], Table] = {}
    runs = [run for group in groups for run in group.runs if mapping(run.compression.get("student"))]
    for run in sorted(runs, key=lambda run: not mapping(run.compression.get("teacher"))):
        pair = (run.teacher_arch if mapping(run.compression.get("teacher")) else "", run.arch)
        if pair in tables or (not pair[0] and any(pair[1] in known for known in tables)):
            continue  # a network alone that a pair's table has shown already
        rows = []
        for text, path, form in SIZES:
            teacher, student = (number(at(run.compression, side, *path)) for side in ("teacher", "student"))
            if teacher is None and student is None:
                continue
            ratio = teacher / student if teacher and student else None
            left = NONE if ratio is None else f"{100 / ratio:.2f} %"
            times = NONE if ratio is None else f"{ratio:.2f} x"
            rows.append((text, form(teacher), form(student), times, left) if pair[0] else (text, form(student)))
        if rows:
            name = f"{pair[0]} to {pair[1]}" if pair[0] else pair[1]
            columns = (
                ("Quantity", ">Teacher", ">Student", ">Teacher / student", ">Student is")
                if pair[0]
                else ("Quantity", ">Student")
            )
            note = at(run.compression, "note") or at(run.compression, "definitions")
            tables[pair] = Table(name, columns, tuple(rows), note if isinstance(note, str) else "")
    return list(tables.values())


def timing(run: RunRecord) -> dict[str, float]:
    """step_ms, data_ms, ..., images_per_s, total_s of a run: of its summary, or the mean of its log points so far."""
    known = {
        key: value for key, item in mapping(run.summary.get("timing")).items() if (value := number(item)) is not None
    }
    for name in ("step_ms", *(f"{part}_ms" for part, _ in PARTS), "images_per_s", "memory_bytes"):
        if name in known:
            continue
        values = [v for line in run.of_kind("train") if (v := number(line.get(f"time/{name}"))) is not None]
        if values:
            known[name] = max(values) if name == "memory_bytes" else sum(values) / len(values)
    return known


def mean_timing(group: Group) -> dict[str, float]:
    times = [timing(run) for run in group.runs]
    found = {key: Spread.of([t.get(key) for t in times]) for key in {k for t in times for k in t}}
    return {key: value.mean for key, value in found.items() if value}


def speed(groups: Sequence[Group]) -> Table | None:
    """Step time, its parts in percent, images a second, memory, whole time: means over the runs of a group."""
    rows = []
    for group in groups:
        times = mean_timing(group)
        if not times:
            continue
        step = times.get("step_ms")
        shares = [100 * times[f"{part}_ms"] / step if step and f"{part}_ms" in times else None for part, _ in PARTS]
        rows.append(
            (
                group.label,
                NONE if step is None else f"{step:.1f}",
                *(NONE if share is None else f"{share:.1f}" for share in shares),
                count(times.get("images_per_s")),
                size(times.get("memory_bytes")),
                duration(times.get("total_s")),
            )
        )
    if not rows:
        return None
    parts = (">Waiting for data (%)", ">Teacher (%)", ">Student (%)", ">Other (%)")
    columns = ("Student", ">Step (ms)", *parts, ">Images/s", ">Peak memory", ">Whole run")
    return Table(
        "Speed and waits", columns, tuple(rows), "Means over log points and runs; the parts are shares of the step."
    )


def with_unit(name: str) -> str:
    """A setting's name with the unit of its values."""
    known = Config.model_fields.get(name)
    unit = known.json_schema_extra["unit"] if known else ""
    return f"{name} ({unit})" if unit else name


def settings(groups: Sequence[Group]) -> tuple[Table | None, Table | None]:
    """What differs between runs, a column a group; and what is the same in all of them."""
    known = [run for group in groups for run in group.runs if run.settings]
    names = list(dict.fromkeys(name for run in known for name in run.settings))
    values = {name: {shown(run.settings.get(name)) for run in known} for name in names}
    differing = [name for name in names if len(values[name]) > 1]

    def cell(group: Group, name: str) -> str:
        own = list(dict.fromkeys(shown(run.settings.get(name)) for run in group.runs))
        return ", ".join(own) if len(own) <= 6 else f"{', '.join(own[:5])}, ... ({len(own)} values)"

    differ, same = None, None
    if differing:
        rows = tuple((with_unit(name), *(cell(group, name) for group in groups)) for name in differing)
        differ = Table("What differs between the runs", ("Setting", *(group.label for group in groups)), rows)
    if alike := [name for name in names if len(values[name]) == 1]:
        rows = tuple((with_unit(name), next(iter(values[name]))) for name in alike)
        same = Table("The same in all runs" if len(known) > 1 else "Settings", ("Setting", "Value"), rows)
    return differ, same


def skipped(groups: Sequence[Group]) -> Table | None:
    """What of the data was not used, run by run, with the reasons."""
    rows = []
    for run in (run for group in groups for run in group.runs):
        facts = mapping(run.summary.get("skipped"))
        lines = run.of_kind("train")
        live = {
            key: number(lines[-1].get(f"data/{key}")) if lines else None
            for key in ("left_out", "bad_samples", "retries")
        }
        seen = {k: v for k, v in (lines[-1] if lines else {}).items() if k.startswith("data/bad/")}
        kinds = mapping(facts.get("bad_samples", {k.removeprefix("data/bad/"): v for k, v in seen.items()}))
        unscored = [number(at(run.of_kind("val"), -1, f"{split}/bad_samples")) for split in ("val", "test")]
        total = number(facts.get("bad_samples_total"))
        if total is None:
            total = sum(number(v) or 0 for v in kinds.values()) if "bad_samples" in facts else live["bad_samples"]
        reasons = ", ".join(f"{kind} {count(number(n))}" for kind, n in sorted(kinds.items()))
        left_out = number(facts.get("left_out_per_epoch", live["left_out"]))
        retries = number(facts.get("retries", live["retries"]))
        steps = number(facts.get("skipped_steps", lines[-1].get("train/skipped_steps") if lines else None))
        if any(value is not None for value in (total, left_out, retries, steps)):
            figures = (*(count(bad) for bad in unscored), count(retries), count(steps))
            rows.append((run.name, count(left_out), count(total), reasons or NONE, *figures))
    columns = (
        "Run",
        ">Left out of each epoch",
        ">Damaged samples",
        "Kinds of damage",
        ">Damaged in validation",
        ">Damaged in test",
        ">Reads repeated",
        ">Steps skipped",
    )
    note = (
        "Left out: samples that do not fill a batch, others in each epoch. Damaged samples keep their place with "
        "weight 0, each epoch anew; in validation and test they are not scored. Steps are skipped where gradients are "
        "not finite, as when fp16 overflows."
    )
    return Table("What was skipped", columns, tuple(rows), note) if rows else None


def data(groups: Sequence[Group]) -> Table | None:
    """The sets of samples: one row for each that differs."""
    rows: dict[tuple[str, ...], None] = {}
    for run in (run for group in groups for run in group.runs):
        for split, text in (("train", "training"), ("val", "validation"), ("test", "test")):
            facts = mapping(at(run.run, "data", split))
            if facts:
                fingerprint = str(facts.get("fingerprint") or NONE)[:16]
                name = str(facts.get("name") or NONE)
                rows[
                    (text, name, count(number(facts.get("samples"))), count(number(facts.get("classes"))), fingerprint)
                ] = None
    columns = ("Split", "Set", ">Samples", ">Classes", "Fingerprint")
    return Table("Data", columns, tuple(rows)) if rows else None


def runs(groups: Sequence[Group]) -> Table:
    """Each run: how it stands, where it ran, when it was taken up again, which code it was."""
    rows = []
    for run in (run for group in groups for run in group.runs):
        total = number(run.status.get("total_steps")) or number(at(run.summary, "plan", "total_steps"))
        step = number(run.status.get("step")) if run.state != "done" else total
        if step is None and run.lines:
            step = number(run.lines[-1].get("step"))
        starts = run.run.get("starts") if isinstance(run.run.get("starts"), list) else []
        places = dict.fromkeys(f"{at(s, 'world_size') or '?'} x {at(s, 'device') or '?'}" for s in starts)
        git = mapping(run.run.get("git"))
        revision = str(git.get("revision") or NONE)[:10] + (" with changes" if git.get("changed") else "")
        state = run.state + (f": {run.status['message']}" if run.status.get("message") else "")
        rows.append(
            (
                run.name,
                state[:200],
                f"{count(step)} of {count(total)}",
                percent(run.last.get("top1")),
                percent(run.best.get("top1")),
                ", ".join(f"step {s:,}" for s in run.resumes) or "never",
                "; ".join(places) or NONE,
                revision,
            )
        )
    columns = (
        "Run",
        "State",
        ">Steps",
        ">Last top-1 (%)",
        ">Best top-1 (%)",
        "Resumed at",
        "Processes x device",
        "Code",
    )
    return Table("Runs", columns, tuple(rows))


def versions(groups: Sequence[Group]) -> Table | None:
    """Packages under the runs; several versions in one cell if the runs differ."""
    known = [mapping(run.run.get("versions")) for group in groups for run in group.runs]
    names = list(dict.fromkeys(name for facts in known for name in facts))
    rows = tuple((name, ", ".join(dict.fromkeys(str(f[name]) for f in known if name in f))) for name in names)
    return Table("Versions", ("Package", "Version"), rows) if rows else None
