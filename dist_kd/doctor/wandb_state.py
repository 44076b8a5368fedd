"""Whether W&B would be online. The key is looked for and never read out."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from typing import Any

from dist_kd.config import Config
from dist_kd.doctor import BAD, OK, Finding
from dist_kd.tracking.wandb_run import decide_mode


def check(config: Config, facts: dict[str, Any]) -> Iterator[Finding]:
    """Bad only if it was asked for: without --wandb nothing depends on it."""
    asked = "" if config.wandb else "not asked for; "
    if find_spec("wandb") is None:
        yield Finding(BAD if config.wandb else OK, "wandb", f"{asked}not installed: `pip install wandb`")
        return
    mode, reason = decide_mode()
    chosen = reason.startswith("WANDB_MODE")
    if mode == "online" or chosen or not config.wandb:
        yield Finding(OK, "wandb", f"{asked}--wandb would be {mode} ({reason})")
        return
    yield Finding(
        BAD,
        "wandb",
        f"--wandb would be {mode} ({reason}): nothing to watch until `wandb sync`; `wandb login`, or say that it is "
        "wanted by WANDB_MODE=offline",
    )
