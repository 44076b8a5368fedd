"""Packed digits, and the same shards as somebody else's, to be damaged."""

import shutil
from pathlib import Path

import pytest
from faults.zygote import Zygote

from dist_kd.commands.main import main
from dist_kd.data.finding import open_data


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DIST_KD_CACHE", str(tmp_path / "cache"))


@pytest.fixture(scope="session")
def origin(tmp_path_factory) -> Path:
    """120 training digits in three shards, packed, and 30 for validation."""
    where = tmp_path_factory.mktemp("damage")
    words = ["digits", str(where), "--limit-per-class", "15", "--shard-size", "50", "--jobs", "1"]
    assert main(["pack", *words]) == 0
    assert open_data(str(where / "train")).num_samples == 150
    return where


@pytest.fixture(scope="module")
def zygote():
    """Starts real trainers out of a process that has imported torch already."""
    found = Zygote()
    yield found
    found.close()


@pytest.fixture
def packed(origin, tmp_path) -> Path:
    """A copy with its index, to be damaged."""
    return Path(shutil.copytree(origin, tmp_path / "packed"))


@pytest.fixture
def foreign(origin, tmp_path) -> Path:
    """The training shards alone: nobody has indexed them."""
    folder = tmp_path / "foreign"
    folder.mkdir()
    for shard in sorted((origin / "train").glob("*.tar")):
        shutil.copy(shard, folder)
    return folder
