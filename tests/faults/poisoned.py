"""The trainer, whose batches of some steps hold a NaN on one rank: POISON is {"rank": r, "steps": [k, ...], ...}.

Where "drop" is true the updates of these steps are left out by hand instead, and nothing is poisoned: what a skipped
update must come to. Its state on each rank at the end is written to POISON's "dump", if there is one.
"""

import json
import math
import os
import sys

import torch

from dist_kd import lifetime, loop
from dist_kd.train import main

POISON = json.loads(os.environ["POISON"])
RANK = int(os.environ.get("RANK", "0"))


class Poisoned:
    """A source with one pixel that is not a number in the batches of some steps."""

    def __init__(self, source, accumulated: int) -> None:
        self._source, self._accumulated = source, accumulated

    def __getattr__(self, name):
        return getattr(self._source, name)

    def batches(self, step):
        inner = self._source.batches(step)
        try:
            for number, batch in enumerate(inner, step * self._accumulated):
                if number // self._accumulated in POISON["steps"] and POISON["rank"] == RANK:
                    images = batch.images.clone()
                    images[0, 0, 0, 0] = math.nan
                    batch = batch._replace(images=images)
                yield batch
        finally:
            inner.close()


def drop_by_hand(run) -> None:
    """Puts back everything that a step changes, after the steps to be dropped. Networks without a method's memory."""
    step, begin, kept = run.updates.step, run.updates.begin, {}

    def beginning() -> None:
        kept["buffers"] = [b.clone() for b in run.student.buffers()]
        begin()

    def stepping(state, *words):
        if state.step not in POISON["steps"]:
            return step(state, *words)
        for buffer, before in zip(run.student.buffers(), kept["buffers"], strict=True):
            if buffer.is_floating_point():
                buffer.copy_(before)
        run.optimizer.optimizer.zero_grad()
        return torch.tensor(math.nan)

    run.updates.begin, run.updates.step = beginning, torch.no_grad()(stepping)


def fit(run):
    if POISON.get("pending"):
        run.updates._most_pending = POISON["pending"]
    if POISON.get("drop"):
        drop_by_hand(run)
    else:
        run.source = Poisoned(run.source, run.plan.accum_steps)
    try:
        return loop.fit(run)
    finally:
        if "dump" in POISON:
            state = {"model": run.student.state_dict(), "optimizer": run.optimizer.state_dict()}
            torch.save(state, f"{POISON['dump']}.{RANK}")


if __name__ == "__main__":
    lifetime.fit = fit
    sys.exit(main())
