"""Two processes give what one gives: the same counts, the same parameters."""

import json

import pytest
import torch
from dist.counting import first_guesses
from dist.launching import launch, world_size

from dist_kd import checkpoint, models
from dist_kd.data.index import read_index

SMALL = [
    "--arch", "cnn_small", "--no-kd", "--image-size", "8", "--batch-size", "16", "--device-batch-size", "8",
    "--max-steps", "3", "--workers", "1",
]  # fmt: skip


def parameters(run):
    found, _ = checkpoint.find(run / "checkpoints")
    return checkpoint.load(found, "cpu")


@pytest.mark.parametrize(("launcher", "scorer"), [("torchrun", "plain"), ("accelerate", "torchrun")])
def test_validation_counts_do_not_depend_on_processes(odd_digits, tmp_path, launcher, scorer):
    """Uneven shards, 61 validation samples: a prime. Two processes train and score; then one, or two, score again.

    The training images stand as a test set too: 247 samples in three shards.
    """
    run, ledger = tmp_path / "run", tmp_path / "ledger"
    ledger.mkdir()
    test = ["--test-data", str(odd_digits / "train")]
    launch(
        launcher, "dist_kd/train.py", *SMALL, *test, "--data", str(odd_digits), "--save-path", str(run),
        variables={"DIST_KD_LEDGER": str(ledger)},
    )  # fmt: skip
    assert world_size(run) == 2
    student = json.loads((run / "summary.json").read_text())["student"]
    seen = [
        int(sample)
        for rank in range(2)
        for line in (ledger / f"test-rank{rank}.txt").read_text().splitlines()
        for sample in line.split()[2:]
    ]
    assert sorted(seen) == sorted([*range(247)] * student["test"]["last"]["evaluations"])
    network, index = models.load(run / "student").eval(), read_index(odd_digits / "train")
    assert student["test"]["last"]["samples"] == 247
    assert student["test"]["last"]["top1"] == 100 * first_guesses(network, index) / 247
    trained = student["last"]
    assert trained["samples"] == 61
    said = launch(scorer, "-m", "dist_kd.commands.main", "evaluate", str(run), "--json")
    answer = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    assert (answer["samples"], answer["top1"], answer["top5"]) == (61, trained["top1"], trained["top5"])
    assert answer["loss"] == pytest.approx(trained["loss"], rel=1e-6)


def train_twenty(run, data, launcher, micro, *more):
    launch(
        launcher, "dist_kd/train.py", "--no-kd", "--batch-size", "16", "--device-batch-size", str(micro),
        "--max-steps", "20", "--lr", "0.01", "--mixed-precision", "no", "--workers", "1", "--augment", "crop",
        "--data", str(data), "--save-path", str(run), *more,
    )  # fmt: skip
    assert world_size(run) == (1 if launcher == "plain" else 2)
    return parameters(run).tensors["model"]


def assert_close(ours, theirs, names):
    for name in names:
        assert torch.allclose(ours[name], theirs[name], rtol=0, atol=1e-5), (
            f"{name} differs by {(ours[name] - theirs[name]).abs().max():.2e}"
        )


def test_two_processes_equal_one_that_accumulates(odd_digits, tmp_path):
    """Batch norm, dropout, drop-connect and mixup: the same micro-batches, so the same gradients."""
    net = ("--arch", "efficientnet_b0", "--image-size", "32", "--mixup", "0.4")
    two = train_twenty(tmp_path / "two", odd_digits, "torchrun", 8, *net)
    one = train_twenty(tmp_path / "one", odd_digits, "plain", 8, *net)
    assert_close(two, one, [n for n in two if "running" not in n and "num_batches" not in n])


def test_without_batch_norm_the_micro_batch_does_not_matter(odd_digits, tmp_path):
    net = ("--arch", "timm/test_vit", "--image-size", "32")
    two = train_twenty(tmp_path / "two", odd_digits, "torchrun", 8, *net)
    one = train_twenty(tmp_path / "one", odd_digits, "plain", 16, *net)
    assert_close(two, one, two)
