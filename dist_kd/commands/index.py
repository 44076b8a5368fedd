"""`dist-kd index SHARDS...`: writes index.json and index.npy for shards that somebody else has written."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from dist_kd.commands.pack import count
from dist_kd.data import finding, remote_sets
from dist_kd.data.damage import is_marked
from dist_kd.data.index import read_facts, write_index
from dist_kd.data.remote_urls import check_url, is_remote
from dist_kd.data.sources import read_class_list
from dist_kd.data.survey import MAX_BAD_FRACTION, build_index
from dist_kd.data.views import check_augment
from dist_kd.errors import ConfigError, DataError


def main(argv: list[str]) -> int:
    """Indexes, and prints what was found; 0."""
    args = parser().parse_args(argv)
    if args.augment is not None:
        check_augment(args.augment)
    place, urls = args.output, [word for word in args.shards if is_remote(word)]
    for url in urls:
        check_url(url)
    if urls and place is None:
        raise ConfigError("the index of shards on another machine needs a folder here: give --output DIR")
    if not urls:
        shards = _named(args.shards)
        folder = Path(os.path.commonpath([shard.parent for shard in shards]))
        place = place or folder
    known = _noted(place)
    name, classes = args.name or known.get("name"), known.get("classes")
    if args.class_list:
        classes = read_class_list(args.class_list)
    options = {
        "classes": tuple(classes) if classes else None,
        "augment": args.augment or known.get("augment") or "none",
        "image_size": args.image_size or known.get("image_size"),
        "jobs": args.jobs,
        "max_bad_fraction": args.max_bad_fraction,
    }
    if urls:
        named = remote_sets.named_shards([name for word in args.shards for name in finding.expand_braces(word)])
        index = remote_sets.index_shards(named, finding.shard_cache(), name=name, **options)
    else:
        index = build_index(folder, shards, name=name or folder.name, **options)
    write_index(index, place)
    size, bad = sum(shard.bytes for shard in index.shards), int(is_marked(index.rows).sum())
    print(
        f"{place}: {index.num_samples:,} samples{f' ({bad:,} of them damaged)' if bad else ''} of "
        f"{len(index.classes)} classes in {len(index.shards)} shards, "
        f"{size / 1e6:.1f} MB, usual augmentation {index.augment}; train with `--data {place}`"
    )
    return 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="dist-kd index",
        allow_abbrev=False,
        description="Index WebDataset shards, so that any sample can be read by its number. Every byte is read once "
        "and the first damage to a shard's structure is an error; a sample with a missing or wrong image or label is "
        "marked, and training shows another in its place. What an earlier index there says of classes and augmentation "
        "is kept.",
    )
    p.add_argument(
        "shards",
        metavar="SHARDS",
        nargs="+",
        help="a folder, a brace pattern such as 'train-{000..099}.tar', or tars; or their URLs",
    )
    p.add_argument(
        "--class-list",
        type=Path,
        metavar="FILE",
        help="text with a class per line, in label order (default: the numbers up to the largest label)",
    )
    p.add_argument("--name", help="what the set is called (default: the folder's name)")
    p.add_argument("--augment", metavar="A", help="augmentation the set is usually trained with (default: none)")
    p.add_argument(
        "--image-size", type=count, metavar="N", help="side in pixels, if all images are squares of one size"
    )
    p.add_argument(
        "--max-bad-fraction",
        type=share,
        default=MAX_BAD_FRACTION,
        metavar="F",
        help="share of samples that may be marked as damaged before this is an error (default: %(default)s)",
    )
    p.add_argument(
        "--output", type=Path, metavar="DIR", help="folder for the index (default: the shards' own, but for URLs)"
    )
    p.add_argument(
        "--jobs",
        type=count,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that read (default: one per core, %(default)s)",
    )
    return p


def share(text: str) -> float:
    """A number from 0 to 1."""
    number = float(text)
    if not 0 <= number <= 1:
        raise argparse.ArgumentTypeError(f"`{text}` must be from 0 to 1")
    return number


def _named(words: list[str]) -> list[Path]:
    """The shards that the words stand for, a folder for its *.tar. DataError if one is missing."""
    shards: list[Path] = []
    for word in words:
        folder = Path(os.path.expanduser(word))
        found = sorted(folder.absolute().glob("*.tar")) if os.path.isdir(folder) else finding.expand(word)
        missing = [shard for shard in found if not os.path.isfile(shard)]  # no error for what cannot be a path
        if missing or not found:
            what = f"`{missing[0]}` is not there" if missing else f"folder `{word}` holds no .tar"
            raise DataError(f"{what}; give a folder of shards, a brace pattern or a list")
        shards += found
    return shards


def _noted(place: Path) -> dict:
    """What an index.json there says, though the rest of it may be damaged; {} if nothing."""
    try:
        return read_facts(place / "index.json")
    except (OSError, ValueError):
        return {}
