"""What others do with the same photographs: each rival is a function that works a while and returns seconds a sample.

Pipelines are written as their own documentation writes them. mosaicml-streaming and litdata are no requirement of
anything here; where they are missing the table says so (README.md says how to have them beside the rest).
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

os.environ.setdefault("WDS_SECURE", "1")  # before webdataset is imported

import numpy as np
import webdataset as wds
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms as T

from dist_kd.data.decode import decode_image
from dist_kd.data.index import Index
from dist_kd.data.tar_reader import TarReader

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
SHUFFLED = 1000  # samples in webdataset's buffer


def shard_paths(index: Index) -> list[str]:
    return [str(index.shard_path(shard)) for shard in range(len(index.shards))]


def per_image(batches: Iterator[Any], batch_size: int, drop: int, count: int) -> float:
    """Seconds an image, over `count` batches after `drop` that are not timed."""
    for _ in range(drop):
        next(batches)
    started = time.perf_counter()
    for _ in range(count):
        next(batches)
    return (time.perf_counter() - started) / (count * batch_size)


def webdataset_loader(
    index: Index, size: int, batch_size: int, workers: int, drop: int, count: int, *, floats: bool
) -> Callable[[], float]:
    """webdataset + Pillow + torchvision in a torch DataLoader: normalized float32, or uint8 without that part."""
    usual = [T.RandomResizedCrop(size), T.RandomHorizontalFlip()]
    last = [T.ToTensor(), T.Normalize(MEAN, STD)] if floats else [T.PILToTensor()]
    transform = T.Compose(usual + last)
    dataset = (
        wds.WebDataset(shard_paths(index), shardshuffle=100)
        .repeat()
        .shuffle(SHUFFLED)
        .decode("pil")
        .to_tuple("jpg;jpeg;png;webp", "cls")
        .map_tuple(transform, _same)
    )

    def turn() -> float:
        iterator = iter(DataLoader(dataset, batch_size=batch_size, num_workers=workers))
        try:
            return per_image(iterator, batch_size, drop, count)
        finally:
            iterator._shutdown_workers()

    return turn


def _same(value: Any) -> Any:
    return value


def webdataset_raw(index: Index, *, shuffled: bool) -> Callable[[], float]:
    """Every sample of the shards as its bytes, not decoded."""

    def turn() -> float:
        dataset = wds.WebDataset(shard_paths(index), shardshuffle=False)
        return _exhaust(iter(dataset.shuffle(SHUFFLED) if shuffled else dataset))

    return turn


def _exhaust(samples: Iterator[Any]) -> float:
    count, started = 0, time.perf_counter()
    for _sample in samples:
        count += 1
    return (time.perf_counter() - started) / count


def _records(index: Index) -> Iterator[dict[str, Any]]:
    reader = TarReader(index)
    for sample, label in enumerate(index.rows["label"].tolist()):
        yield {"image": reader.read(sample), "label": label}


def mosaic_raw(index: Index, folder: Path) -> Callable[[], float]:
    """Samples by number in shuffled order, the faster of its two ways. ImportError without the package."""
    import streaming
    from streaming.base.util import clean_stale_shared_memory

    clean_stale_shared_memory()
    with streaming.MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}) as writer:
        for record in _records(index):
            writer.write(record)
    dataset = streaming.StreamingDataset(local=str(folder), shuffle=False, batch_size=1)
    order = np.random.default_rng(0).permutation(index.num_samples).tolist()
    return lambda: _exhaust(dataset[sample] for sample in order)


def litdata_raw(index: Index, folder: Path, *, shuffled: bool) -> Callable[[], float]:
    """Samples by iteration. It hands out windows into a mapped file, so they are copied, as TarReader's bytes are."""
    import litdata
    from litdata.streaming.writer import BinaryWriter

    if not folder.exists():
        writer = BinaryWriter(str(folder), chunk_bytes="64MB")
        for number, record in enumerate(_records(index)):
            writer[number] = record
        writer.done()
        writer.merge()
    return lambda: _exhaust(bytes(s["image"]) for s in litdata.StreamingDataset(str(folder), shuffle=shuffled))


class PerSample(Dataset):
    """Images in memory with the transforms of each sample, as torchvision's CIFAR10 does it."""

    def __init__(self, images: Tensor, labels: Tensor):
        """`images` uint8 [N, 3, S, S], `labels` [N]."""
        self.images, self.labels = images.permute(0, 2, 3, 1).numpy(), labels.tolist()
        side = images.shape[-1]
        self.transform = T.Compose(
            [T.RandomCrop(side, padding=side // 8), T.RandomHorizontalFlip(), T.ToTensor(), T.Normalize(MEAN, STD)]
        )

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, sample: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.images[sample])), self.labels[sample]


def per_sample_batches(images: Tensor, labels: Tensor, batch_size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Endless batches, without workers."""
    loader = DataLoader(PerSample(images, labels), batch_size=batch_size, shuffle=True, drop_last=True)
    while True:
        yield from loader


def by_hand(index: Index, size: int, count: int) -> Callable[[], float]:
    """A plain loop over torchvision's classes on uint8, one core."""
    import torchvision.transforms.v2 as v2

    reader = TarReader(index)
    transform = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip()])
    order = iter(np.random.default_rng(0).integers(0, index.num_samples, 1 << 20).tolist())

    def turn() -> float:
        started = time.perf_counter()
        for _ in range(count):
            transform(decode_image(reader.read(next(order))))
        return (time.perf_counter() - started) / count

    return turn


def scratch() -> tempfile.TemporaryDirectory:
    return tempfile.TemporaryDirectory(prefix="dist-kd-loader-", ignore_cleanup_errors=True)
