"""Losses by name, alone or added up as in `kd+dist`. This table is torch-free, so that the command line checks at once.

Adding one: a file here with a class `Term` (frame.py), and a row: what `--help-methods` prints is all in it.
The cross-entropy stands in a loss once, with the smallest weight that one of its methods leaves it.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

from dist_kd.methods.settings import Row, Setting

_CE = Setting(1.0, "Weight of the cross-entropy with the labels.", ge=0)
_T = {"gt": 0, "le": 1000}

# A row's formula names its settings; `formula` of the loss that was built has their numbers.
METHODS: dict[str, Row] = {
    "ce": Row(
        "ce",
        formula="CE(labels, student)",
        when="The plain twin: what the student learns without a teacher.",
        needs_teacher=False,
    ),
    "kd": Row(
        "kd",
        paper="Hinton, Vinyals, Dean 2015, arXiv 1503.02531; standardize: Sun et al. 2024, arXiv 2403.01427",
        formula="(1 - w) * CE + w * weight * T^2 * KL(teacher || student at T)",
        when="First choice when teacher and student are not far apart; T 1 to 2 on many classes.",
        settings={
            "T": Setting(4.0, "Softmax temperature of both.", **_T),
            "w": Setting(0.9, "Weight of the kd term; cross-entropy has 1 - w.", ge=0, le=1),
            "weight": Setting(1.0, "Factor beside w: with standardize, 10 makes the published 9 to 0.1.", ge=0),
            "standardize": Setting(False, "Logits of each row to mean 0, deviation 1, before T; published with T 2."),
            "t_squared": Setting(True, "The factor T^2; without it gradients shrink as 1/T^2."),
            "class_mean": Setting(False, "Mean over classes too, as KLDivLoss does by default: 1/C of the term."),
        },
        short=("T", "w"),
        parts=("loss_kd",),
    ),
    "dkd": Row(
        "dkd",
        paper="Zhao et al. 2022, arXiv 2203.08679",
        formula="ce * CE + a * T^2 * TCKD + b * T^2 * NCKD",
        when="Like kd, but what the teacher says of the wrong classes counts also where it is sure of the right one.",
        settings={
            "T": Setting(4.0, "Softmax temperature of both; published: 4 on 100 classes, 1 on 1,000.", **_T),
            "a": Setting(1.0, "Weight of TCKD, KL over {right class, all others}.", ge=0),
            "b": Setting(8.0, "Weight of NCKD, KL over the other classes; published: 2 to 8, on 1,000 0.5 to 2.", ge=0),
            "ce": _CE,
            "warmup": Setting(
                1.0, "Epochs over which both terms rise from 0; published: 20, on 1,000 classes 1.", ge=0
            ),
        },
        parts=("loss_tckd", "loss_nckd"),
        hard_labels=True,
    ),
    "dist": Row(
        "dist",
        paper="Huang et al. 2022, arXiv 2205.10536",
        formula="ce * CE + b * T^2 * (1 - mean correlation over classes) + g * T^2 * (1 - the same over the batch)",
        when="A much stronger teacher, and large sets: it asks for the teacher's order of classes, not its numbers.",
        settings={
            "T": Setting(1.0, "Softmax temperature of both; published: 1 on 1,000 classes, 4 on 100.", **_T),
            "b": Setting(2.0, "Weight of the inter-class term, a row at a time.", ge=0),
            "g": Setting(2.0, "Weight of the intra-class term, a class at a time over the micro-batch.", ge=0),
            "ce": _CE,
        },
        parts=("loss_inter", "loss_intra"),
    ),
    "wttm": Row(
        "wttm",
        paper="Zheng, Yang 2024, arXiv 2402.11148",
        formula="ce * CE + weight * U * KL(teacher^g || student at T = 1), U = sum of teacher^g",
        when="Like kd, without a temperature on the student, so that its confidence is trained as it is used.",
        settings={
            "g": Setting(0.1, "Power of the teacher's probabilities, 1/T; published: 0.1 to 0.2.", gt=0, le=1),
            "weight": Setting(1.0, "Weight of the term; with weighted false (TTM) published about 45.", ge=0),
            "weighted": Setting(True, "Rows count by U, more where the teacher is unsure; false is TTM."),
            "ce": _CE,
        },
        parts=("loss_wttm",),
    ),
    "hard": Row(
        "hard",
        paper="Touvron et al. 2020 (DeiT), arXiv 2012.12877",
        formula="(1 - w) * CE + w * CE(teacher's first guess, student)",
        when="Strong augmentation, where the teacher's guess on the view is truer than the label of the image.",
        settings={"w": Setting(0.5, "Weight of the teacher's guess; cross-entropy has 1 - w.", ge=0, le=1)},
        parts=("loss_hard",),
    ),
    "soft_ce": Row(
        "soft_ce",
        paper="Shen, Savvides 2020 (MEAL V2), arXiv 2009.08453; with mixup Beyer et al. 2021 (FunMatch), 2106.05237",
        formula="weight * T^2 * CE(teacher at T, student at T)",
        when="Unlabelled images, long schedules with mixup, or a pretrained student: no label is looked at.",
        settings={
            "T": Setting(1.0, "Softmax temperature of both.", **_T),
            "weight": Setting(1.0, "Weight of the term.", ge=0),
        },
        parts=("loss_soft_ce",),
        labels=False,
    ),
    "fitnet": Row(
        "fitnet",
        paper="Romero et al. 2014 (FitNets), arXiv 1412.6550",
        formula="ce * CE + weight * MSE(regressor(student_tap), teacher_tap)",
        when="Beside a logit method (kd+fitnet), where the student's middle is what is weak: thin and deep students.",
        settings={
            "weight": Setting(100.0, "Weight of the term; published: 100.", ge=0),
            "student_tap": Setting("", "Map of the student, a role or path; empty: the partner, or the middle stage."),
            "teacher_tap": Setting("", "Map of the teacher, the hint; empty: the partner, or the middle stage."),
            "ce": _CE,
        },
        parts=("loss_fitnet",),
        features=True,
    ),
    "attention": Row(
        "attention",
        paper="Zagoruyko, Komodakis 2016, arXiv 1612.03928",
        formula="ce * CE + weight * sum over stages of MSE(attention map of student, of teacher)",
        when="Beside a logit method (kd+attention): where to look, for students of any width, without parameters.",
        settings={"weight": Setting(1000.0, "Weight of the term; published: 1000.", ge=0), "ce": _CE},
        parts=("loss_attention",),
        features=True,
    ),
    "rkd": Row(
        "rkd",
        paper="Park et al. 2019, arXiv 1904.05068",
        formula="ce * CE + distance * L(distances) + angle * L(angles), smooth L1 over pairs and triples of rows",
        when="Embeddings and retrieval, or networks whose features have nothing else in common; batches of 32 to 256.",
        settings={
            "distance": Setting(25.0, "Weight of the distances between two rows.", ge=0),
            "angle": Setting(50.0, "Weight of the angles between three rows.", ge=0),
            "ce": _CE,
        },
        parts=("loss_rkd_distance", "loss_rkd_angle"),
        features=True,
    ),
    "crd": Row(
        "crd",
        paper="Tian et al. 2019, arXiv 1910.10699",
        formula="ce * CE + weight * NCE of both embeddings (negatives, temperature; memories of momentum)",
        when="Networks of different kinds and many epochs: its memories need several visits of each sample.",
        settings={
            "weight": Setting(0.8, "Weight of the term; published: 0.8.", ge=0),
            "negatives": Setting(16384, "Other samples that each row is held against; at most all of the set.", ge=1),
            "temperature": Setting(0.07, "Temperature of the inner products.", gt=0, le=10),
            "momentum": Setting(0.5, "Share of the old embedding when a memory takes in a new one.", ge=0, lt=1),
            "ce": _CE,
        },
        parts=("loss_crd",),
        features=True,
    ),
    "overhaul": Row(
        "overhaul",
        paper="Heo et al. 2019, arXiv 1904.01866",
        formula="ce * CE + weight * sum over stages of partial L2(connector(student), max(teacher, margin)) / 2^k",
        when="Convolutional teacher with batch norm, and many epochs; published ahead of fitnet and attention.",
        settings={
            "weight": Setting(1e-3, "Weight of the sum over pixels; published: 0.001, on 1,000 classes 0.0001.", ge=0),
            "teacher_batch_norm": Setting(
                False, "Teacher's batch norms by the batch, as published; their running statistics stay."
            ),
            "ce": _CE,
        },
        parts=("loss_overhaul",),
        features=True,
    ),
    "reviewkd": Row(
        "reviewkd",
        paper="Chen et al. 2021, arXiv 2104.09044",
        formula="ce * CE + weight * sum over stages of the context loss of the reviewed student",
        when="Published ahead of the other feature methods, where its fusions, which cost about a student, fit.",
        settings={
            "weight": Setting(1.0, "Weight of the term; published: 0.4 to 8 by pair of networks.", ge=0),
            "warmup": Setting(1.0, "Epochs over which the term rises from 0; published: 20, on 1,000 classes 1.", ge=0),
            "ce": _CE,
        },
        parts=("loss_reviewkd",),
        features=True,
    ),
}


def split(method: str) -> list[str]:
    """The methods that a sum names, in its order: `kd+dist` -> [kd, dist]."""
    return method.split("+")


def needs_teacher(method: str) -> bool:
    return any(METHODS[name].needs_teacher for name in split(method))


def needs_labels(method: str) -> bool:
    return all(METHODS[name].labels for name in split(method))


def parts_of(method: str) -> tuple[str, ...]:
    """Names of LossTerms.parts, in order."""
    first = ("loss_ce",) if needs_labels(method) else ()
    return (*first, *(part for name in split(method) for part in METHODS[name].parts))


def fields_of(method: str) -> tuple[str, ...]:
    """Fields of Config that this loss looks at, by name."""
    short = [field for name in split(method) for field in METHODS[name].short]
    return (*short, *(["label_smoothing"] if needs_labels(method) else []))


def owners(method: str, setting: str) -> list[str]:
    """The methods of the sum that have this setting: `T` of `kd+dkd` -> [kd, dkd]; `dkd.T` -> [dkd]."""
    owner, dot, name = setting.rpartition(".")
    return [m for m in split(method) if (not dot or m == owner) and name in METHODS[m].settings]


def read_args(text: str) -> dict[str, Any]:
    """Config.method_args, which the command line has checked: `dkd.b=2.0,dkd.T=1.0` -> values by dotted name."""
    pairs = [item.split("=", 1) for item in text.split(",") if item]
    return {name: METHODS[name.split(".")[0]].settings[name.split(".")[1]].read(value) for name, value in pairs}


def settings_in_force(method: str, given: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Every setting of each method of the sum. `given` by dotted name, or by plain name where one method has it."""
    chosen = {m: {name: s.default for name, s in METHODS[m].settings.items()} for m in split(method)}
    for key, value in given.items():
        name = key.rpartition(".")[2]
        (owner,) = owners(method, key)
        chosen[owner][name] = METHODS[owner].settings[name].check(value)
    return chosen


def build_method(method: str, pair: Any = None, *, label_smoothing: float = 0.0, **given: Any):
    """The loss `method` as a module (frame.Loss). `given` as settings_in_force takes it; `pair` is a frame.Pair.

    A wrong name is a KeyError or ValueError that never reaches users: the command line has checked it.
    """
    frame = importlib.import_module("dist_kd.methods.frame")
    pair = pair or frame.Pair()
    terms = {}
    for name, settings in settings_in_force(method, given).items():
        if METHODS[name].parts:
            terms[name] = importlib.import_module(f"dist_kd.methods.{METHODS[name].module}").Term(pair, **settings)
    return frame.Loss(terms, pair, label_smoothing=label_smoothing, labels=needs_labels(method))


def build_chosen(config: Any, pair: Any = None):
    """The loss that a Config asks for."""
    fields = {name: getattr(config, name) for name in fields_of(config.method)}
    smoothing = fields.pop("label_smoothing", 0.0)
    # fields are short spellings: `T` of `kd+dkd` is kd's
    short = {f"{m}.{name}": fields[name] for m in split(config.method) for name in METHODS[m].short}
    given = short | read_args(config.method_args)
    return build_method(config.method, pair, label_smoothing=smoothing, **given)
