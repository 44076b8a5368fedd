"""The student's shapes, at the cost of none of its numbers."""

from __future__ import annotations

import torch

from dist_kd import models
from dist_kd.config import Config
from dist_kd.models import Network

CLASSES = 1000  # where no data say how many


def on_meta(config: Config, classes: int) -> Network:
    with torch.device("meta"):
        return models.build(config.arch, classes, image_size=config.image_size)


def sizes(config: Config, classes: int) -> tuple[int, int]:
    """Elements of all (parameters, buffers)."""
    network = on_meta(config, classes)
    return sum(p.numel() for p in network.parameters()), sum(b.numel() for b in network.buffers())
