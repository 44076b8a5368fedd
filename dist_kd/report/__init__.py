"""Run folders -> a page and a dict. Reads files only, needs no training code, and takes folders however they ended."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from dist_kd.report.compare import Group, compare, gap_sentence, group_runs
from dist_kd.report.folder import TEST_SCORES, RunRecord, is_run_folder, read_run

FIGURES = ("top1", "top5", "loss", "ece", "agreement")


def _run_facts(run: RunRecord) -> dict[str, Any]:
    from dist_kd.report.tables import timing

    return {
        "name": run.name,
        "path": str(run.path),
        "state": run.state,
        "arch": run.arch,
        "method": run.settings.get("method"),
        "seed": run.seed,
        "last": run.last,
        "best": run.best,
        "test": {which: found for which in TEST_SCORES if (found := run.test(which))} or None,
        "teacher": {"arch": run.teacher_arch, **run.teacher} if run.teacher else None,
        "resumed_at": run.resumes,
        "timing": timing(run),
        "skipped": run.summary.get("skipped"),
        "compression": run.compression,
        "settings": run.settings,
        "missing": list(run.missing),
    }


def _group_facts(group: Group) -> dict[str, Any]:
    def figures(of) -> dict[str, Any]:
        return {name: asdict(found) for name in FIGURES if (found := of(name))}

    return {
        "label": group.label,
        "plain": group.is_plain,
        "runs": [run.name for run in group.runs],
        "seeds": [run.seed for run in group.runs],
        "last": figures(group.last),
        "best": figures(group.best),
        "test": {which: figures(partial(group.test, which)) for which in TEST_SCORES},
    }


def write_report(run_dirs: Sequence[Path], html: Path | None) -> dict[str, Any]:
    """The report as a dict of runs, groups, comparisons and problems; with `html`, also the page.

    Never raises: what could not be read, made or written is a sentence under `problems` (or a run's `missing`).
    """
    problems: list[str] = []
    report: dict[str, Any] = {"runs": [], "groups": [], "comparisons": [], "problems": problems, "html": None}
    try:
        runs = [read_run(Path(path)) for path in dict.fromkeys(run_dirs)]
        report["runs"] = [_run_facts(run) for run in runs]
        groups = group_runs(runs)
        report["groups"] = [_group_facts(group) for group in groups]
        report["comparisons"] = compare(groups)
        if html is not None and runs:
            from dist_kd.report.page import render  # loads matplotlib

            _replace(Path(html), render(runs, groups, report["comparisons"], problems))
            report["html"] = str(html)
    # at the end of a long training nothing in a report is worth an error
    except Exception as error:
        problems.append(f"the report could not be finished ({type(error).__name__}: {error})")
    return report


def _replace(path: Path, text: str) -> None:
    """Writes beside and renames, so that a page being looked at is never half a page."""
    beside = path.with_name(path.name + ".partial")
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


__all__ = ["gap_sentence", "is_run_folder", "read_run", "write_report"]
