"""The text of --help: every setting with flag, meaning, unit, range, default and other spellings, from Config alone."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping

from dist_kd.cli.files import preset_names
from dist_kd.cli.names import FIELDS, aliases, choices, flag, is_optional, is_switch, kinds
from dist_kd.config import Config
from dist_kd.methods import METHODS
from dist_kd.methods.settings import Setting

INDENT = 28  # columns before the meaning
METAVARS = {int: "INT", float: "NUMBER", str: "TEXT"}


def render(config: Config, origins: Mapping[str, str], problems: list[str], width: int | None = None) -> str:
    """The help, with the values now in force where presets changed them; `problems` of files are told at its end."""
    width = width or max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    lines = [
        "usage: dist-kd train --data DATA [--config NAME_OR_PATH] [--FLAG VALUE ...]",
        "",
        *textwrap.wrap(
            f"{type(config).__doc__} Flags may be written with dashes or underscores, as --flag value or "
            "--flag=value; case matters, and none is abbreviated. What counts most stands last: defaults, the variable "
            "DIST_KD_DATA (for --data), --config files in their order, flags.",
            width,
        ),
        "",
        "command line",
        *_entry("--config NAME_OR_PATH", f"A YAML file, or a preset: {', '.join(preset_names())}. Repeatable.", width),
        *_entry("--print-config", "Print every setting with its origin, as a YAML file for --config, and end.", width),
        *_entry("--help-methods", "Print every loss with its paper, formula and settings, and end.", width),
        *_entry("-h, --help", "Print this, with the values of the presets given before or after it, and end.", width),
    ]
    group = None
    for name, field in FIELDS.items():
        extra = field.json_schema_extra
        if extra["group"] != group:
            group = extra["group"]
            lines += ["", group]
            if group == FIELDS["method"].json_schema_extra["group"]:
                lines += _entry("--kd, --no-kd", "Distil or not: --method kd, --method ce.", width)
        lines += _entry(_flag(name), f"{field.description} [{_facts(name, config, origins)}]", width)
    for problem in problems:
        lines += ["", *textwrap.wrap(f"not in the values above: {problem}", width)]
    return "\n".join(lines) + "\n"


def render_methods(width: int | None = None) -> str:
    """The text of --help-methods: every loss with its paper, formula, use and settings, from the table alone."""
    width = width or max(60, min(120, shutil.get_terminal_size((100, 24)).columns))
    text = (
        "Losses of --method. They add up, as in --method kd+dist, each with the weights among its settings; the "
        "cross-entropy then stands in the loss once, with the smallest weight that one of them leaves it. Settings are "
        "given by --method-arg NAME=VALUE, or METHOD.NAME=VALUE where several have that name; in a --config file by "
        "a mapping `method_args: {NAME: VALUE}`."
    )
    lines = textwrap.wrap(text, width)
    for name, row in METHODS.items():
        lines += ["", name]
        facts = {"paper": row.paper, "loss": row.formula, "when": row.when}
        if row.hard_labels:
            facts["not with"] = "--mixup, --cutmix: it asks for the one class of a sample"
        if row.features:
            facts["not with"] = "several teachers: it looks at features"
        for head, fact in facts.items():
            lines += _entry(head, fact, width) if fact else []
        for setting, rule in row.settings.items():
            lines += _entry(
                f"{setting} {_kind(rule)}", f"{rule.text} [{_setting_facts(setting, rule, row.short)}]", width
            )
    return "\n".join(lines) + "\n"


def _kind(rule: Setting) -> str:
    return "true|false" if isinstance(rule.default, bool) else METAVARS[type(rule.default)]


def _setting_facts(name: str, rule: Setting, short: tuple[str, ...]) -> str:
    default = str(rule.default).lower() if isinstance(rule.default, bool) else _plain(rule.default)
    facts = [rule.limits()] * bool(rule.limits()) + [f"default: {default}"]
    return "; ".join([*facts, f"also {flag(name)}"] if name in short else facts)


def _flag(name: str) -> str:
    if is_switch(name):
        return f"{flag(name)}, --no-{flag(name)[2:]}"
    metavar = METAVARS.get(kinds(name)[0])
    return f"{flag(name)} {metavar or '{' + ','.join(choices(name)) + '}'}"


def limits(name: str) -> str:
    """The range in words, e.g. `at least 0 and at most 1`, or nothing."""
    words = {"gt": "above", "ge": "at least", "lt": "below", "le": "at most"}
    return " and ".join(
        f"{words[key]} {getattr(rule, key):g}"
        if abs(getattr(rule, key)) < 1e6
        else f"{words[key]} {getattr(rule, key)}"
        for rule in FIELDS[name].metadata
        for key in words
        if hasattr(rule, key)
    )


def _facts(name: str, config: Config, origins: Mapping[str, str]) -> str:
    unit, default = FIELDS[name].json_schema_extra["unit"], FIELDS[name].default
    facts = [unit] * bool(unit) + [limits(name)] * bool(limits(name))
    if is_optional(name) and kinds(name)[0] in (int, float):
        facts.append("or none")
    facts.append(f"default: {_plain(default)}")
    if origins[name] != "default":
        facts.append(f"now: {_plain(getattr(config, name))}, from {origins[name]}")
    if aliases(name):
        facts.append("also " + " ".join(aliases(name)))
    return "; ".join(facts)


def _plain(value: object) -> str:
    if value is None:
        return "missing"
    if isinstance(value, bool):
        return "on" if value else "off"
    return f"{value:g}" if isinstance(value, float) else str(value)


def _entry(head: str, text: str, width: int) -> list[str]:
    pad = " " * INDENT
    body = textwrap.wrap(text, width, initial_indent=pad, subsequent_indent=pad, break_on_hyphens=False)
    if len(head) + 4 > INDENT:
        return [f"  {head}", *body]
    return [f"  {head}".ljust(INDENT) + body[0][INDENT:], *body[1:]]
