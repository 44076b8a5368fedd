"""The teacher as a function: student's pixels in, outputs out. Frozen, outside optimizer and checkpoint.

Knows no labels and no loss. Prepared once for speed; the prepared network is compared with the plain one and
dropped if it does not agree.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from dist_kd.contracts import ModelOutput, NetworkSpec
from dist_kd.methods.ensemble import MEMBERS, mean_logits

# largest relative distance of prepared from plain logits, by precision: bf16 keeps 8 bits, fp16 11
TOLERANCE = {"no": 1e-3, "fp16": 0.03, "bf16": 0.1}


def fold_batch_norm(network: nn.Module) -> nn.Module:
    """A copy in evaluation mode with each batch norm folded into the convolution before it, where tracing allows.

    Raises whatever torch.fx raises for a network it cannot trace.
    """
    from torch.fx.experimental.optimization import fuse

    folded = copy.copy(network)
    folded._modules = dict(network._modules)
    folded.net = fuse(copy.deepcopy(network.net).eval(), inplace=True)  # the copy is not copied again
    return folded


def lower_weights(network: nn.Module, dtype: torch.dtype) -> None:
    """Casts weights of convolutions and linear layers in place: autocast would cast them anew at every step."""
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            module.to(dtype)


class Teacher:
    """images [B, 3, H, W], normalized for the student -> ModelOutput of the teacher, without gradient."""

    def __init__(
        self,
        network: nn.Module,
        student: NetworkSpec,
        *,
        image_size: int,
        precision: str = "no",
        device: torch.device | str = "cpu",
        channels_last: bool = True,
        compiled: bool = False,
    ) -> None:
        spec: NetworkSpec = network.spec
        self.spec = spec
        self.members = [self]
        self.device = torch.device(device)
        self.precision = precision
        self.notes: list[str] = []
        plain = network.eval().requires_grad_(False).to(self.device)
        # x_t = (x * std_s + mean_s - mean_t) / std_t: the shift is divided by the teacher's std too
        mean_s, std_s, mean_t, std_t = (torch.tensor(v) for v in (student.mean, student.std, spec.mean, spec.std))
        self._same_norm = student.mean == spec.mean and student.std == spec.std
        self._scale = (std_s / std_t).view(1, 3, 1, 1).to(self.device)
        self._shift = ((mean_s - mean_t) / std_t).view(1, 3, 1, 1).to(self.device)
        if not self._same_norm:
            self.notes.append("re-normalized from the student's mean and std")
        self._resize = spec.image_size if spec.image_size != image_size else None
        if self._resize:
            self.notes.append(f"view resized from {image_size} to its {spec.image_size} px")
        self.network = plain
        self.network = self._prepared(plain, channels_last)
        if compiled:
            self.network.net.compile()
            self.notes.append("compiled")

    def _autocast(self) -> AbstractContextManager[Any]:
        if self.precision == "no":
            return nullcontext()
        dtype = torch.bfloat16 if self.precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def _prepared(self, plain: nn.Module, channels_last: bool) -> nn.Module:
        """The network folded, lowered and in channels_last, if its logits agree with the plain one's."""
        try:
            if plain.wants:  # tracing would lose them
                fast, folded = copy.deepcopy(plain), "batch norms not folded, as features are read between them"
            else:
                fast, folded = fold_batch_norm(plain), "batch norms folded"
        except Exception as error:  # torch.fx refuses networks with data-dependent control flow, in many ways
            fast, folded = copy.deepcopy(plain), f"batch norms not folded ({type(error).__name__})"
        if channels_last:
            fast = fast.to(memory_format=torch.channels_last)
        if self.precision != "no":
            lower_weights(fast, torch.bfloat16 if self.precision == "bf16" else torch.float16)
        size = self.spec.image_size
        # smooth noise: white noise would not look like any image to the network
        coarse = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
        probe = F.interpolate(coarse, size=(size, size), mode="bilinear").to(self.device)
        with torch.no_grad():
            expected = plain(probe).logits
            with self._autocast():
                actual = fast(probe).logits.float()
        self.distance = float((actual - expected).norm() / expected.norm().clamp_min(1e-12))
        if not self.distance <= TOLERANCE[self.precision]:
            self.notes.append(
                f"prepared network refused: its logits differ by {self.distance:.2%} from the plain one's"
            )
            return plain
        precision = "fp32" if self.precision == "no" else self.precision
        self.notes.append(f"{precision}, {folded}: logits within {self.distance:.2g} of the plain network's")
        return fast

    def use_batch_statistics(self) -> None:
        """From now on its batch norms normalize by the batch they see; their running statistics stay as they are."""
        for module in self.network.modules():
            if isinstance(module, _BatchNorm):
                module.train()
                module.momentum = 0.0

    @torch.no_grad()
    def __call__(self, images: Tensor) -> ModelOutput:
        if not self._same_norm:
            images = images * self._scale + self._shift
        if self._resize:
            images = F.interpolate(images, size=(self._resize,) * 2, mode="bilinear", antialias=True)
        with self._autocast():
            return self.network(images)


class Ensemble:
    """Several teachers as one: its logits are the log of their mean softmax, and their own travel as a feature.

    So every loss can take the mean at its own temperature (methods/ensemble.py).
    """

    def __init__(self, members: Sequence[Teacher]) -> None:
        self.members = list(members)
        specs = [member.spec for member in members]
        names, weights = (", ".join(getattr(spec, field) for spec in specs) for field in ("arch", "weights"))
        self.spec = dataclasses.replace(specs[0], arch=names, weights=weights)

    @torch.no_grad()
    def __call__(self, images: Tensor) -> ModelOutput:
        each = torch.stack([member(images).logits.float() for member in self.members])  # [K, B, C]
        return ModelOutput(mean_logits(each, 1.0), {MEMBERS: each})


class SideBySide(nn.Module):
    """The networks of several teachers as one, to be measured: images of the first one's side -> their mean logits."""

    def __init__(self, networks: Sequence[nn.Module], spec: NetworkSpec) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)
        self.spec = spec

    def forward(self, images: Tensor) -> Tensor:
        sides = [(network.spec.image_size,) * 2 for network in self.networks]
        views = [images if images.shape[2:] == side else F.interpolate(images, size=side) for side in sides]
        return torch.stack([n(view).logits for n, view in zip(self.networks, views, strict=True)]).mean(dim=0)


class NoTeacher:
    """What the loop calls when the method needs none."""

    spec = None
    members: tuple[Teacher, ...] = ()

    def __call__(self, images: Tensor) -> None:
        return None
