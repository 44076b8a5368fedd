"""Real shards, written by webdataset's own writer."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from data import node_cache, tars
from data.bad_server import BadServer
from PIL import Image

from dist_kd.contracts import World
from dist_kd.data.loader import EvalLoader, TrainLoader
from dist_kd.data.order import Order, choose_layout
from dist_kd.data.shard_cache import ShardCache
from dist_kd.data.survey import build_index

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SIZES = (7, 10, 5, 15)  # 37 samples: 3 steps of 12 and 1 left out

torch.set_num_threads(1)


def image_bytes(number: int, height: int = 8, width: int = 8, kind: str = "JPEG") -> bytes:
    """A photograph-free image, another for each number."""
    pixels = np.random.default_rng(number).integers(0, 256, (height, width, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def write_shards(
    folder: Path, sizes, *, classes: int = 5, shape=lambda number: (8, 8), prefix: str = "train"
) -> list[Path]:
    """Shards of `sizes` samples with labels number % classes; shape(number) is (height, width)."""
    folder.mkdir(parents=True, exist_ok=True)
    paths, number = [], 0
    for shard, size in enumerate(sizes):
        paths.append(folder / f"{prefix}-{shard:04d}.tar")
        with webdataset.TarWriter(str(paths[-1])) as writer:
            for _ in range(size):
                image = image_bytes(number, *shape(number))
                writer.write({"__key__": f"k{number:05d}", "jpg": image, "cls": number % classes})
                number += 1
    return paths


@pytest.fixture
def shards(tmp_path):
    """shards(sizes, ...) -> paths, in a folder of this test."""
    return lambda sizes, **how: write_shards(tmp_path / "set", sizes, **how)


@pytest.fixture
def make_image():
    return image_bytes


class Shifted:
    """A training view that depends on all it may depend on: a 6 x 6 corner, plus a number of epoch and sample."""

    image_size = 6

    def __call__(self, pixels, epoch, sample):
        return self.batch(pixels[None], epoch, np.array([sample]))[0]

    def batch(self, pixels, epoch, samples, out=None):
        shift = torch.from_numpy((samples * 7 + epoch * 31) % 256).to(torch.uint8)
        views = torch.stack(list(pixels))[:, :, 1:7, 1:7] + shift.view(-1, 1, 1, 1)
        return views if out is None else out.copy_(views)


class Corner:
    """An evaluation view."""

    image_size = 6

    def batch(self, pixels, out=None):
        views = torch.stack(list(pixels))[:, :, :6, :6]
        return views if out is None else out.copy_(views)


@pytest.fixture
def shifted():
    """The view of `train` where none is given."""
    return Shifted()


@pytest.fixture
def index(shards):
    """37 samples of 5 classes in 4 shards."""
    paths = shards(SIZES)
    return build_index(paths[0].parent, paths, name="x", classes=None)


@pytest.fixture
def train(request):
    """train(index, ...) -> TrainLoader with small settings, closed at the end."""

    def make(index, view=None, batch=12, layout=None, **how):
        order = Order(index.spec.shard_sizes, batch, 3, *(layout or choose_layout(index.spec.shard_sizes, batch, True)))
        how = {"world": World(), "micro_batch": 6, "workers": 0, "in_memory": False, "timeout_s": 30.0} | how
        loader = TrainLoader(index, order, view or Shifted(), device="cpu", mean=MEAN, std=STD, **how)
        request.addfinalizer(loader.close)
        return loader

    return make


@pytest.fixture
def evaluate(request):
    def make(index, view=None, **how):
        how = {"world": World(), "batch_size": 8, "workers": 0, "in_memory": False, "timeout_s": 30.0} | how
        loader = EvalLoader(index, view or Corner(), device="cpu", mean=MEAN, std=STD, **how)
        request.addfinalizer(loader.close)
        return loader

    return make


@pytest.fixture
def of_bytes(tmp_path):
    """of_bytes(...) -> the scan of a shard made of these bytes."""

    def scanned(*parts, classes=None):
        path = tmp_path / "a.tar"
        path.write_bytes(b"".join(parts))
        return tars.scan(path, classes)

    return scanned


@pytest.fixture
def server():
    """A server of one shard, well until told otherwise."""
    with BadServer({"a.tar": node_cache.SHARD}) as server:
        yield server


@pytest.fixture
def cache(tmp_path) -> ShardCache:
    """An empty cache with room for ten such shards and little patience."""
    return ShardCache(tmp_path / "cache", 10 * node_cache.SIZE, 20.0, node_cache.QUICK)
