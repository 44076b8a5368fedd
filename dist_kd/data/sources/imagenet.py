"""ImageNet-1k from torchvision's layout: ROOT/train/SYNSET/*.JPEG and ROOT/val/SYNSET/*.JPEG.

The label order is that of the sorted synset names, which is what published networks are trained with.
"""

from __future__ import annotations

from pathlib import Path

from dist_kd.data.sources import Source, folder, needs_root
from dist_kd.errors import ConfigError, DataError

CLASSES = 1000


def open_source(name: str, root: Path | None, download: bool) -> Source:
    """Training and validation photographs below `root`; archives lying there are unpacked by torchvision first."""
    root = needs_root(name, root)
    if download:
        raise ConfigError("`imagenet` cannot be downloaded without an account; put its archives into `--root`")
    for split in ("train", "val"):
        if not (root / split).is_dir():
            _unpack(root, split)
    found = folder.read_splits({"train": root / "train", "val": root / "val"}, name, "rrc+flip")
    if len(found.classes) != CLASSES:
        raise DataError(
            f"`{root / 'train'}` has {len(found.classes)} class folders, but ImageNet-1k has {CLASSES}; for a part of "
            "it pack the folder by its path, with `--class-list` for the true label numbers"
        )
    return found


def _unpack(root: Path, split: str) -> None:
    from torchvision.datasets import ImageNet

    try:
        ImageNet(root, split=split)
    except (RuntimeError, OSError, ImportError) as error:
        raise DataError(
            f"`{root / split}` is not there and torchvision cannot unpack it ({error}); `--root` must hold train/ and "
            "val/ with one folder per synset, or the official archives"
        ) from None
