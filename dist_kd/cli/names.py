"""Which settings there are and how they may be spelled: derived from Config, so that a new field needs nothing here."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any, NamedTuple, get_args

from dist_kd.config import Config
from dist_kd.data import remote_urls

FIELDS = Config.model_fields

# switches that stand for a method: name -> method when given, method when given as --no-NAME (None: no such form)
SWITCHES: dict[str, tuple[str, str | None]] = {"kd": ("kd", "ce"), "overhaul": ("overhaul", None)}

SECRET = re.compile(r"key|token|secret|passw|credential", re.IGNORECASE)  # in what somebody takes for a setting
SEVERAL = ("teacher_arch", "teacher_weights")  # settings that take more than one word; joined by commas in Config


class Given(NamedTuple):
    """One setting as somebody wrote it, not yet converted."""

    field: str  # of Config
    value: str | bool | None
    key: str  # as it was written, e.g. "--T" or "temperature"
    origin: str  # "flag --T", "file PATH" or "variable DIST_KD_DATA"


def aliases(field: str) -> list[str]:
    return FIELDS[field].json_schema_extra["aliases"]


def flag(field: str) -> str:
    """The flag a text should name for this field."""
    return "--" + field.replace("_", "-")


def kinds(field: str) -> tuple[Any, ...]:
    """The types a field takes, without None; for a choice, the Literal."""
    annotation = FIELDS[field].annotation
    parts = get_args(annotation) if type(None) in get_args(annotation) else (annotation,)
    return tuple(part for part in parts if part is not type(None))


def choices(field: str) -> tuple[str, ...]:
    return get_args(kinds(field)[0])


def is_switch(field: str) -> bool:
    return kinds(field) == (bool,)


def is_optional(field: str) -> bool:
    return type(None) in get_args(FIELDS[field].annotation)


def takes_none(field: str) -> bool:
    """Whether the word `none` unsets it: only numbers, because `none` is a value of its own for texts."""
    return is_optional(field) and kinds(field)[0] in (int, float)


# every long spelling, with underscores, and every short flag, to its field
LONG = {name.replace("-", "_"): name for name in FIELDS} | {
    alias[2:].replace("-", "_"): name for name in FIELDS for alias in aliases(name) if alias.startswith("--")
}
SHORT = {alias: name for name in FIELDS for alias in aliases(name) if not alias.startswith("--")}


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name most like `name`: same but for case, else beginning with it, else similar, else None."""
    by_lower = {k.lower(): k for k in known}
    low = name.lower()
    if low in by_lower:
        return by_lower[low]
    started = [k for k in by_lower if len(low) >= 3 and k.startswith(low)]
    close = started[:1] or difflib.get_close_matches(low, by_lower, 1)
    return by_lower[close[0]] if close else None


def shown(value: object) -> str:
    """A value for a message: in backticks, one line, ASCII, at most 80 characters."""
    if isinstance(value, bool) or value is None:
        return f"`{'null' if value is None else str(value).lower()}`"
    text = str(value)
    text = (remote_urls.shown(text) if "//" in text else text).encode("unicode_escape").decode()
    return f"`{text if len(text) <= 80 else text[:77] + '...'}`"
