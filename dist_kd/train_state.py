"""What grows during training and is not a tensor; and whether what was read back from JSON is that."""

from __future__ import annotations

from dataclasses import dataclass, field, is_dataclass
from typing import Any, get_args, get_origin, get_type_hints

from dist_kd.contracts import DataCounters


@dataclass
class ThirdSet:
    """What a test set said of the student so far. Nothing is chosen by it but `highest`, which is named so."""

    data: str = ""  # its fingerprint
    evaluations: int = 0
    bad: dict[str, int] = field(default_factory=dict)  # of the last evaluation: kind of damage -> samples
    last: dict[str, float] = field(default_factory=dict)
    chosen: dict[str, float] = field(default_factory=dict)  # where the validation set's top-1 was best
    highest: dict[str, float] = field(default_factory=dict)  # where its own was

    def add(self, figures: dict[str, float], val_top1: float) -> None:
        """Takes in one evaluation; `val_top1` is the validation set's at the same step. Of equals the first stays."""
        self.evaluations += 1
        self.last = figures | {"val_top1": val_top1}
        if not self.chosen or val_top1 > self.chosen["val_top1"]:
            self.chosen = dict(self.last)
        if not self.highest or figures["top1"] > self.highest["top1"]:
            self.highest = dict(self.last)


@dataclass
class TrainState:
    """What grows during training and is not a tensor."""

    step: int = 0  # finished optimizer updates
    seconds: float = 0.0  # wall time of all starts that led here; what a kill made them do again is in it once
    evaluated_at: int = -1  # the step of the last finished evaluation
    best_top1: float = -1.0
    best_step: int = -1
    evaluations: int = 0
    skipped_steps: int = 0  # updates that changed nothing because gradients were not finite
    skipped_in_a_row: int = 0  # of these, the last ones without one between that was made
    meter_sums: list[float] = field(default_factory=list)  # of the unfinished log window
    data: DataCounters = field(default_factory=DataCounters)  # of training, summed over all ranks
    val_bad: dict[str, int] = field(default_factory=dict)  # of the last evaluation: kind of damage -> samples
    best: dict[str, float] = field(default_factory=dict)
    last: dict[str, float] = field(default_factory=dict)
    test: ThirdSet = field(default_factory=ThirdSet)


def check(value: Any, kind: Any, name: str) -> None:
    """TypeError unless `value` is of `kind`: dataclass, list[...] or dict[...] down to the leaves, or a plain type."""
    base = get_origin(kind) or kind
    fits = type(value) in (int, float) if base is float else type(value) is base
    if not fits:
        raise TypeError(f"{name} is `{value!r:.40}`, not {base.__name__}")
    if is_dataclass(base):
        for part, inner in get_type_hints(base).items():
            check(getattr(value, part), inner, part)
    elif base is list and get_args(kind):
        for item in value:
            check(item, get_args(kind)[0], name)
    elif base is dict and get_args(kind):
        for item in value.values():
            check(item, get_args(kind)[1], name)


def state_of(facts: dict[str, Any]) -> TrainState:
    """What grew, out of state.json. KeyError, TypeError or ValueError if it is not what a save writes."""
    fields = dict(facts["state"])
    fields.pop("bad_samples", None)  # schema 1
    parts = {"data": DataCounters(**fields.get("data", {})), "test": ThirdSet(**fields.get("test", {}))}
    state = TrainState(**fields | parts)
    check(state, TrainState, "state")
    if state.step < 0:
        raise ValueError(f"step is {state.step}")
    return state
