"""One step of this very student, teacher and loss: what fits into memory, how long it takes, and so the whole run.

With random weights and random images: neither changes what a step costs, and nothing is downloaded.
"""

from __future__ import annotations

import resource
import statistics
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.nn import functional as F

from dist_kd import models, wiring
from dist_kd.config import Config
from dist_kd.contracts import Batch
from dist_kd.doctor import BAD, LOOK, OK, Finding
from dist_kd.doctor.devices import gib, memory
from dist_kd.doctor.student import CLASSES
from dist_kd.learner import Learner
from dist_kd.optimizer import make_optimizer
from dist_kd.plan import micro_batch_of
from dist_kd.runtime import Runtime, start_runtime

SAMPLES = 50_000  # in the training set, where none is given
BUDGET_S = 15.0  # for growing on a CPU; the limit of the check leaves room for building the networks
DOUBLINGS = 4  # above the micro-batch that was chosen, on a GPU
REPEATS = 3
SLOW_S = 3.0  # of a step that is not done twice

Step = Callable[[int], float]


def check(config: Config, facts: dict[str, Any]) -> Iterator[Finding]:
    started = time.monotonic()
    processes = max(1, facts.get("gpus", 0))
    micro = micro_batch_of(config, processes)
    runtime = start_runtime(config)
    step = step_of(config, runtime, facts.get("classes", CLASSES), facts.get("samples", SAMPLES))
    if runtime.device.type == "cuda":
        rows, seconds, finding = _on_gpu(step, micro)
    else:
        rows, seconds, finding = _on_cpu(step, micro, started + BUDGET_S)
    yield finding
    if seconds:
        yield _time(config, facts, processes, micro, rows, seconds)


def step_of(config: Config, runtime: Runtime, classes: int, samples: int) -> Step:
    """rows -> seconds of one whole step with them: teacher, student, loss, backward, update."""
    config = config.model_copy(update={"student_weights": "none", "teacher_weights": "none", "compile": False})
    network = wiring.build_student(config, classes)
    spec, device = network.spec, runtime.device
    teachers = wiring.build_teachers(config, classes)
    method = wiring.build_loss(config, network, teachers, samples).to(device)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    network = network.to(device).to(memory_format=memory_format)
    teacher = wiring.prepare_teacher(config, runtime, teachers, spec)
    bare = Learner(network, method)
    head = models.head_parameters(network) if config.head_lr else ()
    learner, optimizer = runtime.prepare(bare, make_optimizer(config, bare, head))
    scaler = runtime.accelerator.scaler

    def step(rows: int) -> float:
        labels = torch.arange(rows, device=device) % classes
        batch = Batch(
            images=torch.randn(rows, 3, spec.image_size, spec.image_size, device=device).to(
                memory_format=memory_format
            ),
            labels=labels,
            weights=torch.ones(rows, device=device),
            samples=torch.arange(rows, device=device) % samples,
            soft_labels=F.one_hot(labels, classes).float() if config.mixup or config.cutmix else None,
        )
        _wait(device)
        started = time.perf_counter()
        total = learner(batch, teacher(batch.images)).total
        (total if scaler is None else scaler.scale(total)).backward()
        optimizer.step()
        optimizer.zero_grad()
        _wait(device)
        return time.perf_counter() - started

    return step


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _on_gpu(step: Step, micro: int) -> tuple[int, float, Finding]:
    """(rows, seconds of a step with them, what fits)."""
    rows = micro
    while rows and not _fits(step, rows):
        rows //= 2
    if not rows:
        text = "not even a micro-batch of 1 fits into the GPU's memory; choose smaller networks or --image-size"
        return 0, 0.0, Finding(BAD, "batch", text)
    seconds = statistics.median(step(rows) for _ in range(REPEATS))
    used, whole = torch.cuda.max_memory_allocated(), torch.cuda.mem_get_info()[1]
    if rows < micro:
        text = f"the micro-batch of {micro} does not fit into the GPU's {gib(whole)}, one of {rows} does"
        return rows, seconds, Finding(BAD, "batch", f"{text}: --device-batch-size {rows} (the global batch stays)")
    largest = rows
    for _ in range(DOUBLINGS):
        if not _fits(step, 2 * largest):
            break
        largest *= 2
    text = f"the micro-batch of {micro} takes {gib(used)} of the GPU's {gib(whole)}; one of {largest} fits too"
    return rows, seconds, Finding(OK, "batch", text)


def _fits(step: Step, rows: int) -> bool:
    try:
        step(rows)
    except torch.OutOfMemoryError:
        pass  # what it holds is let go at the end of this clause
    else:
        return True
    torch.cuda.empty_cache()
    return False


def _peak() -> int:
    """Bytes: the most that this process has ever held."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def _on_cpu(step: Step, micro: int, end: float) -> tuple[int, float, Finding]:
    """As `_on_gpu`; the micro-batch grows while there is time, and what it needs in the end is a straight line."""
    before = _peak()
    available = memory()[1] + before
    rows = min(2, micro)
    seconds, first = _pair(step, rows), (rows, _peak())
    while rows < micro and time.monotonic() + 2 * seconds * min(2, micro / rows) < end:
        rows = min(2 * rows, micro)
        seconds = _pair(step, rows)
    grown, peak = rows - first[0], _peak()
    per_row = (peak - first[1]) / grown if grown else (peak - before) / rows
    need = peak + per_row * (micro - rows)
    about = "" if rows == micro else f", going by one of {rows}"
    text = f"the micro-batch of {micro} needs {gib(need)} of the {gib(available)} that one process can have{about}"
    if need <= available:
        return rows, seconds, Finding(OK, "batch", text)
    if not grown and micro > rows:  # what is needed once, whatever the rows, is in there too
        return rows, seconds, Finding(LOOK, "batch", f"{text}, which is too few to be sure; there was no time for more")
    fits = max(1, int(rows + (available - peak) / per_row)) if per_row > 0 else rows
    return rows, seconds, Finding(BAD, "batch", f"{text}: --device-batch-size {fits} or less (the global batch stays)")


def _pair(step: Step, rows: int) -> float:
    """Seconds of the second of two steps, as the first one prepares kernels and memory; of a slow one it is little."""
    first = step(rows)
    return first if first > SLOW_S else step(rows)


def _time(config: Config, facts: dict[str, Any], processes: int, micro: int, rows: int, seconds: float) -> Finding:
    rate = rows / seconds
    where = f"{processes} process{'es' if processes > 1 else ''} on this machine"
    text = f"{_count(rate)} images/s: a micro-batch of {micro} takes {1e3 * seconds * micro / rows:,.0f} ms"
    text += "" if rows == micro else f" (from one of {rows})"
    text += "; without --compile" if config.compile else ""
    images = config.max_steps * config.batch_size if config.max_steps else config.epochs * facts.get("samples", 0)
    if images:
        length = f"--max-steps {config.max_steps}" if config.max_steps else f"--epochs {config.epochs:g}"
        text += f"; {length} by {where} would take about {_hours(images / rate / processes)}, evaluations not counted"
    loader = facts.get("loader")
    if loader is not None and loader < rate:
        return Finding(
            LOOK, "time", f"{text}; but the data come at {_count(loader)} images/s only: more --workers or cores"
        )
    return Finding(OK, "time", text)


def _count(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"


def _hours(seconds: float) -> str:
    return f"{seconds / 3600:,.1f} hours" if seconds >= 3600 else f"{seconds / 60:.1f} minutes"
