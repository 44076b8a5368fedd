"""The head apart from the rest: which layer it is, and training it alone."""

from __future__ import annotations

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from dist_kd.errors import ConfigError
from dist_kd.models.network import Network


def head_of(network: Network) -> str:
    """The path inside `network.net` of the layer that makes the logits; ConfigError if there is none."""
    classes = network.spec.num_classes
    paths = [
        path
        for path, module in network.net.named_modules()
        if (getattr(module, "out_features", None) or getattr(module, "out_channels", None)) == classes
        and isinstance(module, nn.Linear | nn.Conv2d)
    ]
    if not paths:
        raise ConfigError(
            f"`{network.spec.arch}` has no single layer that makes its {classes} logits, which --freeze and --head-lr "
            "treat apart; leave them out"
        )
    return paths[-1]  # the last: a layer before may happen to be as wide


def head_parameters(network: Network) -> list[nn.Parameter]:
    """The parameters of the layer that makes the logits; ConfigError if there is none."""
    return list(network.net.get_submodule(head_of(network)).parameters())


def freeze_backbone(network: Network, train_norms: bool = False) -> list[str]:
    """Freezes all but the layer that makes the logits, in place; the names of the parameters that no longer learn.

    The frozen part stays in evaluation mode under train(): its batch norms keep their statistics, its dropout is off.
    With `train_norms` its batch norms normalize by the batch and their statistics follow the data, as they do in an
    ordinary training mode; their weights and biases stay as they are. A dropout right before the head goes on.
    """
    head = head_of(network)
    frozen = [name for name, _ in network.net.named_parameters() if not name.startswith(head + ".")]
    for name, parameter in network.net.named_parameters():
        parameter.requires_grad_(name.startswith(head + "."))
    network.at_rest = tuple(_at_rest(network.net, head, train_norms))
    network.train(network.training)
    return [f"net.{name}" for name in frozen]


def _at_rest(module: nn.Module, head: str, train_norms: bool, path: str = "") -> list[str]:
    """The largest submodules that hold something and not the head, or with `train_norms` no batch norm either."""
    found = []
    for name, child in module.named_children():
        here = f"{path}.{name}" if path else name
        if here == head or (train_norms and isinstance(child, _BatchNorm)):
            continue
        inner = list(child.modules())
        if head.startswith(here + ".") or (train_norms and any(isinstance(m, _BatchNorm) for m in inner)):
            # the flag of a module that decides by itself, as a block with stochastic depth does, is its own
            found += _at_rest(child, head, train_norms, here)
        elif any(True for _ in child.parameters()):
            found.append(here)
    return found
