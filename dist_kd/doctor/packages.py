"""Python and the installed packages, against what the installed dist-kd itself asks for."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata
from typing import Any

from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dist_kd.config import Config
from dist_kd.doctor import BAD, LOOK, OK, Finding

US = "dist-kd"
SHOWN = ("torch", "torchvision", "accelerate", "numpy")


def extras(config: Config) -> set[str]:
    """The extras of ours that these settings need."""
    networks = [config.arch, *(arch for arch, _ in config.teachers)]
    places = " ".join(filter(None, (config.data, config.val_data, config.test_data)))
    needed = {
        "timm": any(name.startswith("timm/") for name in networks),
        "tensorboard": config.tensorboard,
        "s3": "s3://" in places,
        "gs": "gs://" in places,
    }
    return {name for name, wanted in needed.items() if wanted}


def unmet(lines: list[str], chosen: set[str]) -> list[str]:
    """What is missing or too old of the requirements in `lines`, each with what is there."""
    problems = []
    for requirement in map(Requirement, lines):
        if requirement.marker and not any(requirement.marker.evaluate({"extra": extra}) for extra in chosen | {""}):
            continue
        try:
            found = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is missing ({requirement.specifier or 'any version'} is needed)")
            continue
        if not requirement.specifier.contains(found, prereleases=True):
            problems.append(f"{requirement.name} is {found}, and {requirement.specifier} is needed")
    return problems


def check(config: Config, facts: dict[str, Any]) -> Iterator[Finding]:
    python = platform.python_version()
    try:
        ours = metadata.metadata(US)
    except metadata.PackageNotFoundError:
        text = f"python {python}; {US} is not installed here, so what it needs is not known: `pip install -e .`"
        yield Finding(LOOK, "packages", text)
        return
    lines = metadata.requires(US) or []
    problems = unmet(lines, extras(config))
    floor = ours["Requires-Python"]
    if floor and not SpecifierSet(floor).contains(python, prereleases=True):
        problems.insert(0, f"python is {python}, and {floor} is needed")
    if problems:
        yield Finding(BAD, "packages", f"{'; '.join(problems)}; `pip install -U {US}` with its extras mends it")
        return
    versions = ", ".join(f"{name} {metadata.version(name)}" for name in SHOWN)
    yield Finding(OK, "packages", f"python {python}, {US} {ours['Version']}, {versions}; none is older than it may be")
