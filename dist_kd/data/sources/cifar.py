"""CIFAR-10 and CIFAR-100 from torchvision's files: 50,000 + 10,000 images of 32x32, stored as PNG without loss."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from dist_kd.data.sources import Item, Source, needs_root
from dist_kd.errors import DataError


def open_source(name: str, root: Path | None, download: bool) -> Source:
    """The set `name` read (and checked by its digests) by torchvision from `root`."""
    root = needs_root(name, root)
    from torchvision.datasets import CIFAR10, CIFAR100

    kind = {"cifar10": CIFAR10, "cifar100": CIFAR100}[name]
    try:
        sets = {"train": kind(root, train=True, download=download), "test": kind(root, train=False, download=download)}
    except (RuntimeError, OSError) as error:
        raise DataError(
            f"torchvision cannot read `{name}` below `{root}` ({error}); `--root` must hold `{kind.base_folder}`, "
            "or add `--download` where the network allows it"
        ) from None
    classes = tuple(sets["train"].classes)
    splits = {split: items_of(found.data, found.targets, classes) for split, found in sets.items()}
    return Source(name, classes, "crop+flip", splits, image_size=32)


def items_of(pixels: np.ndarray, labels: Sequence[int], classes: tuple[str, ...]) -> list[Item]:
    """Items of uint8 images [N, 32, 32, 3], named CLASS/NUMBER.png."""
    from PIL import Image

    items = []
    for k, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        content = io.BytesIO()
        Image.fromarray(image).save(content, "PNG")
        items.append(Item(f"{classes[label]}/{k:05d}.png", content.getvalue(), int(label)))
    return items
