"""A study as one command: study.py which runs, running.py their processes, report/sweep_table.py what they say."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from dist_kd.cli import parse, shown
from dist_kd.config import Config
from dist_kd.errors import ConfigError, SaveError, printable
from dist_kd.report import read_run, sweep_table
from dist_kd.sweep.running import PREEMPTED, Outcome, gpus, is_done, listening, places, work
from dist_kd.sweep.study import Arm, Run, Study, read_study

__all__ = ["run_sweep"]

LOG_LINES = 12  # of a failed run's log, shown


def run_sweep(argv: list[str]) -> int:
    """Does what is not done of the study and writes its table; 0 all done, 1 a run failed, 75 stopped.

    ConfigError, before anything starts, for wrong settings and for folders that hold another study's runs; SaveError
    at the end if the table cannot be written.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError("`dist-kd sweep` starts its own processes, one a GPU; start it once, without a launcher")
    study = read_study(argv)
    _check_folders(study.runs)
    _write_files(study)
    todo = [run for run in study.runs if not is_done(run)]
    side_by_side = places(study.jobs, gpus(study.runs[0].config.cpu))
    command = shlex.join(["dist-kd", "sweep", *argv])
    print(_first_line(study, len(todo), len(side_by_side)), flush=True)
    failed: list[Run] = []
    stopped: list[Run] = []

    def started(run: Run) -> None:
        print(f"start    {run.name}, log {run.log}", flush=True)

    def ended(run: Run, outcome: Outcome, code: int, seconds: float) -> None:
        if outcome == "done":
            print(f"done     {run.name}: top-1 {_top1(run)} % ({seconds:.0f} s)", flush=True)
            try:
                _write(study, command)  # so that a long study can be looked at
            except SaveError as error:
                print(f"WARNING: {error}", flush=True)
        elif outcome == "stopped":
            stopped.append(run)
            print(f"stopped  {run.name}; the same command goes on from there", flush=True)
        else:
            failed.append(run)
            how = f"exit code {code}" if code >= 0 else f"signal {-code}"
            print(f"FAILED   {run.name}: {how}; the end of {run.log}:\n{_tail(run.log)}", flush=True)

    with listening() as stop:
        work(todo, side_by_side, stop, started, ended)
        text = _write(study, command)
    print(f"\n{text}\n\nsweep    {study.folder}: sweep.json, sweep.md, sweep.html")
    if failed:
        print(f"FAILED   {len(failed)} of {len(study.runs)} runs: {', '.join(run.name for run in failed)}")
    if stop.reason or stopped:
        print(f"stopped ({stop.reason or 'a run was asked to stop'}); the same command goes on")
    return PREEMPTED if stop.reason else 1 if failed else PREEMPTED if stopped else 0


def _check_folders(runs: Sequence[Run]) -> None:
    """Refuses folders in which runs of other settings stand: their results would not be those asked for."""
    problems = []
    for run in runs:
        file = run.folder / "config.yaml"
        # a run that never came to a checkpoint left nothing that could be mistaken
        if run.config.allow_changes or not file.is_file() or not any(run.folder.glob("checkpoints/step_*")):
            continue
        try:
            there = parse(["--config", str(file)], {}, require_data=False).config
        except ConfigError as error:
            problems.append(f"`{file}` cannot be understood ({str(error).splitlines()[0]}); take another --save-path")
            continue
        if changed := _differences(there, run.config):
            problems.append(
                f"`{run.folder}` was trained with other settings: {'; '.join(changed)} asked for now; "
                "take another --save-path, or the old settings"
            )
    if problems:
        raise ConfigError(*problems)


def _differences(there: Config, asked: Config) -> list[str]:
    before, now = there.result_settings(), asked.result_settings()
    return [f"{k} {shown(before[k])}, and {shown(now[k])}" for k in now if before[k] != now[k]]


def _write_files(study: Study) -> None:
    try:
        study.folder.mkdir(parents=True, exist_ok=True)
        for path, text in study.files.items():
            path.write_text(text)
    except OSError as error:
        raise ConfigError(
            f"--save-path `{study.folder}` cannot be written ({error.strerror}); give a folder that can"
        ) from error


def _first_line(study: Study, todo: int, jobs: int) -> str:
    seeds = ", ".join(str(run.seed) for run in study.arms[0].runs)
    values = ", ".join(arm.label for arm in study.arms)
    twins = f" and {len(study.twins)} plain twin{'s' * (len(study.twins) > 1)}" if study.twins else ""
    total = len(study.runs)
    return (
        f"sweep    {study.setting} = {values}{twins}, seed{'s' * (len(study.arms[0].runs) > 1)} {seeds}: {total} runs, "
        f"{total - todo} done before, {jobs} at a time, in {study.folder}"
    )


def _top1(run: Run) -> str:
    found = read_run(run.folder).last.get("top1")
    return "unknown" if found is None else f"{found:.2f}"


def _tail(log: Path) -> str:
    lines = log.read_text(errors="replace").splitlines()[-LOG_LINES:]
    return "\n".join(f"    {printable(line)}" for line in lines)


def _seen(arm: Arm) -> sweep_table.Arm:
    """The arm as its folders stand: what is not done has no result."""
    runs = {run.seed: read_run(run.folder) if is_done(run) else None for run in arm.runs}
    return sweep_table.Arm(arm.label, arm.value, runs, arm.twin)


def _write(study: Study, command: str) -> str:
    """Writes sweep.json, sweep.md and sweep.html; the table as text. SaveError if the disk refuses them."""
    arms, twins = [_seen(arm) for arm in study.arms], [_seen(arm) for arm in study.twins]
    try:
        return sweep_table.write(study.folder, sweep_table.Results(study.setting, arms, twins, command))
    except OSError as error:
        raise SaveError(
            f"the table of the study could not be written to `{study.folder}` ({error.strerror or error}); make room "
            "there, or have it made writable: the same command writes it then"
        ) from error
