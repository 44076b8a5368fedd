"""docs/methods.md names every method with its formula and paper, and its command lines parse."""

import re
from pathlib import Path

import pytest

from dist_kd.cli import parse
from dist_kd.methods import METHODS

PAGE = (Path(__file__).parents[2] / "docs/methods.md").read_text()
LINES = [line for line in re.findall(r"`([^`\n]*)`", PAGE) if line.startswith("--kd ")]


@pytest.mark.parametrize("name", list(METHODS))
def test_every_method_stands_in_the_table(name):
    (line,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{name}` |")]
    row = METHODS[name]
    assert row.formula.replace("||", "\\|\\|") in line and row.when in line
    assert re.findall(r"\d{4}\.\d{4,5}", row.paper) == list(dict.fromkeys(re.findall(r"\d{4}\.\d{4,5}", line)))


@pytest.mark.parametrize("line", LINES)
def test_a_published_loss_is_a_line(line):
    assert parse([*line.split(), "--data", "digits"], {}).config.method == "kd"


def test_there_are_four_of_them():
    assert len(LINES) == 4
