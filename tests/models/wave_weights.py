"""Weights and images by a formula, so that other programs can be given the same."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn


def wave(parameter: int, shape: torch.Size) -> Tensor:
    """The values of parameter number `parameter`, float64; vectors are near 1, as a norm's weights."""
    count = torch.Size(shape).numel()
    values = torch.sin(0.37 * (1 + parameter % 5) * torch.arange(count, dtype=torch.float64) + parameter).view(shape)
    return values * (4 / shape[1:].numel()) ** 0.5 if len(shape) > 1 else 1 + 0.1 * values


def logits(net: nn.Module, parameters: Iterable[nn.Parameter], size: int) -> Tensor:
    """The first three logits of the second of two images, in evaluation with fresh running statistics."""
    net = net.double().eval()
    with torch.no_grad():
        for number, parameter in enumerate(parameters):
            parameter.copy_(wave(number, parameter.shape))
        pixels = torch.sin(0.11 * torch.arange(2 * 3 * size * size, dtype=torch.float64))
        return net(pixels.view(2, 3, size, size))[1, :3]
