"""Every setting a user chooses: those of the experiment (experiment.py), and here those of the run and its tracking.

Frozen; knows no argv, no file and no torch.
"""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from dist_kd.experiment import Experiment, setting

RUN, TRACK = "run", "tracking"  # groups of the help page


class Config(Experiment):
    """Train a student, with or without a teacher."""

    # run
    save_path: str | None = setting(
        None,
        "The run's folder. Missing: runs/ARCH-METHOD-HASH of what changes the result.",
        group=RUN,
        result=False,
        aliases=("-o", "--output"),
    )
    resume: str = setting(
        "auto",
        "auto: go on if the folder has a checkpoint; never: refuse a used folder; or a checkpoint's path.",
        group=RUN,
        result=False,
    )
    allow_changes: bool = setting(
        False, "Resume although settings that change the result differ.", group=RUN, result=False
    )
    allow_reshard: bool = setting(
        False,
        "Resume with another number of processes, or another micro-batch; the global batch stays.",
        group=RUN,
        result=False,
    )
    checkpoint_steps: int = setting(500, "Steps between checkpoints.", group=RUN, result=False, unit="steps", ge=1)
    keep: int = setting(2, "Checkpoints kept, besides the best.", group=RUN, result=False, ge=1)
    eval_steps: int | None = setting(
        None, "Steps between evaluations; missing: at each epoch's end.", group=RUN, result=True, unit="steps", ge=1
    )
    log_steps: int = setting(50, "Steps between log points.", group=RUN, result=False, unit="steps", ge=1)
    hang_timeout: float | None = setting(
        None,
        "Longest time in which nothing moves before the run ends and says who is behind; four times as long until "
        "the first step is done, and after the last. Missing: 900, or three times --loader-timeout if that is more.",
        group=RUN,
        result=False,
        unit="seconds",
        gt=0,
        le=1e6,
    )
    time_limit: float | None = setting(
        None,
        "Stop with a checkpoint this long after the start of the process; the step under way and the save come on top.",
        group=RUN,
        result=False,
        unit="minutes",
        gt=0,
    )
    mixed_precision: Literal["no", "fp16", "bf16"] | None = setting(
        None,
        "Compute precision. Missing: as launched, else bf16 on a GPU that has it, else no.",
        group=RUN,
        result=True,
        aliases=("--amp-dtype",),
    )
    channels_last: bool = setting(True, "Memory format of images and weights.", group=RUN, result=True)
    compile: bool = setting(
        False, "torch.compile for student and teacher.", group=RUN, result=True, aliases=("--torchcompile",)
    )
    cpu: bool = setting(False, "Use the CPU even where there is a GPU.", group=RUN, result=False)

    # tracking
    wandb: bool = setting(
        False, "Mirror metrics to Weights & Biases (offline without key or network).", group=TRACK, result=False
    )
    wandb_project: str = setting("dist_kd", "W&B project.", group=TRACK, result=False)
    tensorboard: bool = setting(
        False, "Mirror metrics to TensorBoard files (extra: tensorboard).", group=TRACK, result=False
    )

    @property
    def hang_limit_s(self) -> float:
        """Seconds. Longer than a batch may take, so that a loader that hangs is named by its own, better sentence."""
        return max(900.0, 3 * self.loader_timeout) if self.hang_timeout is None else self.hang_timeout

    def result_settings(self) -> dict[str, Any]:
        """The settings that change the trained numbers, by name."""
        return {k: getattr(self, k) for k, f in type(self).model_fields.items() if f.json_schema_extra["result"]}

    @property
    def default_name(self) -> str:
        """ARCH-METHOD-HASH: the same line, given again, finds its run."""
        digest = hashlib.sha256(json.dumps(self.result_settings(), sort_keys=True).encode()).hexdigest()[:8]
        return f"{self.arch.replace('/', '-')}-{self.method}-{digest}"
