"""Run by torchrun: each method trained by two ranks, beside one process with all rows. Writes found.json."""

import datetime
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from methods.feature_nets import FEATURE_METHODS, loss_of, networks, rows  # noqa: E402

from dist_kd.learner import Learner  # noqa: E402

STEPS, ROWS = 4, 8


def built(name: str, batch_size: int) -> tuple[Learner, nn.Module]:
    student, teacher = networks()
    loss = loss_of(name, student, teacher, batch_size, **({"warmup": 0.0} if name == "reviewkd" else {}))
    learner = Learner(student, loss)
    for module in learner.modules():  # batch norm works over a process's own rows, in the student as in an adapter
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    return learner, teacher


def train(learner: nn.Module, teacher: nn.Module, first: int, count: int) -> list[torch.Tensor]:
    """The losses of four steps over `count` rows from `first` on of each step's eight."""
    optimizer = torch.optim.SGD([p for p in learner.parameters() if p.requires_grad], lr=0.01)
    losses = []
    for step in range(STEPS):
        b = rows(count, ROWS * step + first)
        b.weights[1] = float(first > 0)  # a damaged row, in the first half only
        total = learner(b, teacher(b.images)).total
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total.detach())
    return losses


def state(learner: Learner) -> dict[str, torch.Tensor]:
    return {k: v for k, v in learner.state_dict().items() if "norms" not in k and not k.endswith("key")}


def distance(a: dict, b: dict, part: str) -> float:
    pairs = [(a[k].double().nan_to_num(), b[k].double().nan_to_num()) for k in a if k.startswith(part)]
    return max(((x - y).abs().max().item() for x, y in pairs), default=0.0)


def main() -> None:
    alone = {}
    for name in FEATURE_METHODS:  # before there is a group: one process
        whole, half = built(name, ROWS), built(name, ROWS // 2)
        start = {k: v.clone() for k, v in state(whole[0]).items()}
        losses = train(*whole, 0, ROWS)
        first_half = train(*half, 0, ROWS // 2)
        alone[name] = start, state(whole[0]), losses, first_half
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    found = {"world": world}
    mine = ROWS // world
    for name in FEATURE_METHODS:
        start, expected, losses, first_half = alone[name]
        learner, teacher = built(name, ROWS)
        together = train(DistributedDataParallel(learner, broadcast_buffers=False), teacher, rank * mine, mine)
        total = torch.stack(together)
        dist.all_reduce(total)
        now = state(learner)
        everyone = [None] * world
        dist.all_gather_object(everyone, now)
        found[name] = {
            "loss": (total / world / torch.stack(losses) - 1).abs().max().item(),
            "student": distance(now, expected, "student"),
            "state": distance(now, expected, "method"),
            "ranks": max(distance(everyone[0], other, "") for other in everyone),
            "moved": distance(start, expected, "student"),
            "alone": (torch.stack(together) - torch.stack(first_half)).abs().max().item() if rank == 0 else 0,
        }
    if rank == 0:
        (Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
