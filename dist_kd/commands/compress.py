"""`dist-kd compress`: two networks side by side, before anything is trained."""

from __future__ import annotations

import argparse
import json

from dist_kd.config import Config
from dist_kd.errors import ConfigError
from dist_kd.models import build, resolve


def _parser() -> argparse.ArgumentParser:
    fields = Config.model_fields
    parser = argparse.ArgumentParser(
        prog="dist-kd compress",
        description="Parameters, bytes, FLOPs, activations and CPU latency of student and teacher, with their ratios. "
        "Weights do not matter for sizes, so none are loaded.",
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--arch", "-a", default=fields["arch"].default, help="student network (default: %(default)s)")
    teacher = fields["teacher_arch"].default
    add("--teacher-arch", default=teacher, help="teacher network (default: %(default)s); none: the student alone")
    add("--num-classes", type=int, default=1000, metavar="N", help="classes (default: %(default)s)")
    add("--image-size", type=int, metavar="PIXELS", help="side of the image (default: each network's own)")
    add("--no-latency", action="store_true", help="sizes only")
    add("--threads", type=int, default=1, help="CPU threads for latency (default: %(default)s)")
    add("--seconds", type=float, default=3.0, help="time for each network and batch size (default: %(default)s)")
    add("--json", action="store_true", help="print JSON instead of a table")
    return parser


def main(argv: list[str]) -> int:
    """Exit code of the command."""
    args = _parser().parse_args(argv)
    for flag, value, least in (
        ("--num-classes", args.num_classes, 1),
        ("--image-size", args.image_size, 4),
        ("--threads", args.threads, 1),
        ("--seconds", args.seconds, 0.001),
    ):
        if value is not None and not value >= least:
            raise ConfigError(f"{flag} is `{value}`, but must be at least {least}")
    alone = args.teacher_arch == "none"
    resolve(args.arch, "--arch")  # both names are checked before torch is imported and one network built
    if not alone:
        resolve(args.teacher_arch, "--teacher-arch")

    from dist_kd.compression import compare, table

    student = build(args.arch, args.num_classes, image_size=args.image_size)
    teacher = None
    if not alone:
        teacher = build(args.teacher_arch, args.num_classes, role="teacher", image_size=args.image_size)
    result = compare(
        teacher,
        student,
        student.spec.image_size,
        latency=not args.no_latency,
        teacher_image_size=teacher.spec.image_size if teacher else None,
        threads=args.threads,
        seconds=args.seconds,
    )
    print(json.dumps(result, indent=1) if args.json else table(result), end="\n" if args.json else "")
    return 0
