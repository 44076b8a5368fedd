"""torchvision's networks with stems for 32 pixels: nothing is halved before the first stage has seen the whole side."""

from __future__ import annotations

from collections import OrderedDict

import torchvision.models
from torch import nn
from torchvision.models.vgg import make_layers

# a number is a convolution's width, M halves the side
VGG: dict[str, list[str | int]] = {
    "vgg8": [64, "M", 128, "M", 256, "M", 512, 512],
    "vgg13": [64, 64, "M", 128, 128, "M", 256, 256, "M", 512, 512, 512, 512],
    "vgg19_bn": [64, 64, "M", 128, 128, "M", *[256] * 4, "M", *[512] * 4, "M", *[512] * 4, "M"],
}
# expansion, width, repeats, stride: as for 224 pixels but for the second row, which does not halve
MOBILENET_V2 = (
    (1, 16, 1, 1),
    (6, 24, 2, 1),
    (6, 32, 3, 2),
    (6, 64, 4, 2),
    (6, 96, 3, 1),
    (6, 160, 3, 2),
    (6, 320, 1, 1),
)


def resnet(name: str, num_classes: int) -> nn.Module:
    """The ResNet `name` with one 3x3 convolution as its stem and no max-pool."""
    net = torchvision.models.get_model(name, weights=None, num_classes=num_classes)
    net.conv1 = nn.Conv2d(3, 64, 3, 1, 1, bias=False)
    nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")
    net.maxpool = nn.Identity()
    return net


def vgg(name: str, num_classes: int, pooled_side: int = 1) -> nn.Module:
    """A VGG with batch norm and one linear layer on its map pooled to `pooled_side`; torchvision's feature names."""
    layers = OrderedDict(
        features=make_layers(VGG[name], batch_norm=True),
        avgpool=nn.AdaptiveAvgPool2d(pooled_side),
        flatten=nn.Flatten(),
        classifier=nn.Linear(512 * pooled_side**2, num_classes),
    )
    net = nn.Sequential(layers)
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, 0, 0.01)
            nn.init.zeros_(module.bias)
    return net


def mobilenet_v2(num_classes: int) -> nn.Module:
    """MobileNetV2 whose stem and second row keep the side: 32 pixels end as 4."""
    rows = [list(row) for row in MOBILENET_V2]
    net = torchvision.models.MobileNetV2(num_classes, inverted_residual_setting=rows)
    net.features[0][0].stride = (1, 1)
    return net


def efficientnet_b0(num_classes: int) -> nn.Module:
    """EfficientNet-B0 with a stem of stride 1 and no last 1x1 convolution: the head sees 320 channels."""
    net = torchvision.models.efficientnet_b0(weights=None, num_classes=num_classes)
    net.features[0][0].stride = (1, 1)
    del net.features[8]
    head = nn.Linear(320, num_classes)
    bound = num_classes**-0.5  # torchvision's own choice for its heads
    nn.init.uniform_(head.weight, -bound, bound)
    nn.init.zeros_(head.bias)
    net.classifier[1] = head
    return net
