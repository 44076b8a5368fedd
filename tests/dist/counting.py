"""What the digits of these tests must count to, with no loader and no evaluator."""

from pathlib import Path

import torch

from dist_kd import models
from dist_kd.data.decode import TarSamples
from dist_kd.data.index import read_index

SAMPLES = 61  # in one shard


def count_by_hand(run: Path, data: Path) -> tuple[int, int]:
    """Top-1 and top-5 hits of a run's student."""
    network, index = models.load(run / "student").eval(), read_index(data / "val")
    assert (index.num_samples, len(index.shards)) == (SAMPLES, 1)
    places = _places(network, index)
    return sum(place < 1 for place in places), sum(place < 5 for place in places)


def first_guesses(network, index) -> int:
    """Top-1 hits of a network on a whole set."""
    return sum(place < 1 for place in _places(network, index))


def _places(network, index) -> list[int]:
    """For each sample, how many classes the network thinks likelier than its label."""
    samples, places = TarSamples(index), []
    mean, std = (torch.tensor(value).view(3, 1, 1) for value in (network.spec.mean, network.spec.std))
    for sample in range(index.num_samples):
        image = (samples.pixels(sample) / 255 - mean) / std
        with torch.no_grad():
            logits = network(image[None]).logits[0]
        places.append(int((logits > logits[int(index.rows[sample]["label"])]).sum()))
    return places


def assert_counts(scores: dict, counts: tuple[int, int]) -> None:
    assert 0 < counts[0] < counts[1] <= SAMPLES == scores["samples"]
    assert (scores["top1"], scores["top5"]) == tuple(100 * count / SAMPLES for count in counts)


def assert_each_scored_once(ledger: Path, ranks: int, batches: int) -> None:
    """Batch b is rank b's modulo ranks; a rank without one has written nothing."""
    files = {path.name: path for path in ledger.glob("evaluation-rank*.txt")}
    assert sorted(files) == [f"evaluation-rank{rank}.txt" for rank in range(min(ranks, batches))]
    seen = []
    for rank in range(min(ranks, batches)):
        lines = [list(map(int, line.split())) for line in files[f"evaluation-rank{rank}.txt"].read_text().splitlines()]
        assert [line[1] for line in lines] == list(range(rank, batches, ranks))
        seen += [sample for line in lines for sample in line[2:]]
    assert sorted(seen) == list(range(SAMPLES))
