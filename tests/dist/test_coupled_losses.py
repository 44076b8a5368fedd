"""A loss that looks across the rows of a batch: two processes train as one with twice the rows."""

import json

import torch
from dist.launching import launch, train_here, world_size

from dist_kd import checkpoint

# no batch norm in either network: nothing else depends on the micro-batch. dkd brings a warm-up that counts rows
LINE = [
    "--arch", "timm/test_vit", "--teacher-arch", "timm/test_vit", "--teacher-weights", "none",
    "--method", "dkd+dist", "--method-arg", "dkd.b=1", "--image-size", "32", "--batch-size",
    "16", "--max-steps", "10", "--lr", "0.002", "--mixed-precision", "no", "--workers", "1", "--augment", "crop",
]  # fmt: skip


def train(capsys, run, data, processes, micro):
    """What is said, and what the last checkpoint and the summary hold."""
    words = [*LINE, "--device-batch-size", str(micro), "--data", str(data), "--save-path", str(run)]
    if processes == 1:
        train_here(*words, variables={})
        said = capsys.readouterr().out
    else:
        said = launch("torchrun", "dist_kd/train.py", *words, processes=processes)
    assert world_size(run) == processes
    found, _ = checkpoint.find(run / "checkpoints")
    return said, checkpoint.load(found, "cpu").tensors, json.loads((run / "summary.json").read_text())


def distance(ours, theirs):
    return max((ours["model"][name] - theirs["model"][name]).abs().max().item() for name in ours["model"])


def test_two_processes_train_as_one_of_twice_the_rows(odd_digits, tmp_path, capsys):
    said, two, summary = train(capsys, tmp_path / "two", odd_digits, 2, 8)
    assert "group    dist works over 16 rows = 2 process(es) x 8" in said and "WARNING: dist" not in said
    assert summary["coupled_rows"] == 16
    _, one, _ = train(capsys, tmp_path / "one", odd_digits, 1, 16)
    assert torch.equal(two["method"]["rows_seen"], one["method"]["rows_seen"])
    assert distance(two, one) < 1e-6  # where rows of two processes do not meet it is 1e-2 and more
