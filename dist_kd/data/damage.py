"""Owns the kinds of damage that one sample may have, and how the index marks those that the shard itself shows.

A damaged sample keeps its number: training shows another in its place, which counts nothing, and counts the kind.
Damage to a shard's structure is no kind: it is refused. No torch.
"""

from __future__ import annotations

import numpy as np

# Kind -> what is wrong. Metrics are named by these, so a kind, once here, keeps its name.
KINDS: dict[str, str] = {
    "empty": "its image has 0 bytes",
    "missing_image": "it has no image",
    "missing_label": "it has no label",
    "label": "its label is no whole number, or none of the classes",
    "checksum": "its image has other bytes than when it was indexed",
    "decode": "its image cannot be decoded",
}

# What the index says of a sample: marks that a row of good samples never has.
NO_LABEL, WRONG_LABEL = -1, -2  # in `label`
NO_IMAGE = 0  # in `offset` and `length`: bytes 0..511 of a tar are a header


def damage_of(row: np.void) -> str:
    """The kind of damage that a row of the index is marked with, the image's first; "" if it is not marked."""
    if row["length"] == 0:
        return "missing_image" if row["offset"] == NO_IMAGE else "empty"
    if row["label"] < 0:
        return "missing_label" if row["label"] == NO_LABEL else "label"
    return ""


def is_marked(rows: np.ndarray) -> np.ndarray:
    """bool [N]: which rows of the index are marked with damage."""
    return (rows["length"] == 0) | (rows["label"] < 0)
