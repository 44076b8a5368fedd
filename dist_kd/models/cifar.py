"""Networks for small images: two plain CNNs for any side of at least 8 pixels, two ResNets for 32."""

from __future__ import annotations

from torch import Tensor, nn

from dist_kd.models.weights import Published, View

MEAN, STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)  # of CIFAR-10's training pixels
WIDTHS = {"cnn_small": (16, 32, 64), "cnn_medium": (48, 96, 192)}


class SmallCNN(nn.Sequential):
    """[B, 3, H, W] with H, W >= 8 -> logits [B, C]: three 3x3 convolutions, each halving the side, then the mean."""

    def __init__(self, widths: tuple[int, ...], num_classes: int) -> None:
        layers: list[nn.Module] = []
        for inputs, outputs in zip((3, *widths), widths, strict=False):
            layers += [
                nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
                nn.BatchNorm2d(outputs),
                nn.ReLU(inplace=True),
                nn.MaxPool2d(2),
            ]
        super().__init__(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], num_classes))
        for module in self:
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images)


def construct(name: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """The network with random weights; it takes any image size."""
    if name in WIDTHS:
        return SmallCNN(WIDTHS[name], num_classes)
    from dist_kd.models.torchvision_zoo import construct_cifar

    return construct_cifar(name, num_classes)


def view(name: str) -> View:
    return View(MEAN, STD, 32, 1.0, "bilinear")


def published(name: str) -> list[Published]:
    return []
