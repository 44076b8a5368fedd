"""Going on where a run stopped: which checkpoint, whether it is the same experiment, and putting everything back."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dist_kd import checkpoint
from dist_kd.config import Config
from dist_kd.errors import CheckpointError, ConfigError, says_memory_ran_out
from dist_kd.loop import Run
from dist_kd.plan import micro_batch_of, world_sizes
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
        checkpoint.clean(folder.checkpoints)
        for pointer in ("latest", "best"):
            if (folder.checkpoints / pointer).is_dir():
                raise CheckpointError(
                    f"`{folder.checkpoints / pointer}` is a folder where a run writes a file; remove it, or give "
                    "another --save_path"
                )
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
            runtime.say(f"warning: {sentence}")
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


def check_same_run(config: Config, start: Start, settings: dict[str, Any], fingerprint: str) -> None:
    """Refuses to go on with another experiment under the same name."""
    if start.checkpoint is None:
        return
    if start.facts["data"] != fingerprint:
        raise CheckpointError(
            f"the training data is not what `{start.checkpoint}` was trained on (fingerprint {start.facts['data']}, "
            f"now {fingerprint}); restore the shards, or start anew with another --save_path"
        )
    # a setting younger than the checkpoint was then what it does by default: nothing
    saved = {k: field.default for k, field in Config.model_fields.items() if k in settings} | start.facts["settings"]
    # of the largest micro-batch only what follows from it matters, and that is check_layout's
    before, now = ({k: v for k, v in s.items() if k != "device_batch_size"} for s in (saved, settings))
    changed = checkpoint.differences(before, now)
    if changed and not config.allow_changes:
        raise ConfigError(
            f"`{start.checkpoint}` was made with other settings that change the result: "
            f"{'; '.join(changed)}; use the old ones, another --save_path, or --allow-changes"
        )
    kept, wanted = _memory(before), _memory(now)
    if kept != wanted:
        raise ConfigError(
            f"`{start.checkpoint}` has what `{kept}` remembers, with which `{wanted}` cannot go on, --allow-changes or "
            "not; use the old --optimizer and --momentum, or start anew from its --student-weights with another "
            "--save_path"
        )


def _memory(settings: dict[str, Any]) -> str:
    """What names the tensors that an optimizer keeps for each parameter; those of SGD are there with any momentum."""
    name = settings["optimizer"]
    return f"{name} without momentum" if name == "rmsprop" and not settings["momentum"] else name


def check_layout(config: Config, start: Start, world_size: int) -> str | None:
    """One line on what changes with the number of processes or the micro-batch, if --allow-reshard lets them change."""
    if start.checkpoint is None:
        return None
    layout, works = start.facts["layout"], world_sizes(config)
    numbers = ", ".join(map(str, works))
    processes = f"{layout['world_size']} -> {world_size} processes"
    if world_size not in works:
        raise ConfigError(
            f"`{start.checkpoint}` cannot go on ({processes}): the global batch of `{config.batch_size}` stays, and "
            f"with --device-batch-size `{config.device_batch_size}` it can be shared by {numbers or 'no number of'} "
            f"processes; start so many, with --allow-reshard unless {layout['world_size']}"
        )
    micro = micro_batch_of(config, world_size)
    if (world_size, micro) == (layout["world_size"], layout["micro_batch"]):
        return None
    change = f"{processes}, micro-batch {layout['micro_batch']} -> {micro}"
    if not config.allow_reshard:
        raise ConfigError(
            f"`{start.checkpoint}` was made by other processes than these: {change}; start them as before, or add "
            f"--allow-reshard: the global batch of `{config.batch_size}` stays, and {numbers} processes can share it"
        )
    norm = f"; batch norm works over {micro} rows instead" if micro != layout["micro_batch"] else ""
    return f"reshard  {change}{norm}; the order of samples stays"


def restore(run: Run, start: Start) -> None:
    """Everything that grew, as it was at the checkpoint's step. DataError if it had more bad samples than may be.

    CheckpointError, on all ranks, if one of them cannot read the checkpoint or sees another one there than rank 0.
    """
    saved = why = None
    try:
        saved = _read(run, start.checkpoint)
        _put_back(run, saved, start.checkpoint)
        seen = checkpoint.digest(start.checkpoint / "manifest.json")
    except CheckpointError as error:
        seen, why = None, str(error)
    told = run.runtime.gather((seen, why))
    for rank, (theirs, problem) in enumerate(told):
        if problem is None and theirs != told[0][0]:
            problem = f"`{start.checkpoint}` holds other files there than on rank 0; look at that node's file system"
        if problem is not None:
            error = CheckpointError(problem if len(told) == 1 else f"on rank {rank}: {problem}")
            error.alike = True
            raise error
    run.state, main = saved.state, run.runtime.world.is_main
    if main and saved.state.meter_sums:
        run.meters.load(saved.state.meter_sums)  # the sum over all ranks: the others go on from zero
    run.source.account.load(saved.state.data, main=main)
    run.source.account.check(saved.state.data)


def _read(run: Run, path: Path) -> checkpoint.Snapshot:
    # rank 0 has verified it when it was chosen; what another node's file system shows is verified there
    why = None if run.runtime.world.is_main else checkpoint.problem(path)
    if why is not None:
        raise CheckpointError(f"`{path}` cannot be used: {why}; check that all nodes see the same file system")
    return checkpoint.load(path, run.runtime.device)


def _put_back(run: Run, saved: checkpoint.Snapshot, path: Path) -> None:
    """Networks, adapters and optimizer as saved. CheckpointError if they are of other shapes than these.

    Memory that runs out stays the error that it is.
    """
    try:
        run.student.load_state_dict(saved.tensors["model"])
        if "method" in saved.tensors:
            run.method.load_state_dict(saved.tensors["method"])
        if run.average is not None:
            run.average.network.load_state_dict(saved.tensors["ema"])
    except (KeyError, RuntimeError, TypeError, AttributeError) as error:
        if says_memory_ran_out(error):
            raise
        raise CheckpointError(
            f"`{path}` is not of these networks ({type(error).__name__}: {' '.join(str(error).split())!s:.300}); give "
            "another checkpoint, or start anew with another --save_path"
        ) from None
    # but for the rate, which is the step's: a start that takes no step saves what it has read
    chosen = [{k: v for k, v in group.items() if k not in ("params", "lr")} for group in run.optimizer.param_groups]
    try:
        run.optimizer.load_state_dict(saved.optimizer["optimizer"])
        for group, own in zip(run.optimizer.param_groups, chosen, strict=True):
            group.update(own)  # torch would take decay, momentum and the share of the rate from the checkpoint
        if run.runtime.accelerator.scaler is not None and "scaler" in saved.optimizer:
            run.runtime.accelerator.scaler.load_state_dict(saved.optimizer["scaler"])
    except (KeyError, ValueError, RuntimeError, TypeError, AttributeError) as error:
        if says_memory_ran_out(error):
            raise
        # --allow-changes lets --freeze and --head-lr through
        raise CheckpointError(
            f"the optimizer of `{path}` is for other parameters than learn now ({error!s:.300}); go on with the "
            "old --freeze and --head-lr, or start anew with another --save_path"
        ) from None
