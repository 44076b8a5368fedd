"""How large and how fast networks are, and how much smaller the student is: sizes exact, latency measured on the CPU.

Each quantity is defined in DEFINITIONS, which travels with every result. Knows no training and no data.
"""

from __future__ import annotations

import copy
import math
import platform
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from dist_kd import models

DEFINITIONS = {
    "parameters": "elements of all parameters",
    "buffers": "elements of all buffers (batch norm statistics and counters)",
    "state_dict_bytes": "bytes of all tensors of the state dict at their dtype; MB = 10^6 bytes",
    "flops": "2 x multiply-adds of convolutions and matrix products, forward pass of one image",
    "activations": "output elements of convolution, linear and norm modules, forward pass of one image",
    "size_original": "parameters + activations; some tables call this number the size",
    "latency_ms": "median milliseconds of a forward pass on the CPU, by batch size; null: one would exceed the limit",
}
# functional layers (squeeze-excite's pooling, attention's inner products) are no modules; pooling modules are left out
# so that the number does not depend on how a library writes the same network
COUNTED = (
    nn.modules.conv._ConvNd,
    nn.Linear,
    nn.modules.batchnorm._NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
)
# published "sizes" of a pair of networks (teacher, student), to stand beside ours: millions
PUBLISHED = {
    ("resnet152", "efficientnet_b0", 224): (104.4, 20.7),
    ("resnet152_cifar", "efficientnet_b0_cifar", 32): (72.0, 6.6),
}
REPEATS = (3, 50)  # fewest and most timed passes; few ones only for slow networks

Rows = tuple[tuple[str, str, str], ...]
ROWS: Rows = (  # key, text, unit
    ("parameters", "parameters", "count"),
    ("buffers", "buffers", "count"),
    ("state_dict_bytes", "state dict", "bytes"),
    ("flops", "FLOPs, one image", "flop"),
    ("activations", "activations, one image", "count"),
    ("size_original", "parameters + activations", "count"),
)


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradient or compiled code; every module gets its own mode back."""
    modes = [(module, module.training) for module in network.modules()]
    # asked only where needed: set_stance imports the compiler, which takes seconds
    compiled = any(m._compiled_call_impl is not None for m in network.modules())
    eager = torch.compiler.set_stance("force_eager") if compiled else nullcontext()
    network.eval()
    try:
        with torch.no_grad(), eager:
            yield
    finally:
        for module, training in modes:
            module.training = training


def _logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output[0]


def sizes(network: nn.Module, image_size: int) -> dict[str, Any]:
    """Parameters, buffers, bytes, FLOPs and activations of one image of `image_size` pixels; nothing is computed.

    The forward pass runs on the meta device (shapes only), with stand-ins for the parameters: no copy, no time.
    """
    bare = getattr(network, "net", network)
    state = bare.state_dict()
    named = {**dict(network.named_parameters()), **dict(network.named_buffers())}
    shapes = {name: torch.empty_like(value, device="meta") for name, value in named.items()}
    dtype = next((p.dtype for p in network.parameters()), torch.float32)
    image = torch.empty(1, 3, image_size, image_size, dtype=dtype, device="meta")
    elements = 0

    def count(module: nn.Module, inputs: Any, output: Tensor) -> None:
        nonlocal elements
        elements += output.numel()

    hooks = [m.register_forward_hook(count) for m in network.modules() if isinstance(m, COUNTED)]
    counter = FlopCounterMode(display=False)
    try:
        with _evaluating(network), counter:
            torch.func.functional_call(network, shapes, (image,))
    finally:
        for hook in hooks:
            hook.remove()
    parameters = sum(p.numel() for p in bare.parameters())
    return {
        "parameters": parameters,
        "buffers": sum(b.numel() for b in bare.buffers()),
        "state_dict_bytes": sum(t.numel() * t.element_size() for t in state.values()),
        "dtype": str(dtype).removeprefix("torch."),
        "image_size": image_size,
        "flops": counter.get_total_flops(),
        "activations": elements,
        "size_original": parameters + elements,
    }


def _on_cpu(network: nn.Module) -> nn.Module:
    """The network itself, or a CPU copy made without a second one on its own device."""
    tensors = [*network.parameters(), *network.buffers()]
    if all(t.device.type == "cpu" for t in tensors):
        return network
    memo: dict[int, Any] = {}
    for tensor in tensors:
        local = tensor.detach().cpu()
        memo[id(tensor)] = nn.Parameter(local, requires_grad=False) if isinstance(tensor, nn.Parameter) else local
    return copy.deepcopy(network, memo)


def latencies(
    networks: Sequence[nn.Module],
    image_sizes: Sequence[int],
    batch_sizes: Sequence[int] = (1, 32),
    *,
    threads: int = 1,
    seconds: float = 3.0,
) -> list[dict[str, Any]]:
    """For each network: {"latency_ms": {"1": median, ...}, "latency_p95_ms": {...}, "latency_repeats": {...}}.

    The networks take turns, so that a machine that slows down slows all alike. Each gets about `seconds` per batch
    size; a batch of which three passes would take longer than twice that is not run and reported as None.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        ready = [_on_cpu(network) for network in networks]
        found: list[dict[str, Any]] = [
            {"latency_ms": {}, "latency_p95_ms": {}, "latency_repeats": {}} for _ in networks
        ]
        single: list[float] = []
        for network, size in zip(ready, image_sizes, strict=True):
            with _evaluating(network):
                _timed(network, _image(network, 1, size))  # the first pass prepares kernels
                single.append(_timed(network, _image(network, 1, size)))
        for batch in batch_sizes:
            fits = [t * batch * REPEATS[0] <= 2 * seconds for t in single]
            times = _in_turn(ready, image_sizes, batch, seconds, fits)
            for entry, measured in zip(found, times, strict=True):
                milliseconds = sorted(1e3 * t for t in measured)
                p95 = milliseconds[math.ceil(0.95 * len(milliseconds)) - 1] if milliseconds else None
                entry["latency_ms"][str(batch)] = _rounded(statistics.median(milliseconds)) if milliseconds else None
                entry["latency_p95_ms"][str(batch)] = _rounded(p95)
                entry["latency_repeats"][str(batch)] = len(milliseconds)
        return found
    finally:
        torch.set_num_threads(before)


def _in_turn(
    networks: Sequence[nn.Module], image_sizes: Sequence[int], batch: int, seconds: float, fits: Sequence[bool]
) -> list[list[float]]:
    """Seconds of each timed pass of each network, one pass of each at a time until every one has had its share."""
    times: list[list[float]] = [[] for _ in networks]
    images = [_image(n, batch, size) if fit else None for n, size, fit in zip(networks, image_sizes, fits, strict=True)]
    waiting = {k for k, fit in enumerate(fits) if fit}
    warm = set(waiting) if batch > 1 else set()  # batch 1 has just been run; a large batch allocates anew
    while waiting:
        for k in sorted(waiting):
            with _evaluating(networks[k]):
                took = _timed(networks[k], images[k])
            if k in warm and took * REPEATS[0] <= seconds:  # of a slow pass, preparation is a small part: keep it
                warm.discard(k)
                continue
            warm.discard(k)
            times[k].append(took)
            # large batches can be slower than single images foretold: then fewer than the fewest
            ahead = sum(times[k]) + took
            enough = ahead > (seconds if len(times[k]) >= REPEATS[0] else 2 * seconds)
            if enough or len(times[k]) >= REPEATS[1]:
                waiting.discard(k)
    return times


def _image(network: nn.Module, batch: int, size: int) -> Tensor:
    dtype = next((p.dtype for p in network.parameters()), torch.float32)
    generator = torch.Generator().manual_seed(0)  # the caller's generator is not touched
    return torch.randn(batch, 3, size, size, generator=generator).to(dtype)


def _timed(network: nn.Module, images: Tensor) -> float:
    start = time.perf_counter()
    _logits(network(images)).sum().item()
    return time.perf_counter() - start


def _rounded(value: float | None) -> float | None:
    return None if value is None else float(f"{value:.4g}")


def cpu_name() -> str:
    """The processor's name as the system gives it."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def measure(
    network: nn.Module,
    image_size: int,
    batch_sizes: Sequence[int] = (1, 32),
    latency: bool = True,
    *,
    threads: int = 1,
    seconds: float = 3.0,
) -> dict[str, Any]:
    """Sizes and CPU latency of one network, JSON-ready; the keys are those of DEFINITIONS. The network is unchanged."""
    entry = _named(network) | sizes(network, image_size)
    if latency:
        entry |= latencies([network], [image_size], batch_sizes, threads=threads, seconds=seconds)[0]
    return entry


def _named(network: nn.Module) -> dict[str, Any]:
    spec = getattr(network, "spec", None)
    return {"name": spec.arch if spec else type(network).__name__}


def compare(
    teacher: nn.Module | None,
    student: nn.Module,
    image_size: int,
    batch_sizes: Sequence[int] = (1, 32),
    latency: bool = True,
    *,
    teacher_image_size: int | None = None,
    threads: int = 1,
    seconds: float = 3.0,
) -> dict[str, Any]:
    """Both networks' measures with, for each, student/teacher in percent and teacher/student in x; JSON-ready.

    Without a teacher there are only the student's. A student whose head folds is measured folded too, under "folded".
    Takes about 2 x len(batch_sizes) x `seconds`; none with latency=False.
    """
    sides = {} if teacher is None else {"teacher": (teacher, teacher_image_size or image_size)}
    sides["student"] = (student, image_size)
    if models.foldable(student):
        sides["folded"] = (models.fold_affine_head(student), image_size)
    result: dict[str, Any] = {side: _named(network) | sizes(network, size) for side, (network, size) in sides.items()}
    if latency:
        networks, image_sizes = zip(*sides.values(), strict=True)
        measured = latencies(networks, image_sizes, batch_sizes, threads=threads, seconds=seconds)
        for side, found in zip(sides, measured, strict=True):
            result[side] |= found
        result |= {"cpu": cpu_name(), "threads": threads}
    if teacher is not None:
        result |= _ratios(result["teacher"], result["student"])
        result["published_size"] = PUBLISHED.get((result["teacher"]["name"], result["student"]["name"], image_size))
        if "folded" in sides:
            result["folded"] |= _ratios(result["teacher"], result["folded"])
    result["definitions"] = DEFINITIONS
    result["note"] = _note(result)
    return result


def _ratios(teacher: dict[str, Any], student: dict[str, Any]) -> dict[str, Any]:
    """{"ratio_percent": {...}, "compression": {...}}; latencies as latency_ms_1, latency_ms_32."""
    pairs = {key: (teacher[key], student[key]) for key, _, _ in ROWS}
    for batch, ours in student.get("latency_ms", {}).items():
        pairs[f"latency_ms_{batch}"] = (teacher["latency_ms"][batch], ours)
    percent: dict[str, float | None] = {}
    times: dict[str, float | None] = {}
    for key, (large, small) in pairs.items():
        percent[key] = round(100 * small / large, 4) if large and small is not None else None
        times[key] = round(large / small, 4) if large is not None and small else None
    return {"ratio_percent": percent, "compression": times}


def _note(result: dict[str, Any]) -> str:
    """What the numbers count, in sentences."""
    words = (("Parameters", "parameters"), ("state dict", "state_dict_bytes"), ("FLOPs", "flops"))
    parts = [f"{word}: {DEFINITIONS[key]}" for word, key in (*words, ("activations", "activations"))]
    note = "; ".join(parts) + "."
    if "latency_ms" in result["student"]:
        where = f" ({result['cpu']}, threads: {result['threads']}, networks in turn)" if "cpu" in result else ""
        note += f" Latency: {DEFINITIONS['latency_ms']}{where}."
    if result.get("published_size"):
        large, small = result["published_size"]
        ours = [result[side]["size_original"] / 1e6 for side in ("teacher", "student")]
        note += (
            f" A published table gives this pair's size as {large:g} M -> {small:g} M ({100 * small / large:.2f} %),"
        )
        note += " nearest to parameters + activations, not to parameters"
        note += f"; here these are {ours[0]:.1f} M -> {ours[1]:.1f} M ({100 * ours[1] / ours[0]:.2f} %)."
    return f"{_folded(result)} {note}" if "folded" in result else note


def _folded(result: dict[str, Any]) -> str:
    """The folded student's sizes in a sentence, each as a share of the teacher's, or of the unfolded student's."""
    entry, base = result["folded"], "teacher" if "teacher" in result else "student"
    parts = []
    for key, text, unit in ROWS:
        if key in ("parameters", "state_dict_bytes", "flops"):
            share = 100 * entry[key] / result[base][key]
            parts.append(f"{text} {_shown(entry[key], unit)} ({share:.2f} % of the {base}'s)")
    return f"Folded, the student is the same function as {entry['name']}: {'; '.join(parts)}."


def _shown(value: float | None, unit: str) -> str:
    if value is None:
        return "-"
    if unit == "bytes":
        return f"{value / 1e6:.2f} MB"
    if unit == "flop":
        return f"{value / 1e9:.3f} GFLOP" if value >= 1e8 else f"{value / 1e6:.3f} MFLOP"
    if unit == "ms":
        return f"{value:.4g} ms"
    return f"{value:,}"


def table(result: dict[str, Any]) -> str:
    """The result of `compare` as aligned text with its units, and the definitions below."""
    sides = [side for side in ("teacher", "student") if side in result]
    rows = [(text, unit, key, [result[side][key] for side in sides]) for key, text, unit in ROWS]
    for batch in result["student"].get("latency_ms", {}):
        for kind, text in (("latency_ms", "median"), ("latency_p95_ms", "p95")):
            values = [result[side][kind][batch] for side in sides]
            key = f"latency_ms_{batch}" if kind == "latency_ms" else ""
            rows.append((f"CPU latency, batch {batch}, {text}", "ms", key, values))
    both = len(sides) == 2
    head = ["", *(f"{result[side]['name']} ({result[side]['image_size']} px)" for side in sides)]
    lines = [[*head, "student is", "smaller by"] if both else head]
    for text, unit, key, values in rows:
        line = [text, *(_shown(value, unit) for value in values)]
        if both:
            percent, times = result["ratio_percent"].get(key), result["compression"].get(key)
            line += ["-" if percent is None else f"{percent:.2f} %", "-" if times is None else f"{times:.2f} x"]
        lines.append(line)
    widths = [max(len(line[k]) for line in lines) for k in range(len(lines[0]))]
    text = [
        "  ".join(
            cell.ljust(w) if k == 0 else cell.rjust(w) for k, (cell, w) in enumerate(zip(line, widths, strict=True))
        )
        for line in lines
    ]
    text.insert(1, "-" * max(map(len, text)))
    return (
        "\n".join(line.rstrip() for line in text)
        + "\n"
        + _note(result).replace("; ", ";\n  ").replace(". ", ".\n")
        + "\n"
    )
