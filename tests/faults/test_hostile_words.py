"""Names that somebody else chose, in what a run and its report say: no terminal obeys them, nor do they add lines."""

import json
from pathlib import Path

import numpy as np
from faults.zygote import SMALL

from dist_kd.commands.main import main

# clears the screen, sets the window's title, rings, goes back over the line, and adds a line of its own
EVIL = "\x1b[2J\x1b]0;owned\x07a\rb\nconfig error: all is well\u202e"
SHOWN = r"\x1b[2J\x1b]0;owned\x07a\rb\nconfig error: all is well\u202e"


def assert_plain(text: str) -> None:
    assert all(line.isprintable() for line in text.split("\n")), text
    assert "\nconfig error" not in text


def name_it_evil(split: Path) -> None:
    """The set and its first shard get the name, and the first image of that shard another byte."""
    facts = json.loads((split / "index.json").read_text())
    first = facts["shards"][0]
    row = np.load(split / "index.npy", mmap_mode="r")[0]
    with (split / first["name"]).open("r+b") as file:
        file.seek(int(row["offset"]) + int(row["length"]) // 2)
        byte = file.read(1)[0]
        file.seek(-1, 1)
        file.write(bytes([byte ^ 1]))
    (split / first["name"]).rename(split / f"{EVIL}.tar")
    first["name"] = f"{EVIL}.tar"
    (split / "index.json").write_text(json.dumps(facts | {"name": EVIL}))


def test_what_a_run_says_of_its_data_and_checkpoints(zygote, packed, tmp_path):
    """Within 60 s a start."""
    run, out = tmp_path / "run", tmp_path / "out"
    name_it_evil(packed / "train")
    words = [*SMALL, "--data", str(packed), "--save-path", str(run), "--max-bad-fraction", "0.1"]
    job = {"words": words, "out": str(out), "env": {"DIST_KD_CACHE": str(tmp_path / "cache")}}
    assert zygote.run(job) == [0], out.read_text()
    assert f"data     {SHOWN}: 150 training samples" in out.read_text()
    assert f"/{SHOWN}.tar" in next(line for line in out.read_text().split("\n") if line.startswith("warning: "))
    newer = run / "checkpoints" / "step_00000099"
    newer.mkdir()
    (newer / "manifest.json").write_text(json.dumps({"schema": 1, "files": {EVIL: {"bytes": 1, "sha256": ""}}}))
    out.unlink()
    assert zygote.run(job) == [0]
    assert f"warning: checkpoint `{newer.name}` is not used: {SHOWN} is missing" in out.read_text()
    assert_plain(out.read_bytes().decode())  # as it is: no line end is made of another


def test_what_a_report_says_of_a_record(tmp_path, capsys):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text(json.dumps({"name": EVIL, "starts": EVIL}))
    (run / "status.json").write_text(json.dumps({"state": EVIL, "message": EVIL}))
    summary = {"student": {"arch": EVIL, "last": {"top1": 5.0}}, "formula": EVIL}
    (run / "summary.json").write_text(json.dumps(summary))
    (run / "config.yaml").write_text(json.dumps({"arch": EVIL, EVIL: EVIL}))
    main(["report", str(run), "-o", str(tmp_path / "r.html")])
    told = capsys.readouterr()
    assert r"\x1b[2J" in told.out + told.err
    assert_plain(told.out + told.err)
