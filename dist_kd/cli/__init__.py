"""argv + YAML -> frozen Config, before torch is imported, so that help and typos answer at once on every rank.

names.py spellings, flags.py argv, files.py YAML, rules.py what is wrong, method_args.py settings of methods,
help_page.py the help, exits.py how it ends.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from dist_kd.cli import files, help_page, method_args
from dist_kd.cli.exits import ended, is_speaker, leave
from dist_kd.cli.flags import scan
from dist_kd.cli.names import FIELDS, Given, nearest, shown
from dist_kd.cli.rules import clashes, convert
from dist_kd.config import Config
from dist_kd.errors import ConfigError
from dist_kd.methods import METHODS

__all__ = ["Parsed", "config_yaml", "ended", "explain_missing_data", "leave", "nearest", "parse", "shown"]

DATA_VARIABLE = "DIST_KD_DATA"


class Parsed(NamedTuple):
    """A checked Config, and for each of its fields `default`, `file PATH`, `flag --T` or `variable DIST_KD_DATA`."""

    config: Config
    origins: dict[str, str]


def parse(argv: list[str], env: Mapping[str, str] = os.environ, *, require_data: bool = True) -> Parsed:
    """The settings that `argv` and the files it names ask for.

    Raises a ConfigError with one line per problem, all at once. `--help`, `--help-methods` and
    `--print-config` print (on rank 0) and raise SystemExit(0).
    """
    found = scan(list(argv))
    if found.help_methods:
        _print_and_leave(help_page.render_methods())
    merged, problems = _Merged(), list(found.problems)
    if env.get(DATA_VARIABLE):
        origin = f"variable {DATA_VARIABLE}"
        problems += merged.add([Given("data", env[DATA_VARIABLE], DATA_VARIABLE, origin)])
    for name in found.files:
        path = files.find(name)
        given, wrong = ([], [path]) if isinstance(path, str) else files.read(path)
        problems += wrong + merged.add(given)
    if found.help:
        wrong = [] if not found.files else problems
        _print_and_leave(help_page.render(merged.config(), merged.origins(), wrong))
    problems += merged.add(found.given)
    problems += merged.settle()
    config = merged.config()
    problems += merged.check(config)
    if require_data and not found.print_config and config.data is None and "data" not in merged.bad:
        problems.append(explain_missing_data())
    if problems:
        raise ConfigError(*problems)
    parsed = Parsed(config, merged.origins())
    if found.print_config:
        _print_and_leave(config_yaml(parsed))
    return parsed


def config_yaml(parsed: Parsed) -> str:
    """YAML of every setting with its origin as a trailing comment; itself a valid --config."""
    return files.write(parsed.config, parsed.origins)


def explain_missing_data() -> str:
    return (
        f"--data: is missing; name shards by the flag --data, by a line `data: ...` in a --config file, or by the "
        f"variable {DATA_VARIABLE}; `--data digits` is a small real set that needs no download"
    )


class _Merged:
    """Layers of settings laid over each other: the later wins, and within one layer nothing is said twice."""

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.by: dict[str, Given] = {}  # who gave the value in force
        self.bad: set[str] = set()  # fields with a problem, not to be asked further questions
        self.args: list[method_args.Arg] = []  # settings of methods, not yet understood
        self.layers: dict[str, int] = {}  # of the value in force
        self.count = 0

    def add(self, layer: Iterable[Given]) -> list[str]:
        """Lays one file, or the flags, over what is there; returns the problems found in it."""
        problems, here = [], {}
        self.count += 1
        for item in layer:
            if item.field == "method_args":
                args, problem = method_args.pieces(item, self.count)
                self.args += args
                self.by["method_args"] = item
                problems += [problem] if problem else []
                continue
            value, problem = convert(item)
            if problem:
                problems.append(problem)
                self.bad.add(item.field)
            elif item.field in here and here[item.field][0] != value:
                other = here[item.field][1]
                problems.append(
                    f"{item.key}: gives {item.field} `{value}`, but {other.key} gives `{here[item.field][0]}` "
                    f"({item.origin}; {other.origin}); keep one"
                )
                self.bad.add(item.field)
            else:
                here[item.field] = value, item
        # a limit in epochs replaces an earlier layer's limit in steps, which would win otherwise
        if "epochs" in here and "max_steps" not in here and self.values.get("max_steps") is not None:
            here["max_steps"] = None, here["epochs"][1]
        for name, (value, item) in here.items():
            self.values[name], self.by[name], self.layers[name] = value, item, self.count
        return problems

    def settle(self) -> list[str]:
        """Understands the settings of methods, now that all layers have named the method."""
        if "method" in self.bad:
            return []
        found, problems = method_args.understand(self.config().method, self.args)
        for key, (value, arg) in found.items():
            owner, field = key.split(".")
            if field not in METHODS[owner].short or field in self.bad:
                continue
            layer = self.layers.get(field, 0)
            if layer == arg.layer and self.values[field] != value:
                problems.append(
                    f"{arg.item.key}: gives {field} `{value}`, but {self.by[field].key} gives `{self.values[field]}` "
                    f"({arg.item.origin}; {self.by[field].origin}); keep one"
                )
            elif layer < arg.layer:
                self.values[field], self.by[field], self.layers[field] = value, arg.item, arg.layer
        if text := method_args.spelled(found):
            givers = list(dict.fromkeys(_short(u.arg.item.origin) for u in found.values()))
            self.values["method_args"] = text
            self.by["method_args"] = Given("method_args", text, "--method-arg", ", ".join(givers))
        return problems

    def config(self) -> Config:
        """The settings that could be understood; every value has passed `convert`."""
        return Config.model_validate({name: v for name, v in self.values.items() if name not in self.bad})

    def origins(self) -> dict[str, str]:
        return {name: _short(self.by[name].origin) if name in self.by else "default" for name in FIELDS}

    def check(self, config: Config) -> list[str]:
        by = {name: item for name, item in self.by.items() if name not in self.bad}
        problems = []
        for field, problem in clashes(config, by, self.bad):
            item = by[field]
            problems.append(f"{item.key}: {problem} (got {shown(getattr(config, field))} from {item.origin})")
        return problems


def _short(origin: str) -> str:
    # the line number helps in an error; in a saved file it would only age
    return origin.rpartition(", line ")[0] or origin


def _print_and_leave(text: str) -> None:
    if is_speaker():
        sys.stdout.write(text)
        sys.stdout.flush()
    raise SystemExit(0)
