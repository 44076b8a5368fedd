"""Parameter groups and the optimizer. No schedule: the loop sets the rate that the plan gives for the step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import nn

from dist_kd.config import Config

FUSED_ON = ("cpu", "cuda")  # where fused kernels heed `found_inf`, by which updates.py skips


def parameter_groups(
    module: nn.Module, weight_decay: float, head: Iterable[nn.Parameter] = (), head_factor: float = 1.0
) -> list[dict]:
    """Groups that learn: decayed (matrices and kernels), and not (norms, biases and other vectors: ndim < 2).

    The parameters of `head` stand apart, with `head_factor` times the rate of the others, if that is not 1.
    """
    apart = {id(p) for p in head} if head_factor != 1 else set()
    groups = [
        {
            "params": [
                p
                for p in module.parameters()
                if p.requires_grad and (p.ndim >= 2) == decayed and (id(p) in apart) == in_head
            ],
            "weight_decay": weight_decay if decayed else 0.0,
            "lr_factor": head_factor if in_head else 1.0,
        }
        for in_head in (False, True)
        for decayed in (True, False)
    ]
    return [g for g in groups if g["params"]]


def make_optimizer(config: Config, module: nn.Module, head: Iterable[nn.Parameter] = ()) -> torch.optim.Optimizer:
    """The optimizer of `config.optimizer` over `module`, in the fused form where there is one.

    `head` are the parameters that learn at `config.head_lr`, if one is given.
    """
    first = next(module.parameters())
    fused = first.device.type in FUSED_ON
    lr, momentum = config.peak_lr, config.momentum
    groups = parameter_groups(module, config.weight_decay, head, (config.head_lr or lr) / lr)
    makers = {
        "sgd": lambda: torch.optim.SGD(groups, lr=lr, momentum=momentum, nesterov=momentum > 0, fused=fused),
        "adam": lambda: torch.optim.Adam(groups, lr=lr, betas=(momentum, 0.999), fused=fused),
        # Reddi, Kale, Kumar 2018: the largest second moment so far
        "amsgrad": lambda: torch.optim.Adam(groups, lr=lr, betas=(momentum, 0.999), amsgrad=True, fused=fused),
        "adamw": lambda: torch.optim.AdamW(groups, lr=lr, betas=(momentum, 0.999), fused=fused),
        # eps and alpha as the EfficientNet paper's TensorFlow recipe has them
        "rmsprop": lambda: torch.optim.RMSprop(groups, lr=lr, alpha=0.9, eps=1e-3, momentum=momentum),
    }
    optimizer = makers[config.optimizer]()
    _keep_fused(optimizer)
    optimizer.register_load_state_dict_post_hook(_keep_fused)
    return optimizer


def _keep_fused(optimizer: torch.optim.Optimizer) -> None:
    """Fused as it was made, also with the state of one that was not; SGD's momentum is there before the first step.

    torch would leave it uninitialized if that step is skipped.
    """
    fused = optimizer.defaults.get("fused", False)
    for group in optimizer.param_groups if fused else ():
        group["fused"], group["foreach"] = True, None
        if optimizer.defaults.get("nesterov"):
            for p in group["params"]:
                if optimizer.state[p].get("momentum_buffer") is None:
                    optimizer.state[p]["momentum_buffer"] = torch.zeros_like(p)


def set_lr(groups: Iterable[dict], lr: float) -> None:
    """Gives each group its share of the rate `lr` of this step."""
    for group in groups:
        group["lr"] = lr * group.get("lr_factor", 1.0)  # a checkpoint older than the factor has none
