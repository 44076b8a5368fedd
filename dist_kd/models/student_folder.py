"""The folder a student is handed on in: model.safetensors, config.json as timm writes it, README.md. No pickle.

Written whole or not at all. The weights bear the foreign network's own names, without wrapper or teacher.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from dist_kd.contracts import NetworkSpec
from dist_kd.errors import ConfigError
from dist_kd.models.names import resolve
from dist_kd.models.weights import View

if TYPE_CHECKING:
    from dist_kd.models.network import Network

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"
FORMAT = 1
MAX_BYTES = 16 << 20  # of a config.json: the names of 100,000 classes have a few MB


class StudentConfig(NamedTuple):
    arch: str  # canonical
    num_classes: int
    view: View
    classes: tuple[str, ...]
    extra: dict[str, Any]


def _timm_facts(net: Any) -> dict[str, Any]:
    """What timm needs to build its own network again; empty for other libraries' networks."""
    cfg = getattr(net, "pretrained_cfg", None)
    if not cfg:
        return {}
    facts = {
        "architecture": cfg["architecture"],
        "num_features": net.num_features,
        "pretrained_cfg": {k: cfg[k] for k in ("first_conv", "classifier", "pool_size") if cfg.get(k) is not None}
        | {"fixed_input_size": bool(cfg.get("fixed_input_size")), "custom_load": False},
    }
    pool = getattr(net, "global_pool", None)
    if isinstance(pool, str):
        facts["global_pool"] = pool
    return facts


def _config(network: Network, classes: tuple[str, ...], extra: dict[str, Any]) -> dict[str, Any]:
    import dist_kd

    spec: NetworkSpec = network.spec
    facts = _timm_facts(network.net)
    return {
        "architecture": facts.get("architecture", spec.arch),
        "num_classes": spec.num_classes,
        **{k: facts[k] for k in ("num_features", "global_pool") if k in facts},
        "label_names": list(classes),
        "pretrained_cfg": {
            "tag": "dist_kd",
            "input_size": [3, spec.image_size, spec.image_size],
            "interpolation": spec.interpolation,
            "crop_pct": spec.crop_pct,
            "crop_mode": "center",
            "mean": list(spec.mean),
            "std": list(spec.std),
            "num_classes": spec.num_classes,
            **facts.get("pretrained_cfg", {}),
        },
        "dist_kd": {"format": FORMAT, "version": dist_kd.__version__, "arch": spec.arch, **extra},
    }


def save_student(
    network: Network, folder: str | Path, *, classes: tuple[str, ...], card: str, extra: dict[str, Any]
) -> None:
    """Writes `folder` anew: the bare network's tensors, its description, and `card` as README.md.

    `classes` are the label names in label order; `extra` (JSON values) joins the section `dist_kd` of config.json.
    A reader sees the old folder or the new one, each whole; between the two renames, for an instant, none.
    """
    from safetensors.torch import save_file

    if len(classes) != network.spec.num_classes:
        raise ValueError(f"{len(classes)} class names for {network.spec.num_classes} classes")
    folder = Path(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    net = getattr(network.net, "_orig_mod", network.net)  # torch.compile's wrapper
    # cloned: safetensors refuses tensors that share memory; contiguous: channels_last is the run's business
    tensors = {k: v.detach().cpu().clone().contiguous() for k, v in net.state_dict().items()}
    temporary = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        save_file(tensors, temporary / WEIGHTS, metadata={"format": "pt"})
        (temporary / CONFIG).write_text(json.dumps(_config(network, classes, extra), indent=2) + "\n", "utf-8")
        (temporary / CARD).write_text(card, "utf-8")
        for path in temporary.iterdir():
            path.chmod(0o644)  # safetensors writes 0600, and mkdtemp 0700: others could not read the student
            with path.open("rb") as file:
                os.fsync(file.fileno())
        temporary.chmod(0o755)
        _replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _replace(new: Path, folder: Path) -> None:
    """Renames `new` to `folder`; what stood there goes last."""
    old = None
    if folder.exists():
        old = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}.old."))
        os.rename(folder, old / "was")
    os.rename(new, folder)
    parent = os.open(folder.parent, os.O_RDONLY)
    try:
        os.fsync(parent)
    finally:
        os.close(parent)
    if old:
        shutil.rmtree(old, ignore_errors=True)


def find(path: Path, flag: str) -> Path | None:
    """The student folder that `path` is or (a run folder) holds; None if `path` is a file; ConfigError if neither."""
    if not path.is_dir():
        return None
    for folder in (path, path / "student"):
        if (folder / CONFIG).is_file() and (folder / WEIGHTS).is_file():
            return folder
    raise ConfigError(
        f"folder `{path}` ({flag}) holds no student: neither it nor `student` inside it has {CONFIG} and {WEIGHTS}; "
        "has the run finished?"
    )


def read_config(folder: Path, flag: str) -> StudentConfig:
    """What `save_student` wrote about the network, checked."""
    try:
        if (size := (folder / CONFIG).stat().st_size) > MAX_BYTES:
            raise ValueError(f"it has {size} bytes, but at most {MAX_BYTES} are read")
        raw = json.loads((folder / CONFIG).read_text("utf-8"))
        ours, shown, classes = raw["dist_kd"], raw["pretrained_cfg"], raw["label_names"]
        mean, std = ((float(a), float(b), float(c)) for a, b, c in (shown["mean"], shown["std"]))
        view = View(mean, std, int(shown["input_size"][1]), float(shown["crop_pct"]), str(shown["interpolation"]))
        in_range = 0 < view.crop_pct <= 1 and 0 < view.image_size <= 8192 and min(std) > 0
        if not (in_range and all(map(math.isfinite, (*mean, *std)))):
            raise ValueError(
                f"crop_pct {view.crop_pct}, image size {view.image_size}, mean {mean} or std {std} is out of range"
            )
        if not (isinstance(classes, list) and all(isinstance(name, str) for name in classes)):
            raise TypeError("label_names is no list of texts")
        if view.interpolation not in ("bilinear", "bicubic"):
            raise ValueError(f"interpolation is {view.interpolation:.40}, neither bilinear nor bicubic")
        if not classes or len(classes) != int(raw["num_classes"]):
            raise ValueError(f"{len(classes)} label names for {raw['num_classes']} classes")
        arch = resolve(str(ours["arch"]), f"{folder / CONFIG}")
        return StudentConfig(arch, int(raw["num_classes"]), view, tuple(classes), dict(ours))
    # RecursionError: nested too deeply; OverflowError: a number that is infinite
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError, OverflowError) as error:
        raise ConfigError(
            f"`{folder / CONFIG}` ({flag}) does not describe a student of dist_kd ({type(error).__name__}: {error})"
        ) from None


def check_arch(config: StudentConfig, arch: str, folder: Path, flag: str) -> None:
    if config.arch != arch:
        raise ConfigError(f"weights `{folder}` ({flag}) are of `{config.arch}`, not of `{arch}`; name that network")
