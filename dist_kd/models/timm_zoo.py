"""timm's networks, as `timm/NAME`; timm is an extra and is imported only when one is built."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

from torch import nn

from dist_kd.errors import ConfigError
from dist_kd.models.names import close
from dist_kd.models.taps import Tap, numbered, of_resnet, pooled
from dist_kd.models.weights import Published, View


def _timm() -> Any:
    try:
        import timm
    except ImportError:
        raise ConfigError(
            "networks named `timm/...` need timm, which is not installed; run `pip install 'dist-kd[timm]'`"
        ) from None
    return timm


def _facts(name: str) -> Any:
    """timm's record of the weights that `name` (or `name.tag`) means by default; ConfigError for a miss."""
    timm = _timm()
    plain = name.partition(".")[0]
    known = timm.list_models() + timm.list_models(pretrained=True)
    if name not in known:
        if plain in known:  # the tag is wrong: near are the tags there are
            known = [other for other in known if other.partition(".")[0] == plain]
        raise ConfigError(f"network `timm/{name}` is not known to timm {timm.__version__}; {close(name, known)}")
    return timm.models.get_pretrained_cfg(name)


def construct(name: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """The network with random weights; networks tied to an image size are built for `image_size`."""
    size = {"img_size": image_size} if image_size and _facts(name).fixed_input_size else {}
    return _timm().create_model(name, pretrained=False, num_classes=num_classes, **size)


def taps(net: nn.Module) -> dict[str, Tap]:
    """Stages as timm's own list of features has them, from a quarter of the side on; before ReLU for its ResNets."""
    sides = [entry for entry in getattr(net, "feature_info", []) if entry["reduction"] >= 4]
    halves = all(a["reduction"] < b["reduction"] for a, b in pairwise(sides))  # a transformer's blocks keep the side
    if type(net).__name__ == "ResNet":
        roles = of_resnet(net)
    else:
        roles = numbered(Tap(entry["module"]) for entry in sides) if halves else {}
    return roles | pooled(net)


def view(name: str) -> View:
    cfg = _facts(name)
    return View(tuple(cfg.mean), tuple(cfg.std), cfg.input_size[-1], cfg.crop_pct, cfg.interpolation)


def published(name: str) -> list[Published]:
    """The one set of weights that `name` means, if timm hosts it in its own layout."""
    cfg = _facts(name)
    if not cfg.hf_hub_id or cfg.custom_load or not cfg.num_classes:
        return []
    label = f"{cfg.architecture}.{cfg.tag}" if cfg.tag else cfg.architecture
    hub = cfg.hf_hub_id if "/" in cfg.hf_hub_id and not cfg.hf_hub_id.endswith("/") else f"timm/{label}"
    url = f"https://huggingface.co/{hub}/resolve/main/model.safetensors"
    return [Published(label, view(name), cfg.num_classes, url=url, file=f"{label}.safetensors")]
