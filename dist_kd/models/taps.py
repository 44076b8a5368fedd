"""Where networks can be tapped, by roles that mean the same in each: a method asks for `stage2`, not for `layer2`.

stage1..N     the last map of each side in pixels, from the side at which a ResNet's first stage works
pre_relu1..N  before the activation that ends a stage; in networks of inverted bottlenecks, whose stages end without
              one, before the depthwise convolution's activation, at expanded width
pooled        [B, D]: what the last linear layer sees, before its dropout

N may differ between networks, and the sides too: `Network.shapes` says them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

ACTIVATIONS = (nn.ReLU, nn.ReLU6, nn.SiLU)


class Tap(NamedTuple):
    module: str  # path inside the foreign network
    before: bool = False  # what goes into that module (an activation, a head) instead of what comes out
    norm: str = ""  # batch norm whose bias and |weight| are mean and std of these values, where there is one


def numbered(stages: Iterable[Tap], pre_relu: Iterable[Tap] = ()) -> dict[str, Tap]:
    named = {f"stage{k}": tap for k, tap in enumerate(stages, 1)}
    return named | {f"pre_relu{k}": tap for k, tap in enumerate(pre_relu, 1)}


def pooled(net: nn.Module) -> dict[str, Tap]:
    """The input of the last linear layer, or of the dropout just before it; empty if there is no such layer."""
    linear = [path for path, module in net.named_modules() if isinstance(module, nn.Linear)]
    if not linear:
        return {}
    parent, _, name = linear[-1].rpartition(".")
    siblings = dict(net.get_submodule(parent).named_children())
    before = list(siblings)[: list(siblings).index(name)]
    if before and isinstance(siblings[before[-1]], nn.Dropout) and isinstance(net.get_submodule(parent), nn.Sequential):
        name = before[-1]
    return {"pooled": Tap(f"{parent}.{name}" if parent else name, before=True)}


def of_resnet(net: nn.Module) -> dict[str, Tap]:
    """For `layer1..N` of blocks that end in `relu(norm(x) + shortcut)`, torchvision's or timm's."""
    layers = [f"layer{k}" for k in range(1, 9) if hasattr(net, f"layer{k}")]
    pre_relu = []
    for layer in layers:
        last = len(net.get_submodule(layer)) - 1
        block = net.get_submodule(f"{layer}.{last}")
        number = 3 if hasattr(block, "bn3") else 2
        # torchvision's block calls one ReLU two or three times: the last call counts
        activation = "relu" if hasattr(block, "relu") else f"act{number}"
        pre_relu.append(Tap(f"{layer}.{last}.{activation}", before=True, norm=f"{layer}.{last}.bn{number}"))
    return numbered(map(Tap, layers), pre_relu)


def of_sequence(layers: nn.Sequential, prefix: str = "") -> dict[str, Tap]:
    """For convolutions in a row: a stage ends with the last activation before the side is halved, or before the end."""
    last, norm, pending, ends = "", "", "", []
    for name, module in layers.named_children():
        if isinstance(module, nn.MaxPool2d) and last:
            ends.append((last, norm))
            last = ""
        elif isinstance(module, _BatchNorm):
            pending = name
        elif isinstance(module, nn.Conv2d):
            pending = ""  # a norm must stand between this convolution and its activation to describe its input
        elif isinstance(module, ACTIVATIONS):
            last, norm = name, pending
    ends += [(last, norm)] if last else []
    return numbered(
        (Tap(prefix + name) for name, _ in ends),
        (Tap(prefix + name, before=True, norm=norm and prefix + norm) for name, norm in ends),
    )


def of_inverted(net: nn.Module, blocks: list[str], *, whole: bool = False) -> dict[str, Tap]:
    """For inverted bottlenecks, given as paths in order; with `whole`, also those before the first halved side."""
    groups: list[list[tuple[str, str, bool]]] = [[]]
    for path in blocks:
        layers = [(n, m) for n, m in net.get_submodule(path).named_modules() if isinstance(m, nn.Conv2d | _BatchNorm)]
        convs = [k for k, (_, m) in enumerate(layers) if isinstance(m, nn.Conv2d)]
        depthwise = [k for k in convs if layers[k][1].groups == layers[k][1].out_channels]
        main = (depthwise or convs)[0]
        norm = next(n for n, m in layers[main:] if isinstance(m, _BatchNorm))
        if layers[main][1].stride[0] > 1:
            groups.append([])
        groups[-1].append((path, f"{path}.{norm}", main > convs[0]))
    groups = groups if whole else groups[1:]
    # of a group, the first block that widens its input: where there is a halving, that is the block that halves
    chosen = [next((norm for _, norm, expands in group if expands), group[0][1]) for group in groups]
    return numbered((Tap(group[-1][0]) for group in groups), (Tap(norm, norm=norm) for norm in chosen))
