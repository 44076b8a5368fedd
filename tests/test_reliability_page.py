"""What docs/reliability.md and docs/security.md promise is held by tests: each one that they name is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text()


@pytest.mark.parametrize(("page", "at_least"), [("reliability", 40), ("security", 25)])
def test_every_test_it_names_is_there(page, at_least):
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / "docs" / f"{page}.md").read_text())
    assert len(named) > at_least
    for file, test in named:
        assert (ROOT / file).is_file(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


def test_every_promise_has_a_test():
    rows = re.findall(r"^\| (P\d) \|.*\|$", PAGE, re.MULTILINE)
    assert rows == [f"P{k}" for k in range(1, 8)]
    assert all("`tests/" in line for line in PAGE.splitlines() if re.match(r"\| P\d ", line))
