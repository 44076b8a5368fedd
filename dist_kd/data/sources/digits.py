"""scikit-learn's handwritten digits: 1,797 grey images of 8x8 pixels, ten classes, embedded in the package."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np

from dist_kd.data.selection import hold_out
from dist_kd.data.sources import Item, Source
from dist_kd.errors import ConfigError

VAL_FRACTION = 0.2  # of each class, by the hash of the key; the set has no split of its own


def open_source(name: str, root: Path | None, download: bool) -> Source:
    """The digits with a fixed, stratified split: 1,438 for training, 359 held out. Values 0..16 become 0..255.

    Augmentation is `crop` alone: a mirrored digit is another sign.
    """
    if root is not None or download:
        raise ConfigError("`digits` is embedded; leave out `--root` and `--download`")
    from PIL import Image
    from sklearn.datasets import load_digits

    digits = load_digits()
    items = []
    for k, (values, label) in enumerate(zip(digits.images, digits.target, strict=True)):
        content = io.BytesIO()
        Image.fromarray(np.rint(values * (255 / 16)).astype(np.uint8)).save(content, "PNG")
        items.append(Item(f"{label}/{k:04d}.png", content.getvalue(), int(label)))
    train, val = hold_out(items, VAL_FRACTION)
    return Source(name, tuple("0123456789"), "crop", {"train": train, "val": val}, image_size=8)
