"""What every test of the command line asks: the settings of a line, or what is wrong with it."""

from __future__ import annotations

import pytest

from dist_kd.cli import Parsed, parse
from dist_kd.config import Config
from dist_kd.errors import ConfigError


def _parsed(line: str, **env: str) -> Parsed:
    return parse(line.split(), env)


def _config(line: str) -> Config:
    return _parsed(f"--data digits {line}").config


def _problems(line: str | list[str]) -> list[str]:
    words = line.split() if isinstance(line, str) else line
    with pytest.raises(ConfigError) as caught:
        parse(["--data", "digits", *words], {})
    return str(caught.value).splitlines()


def _problem(line: str | list[str]) -> str:
    found = _problems(line)
    assert len(found) == 1, found
    return found[0]


@pytest.fixture
def parsed():
    """A line -> Parsed; the environment is what is given by name, else empty."""
    return _parsed


@pytest.fixture
def config():
    """A line, without its --data -> Config."""
    return _config


@pytest.fixture
def problems():
    """A wrong line -> all that is wrong with it."""
    return _problems


@pytest.fixture
def problem():
    """A line with one thing wrong -> the sentence that says so."""
    return _problem


@pytest.fixture
def write(tmp_path):
    """A YAML text -> the path of a file holding it."""

    def _write(text: str, name: str = "a.yaml") -> str:
        (tmp_path / name).write_text(text)
        return str(tmp_path / name)

    return _write
