"""--method-arg: settings of methods, by the table in dist_kd.methods. They are understood once the method is known."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

from dist_kd.cli.names import Given, nearest, shown
from dist_kd.methods import METHODS, owners, split


class Arg(NamedTuple):
    """One NAME=VALUE or METHOD.NAME=VALUE as somebody wrote it."""

    name: str
    text: str
    item: Given
    layer: int  # files in their order, then flags: the later wins


class Understood(NamedTuple):
    """The value of METHOD.NAME, and who gave it."""

    value: Any
    arg: Arg


def pieces(item: Given, layer: int) -> tuple[list[Arg], str | None]:
    """What `item` gives, e.g. `b=8,T=1`, and the sentence that says what is wrong with its spelling."""
    args = []
    for part in str(item.value or "").split(","):
        name, equals, text = (x.strip() for x in part.partition("="))
        if name and equals and text:
            args.append(Arg(name, text, item, layer))
        elif part.strip():
            rule = "must be NAME=VALUE, or several joined by commas"
            return [], f"{item.key}: {rule}, got {shown(item.value)} ({item.origin})"
    return args, None


def understand(method: str, args: Iterable[Arg]) -> tuple[dict[str, Understood], list[str]]:
    """The settings in force by METHOD.NAME, and a problem for each that is not known, out of range or without effect.

    A file may hold settings of methods that are not in use, as it may hold a `T` beside `--no-kd`.
    """
    found: dict[str, Understood] = {}
    problems = []
    for arg in args:  # in the order of their layers: a later one replaces what stands
        key = name = problem = None
        having = owners(method, arg.name)
        if len(having) == 1:
            name = arg.name.rpartition(".")[2]
            key = f"{having[0]}.{name}"
            try:
                value = METHODS[having[0]].settings[name].read(arg.text)
            except ValueError as error:
                problem = str(error)
            else:
                before = found.get(key)
                if before and before.arg.layer == arg.layer and before.value != value:
                    problem = f"`{key}` is given as {shown(before.arg.text)} too; keep one"
                found[key] = Understood(value, arg)
        elif having:
            problem = (
                f"{' and '.join(having)} each have a setting `{arg.name}`; say which, as in {having[0]}.{arg.name}"
            )
        elif arg.item.origin.startswith("flag ") or not _known(arg.name):
            problem = _unknown(method, arg.name)
        if problem:
            problems.append(f"{arg.item.key}: {problem}, got {shown(f'{arg.name}={arg.text}')} ({arg.item.origin})")
    return found, problems


def _known(name: str) -> bool:
    owner, dot, setting = name.rpartition(".")
    return any(setting in row.settings for method, row in METHODS.items() if not dot or method == owner)


def _unknown(method: str, name: str) -> str:
    """Why no method of the sum has this setting."""
    owner, _, setting = name.rpartition(".")
    if owner and owner not in split(method):
        if owner in METHODS:
            return f"has no effect: `{owner}` is not in the method `{method}`"
        near = nearest(owner, METHODS)
        return f"there is no method `{owner}`" + (f"; did you mean {near}?" if near else "")
    known = {m: list(METHODS[m].settings) for m in ([owner] if owner else split(method))}
    if not any(known.values()):
        return f"the method `{method}` takes no settings"
    near = nearest(setting, [one for ones in known.values() for one in ones])
    hint = f"did you mean {near}? " if near else ""
    listed = "; ".join(f"{m} takes {', '.join(ones)}" for m, ones in known.items() if ones)
    return f"there is no such setting of `{method}`; {hint}{listed}"


def spelled(found: dict[str, Understood]) -> str:
    """Config.method_args: what differs from the defaults, in one canonical text, so that one loss is one run."""
    words = []
    for key in sorted(found):
        owner, name = key.split(".")
        value = found[key].value
        if name not in METHODS[owner].short and value != METHODS[owner].settings[name].default:
            words.append(f"{key}={str(value).lower() if isinstance(value, bool) else value}")
    return ",".join(words)
