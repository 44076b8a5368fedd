"""What the table of methods is made of: a row, and the settings of a method with their ranges. No torch."""

from __future__ import annotations

import math
from typing import NamedTuple

WORDS = {"true": True, "yes": True, "on": True, "1": True, "false": False, "no": False, "off": False, "0": False}


class Setting(NamedTuple):
    """One number, switch or word of a method. Its kind is that of its default."""

    default: bool | int | float | str
    text: str  # one line, for --help-methods
    gt: float | None = None
    ge: float | None = None
    lt: float | None = None
    le: float | None = None
    choices: tuple[str, ...] = ()

    def limits(self) -> str:
        """The range in words, e.g. `greater than 0 and at most 1000`; empty for a switch."""
        if self.choices:
            return "one of " + ", ".join(self.choices)
        words = {"greater than": self.gt, "at least": self.ge, "less than": self.lt, "at most": self.le}
        return " and ".join(f"{word} {limit:g}" for word, limit in words.items() if limit is not None)

    def read(self, text: str) -> bool | int | float | str:
        """The value that `text` spells. ValueError with the rule that it breaks, as in `must be a number`."""
        kind = type(self.default)
        if kind is bool:
            if text.lower() not in WORDS:
                raise ValueError("must be true or false")
            return WORDS[text.lower()]
        if kind is str:
            if self.choices and text not in self.choices:
                raise ValueError(f"must be {self.limits()}")
            return text
        try:
            value = kind(text)
        except ValueError:
            raise ValueError("must be a whole number" if kind is int else "must be a number") from None
        if not math.isfinite(value):
            raise ValueError("must be a finite number")
        return self.check(value)

    def check(self, value: bool | int | float | str) -> bool | int | float | str:
        """`value`, if it lies in the range; ValueError with the range if not."""
        inside = (
            (self.gt is None or value > self.gt)
            and (self.ge is None or value >= self.ge)
            and (self.lt is None or value < self.lt)
            and (self.le is None or value <= self.le)
        )
        if not inside:
            raise ValueError(f"must be {self.limits()}")
        return value


class Row(NamedTuple):
    """One method: what the command line, the help and the loss need to know of it before torch is there."""

    module: str  # file in this folder, with a class `Term` that takes these settings by name
    paper: str = ""
    formula: str = ""  # of the whole loss when it is used alone
    when: str = ""  # to use it: one sentence
    settings: dict[str, Setting] = {}  # noqa: RUF012 - a table is never written to
    short: tuple[str, ...] = ()  # settings that are fields of Config, with flags of their own
    parts: tuple[str, ...] = ()  # what its term gives, in order: train/NAME in the metrics
    needs_teacher: bool = True
    labels: bool = True  # False: it looks at no label, so that there is no cross-entropy in the loss
    hard_labels: bool = False  # it needs one class per sample: no mixup, no cutmix
    features: bool = False  # it looks at taps: several teachers are refused
