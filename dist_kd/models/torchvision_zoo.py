"""torchvision's classification networks, built without their downloads, and their published weights as facts."""

from __future__ import annotations

import re
from typing import Any

import torchvision.models
from torch import Tensor, nn

from dist_kd.models.weights import Published, View

# auxiliary heads would be parameters that no loss reaches
NO_AUXILIARY = {"aux_logits": False, "init_weights": True}
EXTRAS: dict[str, dict[str, Any]] = {"googlenet": NO_AUXILIARY, "inception_v3": NO_AUXILIARY}
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
# torchvision re-normalizes inside these networks (transform_input); to say so in the view is the same arithmetic
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def construct(name: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """The network with random weights. Only vision transformers and maxvit are tied to an image size."""
    size: dict[str, Any] = {}
    if name.startswith("vit_"):
        size = {"image_size": image_size or view(name).image_size}
    elif name.startswith("maxvit"):
        size = {"input_size": (image_size or view(name).image_size,) * 2}
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **EXTRAS.get(name, {}), **size)


def construct_cifar(name: str, num_classes: int) -> nn.Module:
    """resnet18_cifar or resnet34_cifar: the stem is one 3x3 convolution with stride 1, as is usual at 32 pixels."""
    net = torchvision.models.get_model(name.removesuffix("_cifar"), weights=None, num_classes=num_classes)
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net


def _repair(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Drops auxiliary heads and joins densenet's old names: `norm.1.weight` -> `norm1.weight`."""
    versions = getattr(state, "_metadata", None)
    old = re.compile(r"^(.*denselayer\d+\.(?:norm|relu|conv))\.([12]\..*)$")
    fixed = type(state)((old.sub(r"\1\2", k), v) for k, v in state.items() if not k.startswith(AUXILIARY))
    if versions is not None:
        fixed._metadata = versions
    return fixed


def _view(name: str, entry: Any) -> View:
    shown = entry.transforms()
    mean, std = HALF if name in EXTRAS else (tuple(shown.mean), tuple(shown.std))
    (size,), (resize,) = shown.crop_size, shown.resize_size
    return View(mean, std, size, size / resize, shown.interpolation.value)


def published(name: str) -> list[Published]:
    """Pretrained classifiers, the default first."""
    entries = torchvision.models.get_model_weights(name)
    ordered = [entries.DEFAULT, *(e for e in entries if e is not entries.DEFAULT)]
    return [
        Published(e.name, _view(name, e), len(e.meta["categories"]), url=e.url, repair=_repair)
        for e in ordered
        if e.meta["categories"] is not None  # vgg16's IMAGENET1K_FEATURES have no classifier
    ]


def view(name: str) -> View:
    """What the default weights expect: also the best guess for a network trained from scratch."""
    return _view(name, torchvision.models.get_model_weights(name).DEFAULT)
