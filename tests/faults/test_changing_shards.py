"""Shards that change under a run, on packed digits."""

import itertools
import os

import pytest
import torch
from faults.epochs import SHARD, damaged_shard, loader_of

from dist_kd.data.finding import open_data
from dist_kd.errors import DataError


def images(batches, count):
    return [batch.images.clone() for batch in itertools.islice(batches, count)]


@pytest.mark.parametrize("how", ["cut", "overwritten", "vanished", "replaced"])
def test_a_shard_that_changes_under_a_run(packed, how):
    """After the first batch. What is refused is refused by name; what goes on is of the old shard, byte for byte."""
    index = open_data(str(packed / "train")).select([SHARD])
    other = sorted((packed / "train").glob("*.tar"))[0].read_bytes()
    shard = damaged_shard(packed / "train")
    expected = images(loader_of(index, batch=10).batches(0), 5)
    loader = loader_of(index, batch=10)
    batches = loader.batches(0)
    seen = images(batches, 1)
    if how == "cut":
        os.truncate(shard, 2048)
    elif how == "overwritten":
        size = shard.stat().st_size
        with open(shard, "r+b") as file:
            file.write(other[:size])
    elif how == "vanished":
        shard.unlink()
    else:
        (packed / "new").write_bytes(other)
        os.replace(packed / "new", shard)
    if how in ("cut", "overwritten"):
        said = "was replaced: " if how == "overwritten" else "but the shard ends after"
        with pytest.raises(DataError, match=rf"shard `{shard}`.* {said}"):
            images(batches, 4)
    else:  # the open file is still the old one
        seen += images(batches, 4)
        assert all(map(torch.equal, seen, expected))
        again = loader_of(index, batch=10)  # as a restart, or a worker that had not opened it
        with pytest.raises(DataError, match=str(shard)):
            images(again.batches(0), 5)
        again.close()
    loader.close()
