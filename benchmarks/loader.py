"""The loader against others and against its own plain loop: how fast are batches made, and what does the way cost?

Every figure is images a second or microseconds a sample; every ratio is of one round of rivals that took turns.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import loader_rivals as rivals
import paired
import torch
from loader_ways import Ours, decode_only, packed, read_raw, repeated, train_loader
from torch.nn import functional as F

from dist_kd.cli import ended
from dist_kd.data.index import Index
from dist_kd.data.views import TrainView
from dist_kd.sets import open_split

CPU = torch.device("cpu")
GPUS = (1, 8, 64)
SECTIONS = ("photographs", "raw", "memory")


class Row(NamedTuple):
    """One ratio; `bar` is what it should reach, or with `most` stay below."""

    what: str
    ratio: paired.Spread
    steady: bool
    bar: float | None = None
    most: bool = False

    @property
    def verdict(self) -> str:
        if not self.steady:
            return "inconclusive"
        if self.bar is None:
            return ""
        return "met" if (self.ratio.median <= self.bar) == self.most or self.ratio.median == self.bar else "missed"

    def cells(self) -> list[str]:
        bar = "" if self.bar is None else f"{'<=' if self.most else '>='} {self.bar:g}"
        return [self.what, self.ratio.show(digits=3 if self.most else 2), bar, self.verdict]


class Found:
    """The rounds of everything that was timed, and the rows made of them."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[float]] = {}
        self.rows: list[Row] = []
        self.tables: list[str] = []
        self.missing: list[str] = []

    def turns(self, functions: dict[str, Callable[[], float]], rounds: int) -> paired.Times:
        times = paired.self_timed(functions, rounds)
        self.seconds |= times.wall
        return times

    def row(self, times: paired.Times, what: str, a: str, b: str, bar: float | None = None) -> None:
        """How many times as fast `a` is as `b`."""
        self.rows.append(Row(what, times.ratio(b, a), times.steady(a, b), bar))


def photographs(found: Found, args: argparse.Namespace, original: Index, small: Index) -> None:
    """Batches of training views out of photographs, in all ways."""
    ours, ours_small = (Ours(index, args.size, args.batch_size, args.batches) for index in (original, small))
    images = args.batches * args.batch_size
    functions = {
        "plain loop, originals": ours.bare(),
        "plain loop, 256 px": ours_small.bare(),
        "by hand with torchvision's classes, originals": rivals.by_hand(original, args.size, images),
        "by hand with torchvision's classes, 256 px": rivals.by_hand(small, args.size, images),
        "read and decode only, originals": decode_only(original, images),
        "read and decode only, 256 px": decode_only(small, images),
    }
    for workers in args.workers:
        for floats in (True, False):
            functions[f"webdataset, {'float32' if floats else 'uint8'}, originals, {workers} workers"] = (
                rivals.webdataset_loader(
                    original, args.size, args.batch_size, workers, 2 * workers + 2, args.batches, floats=floats
                )
            )
        for name, way in (("originals", ours), ("256 px", ours_small)):
            functions[f"ours, {name}, {workers} workers"] = way.processes(workers)
            functions[f"ours, {name}, {workers} workers as threads"] = way.threads(workers)
            functions[f"ours, {name}, {workers} workers, float32 on the CPU"] = way.floats(workers)
    times = found.turns(functions, args.rounds)
    head = ["images a second", f"median [min - max] of {args.rounds} rounds x {images} images"]
    rates = [[name, _rate(times, name).show(digits=0)] for name in functions]
    found.tables.append(paired.table(head, rates))
    for workers in args.workers:
        theirs = f"webdataset, float32, originals, {workers} workers"
        mine, mine_small = (f"ours, {name}, {workers} workers" for name in ("originals", "256 px"))
        one = workers == 1
        found.row(times, f"ours / webdataset to float32, {workers} workers", mine, theirs, 1.8 if one else None)
        found.row(times, f"ours on 256 px / same, {workers} workers", mine_small, theirs, 4.0 if one else None)
        bytes_too = theirs.replace("float32", "uint8")
        found.row(times, f"ours / webdataset to uint8, {workers} workers", mine, bytes_too)
        for name, way in (("originals", mine), ("256 px", mine_small)):
            bare = f"plain loop, {name}"
            bar = 0.85 if one else None
            found.row(times, f"delivered / plain loop, {name}, {workers} workers", way, bare, bar)
            found.row(times, f"delivered / plain loop, {name}, {workers} workers as threads", f"{way} as threads", bare)
    _launching(found, args, ours_small)
    _cores(found, args, times, original, small)


def _rate(times: paired.Times, name: str) -> paired.Spread:
    return paired.Spread.of([1 / seconds for seconds in times.wall[name]])


def _launching(found: Found, args: argparse.Namespace, ours: Ours) -> None:
    """What one busy worker does to a main process that starts small operations, as a training loop does."""
    times = found.turns({way: ours.operations(way) for way in ("alone", "processes", "threads")}, args.rounds)
    for way in ("processes", "threads"):
        what = f"a small operation in the main process beside a worker as one of {way} / alone"
        found.rows.append(Row(what, times.ratio(way, "alone"), times.steady(way, "alone")))


def _cores(found: Found, args: argparse.Namespace, times: paired.Times, original: Index, small: Index) -> None:
    """How many cores feed some GPUs, by the rate one worker delivered here."""
    rows = []
    for name, index in (("originals", original), ("256 px", small)):
        rate = _rate(times, f"ours, {name}, {args.workers[0]} workers").median / args.workers[0]
        size = float(index.rows["length"].mean())
        rows += [
            [name, str(gpus), f"{gpus * args.demand:,}", f"{gpus * args.demand / rate:.1f}",
             f"{gpus * args.demand * size / 1e9:.2f} GB/s"]
            for gpus in GPUS
        ]  # fmt: skip
    head = ["files", "GPUs", f"images a second at {args.demand} each", "cores such as this", "reading"]
    found.tables.append(paired.table(head, rows))


def raw(found: Found, args: argparse.Namespace, sets: dict[str, Index], folder: Path) -> None:
    """Samples out of shards as bytes, not decoded."""
    rates = []
    for name, index in sets.items():
        functions = {
            "TarReader, shuffled, checksums": read_raw(index),
            "webdataset": rivals.webdataset_raw(index, shuffled=False),
            "webdataset, shuffle(1000)": rivals.webdataset_raw(index, shuffled=True),
        }
        place = folder / f"mosaic-{name}", folder / f"litdata-{name}"
        others = {
            "mosaicml-streaming, by number": lambda i=index, p=place[0]: rivals.mosaic_raw(i, p),
            "litdata, shuffled": lambda i=index, p=place[1]: rivals.litdata_raw(i, p, shuffled=True),
            "litdata, in order": lambda i=index, p=place[1]: rivals.litdata_raw(i, p, shuffled=False),
        }
        for rival, make in others.items():
            try:
                functions[rival] = make()
            except ImportError:
                rates.append([f"{rival}, {name}", "not installed"])
                found.missing.append(rival)
        size = f"{name} ({index.rows['length'].mean() / 1000:.0f} KB)"
        times = found.turns({f"{rival}, {size}": turn for rival, turn in functions.items()}, args.rounds)
        rates += [
            [rival, paired.Spread.of([1e6 * s for s in seconds]).show(digits=1)]
            for rival, seconds in times.wall.items()
        ]
        bars = {"webdataset": {"256 px": 8.0, "originals": 4.0}.get(name)}
        bars |= dict.fromkeys(("mosaicml-streaming, by number", "litdata, shuffled"), None if name == "48 px" else 1.0)
        mine = f"TarReader, shuffled, checksums, {size}"
        for rival in list(functions)[1:]:
            found.row(times, f"raw: TarReader / {rival}, {size}", mine, f"{rival}, {size}", bars.get(rival))
    head = ["microseconds a sample", f"median [min - max] of {args.rounds} rounds x {index.num_samples} samples"]
    found.tables.append(paired.table(head, rates))


def memory(found: Found, args: argparse.Namespace) -> None:
    """Small images held decoded: batched views against transforms of each, and beside a training step."""
    index = open_split(args.memory_data, "train").select([0])
    side = index.image_size
    loader = train_loader(index, TrainView("crop+flip", side, 0), 128, 0, in_memory=True)
    images = loader._feed.dataset.samples.stack(torch.arange(index.num_samples).numpy())
    labels = torch.from_numpy(index.rows["label"].astype("int64"))
    ours, theirs = loader.batches(0), rivals.per_sample_batches(images, labels, 128)
    functions = {"in memory, batched": lambda: next(ours), "in memory, transforms of each": lambda: next(theirs)}
    times = paired.take_turns(functions, args.rounds, args.memory_batches, CPU)
    found.seconds |= times.wall
    found.row(times, "in memory: batched views / transforms of each", *functions, 10.0)

    torch.set_num_threads(args.step_threads)
    step = _step(side, len(index.classes))
    functions = {"data of a step": lambda: next(ours), "step": lambda: step(next(ours))}
    times = paired.take_turns(functions, args.rounds, args.steps, CPU)
    torch.set_num_threads(1)
    found.seconds |= times.wall
    share = times.ratio("data of a step", "step")
    what = "in memory: data / a whole step of ResNet-18, 128 images"
    found.rows.append(Row(what, share, times.steady("step"), 0.05, most=True))
    rows = [[name, paired.Spread.of([1000 * s for s in found.seconds[name]]).show(digits=1)]
            for name in ("in memory, batched", "in memory, transforms of each", "data of a step", "step")]  # fmt: skip
    found.tables.append(paired.table(["milliseconds for 128 images", "median [min - max]"], rows))
    loader.close()


def _step(side: int, classes: int) -> Callable[[Any], None]:
    """A training step of ResNet-18 with a stem for small images, as fast as this processor does it: bfloat16."""
    import torchvision

    network = torchvision.models.resnet18(num_classes=classes)
    network.conv1, network.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    network = network.to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01, momentum=0.9)

    def step(batch: Any) -> None:
        with torch.autocast("cpu", torch.bfloat16):
            logits = network(batch.images)
        F.cross_entropy(logits.float(), batch.labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", default=".data/imagenet-sample", help="packed photographs, which are repeated")
    parser.add_argument("--memory-data", default=".data/cifar10", help="packed small squares")
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--per-shard", type=int, default=250)
    parser.add_argument("--size", type=int, default=224, help="side of a view")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--batches", type=int, default=10, help="timed in each turn")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--memory-batches", type=int, default=20)
    parser.add_argument(
        "--steps", type=int, default=2, help="of the network beside which memory is timed, in each round"
    )
    parser.add_argument("--step-threads", type=int, default=os.cpu_count(), help="of torch, for that network")
    parser.add_argument("--demand", type=int, default=3300, help="images a second of one GPU, for the table of cores")
    parser.add_argument("--peers", type=Path, help="folder with mosaicml-streaming and litdata, if not installed")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    if args.peers is not None:
        sys.path.insert(0, str(args.peers))  # first: they ask for older packages than are installed
    torch.set_num_threads(1)
    facts = paired.machine(CPU)
    found = Found()
    with rivals.scratch() as name:
        folder = Path(name)
        if {"photographs", "raw"} & set(args.only):
            images = repeated(open_split(args.data, "train"), folder / "images", args.shards, args.per_shard)
            original = packed(images, folder / "originals", args.per_shard)
            small = packed(images, folder / "small", args.per_shard, "--resize", "256")
            if "photographs" in args.only:
                photographs(found, args, original, small)
            if "raw" in args.only:
                tiny = packed(images, folder / "tiny", args.per_shard, "--resize", "48")
                raw(found, args, {"48 px": tiny, "256 px": small, "originals": original}, folder)
    if "memory" in args.only:
        memory(found, args)
    head = ["ratio", f"median [min - max] of {args.rounds} rounds", "bar", ""]
    tables = [paired.table(head, [row.cells() for row in found.rows]), *found.tables]
    rows = [{**row._asdict(), "ratio": row.ratio._asdict(), "verdict": row.verdict} for row in found.rows]
    results = {
        "settings": {key: str(value) if isinstance(value, Path) else value for key, value in vars(args).items()},
        "rows": rows,
        "rounds_s": found.seconds,
        "not_installed": found.missing,
    }
    paired.publish("Loader", facts, tables, results, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(ended(main))
