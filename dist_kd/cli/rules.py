"""What one setting's range cannot say: values out of range in words, names that do not exist, settings that clash."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Container, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from pydantic import ValidationError

from dist_kd.cli.names import Given, choices, is_optional, is_switch, kinds, nearest, shown, takes_none
from dist_kd.config import Config
from dist_kd.data import remote_urls
from dist_kd.errors import ConfigError
from dist_kd.methods import METHODS, fields_of, needs_teacher, owners, split

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
    try:  # before any message repeats the value
        remote_urls.check_no_credentials(str(value))
    except ConfigError as error:
        return None, f"{item.key}: {error} ({item.origin})"
    rule = f"must be {kind_in_words(field)}"
    if value is None or (takes_none(field) and value == "none"):
        if is_optional(field):
            return None, None
        rule += ", and cannot be left empty"
    elif isinstance(value, str) and not value.strip():
        rule += ", and cannot be empty"
    elif not (isinstance(value, bool) and not is_switch(field)):  # pydantic would take true for 1
        try:
            value = getattr(Config.model_validate({field: value}), field)
            return NAMES[field](value, item.origin) if field in NAMES else value, None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            rule = WORDS.get(first["type"], rule).format(**first.get("ctx", {}))
            if first["type"] == "literal_error" and (near := nearest(str(value), choices(field))):
                return None, f"{item.key}: {rule}, got {shown(value)} ({item.origin}); did you mean {near}?"
        except ConfigError as error:
            return None, f"{item.key}: {error}"
    return None, f"{item.key}: {rule}, got {shown(value)} ({item.origin})"


def _network(name: str, origin: str) -> str:
    # asked when somebody names one: the room is torch-free only as long as nothing is built
    return importlib.import_module("dist_kd.models").resolve(name, origin)


def _augment(text: str, origin: str) -> str:
    try:
        return "+".join(importlib.import_module("dist_kd.data.views").check_augment(text)) or "none"
    except ConfigError as error:
        raise ConfigError(f"{error} ({origin})") from None


def _networks(names: str, origin: str) -> str:
    return ",".join(_network(name.strip(), origin) for name in names.split(","))


def _method(text: str, origin: str) -> str:
    """`kd+dist`, its methods in the order of the table: one loss is one run."""
    names = [name.strip() for name in split(text)]
    for name in names:
        if name not in METHODS:
            near = nearest(name, METHODS)
            rule = "there is no such method" + (f"; did you mean {near}?" if near else "")
            raise ConfigError(f"{rule}, got {shown(text)} ({origin}); choose from {', '.join(METHODS)}")
    if len(set(names)) < len(names):
        raise ConfigError(f"must name a method once, got {shown(text)} ({origin})")
    if "ce" in names and len(names) > 1:
        raise ConfigError(f"must not add ce: the cross-entropy stands in each loss, got {shown(text)} ({origin})")
    return "+".join(name for name in METHODS if name in names)


def _data(where: str, origin: str) -> str:
    # the message leaves out what it refuses: a credential, or a command
    try:
        remote_urls.check_url(where)
    except ConfigError as error:
        raise ConfigError(f"{error} ({origin})") from None
    return where


# names are resolved here, to their one canonical spelling: `efficientnet-b0` and `efficientnet_b0` are one run
NAMES: dict[str, Callable[[str, str], str]] = {
    "data": _data,
    "val_data": _data,
    "test_data": _data,
    "arch": _network,
    "teacher_arch": _networks,
    "augment": _augment,
    "method": _method,
}


def clashes(config: Config, by: Mapping[str, Given], bad: Container[str]) -> Iterator[tuple[str, str]]:
    """(field, what is wrong) for settings that cannot go together, and for flags without effect.

    `by` says who gave a field; rules that ask a `bad` field, whose value could not be understood, are left out.
    A flag that changes nothing is refused, because its author believes that it does. A file may hold settings that
    another choice makes idle: a preset's `T` beside `--no-kd` is what makes its plain twin one word away.
    """
    for field in by:
        idle = IDLE.get(field)
        if idle and by[field].origin.startswith("flag ") and idle.on not in bad and idle.when(config):
            yield field, f"has no effect {idle.why(config, by) if callable(idle.why) else idle.why}"
    for fields, when, why in IMPOSSIBLE:
        first = next((field for field in fields if field in by), None)
        if first and not any(field in bad for field in fields) and when(config):
            yield first, why.format(**dict(config))


def _method_remedy(config: Config, by: Mapping[str, Given], field: str = "") -> str:
    giver = by.get("method")
    origin = giver.origin if giver else "default"
    remedy = "leave out one of the two" if origin.startswith("flag ") else "add --kd"
    if own := owners(config.method, field):
        remedy = f"its own is --method-arg {own[0]}.{field}=VALUE"
    return f"with the method `{config.method}` ({origin}); {remedy}"


class Idle(NamedTuple):
    """When a flag changes nothing: which other field decides it, the condition, why and what to do."""

    on: str
    when: Callable[[Config], bool]
    why: str | Callable[[Config, Mapping[str, Given]], str]


def _unless(*schedules: str) -> Idle:
    remedy = " or ".join(f"--schedule {name}" for name in schedules)
    return Idle("schedule", lambda c: c.schedule not in schedules, f"unless with {remedy}")


def _is_remote(where: str | None) -> bool:
    return where is not None and remote_urls.is_remote(where)


def _never_waits(c: Config) -> bool:
    return c.workers == 0 and not any(map(_is_remote, (c.data, c.val_data, c.test_data)))


NO_TEACHER = Idle("method", lambda c: not needs_teacher(c.method), _method_remedy)

IDLE: dict[str, Idle] = {
    field: Idle("method", lambda c, field=field: field not in fields_of(c.method), partial(_method_remedy, field=field))
    for method in METHODS
    for field in fields_of(method)
} | {
    "teacher_arch": NO_TEACHER,
    "teacher_weights": NO_TEACHER,
    "teacher_eval_samples": NO_TEACHER,
    "epochs": Idle("max_steps", lambda c: c.max_steps is not None, "beside --max-steps; keep one of the two"),
    "lr_step_epochs": _unless("step", "restarts", "swing"),
    "lr_gamma": _unless("step", "restarts"),
    "lr_floor": _unless("cosine", "restarts", "swing"),
    "wandb_project": Idle("wandb", lambda c: not c.wandb, "without --wandb; add it"),
    "allow_changes": Idle("resume", lambda c: c.allow_changes and c.resume == "never", "with --resume never"),
    "allow_reshard": Idle("resume", lambda c: c.allow_reshard and c.resume == "never", "with --resume never"),
    "loader_timeout": Idle(
        "workers",
        _never_waits,
        "with --workers 0 and data on this machine, where nothing is waited for",
    ),
}


def _numbers(c: Config) -> tuple[int, int]:
    """How many teachers, and how many weights for them."""
    count = len(c.teacher_arch.split(","))
    return count, len(c.teacher_weights.split(",")) if count > 1 else 1


# (settings concerned, when they clash, why and what to do)
IMPOSSIBLE: list[tuple[tuple[str, ...], Callable[[Config], bool], str]] = [
    (
        ("hang_timeout", "loader_timeout", "workers"),
        lambda c: c.hang_limit_s <= c.loader_timeout and not _never_waits(c),
        "`{hang_timeout}` s would end the run before --loader-timeout `{loader_timeout}` s says which sample a loader "
        "process hangs at; give a longer --hang-timeout, or a shorter --loader-timeout",
    ),
    *(
        (
            ("mixup", "cutmix", "method"),
            lambda c, name=name: bool(c.mixup or c.cutmix) and name in split(c.method),
            f"`{name}` asks for the one class of a sample, and --mixup and --cutmix give it two; leave them out, or "
            "take a method that looks at no class, such as kd or dist",
        )
        for name, row in METHODS.items()
        if row.hard_labels
    ),
    *(
        (
            ("teacher_arch", "method"),
            lambda c, name=name: "," in c.teacher_arch and name in split(c.method),
            f"`{name}` looks at a teacher's features, and several teachers have only their mean softmax in common; "
            "give one teacher, or take methods without features (--help-methods)",
        )
        for name, row in METHODS.items()
        if row.features
    ),
    (
        ("teacher_weights", "teacher_arch"),
        lambda c: needs_teacher(c.method) and _numbers(c)[1] not in (1, _numbers(c)[0]),
        "--teacher-weights `{teacher_weights}` must be one for all, or one for each of --teacher-arch `{teacher_arch}`",
    ),
    (
        ("warmup_epochs", "epochs"),
        lambda c: c.max_steps is None and 0 < c.epochs <= c.warmup_epochs,
        "a warm-up of {warmup_epochs:g} epochs is as long as the whole training of {epochs:g}; "
        "lower --warmup-epochs or raise --epochs",
    ),
    (
        ("lr_gamma", "schedule"),
        lambda c: c.schedule == "restarts" and c.lr_gamma is not None and c.lr_gamma < 1,
        "a factor of {lr_gamma:g} shrinks the periods of --schedule restarts to nothing; use --lr-gamma 1 or 2",
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
