"""`dist-kd verify WHERE...`: checks shards against their index, down to decoding each image."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path

from dist_kd.commands.pack import count
from dist_kd.data.finding import open_data, split_folder
from dist_kd.data.remote_urls import check_url, is_remote, local_path
from dist_kd.data.sources import ensure_known
from dist_kd.data.survey import verify_index
from dist_kd.errors import DataError, one_line


def main(argv: list[str]) -> int:
    """Prints what was found; 0 if all is well, else 3."""
    args = parser().parse_args(argv)
    results = [_checked(where, args.jobs) for word in args.where for where in _parts(word)]
    if args.json:
        print(json.dumps(results, indent=1))
    for result in results if not args.json else ():
        size = f"{result['samples']:,} samples in {result['shards']} shards"
        verdict = f"{len(result['problems'])} problems" if result["problems"] else f"well ({result['seconds']} s)"
        print(f"{one_line(result['where'])}: {size}: {verdict}")
        for problem in result["problems"]:
            print(f"  {one_line(problem)}", file=sys.stderr)
    return DataError.exit_code if any(result["problems"] for result in results) else 0


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="dist-kd verify",
        allow_abbrev=False,
        description="Check shards against their index: sizes, sha256, structure of each tar, each label and checksum, "
        "and whether each image decodes. Exit code 0 if all is well, 3 with the list of problems.",
    )
    p.add_argument(
        "where",
        metavar="WHERE",
        nargs="+",
        help="a packed folder, a folder of shards, a brace pattern, a tar; or their URLs",
    )
    p.add_argument("--json", action="store_true", help="print the result as JSON")
    p.add_argument(
        "--jobs",
        type=count,
        default=len(os.sched_getaffinity(0)),
        metavar="N",
        help="processes that read (default: one per core, %(default)s)",
    )
    return p


def _parts(word: str) -> list[str]:
    """The folders that were packed together, or the word itself."""
    if is_remote(word):
        check_url(word)
        below = {split: split_folder(word, split) for split in ("train", "val", "test")}
        parts = [part for part in below.values() if part not in (None, word)]
        return parts or [word]
    word = local_path(word)
    folder = Path(os.path.expanduser(word))
    if not os.path.exists(folder):  # unlike pathlib's, no error for what cannot be a path
        folder = ensure_known(word) or folder
    parts = [str(folder / split) for split in ("train", "val", "test") if os.path.isdir(folder / split)]
    return parts if parts and not (folder / "index.json").exists() else [str(folder)]


def _checked(where: str, jobs: int) -> dict:
    started = time.perf_counter()
    try:
        index = open_data(where)
    except DataError as error:
        return {"where": where, "shards": 0, "samples": 0, "seconds": 0.0, "problems": [str(error)]}
    problems = verify_index(index, jobs=jobs)
    seconds = round(time.perf_counter() - started, 1)
    return {
        "where": where,
        "shards": len(index.shards),
        "samples": index.num_samples,
        "seconds": seconds,
        "problems": problems,
    }
