"""`dist-kd pack SOURCE DEST`: an image folder or a known data set -> indexed shards in DEST/train, val and test."""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

from dist_kd.data import pack
from dist_kd.data.sources import SOURCES, open_source
from dist_kd.data.views import check_augment
from dist_kd.errors import printable


def main(argv: list[str]) -> int:
    """Packs, and prints what was made and how to use it; 0."""
    args = parser().parse_args(argv)
    if args.augment is not None:
        check_augment(args.augment)
    started = time.perf_counter()
    source = open_source(args.source, args.root, args.download, args.class_list)
    indexes = pack.pack_source(
        source,
        args.dest,
        val_fraction=args.val_fraction,
        test_fraction=args.test_fraction,
        limit_per_class=args.limit_per_class,
        augment=args.augment,
        resize=args.resize,
        quality=args.quality,
        shard_samples=args.shard_size,
        shard_bytes=args.shard_mb * 1_000_000,
        seed=args.seed,
        jobs=args.jobs,
        skip_bad=args.skip_bad,
        part=args.part,
        progress=_progress(),
    )
    if args.part:
        print(
            f"{args.dest}: part {args.part[0]} of {args.part[1]} packed in {time.perf_counter() - started:.1f} s; when "
            "all are, the same line without --part makes the indexes"
        )
        return 0
    for split, index in indexes.items():
        size = sum(shard.bytes for shard in index.shards)
        images = f"{index.image_size}x{index.image_size} pixels" if index.image_size else "images of several sizes"
        print(
            f"{args.dest / split}: {index.num_samples:,} samples of {len(index.classes)} classes, {images}, "
            f"{len(index.shards)} shards, {size / 1e6:.1f} MB, usual augmentation {index.augment}"
        )
        bad = pack.left_out(args.dest / split)
        if bad:
            print(
                f"{args.dest / split}: left out {len(bad)} unreadable images, the first `{printable(bad[0])}` "
                f"(see {pack.STATE})"
            )
    if "val" not in indexes:
        print("no validation set: pack again with --val-fraction 0.2 to hold one out, or give --val-data when training")
    print(f"packed in {time.perf_counter() - started:.1f} s; train with `--data {args.dest}`")
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="dist-kd pack",
        allow_abbrev=False,
        description="Pack images into WebDataset shards (KEY.jpg, .png or .webp, and KEY.cls) with an index. Images "
        "are stored as they are, unless --resize or --quality is given. The same line gives the same bytes, and goes "
        "on where it was interrupted.",
    )
    p.add_argument(
        "source",
        metavar="SOURCE",
        help="a folder with one subfolder per class, or with train/ and val/ (or test/) of that form, or one of "
        + ", ".join(SOURCES),
    )
    p.add_argument("dest", metavar="DEST", type=Path, help="folder to make: DEST/train, DEST/val and DEST/test")
    p.add_argument("--root", type=Path, metavar="DIR", help="where torchvision keeps the files of a known set")
    p.add_argument("--download", action="store_true", help="let torchvision fetch a known set into --root")
    p.add_argument(
        "--class-list",
        type=Path,
        metavar="FILE",
        help="text with a class per line, whose line numbers, from 0, are the labels (default: sorted folder names)",
    )
    p.add_argument(
        "--val-fraction",
        type=float,
        metavar="F",
        help="hold out this part of each class of the training images, 0 to 1, by a hash of their paths (not of the "
        "seed); the source's own val or test is then DEST/test",
    )
    p.add_argument(
        "--test-fraction",
        type=float,
        metavar="F",
        help="for a source without a test set: hold out this part of each class as DEST/test, the very images that "
        "--val-fraction F alone would hold out; --val-fraction is then of what remains",
    )
    p.add_argument("--limit-per-class", type=count, metavar="K", help="at most K images of each class in each split")
    p.add_argument(
        "--resize", type=count, metavar="N", help="shorter side to N pixels; smaller images stay as they are"
    )
    p.add_argument(
        "--quality",
        type=quality,
        metavar="Q",
        help="encode every image as JPEG of this quality, 1 to 95 (--resize alone keeps the format, JPEG at 90)",
    )
    p.add_argument("--augment", metavar="A", help="usual augmentation to note in the index (default: by kind of data)")
    p.add_argument(
        "--shard-size",
        type=count,
        default=pack.SHARD_SAMPLES,
        metavar="N",
        help="samples in a shard at most (default: %(default)s)",
    )
    p.add_argument(
        "--shard-mb",
        type=count,
        default=pack.SHARD_BYTES // 1_000_000,
        metavar="MB",
        help="megabytes of images in a shard, about, before resizing (default: %(default)s)",
    )
    p.add_argument("--seed", type=int, default=0, help="of the shuffle (default: %(default)s)")
    p.add_argument("--skip-bad", action="store_true", help="leave out unreadable images, listed, instead of stopping")
    p.add_argument(
        "--part",
        type=part,
        metavar="I/N",
        help="write only every N-th shard from the I-th on, such as 1/8 to 8/8 on eight machines; then the same line "
        "without --part makes the index, and the same bytes as without parts",
    )
    p.add_argument(
        "--jobs",
        type=count,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that read and write (default: one per core, %(default)s)",
    )
    return p


def count(text: str) -> int:
    """A whole number of 1 or more."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"`{text}` must be 1 or more")
    return number


def part(text: str) -> tuple[int, int]:
    """`3/8` -> (3, 8)."""
    number, slash, count = text.partition("/")
    if not slash or not 1 <= int(number) <= int(count):
        raise argparse.ArgumentTypeError(f"`{text}` must be I/N with I from 1 to N, such as 3/8")
    return int(number), int(count)


def quality(text: str) -> int:
    """A JPEG quality: above 95 files grow without looking better."""
    if count(text) > 95:
        raise argparse.ArgumentTypeError(f"`{text}` must be at most 95")
    return int(text)


def _progress() -> pack.Progress:
    """A line per finished shard; on a terminal one line that is drawn over."""
    if not sys.stdout.isatty():
        return lambda shard, count, total: print(f"{shard}: {count:,} of {total:,} samples", flush=True)

    from rich.console import Console

    console = Console()

    def show(shard: str, count: int, total: int) -> None:
        end = "\n" if count == total else "\r"
        console.print(f"[bold]{100 * count / total:5.1f} %[/] {shard} ({count:,} of {total:,} samples)", end=end)

    return show
