"""The console script: its table, its misses, and how a command ends."""

from __future__ import annotations

import pytest

from dist_kd import cli
from dist_kd.commands.main import COMMANDS
from dist_kd.commands.main import main as console
from dist_kd.errors import ConfigError
from dist_kd.train import main as train


def test_console_help_and_misses(capsys, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    assert console(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(f"  {name} " in text and command.text in text for name, command in COMMANDS.items())
    assert console([]) == 2 and "usage" in capsys.readouterr().err
    assert console(["trian"]) == 2
    assert capsys.readouterr().err == "config error: there is no command `trian`; did you mean train?\n"
    assert console(["--version"]) == 0


def test_console_train_is_train(capsys):
    assert console(["train", "--w", "2"]) == train(["--w", "2"]) == 2
    one, other = capsys.readouterr().err.split("config errors (2):")[1:]
    assert one == other and "--w: must be at most 1" in one


def test_how_a_command_ends(capsys, monkeypatch):
    def raises(error):
        def call():
            raise error

        return call

    assert cli.ended(lambda: None) == 0 and cli.ended(lambda: 75) == 75
    assert cli.ended(raises(KeyboardInterrupt())) == 130
    assert capsys.readouterr().err == ""
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert cli.ended(raises(ConfigError("x"))) == 2
    assert capsys.readouterr().err == ""  # local rank 0 says it
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert cli.ended(raises(ConfigError("x"))) == 2
    assert capsys.readouterr().err == "rank 3: config error: x\n"
    with pytest.raises(ZeroDivisionError):
        cli.ended(lambda: 1 // 0)  # a bug keeps its traceback
