"""Going on where a run stopped: which checkpoint, whether it is the same experiment, and putting everything back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_kd import checkpoint
from dist_kd.config import Config
from dist_kd.errors import CheckpointError, ConfigError
from dist_kd.loop import Run
from dist_kd.run_folder import RunFolder
from dist_kd.runtime import Runtime


@dataclass(frozen=True)
class Start:
    """Where this start begins: fresh, or from a checkpoint."""

    checkpoint: Path | None
    facts: dict[str, Any]
    step: int


def find_start(config: Config, folder: RunFolder, runtime: Runtime) -> Start:
    """What --resume asks for. Rank 0 looks and verifies; all ranks are told."""

    def look() -> Start:
        found, refused = (None, [])
        if config.resume == "auto":
            found, refused = checkpoint.find(folder.checkpoints)
        elif config.resume == "never":
            if checkpoint.find(folder.checkpoints)[0] or folder.metrics.exists():
                raise ConfigError(
                    f"--resume `never`, but `{folder.path}` holds a run already; give another --save_path or remove it"
                )
        else:
            found = checkpoint.resolve(config.resume)
        for sentence in refused:
            print(f"warning: {sentence}", flush=True)
        if found is None:
            if refused:
                raise CheckpointError(
                    f"`{folder.checkpoints}` has checkpoints but none is usable: {refused[0]}; "
                    "restore one, or give another --save_path"
                )
            return Start(None, {}, 0)
        facts = checkpoint.read_facts(found)
        return Start(found, facts, facts["state"]["step"])

    return runtime.on_main(look)


def check_same_run(config: Config, start: Start, facts: dict[str, Any]) -> None:
    """Refuses to go on with another experiment under the same name."""
    if start.checkpoint is None:
        return
    settings = checkpoint.differences(start.facts["settings"], facts["settings"])
    layout = checkpoint.differences(start.facts["layout"], facts["layout"])
    if start.facts["data"] != facts["data"]:
        raise CheckpointError(
            f"the training data is not what `{start.checkpoint}` was trained on (fingerprint {start.facts['data']}, "
            f"now {facts['data']}); restore the shards, or start anew with another --save_path"
        )
    if (settings or layout) and not config.allow_changes:
        raise ConfigError(
            f"`{start.checkpoint}` was made with other settings that change the result: "
            f"{'; '.join(settings + layout)}; use the old ones, another --save_path, or --allow-changes"
        )


def restore(run: Run, start: Start) -> None:
    """Everything that grew, as it was at the checkpoint's step."""
    saved = checkpoint.load(start.checkpoint, run.runtime.device)
    run.student.load_state_dict(saved.tensors["model"])
    if "method" in saved.tensors:
        run.method.load_state_dict(saved.tensors["method"])
    if run.average is not None:
        run.average.network.load_state_dict(saved.tensors["ema"])
    run.optimizer.load_state_dict(saved.optimizer["optimizer"])
    if run.runtime.accelerator.scaler is not None and "scaler" in saved.optimizer:
        run.runtime.accelerator.scaler.load_state_dict(saved.optimizer["scaler"])
    run.state = saved.state
    if run.runtime.world.is_main and saved.state.meter_sums:
        run.meters.load(saved.state.meter_sums)  # the sum over all ranks: the others go on from zero
