import itertools
import os
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from dist_kd.contracts import World
from dist_kd.data.mix import Mix
from dist_kd.data.survey import build_index
from dist_kd.data.views import EvalView, TrainView
from dist_kd.errors import ConfigError, DataError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)  # as in conftest.py
SIZES = (7, 10, 5, 15)


# conftest.py has the loaders' fixtures; a view of None is its Shifted


def take(loader, step, count):
    return list(itertools.islice(loader.batches(step), count))


def joined(batches):
    """All fields of some batches, one after another."""
    return [None if parts[0] is None else torch.cat(parts) for parts in zip(*batches, strict=True)]


def same(a, b):
    return all((x is None and y is None) or torch.equal(x, y) for x, y in zip(a, b, strict=True))


# what a batch is


def test_a_batch_is_what_the_parts_give(index, train, shifted):
    loader = train(index, micro_batch=12)
    (batch,) = take(loader, 4, 1)  # step 4 is the second of epoch 1
    samples = loader._order.global_batch(4)
    assert batch.samples.tolist() == samples.tolist()
    assert batch.labels.tolist() == (samples % 5).tolist() and batch.labels.dtype == torch.int64
    assert batch.weights.tolist() == [1.0] * 12 and batch.soft_labels is None
    pixels = torch.stack([loader._feed.dataset.samples.pixels(sample) for sample in samples.tolist()])
    views = shifted.batch(pixels, 1, samples).double()
    expected = (views / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert batch.images.dtype == torch.float32
    assert (batch.images - expected).abs().max() < 1e-6
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert loader.spec == index.spec


def test_channels_last_is_a_choice(index, train):
    (batch,) = take(train(index, channels_last=False), 0, 1)
    assert batch.images.is_contiguous()


@pytest.mark.parametrize("layout", [None, (4, 5)])
@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_global_batches_on_any_ranks_and_workers(index, train, workers, layout):
    whole = joined(take(train(index, micro_batch=12, layout=layout), 2, 3))
    for ranks, micro in ((1, 6), (2, 6), (3, 4), (3, 2)):
        per_rank = []
        for rank in range(ranks):
            loader = train(index, world=World(rank, ranks), micro_batch=micro, workers=workers, layout=layout)
            per_rank.append(take(loader, 2, 3 * 12 // ranks // micro))
            loader.close()
        per_step = 12 // ranks // micro
        rows = [
            batch
            for step in range(3)
            for batches in per_rank
            for batch in batches[step * per_step : (step + 1) * per_step]
        ]
        assert same(joined(rows), whole)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("in_memory", [False, True])
def test_resuming_anywhere_gives_the_rest(index, train, workers, in_memory):
    loader = train(index, workers=workers, in_memory=in_memory)
    whole = take(loader, 0, 16)  # 8 steps: 2 epochs and a part
    for step in (1, 2, 3, 5, 6):
        assert same(joined(take(loader, step, 16 - 2 * step)), joined(whole[2 * step :]))


@pytest.mark.parametrize(
    "view", [None, TrainView("rrc+flip", 6, 0), TrainView("crop+flip", 8, 0), TrainView("none", 5, 0)]
)
def test_memory_equals_tars(index, train, view):
    tars = take(train(index, view), 1, 8)
    for workers in (0, 2):
        assert same(joined(take(train(index, view, in_memory=True, workers=workers), 1, 8)), joined(tars))


@pytest.mark.parametrize("view", [None, TrainView("rrc+flip", 6, 0), TrainView("crop+flip", 8, 0)])
def test_images_known_to_be_equal_are_viewed_together(index, train, evaluate, view):
    known = replace(index, image_size=8)
    assert same(joined(take(train(known, view), 1, 8)), joined(take(train(index, view), 1, 8)))
    claimed = [joined(evaluate(i, EvalView(6)).batches()) for i in (index, known)]
    assert same(*claimed)


def test_images_wrongly_said_to_be_equal(shards, train):
    paths = shards(SIZES, shape=lambda number: (7 + number % 5, 9))
    index = build_index(paths[0].parent, paths, name="x", classes=None)
    view = TrainView("rrc", 6, 0)
    a, b = (joined(take(train(i, view), 1, 8)) for i in (index, replace(index, image_size=8)))
    assert same(a, b)


def test_memory_equals_tars_for_uneven_sizes(shards, train, evaluate):
    paths = shards(SIZES, shape=lambda number: (7 + number % 5, 9 + number % 3))
    index = build_index(paths[0].parent, paths, name="x", classes=None)
    view = TrainView("rrc+flip", 6, 0)
    a, b = (joined(take(train(index, view, in_memory=memory), 1, 8)) for memory in (False, True))
    assert same(a, b)
    a, b = (joined(evaluate(index, EvalView(6, 0.9), in_memory=memory).batches()) for memory in (False, True))
    assert same(a, b)


def test_mixing_follows_normalizing(index, train):
    mix = Mix(0.4, 1.0, seed=3, num_classes=5)
    plain, mixed = take(train(index), 2, 4), take(train(index, mix=mix, workers=2), 2, 4)
    for epoch, a, b in zip((0, 0, 1, 1), plain, mixed, strict=True):
        images, soft = mix(a.images, a.labels, epoch, a.samples.numpy())
        assert torch.equal(b.images, images) and torch.equal(b.soft_labels, soft)
        assert torch.equal(b.labels, a.labels) and not torch.equal(b.images, a.images)


def test_settings_that_cannot_work(index, train):
    with pytest.raises(ConfigError, match=r"micro-batch `5` does not divide the 12 rows"):
        train(index, micro_batch=5)
    with pytest.raises(ConfigError, match=r"micro-batch `3` is odd"):
        train(index, micro_batch=3, mix=Mix(0.4, 0.0, 0, 5))
    with pytest.raises(ConfigError, match=r"not a multiple of 5"):
        train(index, world=World(0, 5))


def test_ledger(index, train, tmp_path, monkeypatch):
    monkeypatch.setenv("DIST_KD_LEDGER", str(tmp_path))
    loader = train(index, world=World(1, 2), micro_batch=3)
    batches = take(loader, 2, 3)
    lines = [list(map(int, line.split())) for line in (tmp_path / "rank1.txt").read_text().splitlines()]
    assert lines == [
        [epoch, step, *batch.samples.tolist()]
        for (epoch, step), batch in zip([(0, 2), (0, 2), (1, 3)], batches, strict=True)
    ]


# evaluation


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
@pytest.mark.parametrize("workers", [0, 2])
def test_each_sample_is_evaluated_once(index, evaluate, ranks, workers):
    """37 samples in 5 batches: a prime number, and for 7 ranks fewer batches than ranks."""
    seen = {}
    for rank in range(ranks):
        loader = evaluate(index, world=World(rank, ranks), workers=workers if ranks < 7 else 0)
        assert loader.num_samples == 37
        for number, batch in enumerate(loader.batches()):
            seen[rank + number * ranks] = batch
        loader.close()
    batches = [seen[number] for number in range(5)]
    assert [len(batch.labels) for batch in batches] == [8, 8, 8, 8, 5]
    whole = joined(evaluate(index, batch_size=37).batches())
    assert same(joined(batches), whole)
    assert whole[3].tolist() == list(range(37)) and whole[1].tolist() == [s % 5 for s in range(37)]


def test_an_evaluation_can_be_left_and_repeated(index, evaluate):
    loader = evaluate(index, workers=2)
    first = joined(loader.batches())
    workers = [worker.pid for worker in loader._feed._iterator._workers]
    left = loader.batches()
    next(left)
    left.close()
    assert same(joined(loader.batches()), first)
    assert [worker.pid for worker in loader._feed._iterator._workers] == workers  # kept, not started anew
    loader.close()
    assert same(joined(loader.batches()), first)


def test_a_limit_takes_evenly_spaced_samples(index, evaluate):
    loader = evaluate(index, limit=10, in_memory=True)
    assert loader.num_samples == 10
    assert joined(loader.batches())[3].tolist() == [0, 3, 7, 11, 14, 18, 22, 25, 29, 33]
    assert evaluate(index, limit=1000).num_samples == 37


def test_an_empty_rank_gives_nothing(index, evaluate):
    assert list(evaluate(index, world=World(6, 7), workers=2).batches()) == []


# the generators of the main process


@pytest.mark.parametrize("workers", [0, 2])
def test_random_states_are_left_alone(index, train, evaluate, workers):
    def states():
        return torch.get_rng_state().tolist(), repr(np.random.get_state()), random.getstate()

    before = states()
    take(train(index, TrainView("rrc+flip", 6, 0), workers=workers, mix=Mix(0.4, 1.0, 0, 5)), 0, 5)
    take(train(index, workers=workers, in_memory=True), 0, 5)
    list(evaluate(index, workers=workers).batches())
    assert states() == before


# damage


def flip_a_byte(index, sample):
    shard, row = index.locate(sample)
    data = bytearray(index.shard_path(shard).read_bytes())
    data[int(row["offset"]) + 100] ^= 255
    index.shard_path(shard).write_bytes(data)


@pytest.mark.parametrize("workers", [0, 2])
def test_the_first_bad_sample_ends_the_run(index, train, evaluate, workers):
    flip_a_byte(index, 7)
    for batches in (train(index, workers=workers).batches(0), evaluate(index, workers=workers).batches()):
        with pytest.raises(DataError, match=r"sample 7 of shard `.*train-0001.tar` .*checksum") as bad:
            list(itertools.islice(batches, 12))
        assert "\n" not in str(bad.value)
    with pytest.raises(DataError, match=r"sample 7 of shard `.*train-0001.tar`"):
        train(index, in_memory=True)


@pytest.mark.parametrize("in_memory", [False, True])
@pytest.mark.parametrize("workers", [0, 2])
def test_a_bad_sample_keeps_its_place_if_it_may(index, train, evaluate, shifted, workers, in_memory):
    good = joined(take(train(index), 0, 6))
    for sample in (7, 8, 16):  # 7 begins its shard: the nearest earlier good one, cyclic, is 15 as 16 is bad too
        flip_a_byte(index, sample)
    loader = train(index, workers=workers, in_memory=in_memory, max_bad_fraction=0.1)
    shown = joined(take(loader, 0, 6))
    assert torch.equal(shown[3], good[3])  # the intended samples
    bad = torch.isin(good[3], torch.tensor([7, 8, 16]))
    assert bad.sum() == 3 and shown[2].tolist() == (~bad).float().tolist()
    assert torch.equal(shown[0][~bad], good[0][~bad])
    row = good[3].tolist().index(8)
    pixels = loader._feed.dataset.samples.pixels(15)
    view = shifted(pixels, 0, 8).float().div(255)
    assert torch.allclose(shown[0][row], (view - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1))
    assert shown[1][row] == 15 % 5  # its label belongs to what is shown
    assert loader.account.mine.bad == {"checksum": 3} and loader.account.mine.in_epoch == 3
    scored = joined(evaluate(index, workers=workers, in_memory=in_memory, max_bad_fraction=0.1).batches())
    assert scored[3].tolist() == list(range(37)) and scored[2].sum() == 34


def test_a_shard_without_a_good_sample(index, train):
    for sample in range(17, 22):
        flip_a_byte(index, sample)
    with pytest.raises(DataError, match=r"train-0002.tar` has no readable sample"):
        take(train(index, max_bad_fraction=1.0), 0, 6)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_cut_shard_ends_the_run_even_if_samples_may_be_bad(index, train, workers):
    os.truncate(index.shard_path(3), 100)
    with pytest.raises(DataError, match=r"train-0003.tar`.* copy it again"):
        take(train(index, workers=workers, max_bad_fraction=1.0), 0, 6)
