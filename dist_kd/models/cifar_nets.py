"""The networks whose names end in `_cifar`: torchvision's with other stems, and those of three stages it lacks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torchvision.models.resnet import BasicBlock, Bottleneck

from dist_kd.models import cifar_stems as stems
from dist_kd.models import torchvision_zoo
from dist_kd.models.taps import Tap, numbered, of_resnet, of_sequence, pooled


def _init_convolutions(net: nn.Module) -> None:
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")


class StageResNet(nn.Module):
    """[B, 3, H, W] -> [B, C]: a stem that keeps the side, then stages of torchvision's blocks, each half the last.

    `planes` are the blocks' nominal widths by stage; a block gives `block.expansion` times as many channels.
    """

    def __init__(
        self,
        block: type[BasicBlock] | type[Bottleneck],
        stem: int,
        planes: tuple[int, ...],
        depth: int,
        num_classes: int,
        *,
        kernel: int = 3,
        groups: int = 1,
        base_width: int = 64,
    ) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, stem, kernel, padding=kernel // 2, bias=False)
        self.bn1 = nn.BatchNorm2d(stem)
        self.relu = nn.ReLU(inplace=True)
        inputs = stem
        for number, width in enumerate(planes, 1):
            blocks = []
            for k in range(depth):
                stride = 2 if k == 0 and number > 1 else 1
                outputs, shortcut = width * block.expansion, None
                if stride > 1 or inputs != outputs:
                    projection = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
                    shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))
                blocks.append(block(inputs, width, stride, shortcut, groups, base_width))
                inputs = outputs
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.stages = len(planes)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(inputs, num_classes)
        _init_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.relu(self.bn1(self.conv1(images)))
        for number in range(1, self.stages + 1):
            maps = getattr(self, f"layer{number}")(maps)
        return self.fc(self.avgpool(maps).flatten(1))

    def taps(self) -> dict[str, Tap]:
        return of_resnet(self) | pooled(self)


class WideBlock(nn.Module):
    """Norm and ReLU before each convolution; where widths differ, the shortcut too takes the normed input."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.bn1 = nn.BatchNorm2d(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.relu = nn.ReLU(inplace=True)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, maps: Tensor) -> Tensor:
        active = self.relu(self.bn1(maps))
        residual = self.conv2(self.relu(self.bn2(self.conv1(active))))
        return residual + (maps if self.shortcut is None else self.shortcut(active))


class WideResNet(nn.Module):
    """[B, 3, H, W] -> [B, C]: three stages of (depth - 4) / 6 blocks with 16, 32 and 64 times `widen` channels."""

    def __init__(self, depth: int, widen: int, num_classes: int) -> None:
        super().__init__()
        widths = (16, 16 * widen, 32 * widen, 64 * widen)
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        for number in (1, 2, 3):
            blocks = [
                WideBlock(
                    widths[number - 1] if k == 0 else widths[number], widths[number], 2 if k == 0 < number - 1 else 1
                )
                for k in range((depth - 4) // 6)
            ]
            self.add_module(f"layer{number}", nn.Sequential(*blocks))
        self.bn = nn.BatchNorm2d(widths[3])
        self.relu = nn.ReLU(inplace=True)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(widths[3], num_classes)
        _init_convolutions(self)

    def forward(self, images: Tensor) -> Tensor:
        maps = self.layer3(self.layer2(self.layer1(self.conv1(images))))
        return self.fc(self.avgpool(self.relu(self.bn(maps))).flatten(1))

    def taps(self) -> dict[str, Tap]:
        """A stage's sum meets norm and ReLU only in the block after it: there it is tapped before ReLU."""
        norms = ("layer2.0.bn1", "layer3.0.bn1", "bn")
        return numbered(map(Tap, ("layer1", "layer2", "layer3")), (Tap(n, norm=n) for n in norms)) | pooled(self)


class DenseLayer(nn.Module):
    """maps [B, I, H, W] -> [B, I + growth, H, W]: one 3x3 convolution, without the 1x1 bottleneck."""

    def __init__(self, inputs: int, growth: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(inputs)
        self.relu = nn.ReLU(inplace=True)
        self.conv = nn.Conv2d(inputs, growth, 3, 1, 1, bias=False)

    def forward(self, maps: Tensor) -> Tensor:
        return torch.cat((maps, self.conv(self.relu(self.norm(maps)))), 1)


class DenseNet(nn.Sequential):
    """[B, 3, H, W] -> [B, C]: three blocks of `depth` dense layers; the transitions between them keep the width."""

    def __init__(self, depth: int, growth: int, num_classes: int) -> None:
        width = 2 * growth
        features = OrderedDict[str, nn.Module](conv0=nn.Conv2d(3, width, 3, 1, 1, bias=False))
        for number in (1, 2, 3):
            features[f"block{number}"] = nn.Sequential(*(DenseLayer(width + k * growth, growth) for k in range(depth)))
            width += depth * growth
            features[f"norm{number}"] = nn.BatchNorm2d(width)
            features[f"relu{number}"] = nn.ReLU(inplace=True)
            if number < 3:
                features[f"conv{number}"] = nn.Conv2d(width, width, 1, bias=False)
                features[f"pool{number}"] = nn.AvgPool2d(2)
        head = OrderedDict(avgpool=nn.AdaptiveAvgPool2d(1), flatten=nn.Flatten(), fc=nn.Linear(width, num_classes))
        super().__init__(features | head)
        _init_convolutions(self)

    def taps(self) -> dict[str, Tap]:
        norms = [f"norm{k}" for k in (1, 2, 3)]
        return numbered((Tap(f"block{k}") for k in (1, 2, 3)), (Tap(n, norm=n) for n in norms)) | pooled(self)


def _resnet(depth: int, times: int = 1) -> Callable[[int], nn.Module]:
    """ResNets of 6 n + 2 layers; `times` 4 also doubles the stem, as the distillation literature's x4 networks do."""
    stem = 16 if times == 1 else 32
    planes = (16 * times, 32 * times, 64 * times)
    return lambda classes: StageResNet(BasicBlock, stem, planes, (depth - 2) // 6, classes)


def _resnext(groups: int, width: int) -> Callable[[int], nn.Module]:
    """29 layers, blocks that give twice their inner width, a 1x1 stem; `groups` x `width` channels in the first stage.

    In the terms of torchvision's block, which gives four times its nominal width.
    """
    planes = tuple(groups * width // 2 * k for k in (1, 2, 4))
    return lambda classes: StageResNet(
        Bottleneck, 64, planes, 3, classes, kernel=1, groups=groups, base_width=128 // groups
    )


MAKERS: dict[str, Callable[[int], nn.Module]] = {
    **{f"resnet{n}_cifar": lambda classes, n=n: stems.resnet(f"resnet{n}", classes) for n in (18, 34, 50, 152)},
    **{f"resnet{n}_cifar": _resnet(n) for n in (20, 32, 56, 110)},
    **{f"resnet{n}x4_cifar": _resnet(n, 4) for n in (8, 32)},
    "wrn_16_2_cifar": lambda classes: WideResNet(16, 2, classes),
    "wrn_40_1_cifar": lambda classes: WideResNet(40, 1, classes),
    "wrn_40_2_cifar": lambda classes: WideResNet(40, 2, classes),
    **{f"{name}_cifar": lambda classes, name=name: stems.vgg(name, classes) for name in stems.VGG},
    "resnext29_2x64d_cifar": _resnext(2, 64),
    "resnext29_32x4d_cifar": _resnext(32, 4),
    "resnext29_32x8d_cifar": _resnext(32, 8),
    "densenet40_cifar": lambda classes: DenseNet(12, 12, classes),
    "mobilenet_v2_cifar": stems.mobilenet_v2,
    "efficientnet_b0_cifar": stems.efficientnet_b0,
}


def taps(net: nn.Module) -> dict[str, Tap]:
    if isinstance(net, StageResNet | WideResNet | DenseNet):
        return net.taps()
    if isinstance(net, nn.Sequential):
        return of_sequence(net.features, "features.") | pooled(net)
    return torchvision_zoo.taps(net)
