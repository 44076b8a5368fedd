"""docs/security.md against the code: setup.cfg takes no version with a known hole."""

import configparser
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "security.md").read_text()
ROW = re.compile(r"^\| `([a-z0-9-]+)` \| ([0-9.]+) \|", re.MULTILINE)


def number(version: str) -> tuple[int, ...]:
    return tuple(map(int, version.split(".")))


def floors() -> dict[str, str]:
    """Package -> the lowest version that setup.cfg takes, over all that may be installed."""
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    lines = setup["options"]["install_requires"].splitlines()
    lines += [line for extra in setup["options.extras_require"].values() for line in extra.splitlines()]
    found = (re.match(r"([A-Za-z0-9-]+)(?:\[.*\])?[>=]=([0-9.]+)", line.strip()) for line in lines)
    return {match[1].lower(): match[2] for match in found if match}


@pytest.mark.parametrize(("package", "fixed"), ROW.findall(PAGE))
def test_floors_are_above_known_holes(package, fixed):
    assert number(floors()[package]) >= number(fixed)


def test_the_list_has_rows_and_a_date():
    assert {"torch", "pillow", "pyyaml", "requests", "urllib3"} <= {package for package, _ in ROW.findall(PAGE)}
    assert re.search(r"as of 20\d\d-\d\d-\d\d", PAGE)
