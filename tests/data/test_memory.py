import weakref

import numpy as np
import pytest
import torch

from dist_kd.data.decode import TarSamples
from dist_kd.data.memory import MemorySamples, decoded_bytes, fits, held
from dist_kd.data.survey import build_index
from dist_kd.data.tar_reader import BadSample


def index_of(paths, **how):
    return build_index(paths[0].parent, paths, name="x", classes=None, **how)


@pytest.mark.parametrize("shape", [(8, 8), (5, 9), None])
@pytest.mark.parametrize("threads", [1, 3])
def test_equal_to_the_tars(shards, shape, threads):
    index = index_of(shards((300, 11), shape=lambda number: shape or (3 + number % 4, 5 + number % 3)))
    memory, tars = MemorySamples(index, threads=threads), TarSamples(index)
    assert memory.shape == shape and not memory.bad
    for sample in (0, 1, 2, 3, 255, 256, 299, 300, 310):
        assert torch.equal(memory.pixels(sample), tars.pixels(sample))
        assert memory.pixels(sample).stride() == tars.pixels(sample).stride()
    if shape:
        samples = np.array([310, 0, 7, 7])
        assert torch.equal(memory.stack(samples), torch.stack([tars.pixels(s) for s in samples.tolist()]))
        memory.stack(samples)[:] = 0  # a copy
        assert torch.equal(memory.pixels(7), tars.pixels(7))


def test_damage(shards):
    paths = shards((5, 6))
    index = index_of(paths)
    data = bytearray(paths[1].read_bytes())
    data[int(index.rows[7]["offset"]) + 9] ^= 1
    paths[1].write_bytes(data)
    with pytest.raises(BadSample, match=r"sample 7 of shard .*checksum"):
        MemorySamples(index)
    memory = MemorySamples(index, keep_bad=True)
    assert list(memory.bad) == [7] and memory.shape is None
    with pytest.raises(BadSample, match=r"sample 7 of shard .*checksum"):
        memory.pixels(7)
    assert torch.equal(memory.pixels(8), TarSamples(index).pixels(8))


def test_estimates(shards):
    square = index_of(shards((20,)), image_size=8)
    assert decoded_bytes(square) == 20 * 3 * 64
    assert fits(square, 20 * 3 * 64) and not fits(square, 20 * 3 * 64 - 1)
    mixed = index_of(shards((200,), shape=lambda number: (10, 5 + number % 2 * 10)))
    real = 200 * 3 * 10 * 10
    assert real <= decoded_bytes(mixed) <= 1.25 * real


def test_decoded_once_for_all_who_show_it(shards):
    index, other = index_of(shards((5,))), index_of(shards((5,)))
    samples = held(index, keep_bad=False)
    assert held(index, keep_bad=False) is samples
    assert held(index, keep_bad=True) is not samples and held(other, keep_bad=False).index is other
    alive = weakref.ref(samples)
    del samples
    assert alive() is None  # once nobody shows them any more
