"""torchvision's classification networks, built without their downloads, and their published weights as facts."""

from __future__ import annotations

import re
from typing import Any

import torchvision.models
from torch import Tensor, nn

from dist_kd.models.taps import Tap, numbered, of_inverted, of_resnet, of_sequence, pooled
from dist_kd.models.weights import Published, View

# auxiliary heads would be parameters that no loss reaches
NO_AUXILIARY = {"aux_logits": False, "init_weights": True}
EXTRAS: dict[str, dict[str, Any]] = {"googlenet": NO_AUXILIARY, "inception_v3": NO_AUXILIARY}
AUXILIARY = ("aux1.", "aux2.", "AuxLogits.")
# torchvision re-normalizes inside these networks (transform_input); to say so in the view is the same arithmetic
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
INVERTED = (torchvision.models.MobileNetV2, torchvision.models.MobileNetV3, torchvision.models.EfficientNet)


def construct(name: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """The network with random weights. Only vision transformers and maxvit are tied to an image size."""
    size: dict[str, Any] = {}
    if name.startswith("vit_"):
        size = {"image_size": image_size or view(name).image_size}
    elif name.startswith("maxvit"):
        size = {"input_size": (image_size or view(name).image_size,) * 2}
    return torchvision.models.get_model(name, weights=None, num_classes=num_classes, **EXTRAS.get(name, {}), **size)


def taps(net: nn.Module) -> dict[str, Tap]:
    """Roles of the families that feature methods are used on; of the others only what the head sees."""
    roles: dict[str, Tap] = {}
    if isinstance(net, torchvision.models.ResNet):
        roles = of_resnet(net)
    elif isinstance(net, torchvision.models.VGG):
        roles = of_sequence(net.features, "features.")
    elif isinstance(net, torchvision.models.DenseNet):
        norms = [f"features.transition{k}.norm" for k in (1, 2, 3)] + ["features.norm5"]
        roles = numbered((Tap(f"features.denseblock{k}") for k in (1, 2, 3, 4)), (Tap(n, norm=n) for n in norms))
    elif isinstance(net, INVERTED):
        blocks = [
            path
            for path, module in net.named_modules()
            if type(module).__name__ in ("InvertedResidual", "MBConv", "FusedMBConv")
        ]
        # a stem that keeps the side is one for small images: there the blocks before the first halving count too
        roles = of_inverted(net, blocks, whole=net.features[0][0].stride == (1, 1))
    return roles | pooled(net)


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
