"""What the index and the order add to a process that starts at one step: seconds and bytes, printed as JSON.

Run in a fresh process by resume.py; without torch, so that its memory is its own. Linux only (/proc).
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np

from dist_kd.data.index import ROW, Index, read_index, write_index
from dist_kd.data.order import Order
from dist_kd.data.tar_scan import ShardInfo

SAMPLES, SHARDS, CLASSES = 1_281_167, 147, 1000  # as many as ImageNet's training set
BATCH, RANKS = 1024, 8
LAYOUTS = {"full shuffle": (1, SAMPLES), "16 streams": (16, round(4 * SAMPLES / SHARDS))}


def write_synthetic(folder: Path) -> None:
    """An index of that size; there are no shards."""
    rows = np.zeros(SAMPLES, ROW)
    rows["label"], rows["checksum"] = np.arange(SAMPLES) % CLASSES, np.arange(SAMPLES)
    rows["length"], rows["offset"] = 110_000, np.arange(SAMPLES) % (SAMPLES // SHARDS) * 110_592
    shards = tuple(
        ShardInfo(f"train-{number:06d}.tar", 10**9, "0" * 64, len(part))
        for number, part in enumerate(np.array_split(rows, SHARDS))
    )
    write_index(Index(folder, "synthetic", tuple(map(str, range(CLASSES))), shards, rows))


def memory() -> dict[str, int]:
    """Bytes of this process: its own pages, pages of mapped files (shared by all that map them), the most so far."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return {key: 1024 * int(lines[name].split()[0]) for key, name in NAMES.items()}


NAMES = {"own": "RssAnon", "mapped": "RssFile", "peak": "VmHWM"}


def first_batch(folder: Path, layout: str, percent: int) -> dict[str, float]:
    """Cost of rank 0's first batch at `percent` of an epoch; 100 is the first of the next one, after the last."""
    Path("/proc/self/clear_refs").write_text("5")  # the most so far is what there is now
    before, start, processor = memory(), time.perf_counter(), time.process_time()
    index = read_index(folder)
    order = Order(index.spec.shard_sizes, BATCH, 0, *LAYOUTS[layout])
    if percent == 100:
        order.rank_rows(order.steps_per_epoch - 1, 0, RANKS)
    rows = order.rank_rows(percent * order.steps_per_epoch // 100, 0, RANKS)
    seconds = {"wall_s": time.perf_counter() - start, "processor_s": time.process_time() - processor}
    added = {key: value - before[key] for key, value in memory().items()}
    return seconds | {"rows": len(rows)} | added


if __name__ == "__main__":
    print(json.dumps(first_batch(Path(sys.argv[1]), sys.argv[2], int(sys.argv[3]))))
