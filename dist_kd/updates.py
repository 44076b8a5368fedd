"""Optimizer updates. One whose gradients are not finite changes nothing and is counted; the device is not waited for.

After the all-reduce all ranks hold the same gradients, so that all skip the same updates without asking each other.
Looking at the gradients and skipping are done as torch's own gradient scaler does them, here for every precision.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dist_kd.errors import DivergedError
from dist_kd.train_state import TrainState

PENDING = 64  # updates whose outcome the host may not know yet, where asking means to wait for the device


class Updates:
    """The updates of one run, and the running statistics of its student, which a skipped one leaves alone too."""

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        student: nn.Module,
        *,
        scaler: Any = None,
        clip_norm: float | None = None,
        max_skipped: int = 10,
    ) -> None:
        """`optimizer` as optimizer.py makes it, `student` the bare network; `scaler` a torch GradScaler under fp16."""
        self.optimizer, self._scaler, self._clip_norm, self._max_skipped = optimizer, scaler, clip_norm, max_skipped
        self._params = [p for group in optimizer.param_groups for p in group["params"]]
        self._one = torch.ones((), device=self._params[0].device)
        self._fused = optimizer.defaults.get("fused", False)
        self._checked = not self._fused
        self._pending: list[Tensor] = []  # not 0 where an update was skipped, in the order of steps
        self._most_pending = 1 if self._one.device.type == "cpu" else PENDING  # 1: the outcome is known at once
        self._buffers = [b for b in student.buffers() if b.is_floating_point()]
        self._before = self._one.new_empty(sum(b.numel() for b in self._buffers))  # of this step, in one tensor
        parts = self._before.split([b.numel() for b in self._buffers])
        self._views = [part.view_as(b) for part, b in zip(parts, self._buffers, strict=True)]

    @torch.no_grad()
    def begin(self) -> None:
        """Before the first forward of a step: remembers the running statistics."""
        if self._buffers:
            torch._foreach_copy_(self._views, self._buffers)

    @torch.no_grad()
    def step(self, state: TrainState, norm_wanted: bool, suspects: Callable[[], str]) -> Tensor | None:
        """One update by the gradients that are there, and then none are; their norm if it is wanted or limited.

        What was skipped is in `state` at once on a CPU, else after `settle`. DivergedError, on all ranks, if it was
        too much in a row; `suspects()` then says in words what is known of the last batch, and may ask other ranks.
        """
        grads = [p.grad for p in self._params if p.grad is not None]
        found = self._look(grads)
        norm = None
        if norm_wanted or self._clip_norm is not None:
            norm = nn.utils.get_total_norm(grads)
        if self._clip_norm is not None:
            nn.utils.clip_grads_with_norm_(self._params, self._clip_norm, norm)
        if self._fused:
            self._check_layout()
            self.optimizer.found_inf = found  # fused kernels change nothing where it is not 0
            self.optimizer.step()
        elif not found.item():  # RMSprop has no such kernel: there the device is waited for
            self.optimizer.step()
        self.optimizer.zero_grad()
        if self._scaler is not None:
            self._scaler.update()
        self._undo_buffers(found)
        self._pending.append(found)
        if len(self._pending) >= self._most_pending:
            self.settle(state, state.step + 1, suspects)
        return norm

    def _undo_buffers(self, found: Tensor) -> None:
        """Running statistics are again what `begin` remembered, where `found` is not 0."""
        if self._most_pending == 1 and not found.tolist():  # a quarter of a percent of a step of 25 ms
            return
        if self._buffers:
            now = torch.cat([b.reshape(-1) for b in self._buffers])
            torch.where(found > 0, self._before, now, out=self._before)
            torch._foreach_copy_(self._buffers, self._views)

    def _look(self, grads: list[Tensor]) -> Tensor:
        """Not 0 if a gradient is not finite. Under fp16 unscales them."""
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
            return sum(self._scaler._found_inf_per_device(self.optimizer).values())
        found = torch.zeros_like(self._one)
        torch._amp_foreach_non_finite_check_and_unscale_(grads, found, self._one)
        return found

    def _check_layout(self) -> None:
        """Once: fused kernels on a CPU go through memory as it lies, and mix up a gradient that lies otherwise."""
        if not self._checked:
            for p in self._params:
                if p.grad is not None:
                    strides = [(a, b) for a, b, n in zip(p.stride(), p.grad.stride(), p.shape, strict=True) if n > 1]
                    assert all(a == b for a, b in strides), (
                        f"a gradient lies in memory otherwise than its weight: {strides}"
                    )
            self._checked = True

    def settle(self, state: TrainState, step: int, suspects: Callable[[], str] = lambda: "") -> None:
        """Counts the updates, up to the one that made `step`, whose outcome was not known yet. Waits for the device."""
        if not self._pending:
            return
        outcomes = torch.stack(self._pending).tolist()
        self._pending.clear()
        for number, skipped in enumerate(outcomes, step - len(outcomes) + 1):
            state.skipped_steps += int(skipped > 0)
            state.skipped_in_a_row = state.skipped_in_a_row + 1 if skipped else 0
            if state.skipped_in_a_row > self._max_skipped:
                error = DivergedError(
                    f"the gradients of step {number} are not finite, and so it was for {state.skipped_in_a_row} "
                    f"step(s) in a row; --max-skipped-steps lets `{self._max_skipped}` be skipped{suspects()}; lower "
                    "--lr, lengthen --warmup-epochs or set --clip-norm, and start from the last checkpoint"
                )
                error.alike = True
                raise error
