"""`dist-kd evaluate RUN | STUDENT_FOLDER | ARCH`: the trainer's evaluation of a finished network, count for count."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

from dist_kd.config import Config
from dist_kd.data.remote_urls import check_url
from dist_kd.errors import ConfigError, says_memory_ran_out

OF_EVALUATION = ("device_batch_size", "mixed_precision", "channels_last")  # settings that a student's folder keeps


class Subject(NamedTuple):
    """What is scored, and the settings of its own evaluation."""

    network: Any
    config: Config


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dist-kd evaluate",
        description="Score a run's student, a student's folder or a named network on a validation set, exactly: every "
        "sample once, on any number of processes (launch it like training). A run and its student are scored with the "
        "settings they were trained with, and give the trainer's counts.",
    )
    parser.add_argument("what", metavar="RUN|STUDENT_FOLDER|ARCH", help="a run's folder, a student's folder, or a name")
    parser.add_argument(
        "--data", help="data, as --val-data of training; DATA/test for a test set (default: a run's validation set)"
    )
    parser.add_argument("--weights", default="DEFAULT", help="for ARCH only, as --student-weights (default: DEFAULT)")
    parser.add_argument("--checkpoint", choices=("last", "best"), default="last", help="of a RUN (default: last)")
    parser.add_argument(
        "--device-batch-size", type=int, help="samples a device sees at once (default: as trained, or 64)"
    )
    parser.add_argument("--mixed-precision", choices=("no", "fp16", "bf16"), help="default: as trained, or no")
    parser.add_argument("--workers", type=int, default=2, help="loader processes (default: 2)")
    parser.add_argument(
        "--max-bad-fraction",
        type=_share,
        help="share of the samples that may be damaged, and are then not scored (default: as trained, or 0.01)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a line")
    return parser


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must be from 0 to 1, got `{text}`")
    return value


def main(argv: list[str]) -> int:
    args = build_parser().parse_args(argv)
    folder = Path(args.what)
    is_run = (folder / "config.yaml").is_file()
    if args.checkpoint == "best" and not is_run:
        raise ConfigError(f"--checkpoint best needs a run's folder, and `{args.what}` is none")

    check_url(args.data or "")
    from dist_kd.data.finding import shard_cache
    from dist_kd.runtime import start_runtime
    from dist_kd.sets import make_evaluator, on_every_rank, open_split

    changes = {
        "device_batch_size": args.device_batch_size,
        "mixed_precision": args.mixed_precision,
        "val_data": args.data,
        "workers": args.workers,
        "max_bad_fraction": args.max_bad_fraction,
    }
    subject = _of_run(folder, args.checkpoint) if is_run else _of_folder_or_name(args)
    config = subject.config.model_copy(update={k: v for k, v in changes.items() if v is not None})
    where = config.val_data or config.data
    if where is None:
        raise ConfigError("evaluate needs --data; only a run's folder knows its own validation set")
    runtime = start_runtime(config)
    cache = shard_cache(config)
    index = on_every_rank(runtime, cache, lambda: open_split(where, "val", cache) or open_split(where, "train", cache))
    network = subject.network
    if network.spec.num_classes != index.spec.num_classes:
        raise ConfigError(
            f"`{args.what}` has {network.spec.num_classes} classes and --data `{where}` has {index.spec.num_classes}; "
            "give data with the same classes (`dist-kd pack --class-list`)"
        )
    import torch

    from dist_kd import out_of_memory

    with out_of_memory.told_of_scoring(config, runtime, network.spec):
        network = network.to(runtime.device)
        if config.channels_last:
            network = network.to(memory_format=torch.channels_last)
        scores = make_evaluator(config, runtime, index, network.spec).score(network.eval())
    n = scores.samples
    result = {
        "what": args.what,
        "arch": network.spec.arch,
        "weights": network.spec.weights,
        "data": where,
        "samples": n,
        "top1_hits": scores.top1_hits,
        "top5_hits": scores.top5_hits,
        **{k.removeprefix("val/"): v for k, v in scores.values("val").items()},
    }
    text = (
        f"{network.spec.arch} on {n} samples: top-1 {scores.top1_hits}/{n} = {result['top1']:.2f} %, "
        f"top-5 {scores.top5_hits}/{n} = {result['top5']:.2f} %, loss {result['loss']:.4f}, ECE {scores.ece:.2f} %"
    )
    if scores.data.bad:
        kinds = ", ".join(f"{kind} {count}" for kind, count in scores.data.bad.items())
        text += f"; {result['bad_samples']} damaged samples not scored ({kinds}): {', '.join(scores.data.named)}"
    runtime.say(json.dumps(result) if args.json else text)
    runtime.close()
    return 0


def _of_run(folder: Path, which: str) -> Subject:
    """The student of a run with the run's own settings: the exported one, or the best checkpoint's."""
    from dist_kd import checkpoint, models
    from dist_kd.cli import parse
    from dist_kd.report.folder import at
    from dist_kd.run_folder import RunFolder

    config = parse(["--config", str(folder / "config.yaml")], {}).config
    exported = (folder / "student" / "config.json").is_file()
    evaluation = _evaluation(folder) if exported else {}
    config = config.model_copy(update={"mixed_precision": evaluation.get("mixed_precision", config.mixed_precision)})
    if which == "last" and exported:
        return Subject(models.load(folder), config)
    found = checkpoint.best_of(folder / "checkpoints") if which == "best" else None
    if which == "last":
        found, _ = checkpoint.find(folder / "checkpoints")
    if found is None:
        raise ConfigError(f"`{folder}` has no {which} checkpoint and no student yet; train it first")
    snapshot = checkpoint.load(found, "cpu")
    tensors = snapshot.tensors.get("ema", snapshot.tensors["model"])
    classes = at(RunFolder(folder).read("run.json"), "data", "train", "classes")
    if type(classes) is not int or classes < 1:
        raise ConfigError(f"`{folder / 'run.json'}` does not say how many classes the run was trained on; restore it")
    network = models.build(config.arch, classes, "none", image_size=config.image_size)
    try:
        network.load_state_dict(tensors)
    except RuntimeError as error:
        if says_memory_ran_out(error):
            raise
        why = " ".join(str(error).split())
        raise ConfigError(
            f"`{folder / 'config.yaml'}` names the network `{config.arch}`, which the checkpoint `{found}` is not of "
            f"({why:.300}); restore config.yaml as the run left it"
        ) from None
    precision = snapshot.facts["settings"]["mixed_precision"]
    return Subject(network, config.model_copy(update={"mixed_precision": precision}))


def _evaluation(folder: Path) -> dict[str, Any]:
    """The settings of the evaluation that a student's (or its run's) folder tells of. ConfigError if they cannot be."""
    from dist_kd.models import student_folder

    where = student_folder.find(folder, "the student folder")
    said = student_folder.read_config(where, "the student folder").extra.get("evaluation", {})
    try:
        known = {name: said[name] for name in OF_EVALUATION if name in said}
        Config(**known)
    except (TypeError, ValueError) as error:
        why = str(error).replace("\n", " ")
        raise ConfigError(f"`{where / 'config.json'}` tells of an evaluation that cannot be ({why})") from None
    return known


def _of_folder_or_name(args: argparse.Namespace) -> Subject:
    from dist_kd import models

    if Path(args.what).is_dir():
        known, network = _evaluation(Path(args.what)), models.load(args.what)
    else:
        known, network = {}, models.build(args.what, None, args.weights, role="model")
    return Subject(network, Config(**({"device_batch_size": 64, "mixed_precision": "no"} | known)))
