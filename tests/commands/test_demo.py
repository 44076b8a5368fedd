"""`dist-kd demo` when something is wrong; the whole of it is run in walks/test_readme.py."""

from __future__ import annotations

import pytest

from dist_kd.commands import demo
from dist_kd.commands.main import main as console


def test_it_empties_no_folder_but_its_own(tmp_path, capsys):
    kept = tmp_path / "thesis.txt"
    kept.write_text("years")
    assert console(["demo", "--save-path", str(tmp_path)]) == 2
    assert "would be emptied, and it is not an earlier demo that is in it" in capsys.readouterr().err
    assert kept.read_text() == "years"
    (tmp_path / "pack.log").touch()
    demo.Demo(tmp_path, 1).empty()
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(SystemExit):
        console(["demo", "--save-path", str(tmp_path), "--seeds", "0"])


@pytest.mark.timeout(120)
def test_what_runs_beside_a_failure_is_ended(tmp_path, monkeypatch, capsys):
    """The distilled student's teacher is not there; the student alone would train for hours."""
    monkeypatch.setattr(demo, "STUDENT", ["--arch", "cnn_small", "--max-steps", "100000000", "--batch-size", "32"])
    shown = demo.Demo(tmp_path, 1)
    shown.pack("digits")
    shown.pack("few", "--limit-per-class", "10")
    alone, distilled = shown.student("plain", 0), shown.student("distilled", 0)
    with pytest.raises(demo.DemoError, match=r"a step ended with exit code 2; its last lines"):
        demo._finish(distilled, shown.log("distilled-0"))
    assert alone.poll() is None
    shown.end()
    assert alone.returncode is not None
