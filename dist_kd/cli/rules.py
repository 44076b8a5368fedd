"""What one setting's range cannot say: values out of range in words, names that do not exist, settings that clash."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from dist_kd.cli.names import FIELDS, Given, choices, is_optional, is_switch, kinds, nearest, shown, takes_none
from dist_kd.config import Config
from dist_kd.errors import ConfigError
from dist_kd.methods import METHODS

# pydantic's name of an error -> our words; {gt} and the like are the limits it reports
WORDS = {
    "greater_than": "must be greater than {gt:g}",
    "greater_than_equal": "must be at least {ge:g}",
    "less_than": "must be less than {lt:g}",
    "less_than_equal": "must be at most {le:g}",
    "finite_number": "must be a finite number",
}
KINDS = {int: "a whole number", float: "a number", str: "a text", bool: "true or false"}


def kind_in_words(field: str) -> str:
    return KINDS.get(kinds(field)[0]) or "one of " + ", ".join(choices(field))


def convert(item: Given) -> tuple[Any, str | None]:
    """The value of `item` as Config holds it and None, or None and the sentence that says what is wrong."""
    field, value = item.field, item.value
    rule = f"must be {kind_in_words(field)}"
    if value is None or (takes_none(field) and value == "none"):
        if is_optional(field):
            return None, None
        rule += ", and cannot be left empty"
    elif isinstance(value, str) and not value.strip():
        rule += ", and cannot be empty"
    elif not (isinstance(value, bool) and not is_switch(field)):  # pydantic would take true for 1
        try:
            return getattr(Config.model_validate({field: value}), field), None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            rule = WORDS.get(first["type"], rule).format(**first.get("ctx", {}))
            near = nearest(str(value), choices(field)) if first["type"] == "literal_error" else None
            return (
                None,
                f"{item.key}: {rule}, got {shown(value)} ({item.origin}){f'; did you mean {near}?' if near else ''}",
            )
    return None, f"{item.key}: {rule}, got {shown(value)} ({item.origin})"


def named(config: Config, by: Mapping[str, Given]) -> Iterator[tuple[str, str]]:
    """(field, problem) for every name that nothing answers to. Networks and augmentations are asked, not built.

    `by` says who gave which field; fields nobody gave are at their defaults, which are right.
    """
    row = METHODS.get(config.method)
    if row is None or row.planned:
        usable = [name for name, other in METHODS.items() if not other.planned]
        near = nearest(config.method, usable)
        rule = row.planned if row else "is not a method" + (f"; did you mean {near}?" if near else "")
        yield "method", f"{rule}; there are: {', '.join(usable)}"
    asked = {"arch": ("dist_kd.models", "resolve"), "augment": ("dist_kd.data.views", "check_augment")}
    if row and row.needs_teacher:
        asked["teacher_arch"] = asked["arch"]
    for field, (module, name) in asked.items():
        if field in by and getattr(config, field) is not None:
            try:
                getattr(importlib.import_module(module), name)(getattr(config, field))
            except ConfigError as error:
                yield field, str(error)


def clashes(config: Config, by: Mapping[str, Given]) -> Iterator[tuple[str, str]]:
    """(field, what is wrong) for settings that cannot go together, and for flags without effect.

    A flag that changes nothing is refused, because its author believes that it does. A file may hold settings that
    another choice makes idle: a preset's `T` beside `--no-kd` is what makes its plain twin one word away.
    """
    for field in by:
        if by[field].origin.startswith("flag "):
            for condition, why in IDLE.get(field, ()):
                if condition(config):
                    yield field, "has no effect " + (why(config, by) if callable(why) else why)
    for fields, condition, why in IMPOSSIBLE:
        first = next((field for field in fields if field in by), None)
        if first and condition(config):
            yield first, why.format(**{name: getattr(config, name) for name in FIELDS})


def _without_teacher(config: Config) -> bool:
    row = METHODS.get(config.method)
    return row is not None and not row.planned and not row.needs_teacher


def _not_taken(field: str) -> Callable[[Config], bool]:
    def condition(config: Config) -> bool:
        row = METHODS.get(config.method)
        return row is not None and not row.planned and field not in row.settings

    return condition


def _method_remedy(config: Config, by: Mapping[str, Given]) -> str:
    method = f"with the method `{config.method}`"
    giver = by.get("method")
    if giver and giver.origin.startswith("flag "):
        return f"{method} ({giver.origin}); leave out one of the two"
    return f"{method} ({giver.origin if giver else 'default'}); add --kd"


Reason = str | Callable[[Config, Mapping[str, Given]], str]

# flag -> (when it is idle, why and what to do)
IDLE: dict[str, list[tuple[Callable[[Config], bool], Reason]]] = {
    "teacher_arch": [(_without_teacher, _method_remedy)],
    "teacher_weights": [(_without_teacher, _method_remedy)],
    "teacher_eval_samples": [(_without_teacher, _method_remedy)],
    **{
        field: [(_not_taken(field), _method_remedy)]
        for field in dict.fromkeys(name for row in METHODS.values() for name in row.settings)
    },
    "epochs": [(lambda c: c.max_steps is not None, "beside --max-steps, which ends the training; keep one of the two")],
    "lr_step_epochs": [
        (lambda c: c.schedule not in ("step", "restarts"), "unless with --schedule step or --schedule restarts")
    ],
    "lr_gamma": [
        (lambda c: c.schedule not in ("step", "restarts"), "unless with --schedule step or --schedule restarts")
    ],
    "lr_floor": [
        (lambda c: c.schedule not in ("cosine", "restarts"), "unless with --schedule cosine or --schedule restarts")
    ],
    "wandb_project": [(lambda c: not c.wandb, "without --wandb; add it")],
    "allow_changes": [(lambda c: c.allow_changes and c.resume == "never", "with --resume never; leave out one")],
    "loader_timeout": [(lambda c: c.workers == 0, "with --workers 0, where nothing is waited for; leave it out")],
}

# (settings concerned, when they clash, why and what to do)
IMPOSSIBLE: list[tuple[tuple[str, ...], Callable[[Config], bool], str]] = [
    (
        ("warmup_epochs", "epochs"),
        lambda c: c.max_steps is None and 0 < c.epochs <= c.warmup_epochs,
        "a warm-up of {warmup_epochs:g} epochs is as long as the whole training of {epochs:g}; "
        "lower --warmup-epochs or raise --epochs",
    ),
    (
        ("lr_gamma", "schedule"),
        lambda c: c.schedule == "restarts" and c.lr_gamma < 1,
        "a factor of {lr_gamma:g} shrinks the periods of --schedule restarts to nothing; add --lr-gamma 1 or 2",
    ),
    (
        ("device_batch_size", "mixup", "cutmix"),
        lambda c: bool(c.mixup or c.cutmix) and c.device_batch_size % 2 == 1,
        "--mixup and --cutmix mix rows in pairs, so --device-batch-size `{device_batch_size}` must be even",
    ),
    (
        ("batch_size", "mixup", "cutmix"),
        lambda c: bool(c.mixup or c.cutmix) and c.batch_size % 2 == 1,
        "--mixup and --cutmix mix rows in pairs, so --batch-size `{batch_size}` must be even",
    ),
    (
        ("mixed_precision", "cpu"),
        lambda c: c.cpu and c.mixed_precision == "fp16",
        "fp16 needs a GPU, but --cpu is given; use --mixed-precision bf16 or no",
    ),
]
