"""A foreign network in our clothes: images in, ModelOutput out, whatever library it came from."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.hooks import RemovableHandle

from dist_kd.contracts import ModelOutput, NetworkSpec
from dist_kd.errors import ConfigError
from dist_kd.models.names import close
from dist_kd.models.taps import Tap


def _keep_output(kept: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
    # what follows a norm may write into its output: `out += shortcut`, a functional ReLU
    kept[name] = output.clone() if isinstance(module, _BatchNorm) else output


def _keep_input(kept: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple) -> None:
    kept[name] = inputs[0]


class Network(nn.Module):
    """images [B, 3, H, W] -> ModelOutput(logits [B, C], features named in `wants`).

    `net` is the foreign module with its own parameter names, `spec` what it expects of its input. A feature is named
    by its role, a key of `taps`, or by the path of a submodule, whose output it then is. With `wants` empty no hook
    exists, so that nothing stands in the way of torch.compile.
    """

    def __init__(
        self,
        net: nn.Module,
        spec: NetworkSpec,
        wants: frozenset[str] = frozenset(),
        taps: Mapping[str, Tap] | None = None,
        notes: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.net = net
        self.spec = spec
        self.wants: frozenset[str] = frozenset()
        self.taps: dict[str, Tap] = dict(taps or {})
        self.notes = notes  # what was done to the weights that its user should know, a line each
        self.at_rest: tuple[str, ...] = ()  # submodules of `net` that stay in evaluation mode while it trains
        self._kept: dict[str, Tensor] = {}
        if wants:
            self.want(wants)

    def want(self, names: Iterable[str]) -> None:
        """From now on, these features too are in the output; before the network is compiled or folded."""
        new = frozenset(names) - self.wants
        self._hook(new, self._kept)
        self.wants |= new
        for module in self.net.modules():  # an activation in place would overwrite the feature before it
            if getattr(module, "inplace", False):
                module.inplace = False

    def tap(self, name: str) -> Tap:
        """Where `name`, a role or the path of a submodule, is tapped; ConfigError with what is near for a miss."""
        if name in self.taps:
            return self.taps[name]
        modules = dict(self.net.named_modules())
        if name and name in modules:
            return Tap(name)
        known = [*self.taps, *list(modules)[1:]]
        raise ConfigError(f"`{self.spec.arch}` has no feature `{name}` to tap; {close(name, known)}")

    def _hook(self, names: Iterable[str], kept: dict[str, Tensor]) -> list[RemovableHandle]:
        handles = []
        for name in sorted(names):
            tap = self.tap(name)
            module = self.net.get_submodule(tap.module)
            # partial of a plain function and this dict: deepcopy (teacher, averaged student) then copies both alike
            if tap.before:
                handles.append(module.register_forward_pre_hook(partial(_keep_input, kept, name)))
            else:
                handles.append(module.register_forward_hook(partial(_keep_output, kept, name)))
        return handles

    def margin_norms(self) -> dict[str, nn.Module]:
        """Role -> batch norm whose bias and |weight| are mean and std of that feature, where there is such a norm."""
        return {role: self.net.get_submodule(tap.norm) for role, tap in self.taps.items() if tap.norm}

    def shapes(self, names: Iterable[str], image_size: int | None = None) -> dict[str, tuple[int, ...]]:
        """Shape of each feature of one image, without the batch: {"stage1": (256, 56, 56)}. Nothing is computed."""
        side = image_size or self.spec.image_size
        state: dict[str, Any] = dict(self.net.named_parameters()) | dict(self.net.named_buffers())
        state = {name: torch.empty_like(value, device="meta") for name, value in state.items()}
        kept: dict[str, Tensor] = {}
        modes = [(module, module.training) for module in self.modules()]
        handles = self._hook(names, kept)
        try:
            self.eval()  # a norm in training refuses one image
            with torch.no_grad():
                torch.func.functional_call(self.net, state, (torch.empty(1, 3, side, side, device="meta"),))
        finally:
            for handle in handles:
                handle.remove()
            for module, training in modes:
                module.training = training
            self._kept.clear()
        return {name: tuple(kept[name].shape[1:]) for name in names}

    def train(self, mode: bool = True) -> Network:
        super().train(mode)
        for path in self.at_rest:
            self.net.get_submodule(path).eval()
        return self

    def forward(self, images: Tensor) -> ModelOutput:
        self._kept.clear()
        out = self.net(images)
        logits = out if isinstance(out, Tensor) else out[0]  # some networks add auxiliary logits in training
        if not self.wants:
            return ModelOutput(logits, {})
        silent = sorted(self.wants - self._kept.keys())
        if silent:
            raise RuntimeError(f"taps {silent} of {self.spec.arch} gave nothing: was the network traced or folded?")
        features = dict(self._kept)
        self._kept.clear()  # a kept feature would keep its whole graph alive
        return ModelOutput(logits, features)
