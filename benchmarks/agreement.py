"""What it costs that several processes agree at each step whether to stop, beside the same steps without asking.

Processes on this machine train one run together, as a launcher would have them; all take the same turns. The question
travels while the step is computed, so the cost is that of asking and of an answer that is late.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import paired
import step
import torch

from dist_kd.cli import ended

LIMIT_S = 600.0  # for all of it
BAR = 0.5  # percent of a step


def work(rank: int, size: int, port: int, args: argparse.Namespace, folder: Path, link: Connection) -> None:
    """One rank: sends back how many trained together, seconds of both rivals, and of each look for requests."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in place.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(1)
    with contextlib.redirect_stdout(io.StringIO()):
        _, run, _, _ = step.build(args, folder)
    ours, asked, looks = step.OurLoop(run), run.stop.agreed, []

    def look() -> bool:
        begun = time.thread_time()  # of the processor: what others take of it is not the question's
        answer = asked()
        looks.append(time.thread_time() - begun)
        return answer

    def with_(agreed) -> Any:
        def one() -> None:
            run.stop.agreed = agreed
            ours.step()

        return one

    rivals = {"asking": with_(look), "not asking": with_(lambda: False)}
    for one in rivals.values():
        one()
    looks.clear()
    times = paired.take_turns(rivals, args.rounds, args.steps, torch.device("cpu"), turn=step.TURN)
    run.stop.settle()
    link.send((run.runtime.world.world_size, times, looks))
    run.runtime.barrier()
    run.source.close()
    run.tracker.close("done")
    run.runtime.close()


def measure(args: argparse.Namespace, folder: Path) -> list[tuple[int, paired.Times, list[float]]]:
    """What each rank says."""
    spawn = multiprocessing.get_context("spawn")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    links, processes = [], []
    for rank in range(args.processes):
        mine, theirs = spawn.Pipe()
        processes.append(
            spawn.Process(target=work, args=(rank, args.processes, port, args, folder, theirs), daemon=True)
        )
        processes[-1].start()
        links.append(mine)
        theirs.close()
    try:
        assert all(link.poll(LIMIT_S) for link in links), f"no answer within {LIMIT_S:.0f} s"
        return [link.recv() for link in links]
    finally:
        for process in processes:
            process.join(30)
            process.kill()


def main(argv: list[str] | None = None) -> int:
    parser = step.arguments()
    parser.description = __doc__.splitlines()[0]
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tiny", action="store_true", help="few steps of a small network: shows that it works")
    args = parser.parse_args(argv)
    if args.tiny:
        args.teacher_arch, args.batch_size, args.rounds, args.steps = "cnn_small", 16, 2, 2
    facts = paired.machine(torch.device("cpu")) | {"threads": 1}
    with tempfile.TemporaryDirectory() as name:
        told = measure(args, Path(name))
    assert [size for size, _, _ in told] == args.processes * [args.processes], "they did not train together"
    times = told[0][1]
    processor = times.ratio("asking", "not asking", "processor")
    ratio, look = times.ratio("asking", "not asking"), [1000 * statistics.median(looks) for _, _, looks in told]
    share = 100 * max(look) / (1000 * statistics.median(times.processor["not asking"]))
    rows = [
        ["step, asking", times.ms("asking").show("ms")],
        ["step, not asking", times.ms("not asking").show("ms")],
        ["asking / not asking", ratio.show(digits=3) + ("" if times.steady(*times.wall) else ", inconclusive")],
        ["asking / not asking, processor time of rank 0 with its threads", processor.show(digits=3)],
        ["processor time in the call itself, median of each rank", ", ".join(f"{one:.3f}" for one in look) + " ms"],
        [
            "largest of them / processor time of a step",
            f"{share:.2f} %, bar {BAR} %: {'met' if share < BAR else 'missed'}",
        ],
    ]
    what = (
        f"Agreement on stops of {args.processes} processes (gloo) with {args.arch} taught by {args.teacher_arch}, "
        f"{args.batch_size} images a step in all"
    )
    head = ["", f"median [min - max] of {args.rounds} rounds x {args.steps} steps"]
    results = {"rounds": times._asdict(), "look_ms": look, "ratio": ratio._asdict(), "processes": args.processes}
    paired.publish(what, facts, [paired.table(head, rows)], results, args.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(ended(main))
