"""The processes and their agreement: world, device, precision, collectives, stop requests. Home of accelerate."""

from __future__ import annotations

import contextlib
import ctypes
import math
import os
import pickle
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import accelerate
import torch
import torch.distributed as dist
from torch import Tensor, nn

from dist_kd.config import Config
from dist_kd.contracts import World
from dist_kd.errors import ConfigError, LostError, printable
from dist_kd.stop_signals import STOP_SIGNALS, noted, orphaned
from dist_kd.watchdog import PATIENCE, Progress

ORPHAN_LOOK_S = 1.0  # between two looks whether the launcher still lives
ORPHAN_GRACE_S = 120.0  # from its death to ours: one step, one save
GROUP_SLACK_S = 300.0  # a collective waits so much longer than the watchdog, whose evidence its end would destroy


@dataclass
class Runtime:
    """Everything that depends on how many processes there are and what they run on."""

    accelerator: accelerate.Accelerator
    world: World
    device: torch.device
    precision: str  # no, fp16 or bf16
    precision_origin: str
    cpu_group: Any = None  # gloo, for agreements that must not sync a GPU
    progress: Progress = field(default_factory=Progress)  # told before and after each wait for other ranks
    begun: float = field(default_factory=time.monotonic)  # since when this process has been getting ready

    def say(self, line: str) -> None:
        """Prints one line, on rank 0 only."""
        if self.world.is_main:
            with contextlib.suppress(OSError):  # a log on a full disk, a terminal that is gone: training goes on
                print(printable(line), flush=True)

    def prepare(self, learner: nn.Module, optimizer: torch.optim.Optimizer) -> tuple[nn.Module, Any]:
        """Learner in DDP and under autocast, optimizer with loss scaling. Loaders are never prepared (loader.py)."""
        return self.accelerator.prepare(learner, optimizer)

    def autocast(self) -> AbstractContextManager[Any]:
        return self.accelerator.autocast()

    def barrier(self) -> None:
        if self.world.world_size > 1:
            with self.progress.waiting():
                dist.barrier(group=self.cpu_group)

    def broadcast(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world.world_size == 1:
            return value
        box = [value]
        with self.progress.waiting():
            dist.broadcast_object_list(box, src=0, group=self.cpu_group)
        return box[0]

    def on_main(self, action: Callable[[], Any]) -> Any:
        """Runs `action` on rank 0: all ranks are given its result, or raise its error, marked as `alike`."""
        outcome: tuple[Any, Exception | None] = (None, None)
        own: Exception | None = None
        if self.world.is_main:
            try:
                outcome = (action(), None)
            except Exception as error:
                own, outcome = error, (None, _portable(error))
        result, error = self.broadcast(outcome)
        error = error if own is None else own
        if error is not None:
            error.alike = True  # also one that is not ours: out_of_memory.py must know whose it is
            raise error
        return result

    def gather(self, value: Any) -> list[Any]:
        """The values of all ranks, in their order, on every rank."""
        if self.world.world_size == 1:
            return [value]
        values = [None] * self.world.world_size
        with self.progress.waiting():
            dist.all_gather_object(values, value, group=self.cpu_group)
        return values

    def reduce_sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, as a new tensor on the CPU. Syncs the device."""
        total = values.detach().to("cpu", torch.float64, copy=True)  # the sum of all must not become one rank's own
        if self.world.world_size > 1:
            with self.progress.waiting():
                dist.all_reduce(total, group=self.cpu_group)
        return total

    def reduce_max(self, values: Tensor) -> Tensor:
        total = values.detach().cpu().clone()
        if self.world.world_size > 1:
            with self.progress.waiting():
                dist.all_reduce(total, op=dist.ReduceOp.MAX, group=self.cpu_group)
        return total

    def broadcast_buffers(self, module: nn.Module) -> None:
        """Rank 0's running statistics become every rank's: they are the run's."""
        if self.world.world_size > 1:
            with self.progress.waiting():
                for buffer in module.buffers():
                    dist.broadcast(buffer, src=0)

    def close(self) -> None:
        if self.world.world_size > 1 and dist.is_initialized():
            dist.destroy_process_group()


def _portable(error: Exception) -> Exception:
    """The error, or its kind and words where it holds what cannot travel, such as a lock or an open connection."""
    try:
        pickle.loads(pickle.dumps(error))
    except Exception:
        return RuntimeError(f"{type(error).__name__}: {error}")
    return error


def _precision(config: Config, cuda: bool) -> tuple[str, str]:
    """Compute precision and where it came from. The flag wins over the launcher's environment."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION")
    if config.mixed_precision:
        precision, origin = config.mixed_precision, "setting"
    elif launched in ("no", "fp16", "bf16"):
        precision, origin = launched, "as launched"
    else:
        precision, origin = ("bf16" if cuda and torch.cuda.is_bf16_supported() else "no"), "default"
    if precision == "fp16" and not cuda:
        raise ConfigError("--mixed-precision `fp16` needs a GPU, and this run is on the CPU; use bf16 or no")
    return precision, origin


M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4  # of glibc's malloc.h


def keep_freed_memory() -> None:
    """Lets the C library keep the memory that tensors free for the next ones, where it is glibc.

    By default it gives each large block back to the kernel, and gets pages for the next one that must be filled with
    zeros first: up to half of a training step on a CPU. What the environment says of malloc (MALLOC_...) stays.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ) or "glibc.malloc" in os.getenv("GLIBC_TUNABLES", "")
    if sys.platform == "linux" and not chosen:
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
        if mallopt is not None:
            mallopt(M_MMAP_MAX, 0)  # large blocks from the heap too
            mallopt(M_TRIM_THRESHOLD, -1)  # which never shrinks


def launched() -> bool:
    """Whether a launcher started this process: it would report any exit code but 0 as a crash."""
    return "TORCHELASTIC_RUN_ID" in os.environ or "ACCELERATE_MIXED_PRECISION" in os.environ


def _leave_with_launcher() -> None:
    """A launcher that was killed ends nobody: its processes would train on, in the way of the next start.

    StopRequests has the run saved and stopped then. What does not get that far (a peer that hangs) ends here. A thread
    and not Linux's parent-death signal: it also sees a launcher that was gone before, and a main thread that waits.
    """
    since = None
    while since is None or time.monotonic() < since + ORPHAN_GRACE_S:
        if since is None and orphaned():
            since = time.monotonic()
        time.sleep(ORPHAN_LOOK_S)
    print(f"the launcher is gone and the run did not stop within {ORPHAN_GRACE_S:.0f} s", file=sys.stderr, flush=True)
    os._exit(1)


def start_runtime(config: Config, begun: float | None = None) -> Runtime:
    """The runtime of this process; starts the process group if a launcher set one up.

    `begun`, by time.monotonic: since when this process has been getting ready (default: now).
    """
    begun = time.monotonic() if begun is None else begun
    if launched():
        if orphaned():
            raise ConfigError("the launcher that started this process is gone; nothing was done, start it again")
        threading.Thread(target=_leave_with_launcher, name="launcher", daemon=True).start()
    # a launcher's config may ask for accumulation by environment; ours follows from the plan alone
    os.environ.pop("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", None)
    cuda = torch.cuda.is_available() and not config.cpu
    precision, origin = _precision(config, cuda)
    longest_wait = timedelta(seconds=PATIENCE * config.hang_limit_s + GROUP_SLACK_S)
    handlers = [
        # buffers are broadcast before evaluation and saving instead of at every step
        accelerate.DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True),
        accelerate.InitProcessGroupKwargs(timeout=longest_wait),
    ]
    try:
        accelerator = accelerate.Accelerator(cpu=config.cpu, mixed_precision=precision, kwargs_handlers=handlers)
    except dist.DistError as error:
        place = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
        raise LostError(
            f"the processes did not find each other at `{place}` (MASTER_ADDR and MASTER_PORT, by the launcher): "
            f"{str(error).splitlines()[0]}; see that this name leads to the first machine and that the port is free "
            "there, or launch with another port"
        ) from error
    accelerator.gradient_accumulation_steps = 1
    world = World(
        rank=accelerator.process_index,
        world_size=accelerator.num_processes,
        local_rank=accelerator.local_process_index,
        local_world_size=int(os.environ.get("LOCAL_WORLD_SIZE", accelerator.num_processes)),
    )
    asked = int(os.environ.get("WORLD_SIZE", "1"))
    if asked != world.world_size:
        raise ConfigError(
            f"the launcher started {asked} processes (variable WORLD_SIZE) but only {world.world_size} would train "
            "together; launch with torchrun, or with `accelerate launch --multi_gpu`"
        )
    if not cuda:
        keep_freed_memory()
    group = None
    if world.world_size > 1:
        group = dist.new_group(backend="gloo", timeout=longest_wait)
    # among several processes Accelerate numbers the CPU, which safetensors refuses
    device = accelerator.device if accelerator.device.type != "cpu" else torch.device("cpu")
    return Runtime(accelerator, world, device, precision, origin, group, begun=begun)


class StopRequests:
    """Signals, a STOP file, a time limit and too large a count end a run; ranks agree on it without a device sync.

    `agreed` is called once per step (and per round of any long loop) by every rank: it reads the answer to the
    question asked one call before and asks the next one, so a reduction is never waited for. The time limit is the
    process's: a scheduler's clock runs while torch is imported, too.
    """

    def __init__(self, runtime: Runtime, run_dir: Path, time_limit_minutes: float | None) -> None:
        self._runtime = runtime
        self._file = run_dir / "STOP"
        self._deadline = None if time_limit_minutes is None else runtime.begun + 60 * time_limit_minutes
        self._next_look = 0.0
        self._launched = launched()
        self._asked: tuple[Any, Tensor, float] | None = None
        self.exceeded = 0  # the sum of all counts, once it was more than it may be
        self.reason: str | None = None
        self._previous: dict[int, Any] = {}

    def install(self) -> None:
        """Handlers only set the flag: saving inside a signal handler is not safe."""
        for number in STOP_SIGNALS:
            self._previous[number] = signal.signal(number, self._on_signal)
        self.reason = self.reason or noted.take()

    def uninstall(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _on_signal(self, number: int, frame: Any) -> None:
        self.reason = self.reason or f"signal {signal.Signals(number).name}"

    def remove_stale_file(self) -> bool:
        """Removes a STOP file older than this start; whether there was one. Rank 0 only."""
        try:
            self._file.unlink()
        except FileNotFoundError:
            return False
        return True

    def _look(self) -> bool:
        now = time.monotonic()
        if self._deadline is not None and now >= self._deadline:
            self.reason = self.reason or "time limit"
        if self._launched and orphaned():
            self.reason = self.reason or "the launcher is gone"
        # a network file system is asked at most four times a second
        if self._runtime.world.is_main and now >= self._next_look:
            self._next_look = now + 0.25
            if os.path.exists(self._file):  # unlike pathlib's, no error where the file system cannot say
                self.reason = self.reason or "file STOP"
        return self.reason is not None

    def agreed(self, count: int = 0, most: float = math.inf) -> bool:
        """Whether all ranks stop now: one was asked to, or their counts together are above `most` (see `exceeded`).

        With several ranks the answer is one call old, hence the same on all.
        """
        progress = self._runtime.progress
        asked, total = int(self._look()), count
        progress.beat(waiting=True)
        if self._runtime.world.world_size > 1:
            question, before = (torch.tensor([asked, count]), most), self._asked
            asked, total = 0, 0
            if before is not None:
                work, answer, most = before
                work.wait()
                asked, total = answer.tolist()
            work = self._runtime.cpu_group.allreduce([question[0]])  # dist.all_reduce takes half as long again
            self._asked = (work, *question)
        progress.beat()
        if total > most:
            self.exceeded = total
        if asked:  # the same on all ranks, so that all come here
            told = enumerate(self._runtime.gather(self.reason))
            self.reason = self.reason or next(f"{reason} on rank {rank}" for rank, reason in told if reason)
        return bool(asked or self.exceeded)

    def settle(self) -> None:
        """Waits for the question still under way, before the process group is closed."""
        if self._asked is not None:
            self._asked[0].wait()
            self._asked = None

    def obeyed(self) -> None:
        """Removes the STOP file after it was obeyed, so that the next start goes on."""
        if self._runtime.world.is_main:
            self._file.unlink(missing_ok=True)
