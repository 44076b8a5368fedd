"""What tests of damaged shards share: which shard is damaged, and one epoch of a set by the loader."""

import tarfile
from pathlib import Path

from torch import Tensor

from dist_kd.contracts import World
from dist_kd.data.index import Index
from dist_kd.data.loader import TrainLoader
from dist_kd.data.order import Order, choose_layout
from dist_kd.data.views import TrainView

SHARD = 1  # the one that is damaged, of three


def damaged_shard(folder: Path) -> Path:
    return sorted(folder.glob("*.tar"))[SHARD]


def members_of(shard: Path) -> list[tuple[str, bytes]]:
    with tarfile.open(shard) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]


def loader_of(index: Index, *, in_memory: bool = False, max_bad_fraction: float = 0.05, batch: int = 0) -> TrainLoader:
    """A loader whose first batch is the whole set, unless `batch` says otherwise."""
    sizes = index.spec.shard_sizes
    batch = batch or sum(sizes)
    return TrainLoader(
        index,
        Order(sizes, batch, 0, *choose_layout(sizes, batch, True)),
        TrainView("none", 8, 0),
        world=World(),
        micro_batch=batch,
        device="cpu",
        mean=(0, 0, 0),
        std=(1, 1, 1),
        workers=0,
        in_memory=in_memory,
        max_bad_fraction=max_bad_fraction,
    )


def epoch(index: Index, **how) -> tuple[Tensor, Tensor, Tensor]:
    """(labels, weights, images) of all samples, by sample number."""
    loader = loader_of(index, **how)
    batch = next(iter(loader.batches(0)))
    loader.close()
    assert sorted(batch.samples.tolist()) == list(range(index.num_samples))
    order = batch.samples.argsort()
    return batch.labels[order], batch.weights[order], batch.images[order]
