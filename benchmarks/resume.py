"""Going on in the middle of an epoch: the first batch beside a start at step 0; what a large index costs."""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import order_cost
import paired
import torch
import webdataset

from dist_kd.contracts import World
from dist_kd.data import order
from dist_kd.data.index import Index, read_index, write_index
from dist_kd.data.loader import TrainLoader
from dist_kd.data.survey import build_index
from dist_kd.data.tar_reader import TarReader
from dist_kd.data.views import TrainView
from dist_kd.sets import open_split

SHARDS = 64
LATE = 90  # percent of an epoch
MB = 1_000_000


def split(source: Index, folder: Path, shards: int) -> None:
    """The samples of a set in that many shards, indexed."""
    reader, paths = TarReader(source), []
    for number in range(shards):
        paths.append(folder / f"part-{number:06d}.tar")
        with open(paths[-1], "wb") as file, webdataset.TarWriter(file) as writer:  # secured, it opens no names
            for sample in range(number * source.num_samples // shards, (number + 1) * source.num_samples // shards):
                data = reader.read(sample)
                kind = "png" if data.startswith(b"\x89PNG") else "jpg"
                writer.write({"__key__": f"{sample:08d}", kind: data, "cls": str(int(source.rows[sample]["label"]))})
    write_index(
        build_index(
            folder, paths, name="parts", classes=source.classes, augment=source.augment, image_size=source.image_size
        )
    )


class Rival:
    """A start at a share of the epoch, to its first batch: index, order, loader, workers."""

    def __init__(self, folder: Path, percent: int, workers: int, batch: int) -> None:
        self.folder, self.percent, self.workers, self.batch = folder, percent, workers, batch

    def seconds(self) -> tuple[float, float]:
        """(by the wall's clock, of this process's processor time) until the first batch is here."""
        order._laid_out.cache_clear()  # a new process has none
        wall, processor = time.perf_counter(), time.process_time()
        index = read_index(self.folder)
        sizes = index.spec.shard_sizes
        of_run = order.Order(sizes, self.batch, 0, *order.choose_layout(sizes, self.batch, local=True))
        loader = TrainLoader(
            index,
            of_run,
            TrainView(index.augment, index.image_size or 32, 0),
            world=World(),
            micro_batch=self.batch,
            device="cpu",
            mean=(0.5, 0.5, 0.5),
            std=(0.25, 0.25, 0.25),
            workers=self.workers,
            in_memory=False,
        )
        batches = loader.batches(self.percent * of_run.steps_per_epoch // 100)
        next(batches)
        took = time.perf_counter() - wall, time.process_time() - processor
        batches.close()
        loader.close()
        return took


def starts(folder: Path, workers: int, batch: int, rounds: int, calls: int) -> paired.Times:
    """Both starts in turn, one of each before that is not timed; a round's time is the median of its calls.

    A start is short, so whatever takes the processor away in the middle of one would count many times over in a mean.
    """
    rivals = {str(percent): Rival(folder, percent, workers, batch) for percent in (0, LATE)}
    times = paired.Times({name: [] for name in rivals}, {name: [] for name in rivals})
    for rival in rivals.values():
        rival.seconds()
    turns = list(rivals.items())
    for _ in range(rounds):
        took = {name: [] for name in rivals}
        for _ in range(calls):
            turns.reverse()
            for name, rival in turns:
                took[name].append(rival.seconds())
        for name, both in took.items():
            wall, processor = (statistics.median(values) for values in zip(*both, strict=True))
            times.wall[name].append(wall)
            times.processor[name].append(processor)
    return times


def start_row(workers: int, times: paired.Times) -> list[str]:
    late, early = str(LATE), "0"
    ratio = times.ratio(late, early).show("x")
    return [
        str(workers),
        times.ms(early).show("ms", 1),
        times.ms(late).show("ms", 1),
        ratio if times.steady(early, late) else f"inconclusive, {ratio}",
        times.ratio(late, early, "processor").show("x"),
    ]


def costs(folder: Path, layout: str, percent: int, rounds: int) -> list[dict[str, float]]:
    """What order_cost.py says, in a fresh process each."""
    script = [sys.executable, str(Path(order_cost.__file__)), str(folder), layout, str(percent)]
    return [
        json.loads(subprocess.run(script, capture_output=True, text=True, timeout=100, check=True).stdout)
        for _ in range(rounds)
    ]


def cost_row(layout: str, percent: int, found: list[dict[str, float]]) -> list[str]:
    where = f"{percent} %" if percent < 100 else "the next epoch, after this"
    scales = {"wall_s": 1e-3, "processor_s": 1e-3, "own": MB, "mapped": MB, "peak": MB}
    spreads = {key: paired.Spread.of([one[key] / scale for one in found]) for key, scale in scales.items()}
    shown = [spread.show("ms" if key.endswith("_s") else "MB", 0) for key, spread in spreads.items()]
    return [layout, where, *shown]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", default="digits", help="a packed set; its images are put into 64 shards")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument(
        "--calls", type=int, default=15, help="starts of each in a round, in turn (default: %(default)s)"
    )
    parser.add_argument("--workers", type=int, nargs="*", default=[0, 2])
    parser.add_argument("--json", type=Path, help="write everything here too")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    device = torch.device("cpu")
    facts, results = paired.machine(device), {"starts": [], "costs": []}
    start_rows, cost_rows = [], []
    with tempfile.TemporaryDirectory() as scratch:
        shards, synthetic = Path(scratch) / "shards", Path(scratch) / "synthetic"
        shards.mkdir()
        split(open_split(args.data, "train"), shards, SHARDS)
        for workers in args.workers:
            times = starts(shards, workers, args.batch_size, args.rounds, args.calls)
            start_rows.append(start_row(workers, times))
            ratio = times.ratio(str(LATE), "0")._asdict()
            results["starts"].append(
                {"workers": workers, "wall": times.wall, "processor": times.processor, "ratio": ratio}
            )
        order_cost.write_synthetic(synthetic)
        for layout, percent in itertools.product(order_cost.LAYOUTS, (0, LATE, 100)):
            found = costs(synthetic, layout, percent, args.rounds)
            cost_rows.append(cost_row(layout, percent, found))
            results["costs"].append({"layout": layout, "percent": percent, "rounds": found})
    tables = [
        paired.table(
            ["workers", "to the first batch at step 0", f"at {LATE} % of the epoch", "ratio, wall", "ratio, processor"],
            start_rows,
        ),
        paired.table(["order", "start at", "wall", "processor", "own memory", "mapped", "peak of both"], cost_rows),
    ]
    title = f"Resuming: {SHARDS} shards of `{args.data}`; then an index of {order_cost.SAMPLES:,} samples"
    paired.publish(title, facts, tables, results, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
