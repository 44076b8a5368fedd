"""Run by torchrun: what two ranks compute together beside what one process computes of all rows. Writes found.json."""

import copy
import datetime
import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

from methods.golden import large  # noqa: E402

from dist_kd.contracts import Batch, ModelOutput  # noqa: E402
from dist_kd.learner import Learner  # noqa: E402
from dist_kd.methods import build_method, ranks  # noqa: E402
from dist_kd.methods.dist import intra_loss  # noqa: E402


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6, 10, dtype=torch.float64)

    def forward(self, x):
        return ModelOutput(self.head(x), {})


def alone(values):
    """As in a world of one."""
    ranks.world_size, real = (lambda: 1), ranks.world_size
    import dist_kd.methods.dist as module

    module.world_size = ranks.world_size
    try:
        return values()
    finally:
        ranks.world_size = module.world_size = real


def train(learner, method_input, rows):
    optimizer = torch.optim.SGD(learner.parameters(), lr=0.5)
    for _ in range(5):
        images, teacher, labels, weights = (part[rows] for part in method_input)
        b = Batch(images, labels, weights, torch.arange(len(labels)))
        learner(b, ModelOutput(teacher, {})).total.backward()
        optimizer.step()
        optimizer.zero_grad()


def main() -> None:
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=60))
    rank, world = dist.get_rank(), dist.get_world_size()
    s, t, labels = large(16, 10)
    weights = torch.ones(16, dtype=torch.float64)
    weights[[2, 11, 12]] = 0
    mine = slice(8 * rank, 8 * rank + 8)

    whole = s.clone().requires_grad_()
    expected = alone(lambda: intra_loss(whole, t, weights, 4.0))
    expected.backward()
    part = s[mine].clone().requires_grad_()
    together = intra_loss(part, t[mine], weights[mine], 4.0)
    together.backward()
    half = alone(lambda: intra_loss(part, t[mine], weights[mine], 4.0))
    # DDP divides by the number of ranks what this leaves in each
    gradient = (part.grad / world - whole.grad[mine]).abs().max()

    all_rows = s.clone().requires_grad_()
    (all_rows @ all_rows.T).square().mean().backward()
    some = s[mine].clone().requires_grad_()
    gathered = ranks.rows_of_all_ranks(some)
    (gathered @ gathered.T).square().mean().backward()

    torch.manual_seed(0)
    images = torch.randn(16, 6, dtype=torch.float64)
    student = Student()
    before = student.head.weight.detach().clone()
    one, two = (Learner(copy.deepcopy(student), build_method("dist", T=4.0)) for _ in range(2))
    data = images, t, labels, weights
    alone(lambda: train(one, data, slice(None)))
    train(DistributedDataParallel(two), data, mine)

    worst = torch.stack(
        [
            (together - expected).abs().detach(),
            gradient,
            (gathered - s).abs().max().detach(),
            (some.grad / world - all_rows.grad[mine]).abs().max(),
            (half - expected).abs().detach(),
            (one.student.head.weight - two.student.head.weight).abs().max().detach(),
            (two.student.head.weight - before).abs().max().detach(),
        ]
    )
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    names = ("loss", "gradient", "rows", "rows_gradient", "halves", "trained", "moved")
    if rank == 0:
        found = dict(zip(names, worst.tolist(), strict=True)) | {"world": world}
        (Path(sys.argv[1]) / "found.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
