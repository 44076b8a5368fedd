"""Two real processes of this machine that agree: how long an agreement takes, and one exchange of gradients."""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from dist_kd.config import Config
from dist_kd.doctor import BAD, LOOK, OK, Finding, said
from dist_kd.doctor.student import CLASSES, sizes

PEERS = 2
WAIT_S = 10.0  # for each backend
SMALL_REPEATS, LARGE_REPEATS = 30, 3
SLOW_S = 1.0  # for the gradients of one step


def check(config: Config, facts: dict[str, Any]) -> Iterator[Finding]:
    """gloo, by which processes agree even where there are GPUs; and nccl, by which gradients travel between those."""
    parameters, _ = sizes(config, facts.get("classes", CLASSES))
    gpus = 0 if config.cpu else torch.cuda.device_count()  # through the driver's list: no GPU is opened here
    backends = ["gloo", "nccl"] if gpus >= PEERS and dist.is_nccl_available() else ["gloo"]
    for backend in backends:
        answer = between_two(backend, parameters)
        if isinstance(answer, str):
            text = (
                f"{backend} did not work between {PEERS} processes of this machine ({answer}); is the host's name "
                f"known to it, and the loopback interface up? {backend.upper()}_SOCKET_IFNAME=lo tries that one"
            )
            yield Finding(BAD, "collectives", text)
            continue
        small, large = answer
        size = 4 * parameters
        text = (
            f"{backend}, {PEERS} processes of this machine: an agreement of 4 bytes takes {1e3 * small:.2f} ms, the "
            f"student's gradients ({size / 1e6:.1f} MB) {1e3 * large:.1f} ms ({size / large / 1e9:.2f} GB/s)"
        )
        slow = large > SLOW_S
        yield Finding(LOOK if slow else OK, "collectives", text + ("; slow: is the machine busy?" if slow else ""))


def between_two(backend: str, parameters: int) -> tuple[float, float] | str:
    """Seconds of an all-reduce of 4 bytes and of `parameters` floats, medians; or what went wrong."""
    fork = multiprocessing.get_context("fork")
    receiver, sender = fork.Pipe(duplex=False)
    with tempfile.TemporaryDirectory(prefix="dist-kd-doctor-") as folder:
        peers = [
            fork.Process(target=_peer, args=(rank, backend, str(Path(folder) / "store"), parameters, sender))
            for rank in range(PEERS)
        ]
        for peer in peers:
            peer.start()
        sender.close()
        try:
            if not receiver.poll(WAIT_S):
                return f"no answer within {WAIT_S:g} s"
            return receiver.recv()
        except EOFError:
            return "both processes died"
        finally:
            for peer in peers:
                peer.join(0.5)
                peer.kill()
                peer.join(0.5)


def _peer(rank: int, backend: str, store: str, parameters: int, sender: Any) -> None:
    try:
        torch.set_num_threads(1)
        wait = timedelta(seconds=WAIT_S)
        dist.init_process_group(backend, store=dist.FileStore(store, PEERS), world_size=PEERS, rank=rank, timeout=wait)
        assert dist.get_world_size() == PEERS
        device = torch.device("cuda", rank) if backend == "nccl" else torch.device("cpu")
        if device.type == "cuda":
            torch.cuda.set_device(device)
        times = [
            _timed(torch.ones(size, device=device), repeats)
            for size, repeats in ((1, SMALL_REPEATS), (parameters, LARGE_REPEATS))
        ]
        dist.barrier()
        if rank == 0:
            sender.send(tuple(times))
    except Exception as error:
        sender.send(said(error))
    os._exit(0)  # no farewell between peers: both have what they need


def _timed(values: torch.Tensor, repeats: int) -> float:
    """Median seconds; the first one finds the way and is not counted."""
    times = []
    for _ in range(repeats + 1):
        values.fill_(1.0)
        start = time.perf_counter()
        dist.all_reduce(values)
        total = values[-1].item()  # waits for a GPU
        times.append(time.perf_counter() - start)
        if total != PEERS:
            raise RuntimeError(f"the sum over {PEERS} processes came out as {total:g}")
    return statistics.median(times[1:])
