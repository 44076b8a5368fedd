"""Caltech-101 and Caltech-256 from torchvision's layout; neither has an official split (see `--val-fraction`)."""

from __future__ import annotations

from pathlib import Path

from dist_kd.data.sources import Source, folder, needs_root
from dist_kd.errors import DataError

# below --root, the first that is there; Caltech-256 counts its clutter as class 257, as torchvision does
PLACES = {
    "caltech101": ("caltech101/101_ObjectCategories", "101_ObjectCategories", "caltech101"),
    "caltech256": ("caltech256/256_ObjectCategories", "256_ObjectCategories", "caltech256"),
}
LEFT_OUT = "BACKGROUND_Google"  # not a class of the 101, and torchvision leaves it out too


def open_source(name: str, root: Path | None, download: bool) -> Source:
    """The photographs of `name` below `root`, all in train."""
    root = needs_root(name, root)
    if download:
        _download(name, root)
    place = next((root / place for place in PLACES[name] if (root / place).is_dir()), None)
    if place is None:
        raise DataError(
            f"`{root}` holds no `{PLACES[name][0]}`; unpack the archive there, or add `--download` where the network "
            "allows it"
        )
    found = folder.read_splits({"train": place}, name, "rrc+flip")
    if LEFT_OUT not in found.classes:
        return found
    left_out = found.classes.index(LEFT_OUT)
    classes = tuple(c for c in found.classes if c != LEFT_OUT)
    items = [
        item._replace(label=item.label - (item.label > left_out))
        for item in found.splits["train"]
        if item.label != left_out
    ]
    return Source(name, classes, found.augment, {"train": items})


def _download(name: str, root: Path) -> None:
    from torchvision.datasets import Caltech101, Caltech256

    try:
        {"caltech101": Caltech101, "caltech256": Caltech256}[name](root, download=True)
    except Exception as error:  # gdown, urllib and archive errors have no common base
        raise DataError(
            f"torchvision could not download `{name}` to `{root}` ({error}); fetch and unpack it there by hand, then "
            "leave out `--download`"
        ) from None
