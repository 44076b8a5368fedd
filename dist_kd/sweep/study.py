"""argv of `dist-kd sweep` -> the runs of the study. Every line is checked by the trainer's parser before one starts.

Knows no process and no figure: running.py and report/sweep_table.py do.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from dist_kd.cli import Parsed, config_yaml, nearest, parse, shown
from dist_kd.cli.flags import scan
from dist_kd.cli.names import FIELDS, LONG, flag, is_switch
from dist_kd.config import Config
from dist_kd.errors import ConfigError
from dist_kd.methods import METHODS, needs_teacher, owners
from dist_kd.report.compare import OF_TEACHERS

TWIN = "twin"


class Run(NamedTuple):
    """One `dist-kd train WORDS`, in a folder of its own; what it prints goes to `log`, beside it."""

    name: str
    seed: int
    words: tuple[str, ...]
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.save_path)

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")


class Arm(NamedTuple):
    """Runs that differ in the seed alone: one value of the setting, or a plain twin."""

    label: str  # the value as text, or what the twin is
    value: Any
    runs: tuple[Run, ...]
    twin: str | None = None  # label of the arm to compare with


class Study(NamedTuple):
    """All that one command asks for."""

    setting: str  # field of Config, or METHOD.NAME
    folder: Path
    arms: tuple[Arm, ...]  # the values, in the order given
    twins: tuple[Arm, ...]
    files: dict[Path, str]  # configurations of the twins, to be written before they start
    jobs: int | None  # as asked

    @property
    def runs(self) -> list[Run]:
        """Seed by seed, so that a study cut short compares what it has; twins first."""
        arms = [*self.twins, *self.arms]
        return [arm.runs[k] for k in range(len(arms[0].runs)) for arm in arms]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-kd sweep",
        usage="dist-kd sweep [CONFIG] --over NAME=V,V,... [--seeds N] [--twin] [--jobs N] [--save-path DIR] "
        "[FLAGS OF dist-kd train]",
        description="A study: several values of one setting, several seeds, a table and a plot. CONFIG is a preset's "
        "name or a YAML file; any further flags go to every run, each an ordinary `dist-kd train` in its own folder "
        "DIR/NAME=VALUE/seed-K. Given again, the same command does what is not done yet; more values or more seeds "
        "may be asked for.",
        epilog="It leaves DIR/sweep.json, sweep.md and sweep.html. Exit code: 0 all done, 1 a run failed, 2 wrong "
        "settings, 75 stopped (the same command goes on).",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--over", action="append", metavar="NAME=V,V,...", help="setting of training, or of a method, and its values")
    add("--seeds", type=int, default=3, metavar="N", help="seeds of each value, from --seed on (default: 3)")
    add("--twin", action="store_true", help="train the plain twin (--no-kd) too, and compare with it seed by seed")
    add("--jobs", type=int, metavar="N", help="runs side by side (default: one for each GPU, or 1)")
    add("-o", "--output", "--save-path", "--save_path", dest="save_path", metavar="DIR", help="default: runs/sweep-...")
    add("--seed", metavar="K", help="the first seed (default: as configured)")
    return parser


def read_study(argv: list[str]) -> Study:
    """The study that `argv` asks for. ConfigError with everything that is wrong in any of its runs."""
    # a word that is no flag can be told from a flag's value at the front only
    named = argv[:1] if argv and not argv[0].startswith("-") else []
    asked, rest = build_parser().parse_known_args(argv[len(named) :])
    base = [*(["--config", *named] if named else []), *rest]
    problems = [
        f"{option}: must be at least 1, got {shown(count)} (flag {option})"
        for option, count in (("--seeds", asked.seeds), ("--jobs", asked.jobs))
        if count is not None and count < 1
    ]
    name, texts, wrong = _read_over(asked.over or [], base)
    problems += wrong
    if problems:
        raise ConfigError(*problems)
    from_seed = [f"--seed={asked.seed}"] if asked.seed else []
    found = {text: _parsed([*base, *_spelled(name, text), *from_seed], problems) for text in texts}
    if problems:
        raise ConfigError(*dict.fromkeys(problems))

    first = found[texts[0]].config
    setting = LONG.get(name) or f"{owners(first.method, name)[0]}.{name.rpartition('.')[2]}"
    values = {text: _value(setting, text, parsed.config) for text, parsed in found.items()}
    labels = {text: _label(value) for text, value in values.items()}
    twice = [text for k, text in enumerate(texts) if labels[text] in [labels[t] for t in texts[:k]]]
    if twice:
        raise ConfigError(f"--over: gives {setting} the value {shown(twice[0])} twice; keep one")
    distilled = [text for text in texts if needs_teacher(found[text].config.method)]
    if asked.twin and not distilled:
        raise ConfigError(
            f"--twin: has nothing to stand beside, because the method `{first.method}` has no teacher; add --kd, or "
            "leave out --twin"
        )
    folder = Path(asked.save_path or Path("runs") / _folder_name(named, setting, first))
    seeds = range(first.seed, first.seed + asked.seeds)

    def arm(label: str, value: Any, place: str, words: list[str], config: Config, twin: str | None = None) -> Arm:
        runs = []
        for seed in seeds:
            path = str(folder / place / f"seed-{seed}")
            more = (f"--seed={seed}", f"--save-path={path}")
            own = config.model_copy(update={"seed": seed, "save_path": path})
            runs.append(Run(f"{place} seed {seed}", seed, (*words, *more), own))
        return Arm(label, value, tuple(runs), twin)

    places = _places(setting, labels)
    arms, twins, files = [], {}, {}
    for text in texts:
        config, twin = found[text].config, None
        if asked.twin and text in distilled:
            # one twin for all, if the student alone never looks at this setting
            shared = setting not in FIELDS or setting in OF_TEACHERS
            place = TWIN if shared else f"{TWIN}-{places[text]}"
            twin = "without teacher" if shared else f"{labels[text]}, without teacher"
            file = folder / f"{place}.yaml"
            if place not in twins:
                plain = _plain(found[text])
                files[file] = config_yaml(plain)
                twins[place] = arm(twin, values[text], place, ["--config", str(file)], plain.config)
        arms.append(arm(labels[text], values[text], places[text], [*base, *_spelled(name, text)], config, twin))
    _parsed([*arms[0].runs[-1].words], problems)  # all is known to be in range but the last seed
    if problems:
        raise ConfigError(*problems)
    return Study(setting, folder, tuple(arms), tuple(twins.values()), files, asked.jobs)


def _parsed(words: list[str], problems: list[str]) -> Parsed | None:
    """What the trainer would make of `words`; what is wrong with them goes to `problems`."""
    try:
        return parse(words)
    except ConfigError as error:
        problems += str(error).splitlines()
        return None


def _read_over(given: list[str], base: list[str]) -> tuple[str, list[str], list[str]]:
    """NAME, its values as texts, and what is wrong with --over itself."""
    rule = "--over: must be given once, as NAME=V,V,... such as T=1,2,4"
    if len(given) != 1:
        return "", [], [f"{rule}, but is {'missing' if not given else 'given ' + str(len(given)) + ' times'}"]
    name, _, text = given[0].partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    texts = [part.strip() for part in text.split(",")]
    if not name or not all(texts):
        return name, texts, [f"{rule}, got {shown(given[0])}"]
    field = LONG.get(name)
    if field == "seed":
        return name, texts, ["--over: varies the seed, which every study does; use --seeds N and --seed FIRST"]
    if field and not FIELDS[field].json_schema_extra["result"]:
        return name, texts, [f"--over: {field} does not change what is learnt, so that there is nothing to compare"]
    if field == "method_args":
        return name, texts, ["--over: name the setting of the method itself, as in --over dkd.b=1,2"]
    if field is None and not _is_of_method(name):
        near = nearest(name, [*LONG, *(setting for row in METHODS.values() for setting in row.settings)])
        hint = f"did you mean {near}?" if near else "see dist-kd train --help and --help-methods"
        return name, texts, [f"--over: there is no setting {shown(name)}; {hint}"]
    wrong = [
        f"--over: varies {field}, and {item.key} gives it one value; leave out one of the two"
        for item in scan(base).given
        if field and item.field == field
    ]
    return name, texts, wrong


def _is_of_method(name: str) -> bool:
    owner, _, setting = name.rpartition(".")
    return any(setting in row.settings for method, row in METHODS.items() if owner in ("", method))


def _spelled(name: str, text: str) -> list[str]:
    """The flag that gives the setting this value."""
    field = LONG.get(name)
    if field is None:
        return [f"--method-arg={name}={text}"]
    if is_switch(field) and text.lower() in ("true", "false"):
        return [flag(field) if text.lower() == "true" else f"--no-{flag(field)[2:]}"]
    return [f"{flag(field)}={text}"]


def _value(setting: str, text: str, config: Config) -> Any:
    if setting in FIELDS:
        return getattr(config, setting)
    owner, _, name = setting.rpartition(".")
    return METHODS[owner].settings[name].read(text)


def _label(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return "none" if value is None else str(value).lower()
    return str(value).removesuffix(".0")


def _places(setting: str, labels: dict[str, str]) -> dict[str, str]:
    """For each value the folder NAME=VALUE; what a path cannot hold is replaced, and a digest keeps it apart."""
    places = {}
    for text, label in labels.items():
        safe = re.sub(r"[^\w.+=@,-]", "-", label)[:80]
        mark = "" if safe == label else "-" + hashlib.sha256(label.encode()).hexdigest()[:6]
        places[text] = f"{setting}={safe}{mark}"
    return places


def _folder_name(named: list[str], setting: str, config: Config) -> str:
    """sweep-CONFIG-NAME-HASH of what is the same in all runs: more values or seeds find the study again."""
    varied = {"seed", setting if setting in FIELDS else "method_args"}
    same = {k: v for k, v in config.result_settings().items() if k not in varied}
    digest = hashlib.sha256(json.dumps(same, sort_keys=True).encode()).hexdigest()[:8]
    first = Path(named[0]).stem if named else "-".join(same[k] for k in ("arch", "method") if k in same)
    return f"sweep-{first.replace('/', '-')}-{setting}-{digest}"


def _plain(parsed: Parsed) -> Parsed:
    """The same student on labels alone. What only a method with a teacher looks at is as if never given."""
    defaults = {name: FIELDS[name].default for name in OF_TEACHERS} | {"method": "ce", "save_path": None}
    origins = parsed.origins | dict.fromkeys(defaults, "default") | {"method": "flag --twin"}
    return Parsed(parsed.config.model_copy(update=defaults), origins)
