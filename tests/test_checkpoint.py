"""Checkpoints: complete and verified, or not used. Damage is real damage to real files."""

import errno
import io
import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import torch

from dist_kd import checkpoint
from dist_kd.checkpoint import Snapshot
from dist_kd.contracts import DataCounters
from dist_kd.errors import CheckpointError
from dist_kd.train_state import ThirdSet, TrainState


def snapshot(step, best_step=-1, scale=1.0):
    bad = DataCounters({"decode": 2}, retries=1, epoch=3, in_epoch=1, first={"decode": "so"}, named=["sample 3"])
    state = TrainState(step=step, best_step=best_step, meter_sums=[0.1 + 0.2, 1e-300], data=bad)
    state.test.add({"top1": 0.1 + 0.2}, 1 / 3)
    tensors = {"model": {"w": torch.arange(1000.0) * scale}, "ema": {"w": torch.ones(3)}}
    optimizer = {"optimizer": {"state": {0: {"momentum_buffer": torch.ones(2)}}, "param_groups": [{"lr": 0.1}]}}
    facts = {"settings": {"lr": 0.1}, "layout": dict.fromkeys(checkpoint.LAYOUT, 1), "data": "f"}
    return Snapshot(state, tensors, optimizer, facts)


def test_what_is_saved_is_what_is_loaded(tmp_path):
    saved = snapshot(7)
    where = checkpoint.save(tmp_path, saved, keep=2)
    assert checkpoint.problem(where) is None
    loaded = checkpoint.load(where, "cpu")
    assert loaded.state == saved.state  # floats to the last bit
    assert torch.equal(loaded.tensors["model"]["w"], saved.tensors["model"]["w"])
    assert loaded.optimizer["optimizer"]["param_groups"] == [{"lr": 0.1}]
    assert loaded.facts["settings"] == {"lr": 0.1}
    assert (where / "model.safetensors").stat().st_mode & 0o777 == 0o644


def test_a_checkpoint_of_schema_1_is_read(tmp_path):
    """It counted bad samples without their kinds."""
    where = checkpoint.save(tmp_path, snapshot(7), keep=2)
    facts = json.loads((where / "state.json").read_text())
    del facts["state"]["data"], facts["state"]["val_bad"]
    facts["state"]["bad_samples"], facts["schema"] = 4, 1
    (where / "state.json").write_text(json.dumps(facts))
    assert checkpoint.load(where, "cpu").state.data == DataCounters()


def test_a_checkpoint_of_schema_2_is_read(tmp_path):
    """It knew no test set."""
    where = checkpoint.save(tmp_path, snapshot(7), keep=2)
    facts = json.loads((where / "state.json").read_text())
    del facts["state"]["test"]
    facts["schema"] = 2
    (where / "state.json").write_text(json.dumps(facts))
    assert checkpoint.load(where, "cpu").state.test == ThirdSet()


def test_the_three_figures_of_a_test_set():
    """Last, where validation was best, and its own highest; of equals the first."""
    test = ThirdSet("fingerprint")
    for step, (val, own) in enumerate([(50, 60.0), (80, 70.0), (70, 75.0), (80, 75.0), (60, 65.0)], 1):
        test.add({"top1": own, "step": step}, val)
    assert test.evaluations == 5
    assert test.last == {"top1": 65.0, "step": 5, "val_top1": 60}
    assert test.chosen == {"top1": 70.0, "step": 2, "val_top1": 80}
    assert test.highest == {"top1": 75.0, "step": 3, "val_top1": 70}


def test_keeps_the_newest_and_the_best(tmp_path):
    for step in (1, 2, 3, 4, 5):
        checkpoint.save(tmp_path, snapshot(step, best_step=2 if step == 2 else -1), keep=2)
    assert sorted(p.name for p in tmp_path.glob("step_*")) == [checkpoint.folder_name(s) for s in (2, 4, 5)]
    assert (tmp_path / "latest").read_text().strip() == checkpoint.folder_name(5)
    assert checkpoint.best_of(tmp_path).name == checkpoint.folder_name(2)


def test_the_same_step_again_replaces_it(tmp_path):
    checkpoint.save(tmp_path, snapshot(3), keep=2)
    checkpoint.save(tmp_path, snapshot(3, scale=2.0), keep=2)
    assert [p.name for p in tmp_path.glob("step_*")] == [checkpoint.folder_name(3)]
    found, refused = checkpoint.find(tmp_path)
    assert not refused
    assert checkpoint.load(found, "cpu").tensors["model"]["w"][1] == 2.0


def test_a_good_save_is_not_undone_by_its_tidying_up(tmp_path, monkeypatch):
    """Once it stands, its folder cannot be listed, as on a network file system that is away, and the log is full."""
    checkpoint.save(tmp_path, snapshot(1), keep=1)
    listdir, said = os.listdir, io.StringIO()

    def away(folder="."):
        if folder == tmp_path:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        return listdir(folder)

    with io.TextIOWrapper(io.FileIO("/dev/full", "w"), write_through=True) as full:
        for step, log in ((2, said), (3, full)):
            with monkeypatch.context() as patch:
                patch.setattr(os, "listdir", away)
                patch.setattr(sys, "stdout", log)
                where = checkpoint.save(tmp_path, snapshot(step), keep=1)
            assert checkpoint.find(tmp_path) == (where, [])
    assert "warning: older checkpoints could not be removed" in said.getvalue()
    assert os.strerror(errno.ESTALE) in said.getvalue() and "step 2 stands" in said.getvalue()
    checkpoint.save(tmp_path, snapshot(4), keep=1)
    assert [p.name for p in tmp_path.glob("step_*")] == [checkpoint.folder_name(4)]  # made up for


def _flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


DAMAGE = {
    "flipped bit": lambda f: _flip(f / "model.safetensors"),
    "flipped optimizer": lambda f: _flip(f / "optimizer.pt"),
    "truncated": lambda f: os.truncate(f / "model.safetensors", 100),
    "empty": lambda f: os.truncate(f / "state.json", 0),
    "missing file": lambda f: (f / "ema.safetensors").unlink(),
    "missing manifest": lambda f: (f / "manifest.json").unlink(),
    "garbage manifest": lambda f: (f / "manifest.json").write_text("{"),
    "newer schema": lambda f: (f / "manifest.json").write_text(
        json.dumps({**json.loads((f / "manifest.json").read_text()), "schema": 99})
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_damaged_checkpoint_falls_back_to_the_older(tmp_path, kind):
    checkpoint.save(tmp_path, snapshot(1), keep=5)
    newest = checkpoint.save(tmp_path, snapshot(2), keep=5)
    DAMAGE[kind](newest)
    found, refused = checkpoint.find(tmp_path)
    assert found.name == checkpoint.folder_name(1)
    assert len(refused) == 1
    assert newest.name in refused[0]


def test_resolve_says_what_is_wrong(tmp_path):
    with pytest.raises(CheckpointError, match="holds no usable checkpoint"):
        checkpoint.resolve(str(tmp_path))
    where = checkpoint.save(tmp_path / "checkpoints", snapshot(1), keep=1)
    assert checkpoint.resolve(str(tmp_path)) == where
    _flip(where / "model.safetensors")
    with pytest.raises(CheckpointError, match="is damaged"):
        checkpoint.resolve(str(where))


def test_kill_during_saves_leaves_a_good_one(tmp_path):
    """A process that saves without pause is killed at ten random moments; what stands always verifies."""
    code = f"""
import sys, torch
from pathlib import Path
from dist_kd import checkpoint
from dist_kd.checkpoint import Snapshot, TrainState
step = int(sys.argv[1])
facts = {{"settings": {{}}, "layout": dict.fromkeys(checkpoint.LAYOUT, 1), "data": "f"}}
while True:
    step += 1
    t = {{"model": {{"w": torch.full((300_000,), float(step))}}}}
    checkpoint.save(Path({str(tmp_path)!r}), Snapshot(TrainState(step=step), t, {{}}, facts), keep=2)
    print(step, flush=True)
"""
    last = 0
    for pause in (0.0, 0.003, 0.006, 0.009, 0.013):
        with subprocess.Popen([sys.executable, "-c", code, str(last)], stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline(), "no save was finished"
            time.sleep(pause)
            process.kill()
        found, refused = checkpoint.find(tmp_path)
        assert not refused
        snap = checkpoint.load(found, "cpu")
        assert snap.state.step > last
        assert (snap.tensors["model"]["w"] == snap.state.step).all()
        last = snap.state.step
    shutil.rmtree(tmp_path)


def test_differences_name_the_setting():
    assert checkpoint.differences({"lr": 0.1, "T": 4}, {"lr": 0.2, "T": 4}) == ["lr: 0.1 -> 0.2"]
