"""A foreign network in our clothes: images in, ModelOutput out, whatever library it came from."""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

from dist_kd.contracts import ModelOutput, NetworkSpec
from dist_kd.errors import ConfigError
from dist_kd.models.names import close


def _keep(taps: dict[str, Tensor], name: str, module: nn.Module, inputs: tuple, output: Tensor) -> None:
    taps[name] = output


class Network(nn.Module):
    """images [B, 3, H, W] -> ModelOutput(logits [B, C], features of the submodules named in `wants`).

    `net` is the foreign module with its own parameter names, `spec` what it expects of its input. With `wants`
    empty no hook exists, so that nothing stands in the way of torch.compile.
    """

    def __init__(self, net: nn.Module, spec: NetworkSpec, wants: frozenset[str] = frozenset()) -> None:
        super().__init__()
        self.net = net
        self.spec = spec
        self.wants = frozenset(wants)
        self._taps: dict[str, Tensor] = {}
        modules = dict(net.named_modules())
        for name in sorted(self.wants):
            if not name or name not in modules:
                raise ConfigError(f"`{spec.arch}` has no submodule `{name}` to tap; {close(name, list(modules)[1:])}")
            # partial of a plain function and this dict: deepcopy (teacher, averaged student) then copies both alike
            modules[name].register_forward_hook(partial(_keep, self._taps, name))

    def forward(self, images: Tensor) -> ModelOutput:
        self._taps.clear()
        out = self.net(images)
        logits = out if isinstance(out, Tensor) else out[0]  # some networks add auxiliary logits in training
        if not self.wants:
            return ModelOutput(logits, {})
        silent = sorted(self.wants - self._taps.keys())
        if silent:
            raise RuntimeError(f"taps {silent} of {self.spec.arch} gave nothing: was the network traced or folded?")
        features = dict(self._taps)
        self._taps.clear()  # a kept feature would keep its whole graph alive
        return ModelOutput(logits, features)
