"""The same rows, and the same bytes of pixels, on any ranks, micro-batches and workers, in memory or from tars."""

import itertools
from dataclasses import replace

import pytest
import torch

from dist_kd.contracts import World
from dist_kd.data.decode import TarSamples
from dist_kd.data.loader import _TrainRequests
from dist_kd.data.survey import build_index
from dist_kd.data.views import TrainView

SIZES = (7, 10, 0, 5, 1, 14)  # 37 samples: 3 steps of 12 and 1 left out
FIRST, COUNT = 2, 5  # steps: from the last of epoch 0 to the first of epoch 2
EVERYTHING = "rrc+flip+vflip+rotate+jitter+randaugment+erase"
LAYOUTS = [  # ranks, micro-batch, workers, in memory
    (1, 4, 3, False),
    (2, 6, 1, False),
    (3, 2, 2, False),
    (4, 3, 0, False),
    (6, 1, 3, False),
    (2, 3, 0, True),
    (3, 4, 2, True),
    (12, 1, 0, True),
]


@pytest.fixture(params=["of one size", "said to be of one size", "of many sizes"])
def pictures(request, shards):
    many = request.param == "of many sizes"
    paths = shards(
        SIZES, shape=(lambda number: (9 + number % 5, 8 + number % 7)) if many else (lambda number: (10, 10))
    )
    index = build_index(paths[0].parent, paths, name="x", classes=None)
    return index if many or request.param == "of one size" else replace(index, image_size=10)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize(("augment", "streams"), [(EVERYTHING, 1), ("crop+flip", 3)])
def test_pixels_follow_from_seed_epoch_and_sample_alone(pictures, train, augment, streams):
    """Beside each image decoded and viewed by itself, with no loader."""
    view, samples, orders = TrainView(augment, 8, seed=5), TarSamples(pictures), (streams, 37 if streams == 1 else 5)
    seen = {}
    for ranks, micro, workers, in_memory in LAYOUTS:
        given = [[] for _ in range(COUNT)]
        for rank in range(ranks):
            world, how = World(rank, ranks), {"workers": workers, "in_memory": in_memory, "layout": orders}
            loader = train(pictures, view, world=world, micro_batch=micro, **how)
            requests = _TrainRequests(loader._order, world, micro, FIRST)
            for rows in itertools.islice(loader._feed.start(requests), COUNT * 12 // ranks // micro):
                assert rows.images.dtype == torch.uint8
                for image, label, sample in zip(rows.images, rows.labels.tolist(), rows.samples.tolist(), strict=True):
                    if (rows.epoch, sample) not in seen:
                        seen[rows.epoch, sample] = view(samples.pixels(sample), rows.epoch, sample)
                    assert torch.equal(image, seen[rows.epoch, sample]) and label == sample % 5
                    given[rows.step - FIRST].append(sample)
            loader.close()
        assert given == [loader._order.global_batch(step).tolist() for step in range(FIRST, FIRST + COUNT)]
    assert len(seen) == COUNT * 12
    both = [sample for epoch, sample in seen if epoch == 1 and (2, sample) in seen]
    assert sum(torch.equal(seen[1, sample], seen[2, sample]) for sample in both) < len(both)  # epochs differ
