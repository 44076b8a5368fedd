"""Networks for small images: two plain CNNs for any side of at least 8 pixels, and those that are usual at 32.

A name that ends in `_cifar` is of a network that the literature trains at 32 pixels; the part before may be a
library's name of the network for 224, or the name a paper gives.
"""

from __future__ import annotations

from torch import nn

from dist_kd.models.taps import Tap, of_sequence, pooled
from dist_kd.models.weights import Published, View

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training pixels
WIDTHS = {"cnn_small": (16, 32, 64), "cnn_medium": (16, 48, 96, 192)}
HALVINGS = 3  # of the plain CNNs: an 8 pixel side ends as 1


class SmallCNN(nn.Sequential):
    """[B, 3, H, W] with H, W >= 8 -> logits [B, C]: 3x3 convolutions, the first three halve the side, then the mean."""

    def __init__(self, widths: tuple[int, ...], num_classes: int) -> None:
        layers: list[nn.Module] = []
        for k, (inputs, outputs) in enumerate(zip((3, *widths), widths, strict=False)):
            layers.append(nn.Conv2d(inputs, outputs, 3, padding=1, bias=False))
            if k < HALVINGS:
                layers.append(nn.MaxPool2d(2))  # before norm and ReLU, which then touch a quarter of the numbers
            layers += [nn.BatchNorm2d(outputs), nn.ReLU(inplace=True)]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


def construct(name: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """The network with random weights; it takes any image size that its halvings leave something of."""
    if name in WIDTHS:
        return SmallCNN(WIDTHS[name], num_classes)
    from dist_kd.models.cifar_nets import MAKERS  # imports torchvision, which takes seconds

    return MAKERS[name](num_classes)


def taps(net: nn.Module) -> dict[str, Tap]:
    if isinstance(net, SmallCNN):
        return of_sequence(net) | pooled(net)
    from dist_kd.models import cifar_nets

    return cifar_nets.taps(net)


def view(name: str) -> View:
    """CIFAR's statistics, whatever the network."""
    return View(MEAN, STD, 32, 1.0, "bilinear")


def published(name: str) -> list[Published]:
    """None: these are trained here."""
    return []
