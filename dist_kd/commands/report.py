"""`dist-kd report RUN...`: run folders -> one HTML page, JSON, or both."""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

from dist_kd.errors import ConfigError, printable
from dist_kd.report import is_run_folder, write_report


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-kd report",
        description="One page of one or more runs: results, curves, sizes, speed, settings. It needs no network.",
        epilog="With --json and without -o no page is written. Runs that differ only in the seed are one group.",
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder, finished or not")
    parser.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="FILE",
        help="the page; default: RUN/report.html for one run, else report.html",
    )
    parser.add_argument("--json", metavar="FILE", help="the figures as JSON; - is standard output")
    return parser


def _plain_json(tree: Any) -> Any:
    """The tree with None for what JSON has no word for (nan, inf), and text for what it has no type for (dates)."""
    if isinstance(tree, dict):
        return {str(key): _plain_json(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return [_plain_json(value) for value in tree]
    if isinstance(tree, float):
        return tree if math.isfinite(tree) else None
    return tree if tree is None or isinstance(tree, (str, int, bool)) else str(tree)


def main(argv: list[str]) -> int:
    """Exit code of the command: 0, or 1 if the page could not be made whole. ConfigError for a wrong folder or file."""
    args = _parser().parse_args(argv)
    for path in args.runs:
        if not is_run_folder(path):
            what = "has none of a run's files" if path.is_dir() else "is not a folder"
            raise ConfigError(
                f"RUN is `{path}`, which {what}; give a folder that training has written (--save_path), "
                "with run.json, config.yaml or metrics.jsonl in it"
            )
    html = args.output
    if html is None and args.json is None:
        html = args.runs[0] / "report.html" if len(args.runs) == 1 else Path("report.html")
    for option, file in (("-o", html), ("--json", None if args.json in (None, "-") else Path(args.json))):
        if file is not None and not file.absolute().parent.is_dir():
            raise ConfigError(f"{option} is `{file}`, but the folder `{file.parent}` does not exist; create it first")

    report = write_report(args.runs, html)
    talk = sys.stderr if args.json == "-" else sys.stdout
    if args.json:
        text = json.dumps(_plain_json(report), indent=1) + "\n"
        if args.json == "-":
            sys.stdout.write(text)
        else:
            Path(args.json).write_text(text)
            print(f"figures: {args.json}", file=talk)
    for found in report["comparisons"]:
        print(printable(found["sentence"]), file=talk)
    for run in report["runs"]:
        for text in run["missing"]:
            print(printable(f"note: {run['name']}: {text}"), file=talk)
    for problem in report["problems"]:
        print(printable(f"warning: {problem}"), file=sys.stderr)
    if report["html"]:
        print(f"report: {report['html']}", file=talk)
    return 1 if report["problems"] else 0
