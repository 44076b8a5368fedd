"""Damaged samples under real processes: ranks stay in step, count the same, and stop together if it is too many."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import torch
from dist.launching import launch, world_size

from dist_kd import checkpoint
from dist_kd.cli import parse
from dist_kd.data.index import checksum, read_index, write_index
from dist_kd.data.order import Order
from dist_kd.errors import DataError
from dist_kd.lifetime import run_training

pytestmark = pytest.mark.timeout(300)  # the first test that asks for a run of the module waits for it

BATCH, SEED, STEPS = 16, 0, 20
SAMPLES, PER_EPOCH = 247, 247 // 16  # 15 steps an epoch: the run ends in the second
BAD = {3: "checksum", 60: "decode", 110: "checksum", 150: "checksum", 201: "checksum", 220: "decode"}
BAD_VAL = {5: "checksum"}
ENOUGH, TOO_LITTLE = "0.05", "0.012"  # 12 and 2 samples


def damage(folder, kinds):
    """Flips a byte of images (checksum), or puts other bytes there with their own checksum, as at indexing (decode)."""
    index = read_index(folder)
    rows = np.array(index.rows)
    for sample, kind in kinds.items():
        shard, row = index.locate(sample)
        with open(index.shard_path(shard), "r+b") as file:
            file.seek(int(row["offset"]))
            data = bytearray(file.read(int(row["length"])))
            data[1] ^= 255
            file.seek(int(row["offset"]))
            file.write(data)
        if kind == "decode":
            rows[sample]["checksum"] = checksum(bytes(data))
    write_index(dataclasses.replace(index, rows=rows))


@pytest.fixture(scope="module")
def damaged(odd_digits, tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged") / "set"
    shutil.copytree(odd_digits, folder)
    damage(folder / "train", BAD)
    damage(folder / "val", BAD_VAL)
    return folder


def train(run, data, launcher, fraction, *more, expected=0, refused=False):
    """One start of a run; what it said. The ledger lies in the run's folder."""
    run.mkdir(exist_ok=True)
    said = launch(
        launcher, "dist_kd/train.py", "--arch", "timm/test_vit", "--no-kd", "--image-size", "32",
        "--batch-size", str(BATCH), "--device-batch-size", str(BATCH), "--max-steps", str(STEPS), "--lr", "0.01",
        "--log-steps", "3", "--checkpoint-steps", "100", "--no-in-memory", "--workers", "1", "--seed", str(SEED),
        "--mixed-precision", "no", "--max-bad-fraction", fraction, "--data", str(data), "--save-path", str(run), *more,
        expected=expected, variables={"DIST_KD_LEDGER": str(run)},
    )  # fmt: skip
    if not refused:
        assert world_size(run) == (1 if launcher == "plain" else 2)
    return said


def ledger(run, rank):
    """Lines [epoch, step, samples...] of one rank."""
    return [list(map(int, line.split())) for line in (run / f"rank{rank}.txt").read_text().splitlines()]


def bad_by_step(first, last):
    """[(step, number of bad samples up to it in its epoch)] that the order of samples says."""
    order = Order((100, 100, 47), BATCH, SEED, 1, SAMPLES)
    counts, total = [], 0
    for step in range(first, last):
        total = total if step % PER_EPOCH else 0
        total += int(np.isin(order.global_batch(step), list(BAD)).sum())
        counts.append((step, total))
    return counts


def kinds_shown(steps):
    order = Order((100, 100, 47), BATCH, SEED, 1, SAMPLES)
    shown = [BAD[s] for step in range(steps) for s in order.global_batch(step).tolist() if s in BAD]
    return {kind: shown.count(kind) for kind in sorted(set(shown))}


def metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    timed = ("time/", "val/seconds")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in lines if line["kind"] != "resume"]


def model(run):
    return checkpoint.load(checkpoint.find(run / "checkpoints")[0], "cpu").tensors["model"]


def skipped(run):
    return json.loads((run / "summary.json").read_text())["skipped"]


def status(run):
    return json.loads((run / "status.json").read_text())


@pytest.fixture(scope="module")
def undisturbed(damaged, tmp_path_factory):
    run = tmp_path_factory.mktemp("undisturbed") / "run"
    return run, train(run, damaged, "torchrun", ENOUGH)


@pytest.fixture(scope="module")
def stopped(damaged, tmp_path_factory):
    """A run of two processes that may have two bad samples and meets more."""
    run = tmp_path_factory.mktemp("stopped") / "run"
    return run, train(run, damaged, "torchrun", TOO_LITTLE, expected=1)


def test_two_processes_count_and_learn_what_one_does(damaged, undisturbed, tmp_path):
    two, said = undisturbed
    one = tmp_path / "one"
    train(one, damaged, "plain", ENOUGH)
    assert skipped(two) | {"bad_samples_named": None} == skipped(one) | {"bad_samples_named": None}
    assert skipped(two)["bad_samples"] == kinds_shown(STEPS)
    assert sorted(skipped(two)["bad_samples_named"]) == sorted(skipped(one)["bad_samples_named"])
    assert skipped(two)["val_bad_samples"] == {"checksum": 1} and skipped(two)["left_out_per_epoch"] == 7
    for ours, theirs in zip(metrics(two), metrics(one), strict=True):
        assert {k: v for k, v in ours.items() if "data/" in k or "samples" in k} == {
            k: v for k, v in theirs.items() if "data/" in k or "samples" in k
        }
        assert ours.get("train/loss", 0) == pytest.approx(theirs.get("train/loss", 0), rel=1e-5)
    last = metrics(two)[-1]
    assert (last["val/samples"], last["val/bad_samples"]) == (60, 1)
    # the sum over all rows by their constant number, in micro-batches of 8 and of 16: a mean over the good ones of each
    # would give a rank with bad rows as much weight as one without
    for name, ours in model(two).items():
        assert torch.allclose(ours, model(one)[name], rtol=0, atol=1e-5), name
    for kind in ("checksum", "decode"):
        assert said.count(f"more such ({kind}) are only counted") == (2 if kind == "checksum" else 1)  # once for val


def test_the_ledger_has_the_intended_samples(undisturbed):
    run, _ = undisturbed
    order = Order((100, 100, 47), BATCH, SEED, 1, SAMPLES)
    lines = [ledger(run, rank) for rank in range(2)]
    assert len(lines[0]) == len(lines[1]) == STEPS
    for step, (ours, theirs) in enumerate(zip(*lines, strict=True)):
        assert ours[:2] == theirs[:2] == [step // PER_EPOCH, step]
        assert ours[2:] + theirs[2:] == order.global_batch(step).tolist()
    met = [{sample for line in of_rank for sample in line[2:] if sample in BAD} for of_rank in lines]
    assert all(met), "damage must have come to both processes"


def test_too_many_end_the_run_on_all_ranks_at_one_step(damaged, stopped):
    run, said = stopped
    step = next(step for step, count in bad_by_step(0, STEPS) if count > 2) + 1
    facts = status(run)
    assert (facts["state"], facts["kind"]) == ("failed", "data")
    assert step <= facts["step"] <= step + 1  # ranks hear of each other one step later
    assert checkpoint.find(run / "checkpoints")[0].name == checkpoint.folder_name(facts["step"])
    assert [ledger(run, rank)[-1][:2] for rank in range(2)] == [[0, facts["step"] - 1]] * 2
    for words in ("of 247 samples", "(--max-bad-fraction)", "checksum ", " of odd-00000", "dist-kd verify"):
        assert words in facts["message"]
    named = [s for s in BAD if f"sample {s} of " in facts["message"]]
    assert len(named) == dict(bad_by_step(0, STEPS))[facts["step"] - 1]
    assert said.count("data error: ") == 1 and 'Traceback (most recent call last):\n  File "/work' not in said


@pytest.mark.slow
def test_one_process_ends_with_the_code_for_data(damaged, tmp_path):
    train(tmp_path, damaged, "plain", TOO_LITTLE, expected=3)
    step = next(step for step, count in bad_by_step(0, STEPS) if count > 2) + 1
    assert status(tmp_path)["step"] == step and (tmp_path / "checkpoints" / checkpoint.folder_name(step)).is_dir()


def test_with_a_higher_bound_it_goes_on_as_if_nothing_had_been(damaged, stopped, undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stopped[0], run)
    before = status(run)["step"], len(ledger(run, 0))
    train(run, damaged, "plain", TOO_LITTLE, "--allow-reshard", expected=3, refused=True)
    assert (status(run)["step"], len(ledger(run, 0))) == before
    said = train(run, damaged, "torchrun", ENOUGH)
    assert "Its row counts nothing" not in said  # both kinds were shown by the first start
    whole = undisturbed[0]
    assert metrics(run) == metrics(whole) and skipped(run) == skipped(whole)
    assert all(torch.equal(tensor, model(whole)[name]) for name, tensor in model(run).items())


@pytest.mark.slow
def test_counts_stay_exact_on_another_number_of_processes(damaged, stopped, undisturbed, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(stopped[0], run)
    train(run, damaged, "plain", ENOUGH, "--allow-reshard")
    assert skipped(run)["bad_samples"] == skipped(undisturbed[0])["bad_samples"]
    ours, theirs = ([line for line in metrics(r) if line["kind"] == "train"] for r in (run, undisturbed[0]))
    for a, b in zip(ours, theirs, strict=True):
        assert {k: v for k, v in a.items() if "data/" in k} == {k: v for k, v in b.items() if "data/" in k}
        assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-4)


def evaluate(launcher, run, *more, expected=0):
    words = ("evaluate", str(run), "--json", "--workers", "1", *more)
    return launch(launcher, "-m", "dist_kd.commands.main", *words, expected=expected)


def test_evaluate_scores_the_rest_and_bounds_what_is_damaged(undisturbed):
    run = undisturbed[0]
    answer = json.loads(next(line for line in evaluate("plain", run).splitlines() if line.startswith("{")))
    assert (answer["samples"], answer["bad_samples"]) == (60, 1)
    assert answer["top1"] == metrics(run)[-1]["val/top1"]
    said = evaluate("torchrun", run, "--max-bad-fraction", "0.01", expected=1)
    assert said.count("data error: 1 of 61 samples of `odd` are damaged, more than the share `0.01`") == 1
    assert "sample 5 of odd-000000.tar (checksum)" in said and "rank 1: data error" not in said


def test_a_validation_set_too_damaged_for_the_teacher_ends_the_start(damaged, tmp_path):
    words = (
        "--arch cnn_small --kd --teacher-arch cnn_medium --teacher-weights none --image-size 8 --batch-size 16 --cpu"
    )
    where = ["--data", str(damaged), "--save-path", str(tmp_path), "--max-bad-fraction", "0.01"]
    with pytest.raises(DataError, match="1 of 61 samples"):
        run_training(parse([*words.split(), *where], {}))
    assert (status(tmp_path)["state"], status(tmp_path)["kind"]) == ("failed", "data")


def test_none_may_be_damaged(damaged, tmp_path):
    """--max-bad-fraction 0: the first one ends the run before anything is learnt from its batch, and the status is of
    the process that met it."""
    said = train(tmp_path, damaged, "torchrun", "0", expected=1)
    facts, first = status(tmp_path), next(step for step, count in bad_by_step(0, STEPS) if count)
    assert (facts["state"], facts["kind"], facts["step"]) == ("failed", "data", first)
    assert "sample 150 of shard" in facts["message"] and f"rank 1: data error: {facts['message']}" in said
