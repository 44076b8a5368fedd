"""A prime number of samples, more ranks than shards, ranks with nothing to score: each sample counts once."""

import json

import pytest
from dist.counting import assert_counts, assert_each_scored_once, count_by_hand
from dist.launching import launch, train_here, world_size


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("trained_by", "scored_by", "evaluation_batch", "batches"),
    [
        (1, 4, 25, 3),
        pytest.param(3, 4, 64, 1, marks=pytest.mark.slow),
        pytest.param(4, 3, 13, 5, marks=pytest.mark.slow),
    ],
)
def test_counts_are_those_made_by_hand(odd_digits, tmp_path, trained_by, scored_by, evaluation_batch, batches):
    """In training, then by `dist-kd evaluate`; test_reshard.py has a training on 3 ranks, two with nothing to score."""
    run, ledgers = tmp_path / "run", [tmp_path / "trained", tmp_path / "scored"]
    for ledger in ledgers:
        ledger.mkdir()
    words = [
        "--arch", "cnn_small", "--no-kd", "--image-size", "8", "--batch-size", "12", "--device-batch-size",
        str(evaluation_batch), "--max-steps", "30", "--eval-steps", "1000", "--workers", "1", "--no-in-memory", "--cpu",
        "--data", str(odd_digits), "--save-path", str(run),
    ]  # fmt: skip
    variables = {"DIST_KD_LEDGER": str(ledgers[0])}
    if trained_by == 1:
        train_here(*words, variables=variables)
    else:
        launch("torchrun", "dist_kd/train.py", *words, processes=trained_by, variables=variables)
    assert world_size(run) == trained_by
    trained = json.loads((run / "summary.json").read_text())["student"]["last"]
    said = launch(
        "torchrun", "-m", "dist_kd.commands.main", "evaluate", str(run), "--json",
        processes=scored_by, variables={"DIST_KD_LEDGER": str(ledgers[1])},
    )  # fmt: skip
    scored = json.loads(next(line for line in said.splitlines() if line.startswith("{")))
    counts = count_by_hand(run, odd_digits)
    assert_counts(trained, counts)
    assert_counts(scored, counts)
    assert_each_scored_once(ledgers[0], trained_by, batches)
    assert_each_scored_once(ledgers[1], scored_by, batches)
