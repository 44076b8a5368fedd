"""Run folders -> the small JSON kept under docs/results/, and the rows of its table.

What a figure needs beside it: settings that differ from the defaults, commit, packages, processor, seconds, and the
scores of the last epoch, of the one chosen on held-out training data, and the highest on the test set itself.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import paired

from dist_kd.cli import ended
from dist_kd.config import Config
from dist_kd.errors import ConfigError
from dist_kd.report.compare import Spread, group_runs
from dist_kd.report.folder import RunRecord, at, read_run

PLACES = {"data", "val_data", "test_data", "save_path", "teacher_weights", "student_weights"}  # paths of one machine


def chosen(run: RunRecord) -> dict[str, Any]:
    """The settings that make the result and are not the defaults; a run folder's path by its last part."""
    fields = Config.model_fields
    kept = {k: v for k, v in run.settings.items() if k in fields and fields[k].json_schema_extra["result"]}
    kept = {k: Path(v).name if k in PLACES and v else v for k, v in kept.items() if v != fields[k].default}
    return {k: v for k, v in kept.items() if k not in ("data", "val_data")}


def summary(run: RunRecord) -> dict[str, Any]:
    student = {k: v for k, v in run.summary.get("student", {}).items() if k != "arch"}
    teacher = run.summary.get("teacher")
    if teacher:
        teacher = teacher | {"weights": Path(teacher["weights"]).name}
    return {
        "run": run.path.name,
        "settings": chosen(run),
        "formula": run.summary.get("formula"),
        "parameters": run.run.get("parameters"),
        "samples": {split: at(run.run, "data", split, "samples") for split in run.run.get("data", {})},
        "student": student,
        "teacher": teacher,
        "epochs": at(run.summary, "student", "last", "epoch"),
        "seconds": at(run.summary, "timing", "total_s"),
        "commit": at(run.run, "git", "revision"),
        "versions": run.run.get("versions"),
        "starts": [{k: s.get(k) for k in ("step", "world_size", "device", "precision", "threads")} for s in
                   run.run.get("starts", [])],
    }  # fmt: skip


PANELS = {  # title -> metric
    "Training top-1 (%)": "train/top1",
    "Test top-1 (%)": "test/top1",
    "Training loss, each by its own formula": "train/loss",
    "Test loss, cross-entropy": "test/loss",
}


def draw(records: list[RunRecord], target: Path) -> None:
    """Accuracy and loss of the runs by epoch, as an SVG that a page of the docs can show.

    A recipe that chose its epoch on the test images has them as its validation set, and no test set besides.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 6.4), layout="constrained")
    for axes, (title, key) in zip(figure.subplots(2, 2).flat, PANELS.items(), strict=True):
        for record in records:
            lines = record.of_kind("val" if key.startswith("test/") else "train")
            shown = key if any(key in line for line in lines) else key.replace("test/", "val/")
            lines = [line for line in lines if shown in line]
            places = [line["step"] * (record.epochs_per_step or 1) for line in lines]
            axes.plot(places, [line[shown] for line in lines], label=record.path.name, linewidth=1.2)
        axes.set_title(title, fontsize=10)
        axes.set_xlabel("epoch")
        axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(target, metadata={"Date": None})


def cell(found: Spread | None) -> str:
    if found is None:
        return "-"
    return f"{found.mean:.2f}" + ("" if found.sd is None else f" +- {found.sd:.2f}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", type=Path, nargs="+")
    parser.add_argument("--to", type=Path, required=True, help="the JSON file")
    parser.add_argument("--curves", type=Path, help="an SVG of accuracy and loss by epoch")
    args = parser.parse_args()
    records = [read_run(path) for path in args.runs]
    for record in records:
        if record.state != "done":
            raise ConfigError(f"`{record.path}` is {record.state}: only finished runs are results")
    rows = []
    for group in group_runs(records):
        evaluations = at(group.runs[0].summary, "student", "last", "epoch")
        rows.append(
            [
                group.label,
                ", ".join(str(run.seed) for run in group.runs),
                f"{evaluations:g}",
                *(cell(group.test(which, "top1")) for which in ("last", "chosen", "highest")),
                cell(group.last("top1")),
                cell(Spread.of([at(run.summary, "timing", "total_s") for run in group.runs])),
            ]
        )
    head = ["runs", "seeds", "epochs", "test, last", "test, chosen", "test, highest", "val, last", "seconds"]
    print(paired.table(head, rows))
    if args.curves:
        draw(records, args.curves)
    args.to.parent.mkdir(parents=True, exist_ok=True)
    args.to.write_text(json.dumps([summary(record) for record in records], indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(ended(main))
