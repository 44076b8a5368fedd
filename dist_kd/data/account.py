"""Owns the account of damaged samples: how many of each kind and which, on all ranks, and when there are too many."""

from __future__ import annotations

import math
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor

from dist_kd.contracts import DataCounters
from dist_kd.data.damage import KINDS
from dist_kd.data.feed import Rows
from dist_kd.data.index import Index
from dist_kd.errors import DataError

MOST_NAMED = 20  # damaged samples that the last sentence of a run lists


class Account:
    """Counts of one rank (`mine`), and from them those of all ranks.

    An epoch, like an evaluation, shows each sample at most once: the rows replaced in it, summed over ranks, are the
    number of its different damaged samples, of which there may be `limit`.
    """

    def __init__(self, index: Index, num_samples: int, max_bad_fraction: float):
        """`num_samples`: how many are shown of the index, of which the fraction is."""
        self.index, self.num_samples, self.fraction = index, num_samples, max_bad_fraction
        # rounded first: 0.29 * 100 is 28.999999999999996
        self.limit = math.floor(round(max_bad_fraction * num_samples, 6))
        self.mine = DataCounters()
        self._named: tuple[dict[str, int], DataCounters] | None = None  # totals, and what was gathered at them

    def add(self, rows: Rows) -> None:
        """Counts what was bad in rows that are now given out."""
        mine = self.mine
        if rows.epoch != mine.epoch:
            mine.epoch, mine.in_epoch = rows.epoch, 0
        mine.retries += rows.retries
        for sample, kind, sentence in rows.bad:
            assert kind in KINDS, f"damage of the kind {kind!r} has no row in data/damage.py"
            shard, _ = self.index.locate(sample)
            name = f"sample {sample} of {self.index.shards[shard].name} ({kind})"
            mine.bad[kind] = mine.bad.get(kind, 0) + 1
            mine.in_epoch += 1
            mine.first.setdefault(kind, sentence)
            if len(mine.named) < MOST_NAMED and name not in mine.named:
                mine.named.append(name)

    def load(self, saved: DataCounters, *, main: bool) -> None:
        """Goes on from the sums over all ranks that were saved: they stand on one rank, the others go on from zero."""
        self.mine = deepcopy(saved) if main else DataCounters(epoch=saved.epoch)

    def clear(self) -> None:
        """Starts anew: for an evaluation that shows all samples again."""
        self.mine, self._named = DataCounters(), None

    def of_all(self, reduce_sum: Callable[[Tensor], Tensor], gather: Callable[[Any], list]) -> DataCounters:
        """The counts of all ranks, the same on each; every rank calls it. Names travel only when there are new ones."""
        mine = self.mine
        numbers = [*(mine.bad.get(kind, 0) for kind in KINDS), mine.retries, mine.in_epoch]
        *counts, retries, in_epoch = map(round, reduce_sum(torch.tensor(numbers, dtype=torch.float64)).tolist())
        bad = {kind: count for kind, count in zip(KINDS, counts, strict=True) if count}
        if self._named is None or self._named[0] != bad:
            ranks: list[DataCounters] = gather(mine) if bad else []
            first = {kind: sentence for rank in reversed(ranks) for kind, sentence in rank.first.items()}
            named = {name for rank in ranks for name in rank.named}
            by_number = sorted(named, key=lambda name: int(name.split()[1]))
            self._named = bad, DataCounters(first=first, named=by_number[:MOST_NAMED])
        found = self._named[1]
        return DataCounters(bad, retries, mine.epoch, in_epoch, dict(found.first), list(found.named))

    def check(self, counters: DataCounters, seen: int = 0) -> None:
        """DataError with the list and what to do if all ranks' `counters`, or `seen` bad samples, are too many."""
        bad = max(counters.in_epoch, seen)
        if bad <= self.limit:
            return
        kinds = ", ".join(f"{kind} {count}" for kind, count in counters.bad.items())
        more = ", and others" if sum(counters.bad.values()) > len(counters.named) else ""
        enough = math.ceil(bad / self.num_samples * 10_000) / 10_000
        error = DataError(
            f"{bad} of {self.num_samples} samples of `{self.index.name}` are damaged, more than the share "
            f"`{self.fraction:g}` that may be (--max-bad-fraction); replaced so far: {kinds} ("
            f"{', '.join(counters.named)}{more}); see `dist-kd verify {self.index.folder}` and copy those shards "
            f"again, or start again with `--max-bad-fraction {enough:g}` or more"
        )
        error.alike = True
        raise error
