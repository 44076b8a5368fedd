"""Parameter groups and the optimizer. No schedule: the loop sets the rate that the plan gives for the step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from dist_kd.config import Config


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict]:
    """Two groups: decayed (matrices and kernels), and not (norms, biases and other vectors: ndim < 2)."""
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.ndim < 2], "weight_decay": 0.0},
    ]
    return [g for g in groups if g["params"]]


def make_optimizer(config: Config, module: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `config.optimizer` over `module`, in fused or foreach form where torch chooses so."""
    groups = parameter_groups(module, config.weight_decay)
    lr, momentum = config.peak_lr, config.momentum
    makers = {
        "sgd": lambda: torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0),
        "adam": lambda: torch.optim.Adam(groups, lr=lr, betas=(momentum, 0.999)),
        "adamw": lambda: torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999)),
        # eps and alpha as the EfficientNet paper's TensorFlow recipe has them
        "rmsprop": lambda: torch.optim.RMSprop(groups, lr=lr, alpha=0.9, eps=1e-3, momentum=momentum),
    }
    return makers[config.optimizer]()


def set_lr(groups: Iterable[dict], lr: float) -> None:
    for group in groups:
        group["lr"] = lr
