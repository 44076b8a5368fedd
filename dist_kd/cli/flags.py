"""argv -> what was asked for. Knows spellings only: no ranges, no files, no rule between settings."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from dist_kd.cli.names import FIELDS, LONG, SECRET, SEVERAL, SHORT, SWITCHES, Given, flag, is_switch, nearest, shown
from dist_kd.errors import ConfigError, one_line

NO_SECRETS = "secrets are not taken on the command line, where every user of the machine can read them"
OWN = ("config", "print_config", "help", "help_methods")  # flags of the command line itself; no settings


@dataclass
class Scan:
    """What an argv holds, in its order."""

    given: list[Given] = field(default_factory=list)
    files: list[str] = field(default_factory=list)  # of --config
    help: bool = False
    help_methods: bool = False
    print_config: bool = False
    problems: list[str] = field(default_factory=list)


def scan(argv: list[str]) -> Scan:
    """What `argv` asks for, with every word that cannot be understood among `problems`."""
    found, rest = Scan(), list(argv)
    while rest:
        word = rest.pop(0)
        if not _is_flag(word):
            found.problems.append(f"{shown(word)}: is no flag, and no flag before it takes it; see --help")
            continue
        name, equals, value = word.partition("=")
        _one_flag(found, name, value if equals else None, rest)
    return found


def refuse_secrets(argv: list[str]) -> None:
    """ConfigError for a flag of any command that is named like a secret; argparse would repeat its value."""
    for word in argv:
        name = word.partition("=")[0]
        if name.startswith("-") and SECRET.search(name):
            raise ConfigError(f"{one_line(name)[:80]}: {NO_SECRETS}")


def _is_flag(word: str) -> bool:
    # a negative number is a value: its range error says more than "unknown flag"
    return word.startswith("-") and not re.fullmatch(r"-[\d.].*|-inf(inity)?|-", word)


def _one_flag(found: Scan, name: str, value: str | None, rest: list[str]) -> None:
    key = name[2:].replace("-", "_") if name.startswith("--") else None
    bare = key[3:] if key and key.startswith("no_") else None  # X of --no-X
    if name == "-h" or key == "help":
        found.help = True
    elif key == "help_methods":
        found.help_methods = True
    elif key == "print_config":
        found.print_config = True
    elif key == "config":
        text = _value(found, name, value, rest, "a preset's name or a YAML file")
        if text is not None:
            found.files.append(text)
    elif key in SWITCHES:
        _switch(found, name, value, rest, "method", SWITCHES[key][0])
    elif bare in SWITCHES and SWITCHES[bare][1]:
        _switch(found, name, value, rest, "method", SWITCHES[bare][1])
    elif key in LONG or name in SHORT:
        setting = LONG[key] if key in LONG else SHORT[name]
        if is_switch(setting):
            _switch(found, name, value, rest, setting, True)
            return
        text = _value(found, name, value, rest, "a value")
        while setting in SEVERAL and text is not None and rest and not _is_flag(rest[0]):
            text += "," + rest.pop(0)
        if text is not None:
            found.given.append(Given(setting, text, name, f"flag {name}"))
    elif bare in LONG and is_switch(LONG[bare]):
        _switch(found, name, value, rest, LONG[bare], False)
    else:
        found.problems.append(_unknown(name, key, bare, value, rest))


def _switch(found: Scan, name: str, value: str | None, rest: list[str], setting: str, on: bool | str) -> None:
    if value is None and rest and re.fullmatch(r"(?i)true|false|yes|no|on|off|0|1", rest[0]):
        value = rest.pop(0)
    if value is None:
        found.given.append(Given(setting, on, name, f"flag {name}"))
        return
    base = re.sub(r"^--no[-_]", "--", name)
    yes = value.lower() in ("true", "yes", "on", "1", "")
    wanted = base if yes == (base == name) else "--no-" + base[2:]
    if base == "--overhaul" and not yes:
        wanted = "--method ce or --method kd"
    found.problems.append(f"{name}: takes no value, got {shown(value)} (flag {name}); write {wanted}")


def _value(found: Scan, name: str, value: str | None, rest: list[str], what: str) -> str | None:
    if value is not None:
        return value
    if rest and not _is_flag(rest[0]):
        return rest.pop(0)
    then = f"the end of the line (flag {name})" if not rest else f"the next flag, {shown(rest[0])} (flag {name})"
    found.problems.append(f"{name}: needs {what}, but what follows is {then}")
    return None


def _unknown(name: str, key: str | None, bare: str | None, value: str | None, rest: list[str]) -> str:
    """One line for a flag that is none of ours; takes its value off `rest`."""
    if value is None and rest and not _is_flag(rest[0]):
        value = rest.pop(0)
    if SECRET.search(name):  # the value is not repeated: this text ends up in logs
        return f"{name}: {NO_SECRETS}"
    got = f", got {shown(value)}" if value is not None else ""
    if bare in LONG or bare in SWITCHES:
        remedy = f"leave out {flag(bare)}" if bare in SWITCHES else f"{flag(LONG[bare])} is no yes-or-no setting"
        return f"{name}: no such flag{got} (flag {name}); {remedy}"
    if key is None and name[:2] in SHORT and len(name) > 2:
        return f"{name}: no such flag{got} (flag {name}); write `{name[:2]} {name[2:]}`"
    known = [*FIELDS, *LONG, *SWITCHES, *OWN]
    near = nearest(key if key is not None else name.lstrip("-").replace("-", "_"), known)
    remedy = f"did you mean {flag(near)}?" if near else "see --help"
    return f"{name}: no such flag{got} (flag {name}); {remedy}"
