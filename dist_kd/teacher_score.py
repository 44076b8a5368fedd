"""The teacher's score before step 1: taken once for a run, and kept in its folder with the answers for the agreement.

A start that resumes finds them there, unless something has changed that they follow from.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_type_hints

import torch
from torch import Tensor, nn

from dist_kd.checkpoint import write_atomically
from dist_kd.config import Config
from dist_kd.contracts import DataSpec, NetworkSpec
from dist_kd.data.index import Index
from dist_kd.evaluation import Evaluator, Scores
from dist_kd.loop import Run, note_unscored
from dist_kd.run_folder import RunFolder
from dist_kd.sets import Sets, make_evaluator
from dist_kd.train_state import check
from dist_kd.world_digest import source_digest

KEPT = ("samples", "top1_hits", "top5_hits", "loss_sum", "ece", "agreements", "compared", "seconds")  # of Scores
UNREADABLE = (OSError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, RecursionError)


def before_training(
    config: Config, run: Run, networks: Sequence[nn.Module], sets: Sets, folder: RunFolder
) -> tuple[NetworkSpec, Scores, Scores | None]:
    """What the teacher is and scores on the validation set and on the third one; `networks` are its plain members.

    Says so, warns of a teacher that knows nothing, and logs it where the run begins. Scores may be incomplete: then a
    stop was asked for.
    """
    teacher, state = run.teacher, run.state
    key = _key(config, run, networks) if run.runtime.world.is_main else {}
    scores = score_teacher(config, run, run.evaluator, sets.val, "validation", folder, key)
    tested = None
    if scores.complete and run.tester is not None:
        tested = score_teacher(config, run, run.tester, sets.test, "test", folder, key)
    if not scores.complete or (tested is not None and not tested.complete):
        return teacher.spec, scores, tested
    values = scores.values("teacher")
    note_unscored(run, scores.data, state.val_bad)
    if tested is not None:
        values |= tested.values("teacher/test")
        note_unscored(run, tested.data, state.test.bad)
    warning = teacher_warning(scores, sets.train.spec.num_classes)
    if warning:
        run.runtime.say(warning)
    if state.step == 0:
        state.val_bad = scores.data.bad
        state.test.bad = tested.data.bad if tested is not None else {}
        run.tracker.log(values | {"teacher/classes": float(teacher.spec.num_classes)}, 0, kind="teacher")
    return teacher.spec, scores, tested


def score_teacher(
    config: Config, run: Run, evaluator: Evaluator, index: Index, split: str, folder: RunFolder, key: dict[str, Any]
) -> Scores:
    """The teacher on a set through the student's own view, and the lines that say so; `evaluator` has its answers then.

    Of several teachers each is scored and said first, then their mean, which is what teaches.
    """
    teacher, runtime, spec = run.teacher, run.runtime, index.spec
    some = min(config.teacher_eval_samples, spec.num_samples)
    path, key = folder.path / f"teacher_{split}.json", key | {"data": spec.fingerprint, "samples": some}
    kept = runtime.on_main(lambda: _kept(path, key, spec))
    if kept is not None:
        scores, lines, answers = kept
        evaluator.answers = answers.to(runtime.device)
        for line in lines:
            runtime.say(f"{line} (scored at an earlier start)")
        return scores
    sample, lines = evaluator, []
    if some < spec.num_samples:
        sample = make_evaluator(config, runtime, index, run.student.spec, run.stop.agreed, limit=some)
    for member in teacher.members if len(teacher.members) > 1 else ():
        alone = sample.score(member)
        if not alone.complete:
            return alone
        lines.append(teacher_line(member.spec, alone, split))
        runtime.say(lines[-1])
    scores = sample.score(teacher, remember=True)
    evaluator.answers = sample.answers
    if scores.complete:
        lines.append(teacher_line(teacher.spec, scores, split))
        runtime.say(lines[-1])
        if not scores.data.bad:  # damaged samples may be whole again at the next start
            runtime.on_main(lambda: _keep(path, key, scores, lines, evaluator.answers))
    return scores


def teacher_line(spec: NetworkSpec, scores: Scores, split: str) -> str:
    """The teacher's hits on a set, as a run says them."""
    n = scores.samples
    return (
        f"teacher  {spec.arch} on {n} {split} samples: top-1 {scores.top1_hits}/{n} = "
        f"{100 * scores.top1_hits / max(1, n):.2f} %, top-5 {scores.top5_hits}/{n} = "
        f"{100 * scores.top5_hits / max(1, n):.2f} %, {spec.num_classes} classes"
    )


def teacher_warning(scores: Scores, num_classes: int) -> str | None:
    """A loud sentence if the teacher is no better than guessing."""
    top1, chance = 100 * scores.top1_hits / max(1, scores.samples), 100 / num_classes
    noise = 300 * math.sqrt(chance / 100 * (1 - chance / 100) / max(1, scores.samples))  # three standard errors
    if top1 > chance + noise:
        return None
    return (
        f"WARNING: the teacher is at chance level: top-1 {top1:.2f} % on {scores.samples} validation samples, "
        f"guessing gives {chance:.2f} %; the student can learn nothing from it. Check --teacher-weights and the "
        "order of classes (--class-list of dist-kd pack)"
    )


# ------------------------------------------------------------------------------------- what is remembered


def _key(config: Config, run: Run, networks: Sequence[nn.Module]) -> dict[str, Any]:
    """All that the answers on a given set follow from; JSON-ready."""
    weights = hashlib.sha256()
    for network in networks:
        for name, value in network.state_dict().items():
            weights.update(name.encode())
            weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    shown = asdict(run.student.spec)
    return {
        "code": source_digest(),
        "torch": torch.__version__,
        "device": run.runtime.device.type,
        "precision": run.runtime.precision,
        "prepared": [config.channels_last, config.compile],
        "view": [shown[name] for name in ("mean", "std", "image_size", "crop_pct", "interpolation")],
        "teachers": [[member.spec.arch, member.spec.weights] for member in run.teacher.members],
        "weights": weights.hexdigest(),
    }


def _keep(path: Path, key: dict[str, Any], scores: Scores, lines: list[str], answers: Tensor) -> None:
    """Costs the next start some time if it fails, and nothing else."""
    facts = {name: getattr(scores, name) for name in KEPT}
    content = {"key": key, "scores": facts, "lines": lines, "answers": " ".join(map(str, answers.tolist()))}
    with contextlib.suppress(OSError):
        write_atomically(path, json.dumps(content, indent=1) + "\n")


def _kept(path: Path, key: dict[str, Any], spec: DataSpec) -> tuple[Scores, list[str], Tensor] | None:
    """(scores, lines, top-1 of each sample) of an earlier start with the same key, if they are there and whole."""
    try:
        found = json.loads(path.read_text())
        if found["key"] != json.loads(json.dumps(key)):
            return None
        kinds = {name: kind for name, kind in get_type_hints(Scores).items() if name in KEPT}
        for name, kind in kinds.items():
            check(found["scores"][name], kind, name)
        lines = [str(line) for line in found["lines"]]
        answers = torch.tensor([int(number) for number in found["answers"].split()], dtype=torch.int32)
        if len(answers) != spec.num_samples or answers.min() < -1 or answers.max() >= spec.num_classes:
            return None
        return Scores(**{name: found["scores"][name] for name in kinds}), lines, answers
    except UNREADABLE:
        return None
