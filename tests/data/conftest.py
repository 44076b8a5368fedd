"""Real shards, written by webdataset's own writer."""

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image

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
