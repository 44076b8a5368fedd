"""What a run says at its start and leaves at its end: header, summary.json, compression.json, student/, report."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from dist_kd import checkpoint, compression, models
from dist_kd.config import Config
from dist_kd.evaluation import Scores
from dist_kd.loop import Run
from dist_kd.report import write_report
from dist_kd.run_folder import RunFolder, versions
from dist_kd.teacher import SideBySide
from dist_kd.tracking.jsonl import read_metrics
from dist_kd.train_state import ThirdSet


def network_line(role: str, spec, parameters: int) -> str:
    return (
        f"{role:<9}{spec.arch}, weights {spec.weights}, {parameters:,} parameters, {spec.num_classes} classes, "
        f"{spec.image_size} px"
    )


def header(
    config: Config, run: Run, layout: dict[str, Any], data_lines: list[str], teacher_parameters: list[int]
) -> Iterator[str]:
    """The first lines of a run: every number that was derived, with the chosen ones it came from."""
    runtime, plan = run.runtime, run.plan
    yield f"device   {runtime.device}, {runtime.world.world_size} process(es), precision {runtime.precision} " + (
        f"({runtime.precision_origin})"
    )
    yield from data_lines
    sizes = [(p.numel(), p.requires_grad) for p in run.student.parameters()]
    yield network_line("student", run.student.spec, sum(size for size, _ in sizes))
    if config.freeze != "none":
        yield f"         --freeze {config.freeze}: {sum(size for size, learns in sizes if learns):,} parameters learn"
    for teacher, parameters in zip(run.teacher.members, teacher_parameters, strict=True):
        yield network_line("teacher", teacher.spec, parameters)
        for note in teacher.notes:
            yield f"         {note}"
    yield f"loss     {run.method.formula}"
    for note in run.method.notes:
        yield f"         {note}"
    for warning in run.method.warnings:
        yield f"WARNING: {warning}"
    yield (
        f"batch    {plan.global_batch} global = {runtime.world.world_size} process(es) x {plan.accum_steps} "
        f"accumulated x {plan.micro_batch} on one device (batch norm works over {plan.micro_batch})"
    )
    yield from _group_lines(run)
    yield (
        f"plan     {plan.total_steps} steps = {plan.epoch_at(plan.total_steps):.4g} epochs of {plan.steps_per_epoch}; "
        f"{config.optimizer}, lr {plan.peak_lr:g} {plan.schedule}, warm-up {plan.warmup_steps} steps"
    )
    yield f"order    streams {layout['streams']}, window {layout['window']}, seed {config.seed}"


def _group_lines(run: Run) -> Iterator[str]:
    """Over how many rows the methods work that look across a batch, where there is such a method."""
    names, plan, processes = ", ".join(run.method.coupled), run.plan, run.runtime.world.world_size
    if not names:
        return
    group = processes * plan.micro_batch
    yield f"group    {names} works over {group} rows = {processes} process(es) x {plan.micro_batch}"
    if plan.accum_steps > 1:
        yield (
            f"WARNING: {names} sees {group} of the {plan.global_batch} rows of a step together, because "
            f"{plan.accum_steps} micro-batches are accumulated; its loss is that of a batch of {group}. A larger "
            "--device-batch-size, or more processes, would change that"
        )


def _timing(run: Run, folder: RunFolder) -> dict[str, float]:
    """Means over the log points of training, weighted equally; shares of the step's time in percent."""
    lines = [m for m in read_metrics(folder.metrics) if m.get("kind") == "train"]
    timing = {"total_s": run.seconds}
    if not lines:
        return timing
    names = ("step_ms", "data_ms", "teacher_ms", "student_ms", "other_ms")
    means = {n: sum(m.get(f"time/{n}", 0.0) for m in lines) / len(lines) for n in names}
    timing |= means
    for name in names[1:]:
        timing[name.replace("_ms", "_share")] = 100 * means[name] / means["step_ms"] if means["step_ms"] else 0.0
    timing["images_per_s"] = sum(m.get("time/images_per_s", 0.0) for m in lines) / len(lines)
    return timing


THIRD_SET_NOTES = {
    "last": "the last evaluation",
    "chosen": "the epoch with the best top-1 on the validation set",
    "highest": "chosen on the test set itself, as published figures often are: optimistic",
}


def third_set_figures(test: ThirdSet) -> dict[str, Any]:
    """The test set's scores of three epochs, each with how it was chosen, and out of how many evaluations."""
    return {
        which: getattr(test, which) | {"evaluations": test.evaluations, "note": note}
        for which, note in THIRD_SET_NOTES.items()
    }


def third_set_sentence(test: dict[str, Any]) -> str:
    """The three in words."""
    last, chosen, highest = (test[which] for which in THIRD_SET_NOTES)
    return (
        f"{last['samples']:.0f} test samples, which nothing was chosen by: top-1 {last['top1']:.2f} % at the last "
        f"evaluation, {chosen['top1']:.2f} % at the epoch with the best validation top-1 (epoch {chosen['epoch']:.4g})"
        f"; the highest of {highest['evaluations']} was {highest['top1']:.2f} %, which is chosen on the test set "
        "itself and therefore optimistic"
    )


def summary(run: Run, teacher: tuple[Any, Scores, Scores | None] | None, folder: RunFolder) -> dict[str, Any]:
    """summary.json: the last evaluation is the result; the best is named as what it is."""
    state = run.state
    best = state.best | {"evaluations": state.evaluations, "note": "chosen on the validation set by its own top-1"}
    best["kept"] = state.best_step >= 0 and checkpoint.holds(run.folder, state.best_step)  # not if its save was refused
    student = {"arch": run.student.spec.arch, "last": state.last, "best": best, "averaged": run.average is not None}
    if run.tester is not None and state.test.evaluations:
        student["test"] = third_set_figures(state.test)
    result: dict[str, Any] = {"student": student, "teacher": None, "formula": run.method.formula}
    if teacher is not None:
        spec, scores, tested = teacher
        values = {k.removeprefix("teacher/"): v for k, v in scores.values("teacher").items()}
        result["teacher"] = {"arch": spec.arch, "weights": spec.weights, **values}
        if tested is not None:
            result["teacher"]["test"] = {k.removeprefix("test/"): v for k, v in tested.values("test").items()}
    if run.method.coupled:
        result["coupled_rows"] = run.runtime.world.world_size * run.plan.micro_batch
    result["skipped"] = {
        "left_out_per_epoch": run.facts["layout"]["left_out"],
        "bad_samples": state.data.bad,
        "bad_samples_total": sum(state.data.bad.values()),
        "bad_samples_named": state.data.named,
        "val_bad_samples": state.val_bad,
        **({"test_bad_samples": state.test.bad} if run.tester is not None else {}),
        "retries": state.data.retries,
        "skipped_steps": state.skipped_steps,
    }
    result["plan"] = dataclasses.asdict(run.plan)
    result["layout"] = run.facts["layout"]
    result["timing"] = _timing(run, folder)
    return result


CARD = """---
library_name: {library}
pipeline_tag: image-classification
tags: [image-classification, knowledge-distillation]
---
# {arch}, trained with dist_kd

{formula}

| | top-1 % | top-5 % | parameters |
|---|---|---|---|
{rows}

Top-1 and top-5 are of the last evaluation, on {samples} validation samples of `{data}`. {test_note}{teacher_note}

## How to load
```python
from dist_kd import models
network = models.load("FOLDER")
# images [B, 3, {size}, {size}], scaled to 0..1, then normalized with network.spec.mean and network.spec.std
logits = network.eval()(images).logits
```

## Settings
{settings}

Made with: {versions}
"""


def model_card(config: Config, result: dict[str, Any], network, data_name: str, teacher_parameters: int) -> str:
    """README.md of student/: what it is, what it scores, how to load it."""
    last, teacher, spec = result["student"]["last"], result["teacher"], network.spec
    own = sum(p.numel() for p in network.parameters())
    rows = [f"| student `{spec.arch}` | {last['top1']:.2f} | {last['top5']:.2f} | {own:,} |"]
    note = "It was trained from labels alone."
    if teacher:
        rows.append(
            f"| teacher `{teacher['arch']}` | {teacher['top1']:.2f} | {teacher['top5']:.2f} | {teacher_parameters:,} |"
        )
        note = f"The teacher's weights are `{teacher['weights']}`; their licence applies to them, not to this file."
    settings = "\n".join(f"- `{k}`: {v}" for k, v in config.result_settings().items())
    return CARD.format(
        library="timm" if spec.arch.startswith("timm/") else "dist_kd",
        arch=spec.arch,
        formula=result["formula"],
        rows="\n".join(rows),
        samples=int(last["samples"]),
        data=data_name,
        test_note=f"On {third_set_sentence(result['student']['test'])}. " if "test" in result["student"] else "",
        teacher_note=note,
        size=spec.image_size,
        settings=settings,
        versions=", ".join(f"{k} {v}" for k, v in versions().items()),
    )


def _save_folded(path: Path, card: Callable[..., str], leaves: dict[str, Any]) -> str:
    """Writes student_folded/ from student/, both as they will be loaded; the line that says how they compare."""
    student = models.load(path / "student")
    folded = models.fold_affine_head(student)
    large, small = (sum(p.numel() for p in network.parameters()) for network in (student, folded))
    side = student.spec.image_size
    images = torch.randn(8, 3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = student(images).logits, folded(images).logits
    line = (
        f"{large:,} parameters folded into {small:,}, the same function: logits of {len(images)} images of noise "
        f"differ by {(found - expected).abs().max():.2g} at most (largest logit {expected.abs().max():.3g})"
    )
    text = f"{card(folded)}\nFolded from `{student.spec.arch}`, which the scores are of: {line}.\n"
    models.save_student(folded, path / "student_folded", card=text, **leaves)
    return f"folded   {line}: student_folded/"


def finish(config: Config, folder: RunFolder, run: Run, built: dict[str, Any]) -> None:
    """Writes what a finished run leaves behind. Rank 0 only."""
    result = summary(run, built["teacher"], folder)
    folder.write("summary.json", result)
    network = run.student if run.average is None else run.average.network
    evaluation = {
        "image_size": network.spec.image_size,
        "mixed_precision": run.runtime.precision,
        "device_batch_size": config.device_batch_size,
        "channels_last": config.channels_last,
    }
    data, teacher_parameters = built["train"].spec.name, sum(built["teacher_parameters"])

    def card(described) -> str:
        return model_card(config, result, described, data, teacher_parameters)

    leaves = {"classes": built["train"].classes, "extra": {"evaluation": evaluation}}
    models.save_student(network, folder.path / "student", card=card(network), **leaves)
    if models.foldable(network):
        run.runtime.say(_save_folded(folder.path, card, leaves))
    size, classes = network.spec.image_size, network.spec.num_classes
    student = models.build(network.spec.arch, classes, "none", image_size=size)
    spec = run.teacher.spec
    specs = [member.spec for member in run.teacher.members]
    teachers = [models.build(s.arch, s.num_classes, "none", image_size=s.image_size) for s in specs]
    teacher = SideBySide(teachers, spec) if len(teachers) > 1 else next(iter(teachers), None)
    table = compression.compare(teacher, student, size, teacher_image_size=spec.image_size if spec else None)
    folder.write("compression.json", table)
    for line in compression.table(table).splitlines():
        run.runtime.say(line)
    if "test" in result["student"]:
        run.runtime.say(f"test     {third_set_sentence(result['student']['test'])}")
    run.tracker.summary(result)
    write_report([folder.path], folder.path / "report.html")
    run.runtime.say(f"run      {folder.path}: student/, summary.json, compression.json, report.html")
