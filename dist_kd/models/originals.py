"""The four projects' own networks, layer by layer as they built them, with the views they trained on.

A `resnet18_fine` `residual_cnn`; B `vgg19_bn_tiled` `cnn_norm_last`; D `mobilenets_m` `mobilenets_s`. C's, and what
else A, B and D used, are in the other zoos: `resnet34`, `mobilenet_v2`, `efficientnet_b0_cifar`, ...
"""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch
import torchvision.models
from torch import Tensor, nn
from torchvision.ops import Conv2dNormActivation

from dist_kd.errors import ConfigError
from dist_kd.models import torchvision_zoo
from dist_kd.models.cifar_stems import vgg
from dist_kd.models.taps import Tap, numbered, of_inverted, of_sequence, pooled
from dist_kd.models.weights import IMAGENET_MEAN, IMAGENET_STD, Published, View

if TYPE_CHECKING:
    from dist_kd.models.network import Network

MEAN_A, STD_A = (0.4914, 0.4822, 0.4465), (0.2023, 0.1994, 0.2010)  # A's; the std is a mean over images, not of pixels
HALF = (0.5, 0.5, 0.5)
# expansion (0: the variant's), width, repeats, stride
MOBILENETS = ((1, 16, 1, 1), (0, 24, 2, 2), (0, 32, 3, 2), (0, 64, 4, 2), (0, 96, 3, 1), (0, 160, 3, 2), (0, 320, 1, 1))
EXPANSIONS = {"mobilenets_m": 4, "mobilenets_s": 2}


def resnet18_fine(num_classes: int) -> nn.Module:
    """torchvision's ResNet-18 without three of its five halvings: at 32 pixels its maps are 16, 16, 8 and 8 wide.

    Only strides differ, so that ImageNet weights fit.
    """
    net = torchvision.models.resnet18(weights=None, num_classes=num_classes)
    for conv in (net.conv1, *(layer[0].conv1 for layer in (net.layer2, net.layer4))):
        conv.stride = (1, 1)
    for layer in (net.layer2, net.layer4):
        layer[0].downsample[0].stride = (1, 1)
    return net


class ResidualStage(nn.Module):
    """maps -> maps 1 pixel smaller, and by what the convolution's padding lacks: relu(norm(conv)) + 1x1, max-pooled."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, bias=False)
        self.pool = nn.MaxPool2d(2, stride=1)
        self.crop = (kernel - 3) // 2

    def forward(self, maps: Tensor) -> Tensor:
        shortcut = self.shortcut(maps)
        if self.crop:
            shortcut = shortcut[:, :, self.crop : -self.crop, self.crop : -self.crop]
        return self.pool(self.relu(self.norm(self.conv(maps))) + shortcut)


class ResidualCNN(nn.Sequential):
    """[B, 3, S, S] -> [B, C]: three stages that hardly shrink the side, and a head on all of the last map.

    The head is affine (linear, norm, linear), hence one linear layer in evaluation: `folded` is that. The norm refuses
    a training batch of 1.
    """

    def __init__(self, num_classes: int, image_size: int, *, folded: bool = False) -> None:
        inputs = 128 * (image_size - 5) ** 2
        layers = OrderedDict[str, nn.Module](
            stage1=ResidualStage(3, 32, 5), stage2=ResidualStage(32, 64, 3), stage3=ResidualStage(64, 128, 3)
        )
        layers["flatten"] = nn.Flatten()
        layers["classifier"] = (
            nn.Linear(inputs, num_classes)
            if folded
            else nn.Sequential(nn.Linear(inputs, 500), nn.BatchNorm1d(500), nn.Linear(500, num_classes))
        )
        super().__init__(layers)


def foldable(network: nn.Module) -> bool:
    """Whether `fold_affine_head` can make it smaller."""
    net = getattr(network, "net", None)
    return isinstance(net, ResidualCNN) and isinstance(net.classifier, nn.Sequential)


def fold_affine_head(network: Network) -> Network:
    """A copy of `residual_cnn` in evaluation mode as `residual_cnn_folded`: the same function of 1.04 M parameters.

    W = W2 G W1 and b = W2 (G (b1 - mean) + beta) + b2, where the norm is G (x - mean) + beta. Of the network's taps
    none is wanted in the copy. ConfigError for another network.
    """
    if not foldable(network):
        raise ConfigError(f"`{network.spec.arch}` has no affine head to fold; only `residual_cnn` has one")
    spec = dataclasses.replace(network.spec, arch="residual_cnn_folded")
    first, norm, second = network.net.classifier
    with torch.no_grad():
        # in double precision, so that 93,312 products per output do not add up their rounding
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        outer = second.weight.double() * scale
        shift = (first.bias.double() - norm.running_mean.double()) @ outer.T
        bias = shift + second.weight.double() @ norm.bias.double() + second.bias.double()
        head = {"weight": outer @ first.weight.double(), "bias": bias}
    state = {name: value.clone() for name, value in network.net.state_dict().items() if "classifier" not in name}
    state |= {f"classifier.{name}": value.to(first.weight.dtype) for name, value in head.items()}
    with torch.device("meta"):  # the tensors are given at once
        net = ResidualCNN(spec.num_classes, spec.image_size, folded=True)
    net.load_state_dict(state, assign=True)
    return type(network)(net, spec, taps=taps(net), notes=network.notes).eval()


def cnn_norm_last(num_classes: int, image_size: int) -> nn.Module:
    """Three 3x3 convolutions, each with ReLU and max-pool before its norm; the head sees all of the last map."""
    layers: list[nn.Module] = []
    for inputs, outputs in ((3, 32), (32, 64), (64, 128)):
        layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(inplace=True), nn.MaxPool2d(2)]
        layers.append(nn.BatchNorm2d(outputs))
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(128 * (image_size // 8) ** 2, num_classes))


def _init_by_inputs(net: nn.Module) -> nn.Module:
    """He's normal weights by fan-in, over convolutions and linear layers alike, as B has them."""
    for module in net.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight)
    return net


class OverlapBlock(nn.Module):
    """Quarters a b c d of the input, as a b b c c d d a, through a 1x1 in four groups, a depthwise 3x3 and a 1x1.

    Neighbouring groups share a quarter. No activation follows the grouped convolution.
    """

    def __init__(self, inputs: int, outputs: int, stride: int, expansion: int) -> None:
        super().__init__()
        hidden = inputs * expansion
        self.conv = nn.Sequential(
            Conv2dNormActivation(2 * inputs, hidden, 1, groups=4, activation_layer=None),
            Conv2dNormActivation(hidden, hidden, 3, stride, groups=hidden, activation_layer=nn.SiLU),
            Conv2dNormActivation(hidden, outputs, 1, activation_layer=None),
        )
        self.keeps_shape = stride == 1 and inputs == outputs

    def forward(self, maps: Tensor) -> Tensor:
        a, b, c, d = maps.chunk(4, dim=1)
        residual = self.conv(torch.cat((a, b, b, c, c, d, d, a), dim=1))
        return maps + residual if self.keeps_shape else residual


class MobileNetS(nn.Sequential):
    """[B, 3, H, W] -> [B, C]: MobileNetV2's rows with OverlapBlock; torchvision's names."""

    def __init__(self, expansion: int, num_classes: int) -> None:
        features: list[nn.Module] = [Conv2dNormActivation(3, 32, 3, 2, activation_layer=nn.SiLU)]
        inputs = 32
        for times, outputs, repeats, stride in MOBILENETS:
            for k in range(repeats):
                features.append(OverlapBlock(inputs, outputs, stride if k == 0 else 1, times or expansion))
                inputs = outputs
        features.append(Conv2dNormActivation(inputs, 1280, 1, activation_layer=nn.SiLU))
        layers = OrderedDict[str, nn.Module](features=nn.Sequential(*features), avgpool=nn.AdaptiveAvgPool2d(1))
        layers["flatten"] = nn.Flatten()
        layers["classifier"] = nn.Sequential(nn.Dropout(0.2), nn.Linear(1280, num_classes))
        super().__init__(layers)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out")
            elif isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, 0, 0.01)
                nn.init.zeros_(module.bias)


def construct(name: str, num_classes: int, image_size: int | None = None) -> nn.Module:
    """The network with random weights; `residual_cnn` and `cnn_norm_last` are tied to the image size (default 32)."""
    if name == "resnet18_fine":
        return resnet18_fine(num_classes)
    if name == "vgg19_bn_tiled":
        # the pool repeats the last map, which is 1 pixel wide at 32, 49 times
        return _init_by_inputs(vgg("vgg19_bn", num_classes, pooled_side=7))
    if name == "cnn_norm_last":
        return _init_by_inputs(cnn_norm_last(num_classes, image_size or 32))
    if name in EXPANSIONS:
        return MobileNetS(EXPANSIONS[name], num_classes)
    return ResidualCNN(num_classes, image_size or 32, folded=name == "residual_cnn_folded")


def taps(net: nn.Module) -> dict[str, Tap]:
    if isinstance(net, torchvision.models.ResNet):
        return torchvision_zoo.taps(net)
    if isinstance(net, ResidualCNN):
        stages = [f"stage{k}" for k in (1, 2, 3)]
        roles = numbered(map(Tap, stages), (Tap(f"{s}.relu", before=True, norm=f"{s}.norm") for s in stages))
    elif isinstance(net, MobileNetS):
        roles = of_inverted(net, [f"features.{k}" for k in range(1, 18)])
    elif isinstance(net[0], nn.Sequential):
        roles = of_sequence(net.features, "features.")
    else:
        roles = of_sequence(net)
    return roles | pooled(net)


def view(name: str) -> View:
    """As each project normalized and resized."""
    if name in EXPANSIONS:
        return View(HALF, HALF, 224, 1.0, "bilinear")
    if name in ("vgg19_bn_tiled", "cnn_norm_last"):
        return View(IMAGENET_MEAN, IMAGENET_STD, 32, 1.0, "bilinear")
    return View(MEAN_A, STD_A, 32, 1.0, "bilinear")


def published(name: str) -> list[Published]:
    """ImageNet's weights for `resnet18_fine`, under its own view: that is what it was fine-tuned from."""
    if name != "resnet18_fine":
        return []
    return [offer._replace(view=view(name)) for offer in torchvision_zoo.published("resnet18")]
