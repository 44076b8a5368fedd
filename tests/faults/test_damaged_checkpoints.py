"""Checkpoints that are damaged, foreign or forged: the older good one with a loud line, or a refusal in one sentence.

Bounds: each start ends within 60 s, also where one of two processes cannot read what the other can.
"""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from faults.zygote import SMALL, free_port, pair
from walks.training import assert_same, final_state, status

from dist_kd import checkpoint
from dist_kd.errors import CheckpointError

FILES = ["model.safetensors", "ema.safetensors", "optimizer.pt", "state.json", "manifest.json"]
NEWEST, OLDER = checkpoint.folder_name(6), checkpoint.folder_name(5)


@pytest.fixture(scope="module")
def trained(zygote, origin, tmp_path_factory) -> Path:
    """A finished run of 6 steps with checkpoints of steps 5 and 6; the best one is a third."""
    run = tmp_path_factory.mktemp("trained") / "run"
    assert zygote.run({"words": line(run, origin)}) == [0]
    assert [p.name for p in sorted((run / "checkpoints").glob("step_*"))][-2:] == [OLDER, NEWEST]
    return run


def line(run: Path, data: Path) -> list[str]:
    more = ["--max-steps", "6", "--checkpoint-steps", "1", "--data", str(data), "--save-path", str(run)]
    at = [SMALL.index(flag) for flag in ("--max-steps", "--checkpoint-steps")]
    return [word for i, word in enumerate(SMALL) if i not in at and i - 1 not in at] + more


@pytest.fixture
def run(trained, tmp_path) -> Path:
    return Path(shutil.copytree(trained, tmp_path / "run"))


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def _folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def _link(path: Path) -> None:
    path.rename(path.with_name("elsewhere"))
    path.symlink_to("elsewhere")


def _pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE = {
    "truncated": lambda p: os.truncate(p, p.stat().st_size // 2),
    "flipped": _flip,
    "deleted": lambda p: p.unlink(),
    "empty": lambda p: os.truncate(p, 0),
    "folder": _folder,
    "link": _link,
    "pipe": _pipe,
}


@pytest.mark.parametrize("damage", DAMAGE)
@pytest.mark.parametrize("file", FILES)
def test_any_damage_to_any_file_falls_back(run, file, damage):
    where = run / "checkpoints"
    DAMAGE[damage](where / NEWEST / file)
    found, refused = checkpoint.find(where)
    assert found is not None
    if (file, damage) == ("manifest.json", "link"):
        assert found.name == NEWEST  # it vouches for the files, wherever it lies
        return
    assert (found.name, len(refused)) == (OLDER, 1)
    assert NEWEST in refused[0]
    assert (file in refused[0]) or "manifest" in refused[0]


@pytest.mark.parametrize("pointer", ["latest", "best"])
@pytest.mark.parametrize("damage", [*DAMAGE, "binary", "leads out", "nowhere"])
def test_a_damaged_pointer_leads_nowhere(run, pointer, damage):
    """`latest` is for people; `best` is what `evaluate --which best` reads and what pruning spares."""
    where = run / "checkpoints"
    texts = {"binary": b"\xff\xfe\x00", "leads out": b"../../../etc", "nowhere": b"step_00000099\n"}
    if damage in texts:
        (where / pointer).write_bytes(texts[damage])
    else:
        DAMAGE[damage](where / pointer)
    assert checkpoint.find(where)[0].name == NEWEST
    best = checkpoint.best_of(where)
    assert best is None or best.parent == where


def _resealed(folder: Path) -> None:
    """The manifest is made to fit what stands there: only what the files say is wrong."""
    files = [p for p in folder.iterdir() if p.name != "manifest.json"]
    entries = {p.name: {"bytes": p.stat().st_size, "sha256": checkpoint.digest(p)} for p in files}
    (folder / "manifest.json").write_text(json.dumps({"schema": checkpoint.SCHEMA, "files": entries}))


ODD = [None, True, -1, 0, 1.5, 10**30, "", "x", "../../etc/passwd", "/dev/zero", [], [1], {}, {"a": 1}, float("nan")]


def _mutated(value, chance: random.Random):
    """The value with one thing in it replaced, removed or added."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(sorted(value))
        copy, how = dict(value), chance.random()
        if how < 0.15:
            del copy[key]
        elif how < 0.3:
            copy[chance.choice(["extra", "../up", "/abs", ""])] = chance.choice(ODD)
        else:
            copy[key] = _mutated(value[key], chance)
        return copy
    if isinstance(value, list) and value and chance.random() < 0.5:
        return [*value[:-1], _mutated(value[-1], chance)]
    return chance.choice(ODD)


@pytest.mark.parametrize("file", ["state.json", "manifest.json"])
def test_valid_json_of_the_wrong_shape_is_never_a_traceback(run, file):
    """500 mutations with one seed. What is taken for good loads, and is of the types that training counts with."""
    chance, newest = random.Random(7), run / "checkpoints" / NEWEST
    texts = {name: (newest / name).read_text() for name in ("state.json", "manifest.json")}
    taken = 0
    for _ in range(500):
        (newest / file).write_text(json.dumps(_mutated(json.loads(texts[file]), chance)))
        if file == "state.json":
            _resealed(newest)
        found, refused = checkpoint.find(run / "checkpoints")
        if found.name == NEWEST:
            taken += 1
            loaded = checkpoint.load(found, "cpu")
            assert type(loaded.state.step) is int
            assert {"settings", "layout", "data"} <= loaded.facts.keys()
        else:
            assert (found.name, len(refused)) == (OLDER, 1)
            assert "\n" not in refused[0]
    assert taken < 250
    for text in ("[" * 100_000, "[]", "3", "null", '"x"', "\x00"):
        (newest / "manifest.json").write_text(text)
        assert checkpoint.find(run / "checkpoints")[0].name == OLDER


def test_a_manifest_that_names_less_or_more_is_not_believed(run):
    newest = run / "checkpoints" / NEWEST
    manifest = json.loads((newest / "manifest.json").read_text())
    for files in ({}, {k: v for k, v in manifest["files"].items() if k != "model.safetensors"}):
        (newest / "manifest.json").write_text(json.dumps(manifest | {"files": files}))
        assert "does not name" in checkpoint.problem(newest)
    (newest / "manifest.json").write_text(json.dumps(manifest))
    # a file that nobody vouches for is not loaded
    shutil.copy(newest / "ema.safetensors", newest / "method.safetensors")
    assert checkpoint.problem(newest) is None
    assert "method" not in checkpoint.load(newest, "cpu").tensors


def test_a_start_says_what_it_passes_over_and_ends_alike(zygote, trained, run, origin, tmp_path):
    _flip(run / "checkpoints" / NEWEST / "model.safetensors")
    out = tmp_path / "out"
    assert zygote.run({"words": line(run, origin), "out": str(out)}) == [0]
    assert f"warning: checkpoint `{NEWEST}` is not used: model.safetensors is damaged" in out.read_text()
    assert_same(final_state(run), final_state(trained))


REFUSED = {
    "all damaged": (lambda c: [_flip(p / "optimizer.pt") for p in c.glob("step_*")], "none is usable"),
    "newer": (lambda c: [_newer(p) for p in c.glob("step_*")], "written by a newer version"),
    "pointer is a folder": (lambda c: _folder(c / "latest"), "is a folder where a run writes a file"),
    "other shapes": (lambda c: [_other_shapes(p) for p in c.glob("step_*")], "is not of these networks"),
    "optimizer of others": (lambda c: [_other_optimizer(p) for p in c.glob("step_*")], "optimizer of"),
    "pickle": (lambda c: [_pickled(p) for p in c.glob("step_*")], "cannot be read on this process"),
}


def _newer(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | {"schema": checkpoint.SCHEMA + 1}))


def _other_shapes(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    save_file({"somewhere": torch.ones(3)}, folder / "model.safetensors")
    _resealed(folder)


def _other_optimizer(folder: Path) -> None:
    import torch

    torch.save({"optimizer": {"state": {}, "param_groups": []}}, folder / "optimizer.pt")
    _resealed(folder)


def _pickled(folder: Path) -> None:
    """What weights_only refuses: loading it would run code of whoever wrote it."""
    import torch

    torch.save({"optimizer": Path("x")}, folder / "optimizer.pt")
    _resealed(folder)


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_gone_on_from_is_refused_in_one_sentence(zygote, run, origin, tmp_path, kind):
    damage, words = REFUSED[kind]
    damage(run / "checkpoints")
    before = (run / "metrics.jsonl").read_bytes()
    out = tmp_path / "out"
    assert zygote.run({"words": line(run, origin), "out": str(out)}) == [CheckpointError.exit_code], out.read_text()
    said = out.read_text()
    assert "Traceback" not in said
    assert len([text for text in said.splitlines() if "error: " in text and words in text]) == 1, said
    assert (run / "metrics.jsonl").read_bytes() == before  # nothing was cut back for a start that did not happen


def test_one_of_two_ranks_cannot_read_the_checkpoint(zygote, origin, tmp_path):
    """Both leave, and the sentence names the rank. Its way to the folder leads elsewhere: a file system not mounted."""
    words, away = line(Path("run"), origin), tmp_path / "away"
    away.mkdir()
    jobs = [{"words": words, "cwd": str(tmp_path), "out": str(tmp_path / f"out{r}")} for r in (0, 1)]
    assert zygote.run(*pair(lambda r: jobs[r], free_port())) == [0, 0]
    jobs[1]["cwd"] = str(away)
    assert zygote.run(*pair(lambda r: jobs[r], free_port())) == [4, 4], (tmp_path / "out1").read_text()
    said = (tmp_path / "out0").read_text()
    assert "checkpoint error: on rank 1: " in said
    assert "Traceback" not in said + (tmp_path / "out1").read_text()
    # a folder of the same name with other content is not taken either
    shutil.copytree(tmp_path / "run", away / "run", dirs_exist_ok=True)
    newest = away / "run" / "checkpoints" / NEWEST
    _flip(newest / "model.safetensors")
    _resealed(newest)
    assert zygote.run(*pair(lambda r: jobs[r], free_port())) == [4, 4]
    assert "on rank 1: " in (tmp_path / "out0").read_text().splitlines()[-1]
    assert "holds other files there than on rank 0" in (tmp_path / "out0").read_text()
    assert status(tmp_path / "run")["state"] == "done"  # a refused start does not overwrite what stands there
