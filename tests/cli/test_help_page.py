"""--help tells everything about every setting."""

from __future__ import annotations

import pytest

from dist_kd.cli.files import preset_names
from dist_kd.cli.names import FIELDS


def test_help_tells_everything_about_every_setting(parsed, capsys, write):
    with pytest.raises(SystemExit) as left:
        parsed(f"--config {write('T: 7')} --help")
    assert left.value.code == 0
    text = capsys.readouterr().out
    flat = " ".join(text.split())
    for name, field in FIELDS.items():
        extra = field.json_schema_extra
        assert f"--{name.replace('_', '-')}" in flat and field.description in flat
        assert all(alias in flat for alias in extra["aliases"]) and extra["unit"] in flat
    for word in ("--config NAME_OR_PATH", "--print-config", "--kd, --no-kd", *preset_names()):
        assert word in flat
    assert "[at least 0 and at most 1; default: 0.9; also --kd-weight]" in flat
    assert "default: 4; now: 7, from file" in flat
    groups = [line for line in text.splitlines() if line and line[0] not in " -" and len(line.split()) == 1]
    assert groups == ["data", "models", "distillation", "optimization", "run", "tracking"]
    assert max(map(len, text.splitlines())) <= 120


def test_help_survives_a_broken_preset(parsed, capsys, write):
    with pytest.raises(SystemExit):
        parsed(f"--config {write('T: x')} --help")
    assert "not in the values above: T: must be a number" in " ".join(capsys.readouterr().out.split())
