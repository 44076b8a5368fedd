"""docs/reliability.md against the tests: each one that it names is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "reliability.md").read_text()


def test_every_test_it_names_is_there():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", PAGE)
    assert len(named) > 40
    for file, test in named:
        assert (ROOT / file).is_file(), file
        assert not test or f"def {test}(" in (ROOT / file).read_text(), f"{file}::{test}"


def test_every_promise_has_a_test():
    rows = re.findall(r"^\| (P\d) \|.*\|$", PAGE, re.MULTILINE)
    assert rows == [f"P{k}" for k in range(1, 8)]
    assert all("`tests/" in line for line in PAGE.splitlines() if re.match(r"\| P\d ", line))
