"""What smaller shuffle windows cost: how far batches are from those of a full shuffle. Counts, not times."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import Any

import numpy as np
import paired
import torch

from dist_kd.data.order import Order

SHARDS, SHARD, BATCH, CLASSES = 64, 250, 256, 100  # 16,000 samples, 62 steps, 128 left out
NEAR = 10  # sample numbers apart that count as next to each other
WINDOWS = (1, 2, 4, 8, 16, SHARDS)  # in mean shards; the last is a full one
STREAMS = (1, 4, 16)
HEAD = [
    "P",
    "W",
    "neighbours meet",
    "same shard meets",
    "other shards meet",
    "shards in a batch",
    "classes in a batch, shards sorted",
    "correlation with the shards' order",
]


def pairs_within(numbers: np.ndarray, apart: int) -> int:
    """Pairs of sorted numbers that differ by at most `apart`."""
    return int((np.searchsorted(numbers, numbers + apart, side="right") - np.arange(len(numbers)) - 1).sum())


def pairs_of(groups: np.ndarray) -> int:
    counts = np.bincount(groups)
    return int((counts * (counts - 1) // 2).sum())


def measure(streams: int, shards: int, epochs: int, seed: int = 0) -> dict[str, float]:
    """Figures of one order, mean over its epochs; a ratio of 1 is what chance gives."""
    samples = SHARDS * SHARD
    order = Order((SHARD,) * SHARDS, BATCH, seed, streams, shards * SHARD)
    everyone = np.arange(samples)
    inside = [everyone[first : first + SHARD] for first in range(0, samples, SHARD)]
    possible = {
        "near": sum(pairs_within(shard, NEAR) for shard in inside),
        "same": SHARDS * SHARD * (SHARD - 1) // 2,
        "all": samples * (samples - 1) // 2,
    }
    met = dict.fromkeys(possible, 0)
    in_batch, classes, correlation = [], [], []
    for epoch in range(epochs):
        batches = np.sort(order.epoch_order(epoch), axis=1)
        steps = np.arange(len(batches)).repeat(BATCH)
        for batch in batches:
            shard = batch // SHARD
            # neighbours of one shard: shards are pushed apart first
            met["near"] += pairs_within(batch + shard * SHARD, NEAR)
            met["same"] += pairs_of(shard)
            met["all"] += BATCH * (BATCH - 1) // 2
            in_batch.append(len(np.unique(shard)))
            classes.append(len(np.unique(batch * CLASSES // samples)))  # sorted by class: runs of 160 samples
        correlation.append(np.corrcoef(steps, batches.ravel())[0, 1])
    fair = met["all"] / possible["all"]
    return {
        "neighbours": met["near"] / possible["near"] / fair,
        "same shard": met["same"] / possible["same"] / fair,
        "other shards": (met["all"] - met["same"]) / (possible["all"] - possible["same"]) / fair,
        "shards": float(np.mean(in_batch)),
        "classes": float(np.mean(classes)),
        "correlation": float(np.sqrt(np.mean(np.square(correlation)))),
    }


def row(streams: int, shards: int, found: dict[str, float]) -> list[str]:
    ratios = [f"{found[key]:.2f} x" for key in ("neighbours", "same shard", "other shards")]
    spread = [f"{found['shards']:.1f}", f"{found['classes']:.1f}", f"{found['correlation']:.3f}"]
    return [str(streams), "full" if shards == SHARDS else str(shards), *ratios, *spread]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--epochs", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--json", type=Path, help="write everything here too")
    args = parser.parse_args(argv)
    rows, results = [], []
    for streams in STREAMS:
        for shards in WINDOWS:
            found = measure(streams, shards, args.epochs)
            rows.append(row(streams, shards, found))
            results.append({"streams": streams, "window_shards": shards} | found)
    title = f"Orders of {SHARDS} shards of {SHARD} samples, batches of {BATCH}, {args.epochs} epochs"
    facts: dict[str, Any] = {"cores": os.cpu_count(), "torch": torch.__version__}
    paired.publish(title, facts, [paired.table(HEAD, rows)], {"rows": results}, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
