"""Losses by name. This table is torch-free, so that the command line can check names and settings at once.

Adding one: a file here with a class `Loss` taking the settings listed in its row, and a row.
"""

from __future__ import annotations

import importlib
from typing import NamedTuple


class Row(NamedTuple):
    module: str  # file in this folder
    needs_teacher: bool
    settings: tuple[str, ...]  # fields of Config it takes, by name
    parts: tuple[str, ...] = ()  # names of LossTerms.parts, in order: train/NAME in the metrics
    planned: str = ""  # why it is not there yet


METHODS: dict[str, Row] = {
    "ce": Row("ce", needs_teacher=False, settings=("label_smoothing",), parts=("loss_ce",)),
    "kd": Row("kd", needs_teacher=True, settings=("T", "w", "label_smoothing"), parts=("loss_ce", "loss_kd")),
    "overhaul": Row("", True, (), planned="the overhaul method (pre-ReLU features) is not built yet"),
}


def build_method(name: str, **settings: float):
    """The loss module `name`. KeyError never reaches users: the command line has checked the name."""
    return importlib.import_module(f"dist_kd.methods.{METHODS[name].module}").Loss(**settings)
