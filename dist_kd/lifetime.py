"""One start of a run, from the first process to the exit code: its folder and lock, its watchdog, its end in words.

Between them the run is built (wiring.py) and trained (loop.py). Whatever ends it, status.json says so.
"""

from __future__ import annotations

import contextlib
import time
from pathlib import Path
from typing import Any

from dist_kd import first_failure, out_of_memory, results
from dist_kd.checkpoint import writing
from dist_kd.cli import Parsed, leave
from dist_kd.cli.exits import PREEMPTED
from dist_kd.errors import DistKDError
from dist_kd.loop import Run, fit
from dist_kd.run_folder import RunFolder
from dist_kd.runtime import launched, start_runtime
from dist_kd.stop_signals import noted
from dist_kd.watchdog import Watchdog
from dist_kd.wiring import build_run


def run_training(parsed: Parsed, begun: float | None = None) -> int:
    """Trains as `parsed` says; the process's exit code. Every way to end is in status.json.

    `begun`, by time.monotonic: since when this process has been getting ready. A time limit counts from there, and a
    line says how long it took.
    """
    config = parsed.config
    started = time.monotonic()
    runtime = start_runtime(config, started if begun is None else begun)
    runtime.progress.spent = {"imports": started - runtime.begun, "processes": time.monotonic() - started}
    folder = RunFolder(Path(config.save_path or Path("runs") / config.default_name))
    run: Run | None = None
    alike, told = False, None  # told: the error with which this process ends

    def hung(sentence: str) -> None:
        folder.status("failed", step=run.state.step if run else None, kind="hung", message=sentence)

    watch = Watchdog(folder.path, runtime.world, runtime.progress, config.hang_limit_s, hung)
    try:
        taken_over = runtime.on_main(lambda: (folder.occupy(), watch.clear())[0])
        watch.start()
        if taken_over:
            runtime.say(taken_over)
        early = next(filter(None, runtime.gather(noted.reason)), None)
        if early:  # before anything was built
            runtime.on_main(lambda: folder.stopped_early(early))
            runtime.say(f"stopped before the first step ({early}); the same command starts it")
            runtime.close()
            return _exit_code("preempted")
        with out_of_memory.told(config, runtime, lambda: run):
            run, built = build_run(parsed, runtime, folder)
            outcome = fit(run)
        runtime.progress.at("finish", run.state.step)
        runtime.progress.patient = True
        if outcome == "done":
            runtime.on_main(lambda: _finish(parsed, folder, run, built))
        else:
            runtime.say(f"stopped at step {run.state.step} ({run.stop.reason}); the same command goes on from there")
            run.stop.obeyed()
        run.tracker.close(outcome)
        if runtime.world.is_main:
            facts = {"step": run.state.step, "total_steps": run.plan.total_steps, "message": run.stop.reason or ""}
            folder.status(outcome, **facts)
        runtime.barrier()
        runtime.close()
    except BaseException as error:
        alike = isinstance(error, DistKDError) and error.alike
        told = first_failure.record(runtime.world, folder, watch, run.state.step if run else None, error)
        if run is not None:
            run.tracker.close("failed")
        if told is not error:
            raise told from None
        raise
    finally:
        last = [folder.lock.release]
        if run is not None:
            last.append(run.source.close)
        if alike:
            last.append(runtime.barrier)  # a launcher ends all others with the first, and rank 0 has yet to say why
        if run is not None:
            last.append(run.stop.uninstall)
        last.append(watch.stop)
        # all are done, whichever fails; and one that fails takes no error's place
        with contextlib.suppress(*([Exception] if told else [])), contextlib.ExitStack() as ending:
            for step in reversed(last):
                ending.callback(step)
        if told is not None and not alike and runtime.world.world_size > 1:
            leave(told)
    return _exit_code(outcome)


def _exit_code(outcome: str) -> int:
    return PREEMPTED if outcome == "preempted" and not launched() else 0


def _finish(parsed: Parsed, folder: RunFolder, run: Run, built: dict[str, Any]) -> None:
    with writing(
        folder.path, "what a finished run leaves (its last checkpoint stands: the same command goes on there)"
    ):
        results.finish(parsed.config, folder, run, built)
