"""The trainer, in which one rank meets trouble: TROUBLE is a JSON object of rank, where, at and what.

where: "train" (batch number `at`), "evaluation" (its first batch) or "save" (its second one). What: see WHAT.
"""

import ctypes
import json
import os
import signal
import sys
import time
from pathlib import Path


def fail() -> None:
    raise AssertionError("the trouble of this test")


WHAT = {
    "sleep": lambda: time.sleep(100000),
    "hold the interpreter": lambda: ctypes.PyDLL(None).sleep(100000),  # in C, without letting other threads run
    "stop": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "die": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "raise": fail,
    "dawdle": lambda: time.sleep(0.3),
}


def troubled(of_loader, trouble: dict):
    """`batches` of a loader with trouble before a batch; from that one on if it is "dawdle"."""

    def batches(self, *step):
        inner = of_loader(self, *step)
        try:
            for number, batch in enumerate(inner):
                if number == trouble["at"] or (trouble["what"] == "dawdle" and number > trouble["at"]):
                    meet(trouble)
                yield batch
        finally:
            inner.close()

    return batches


def meet(trouble: dict) -> None:
    """Notes when, on the clock of all processes, and does it."""
    Path(trouble["note"]).write_text(repr(time.monotonic()))
    WHAT[trouble["what"]]()


def bring(trouble: dict) -> None:
    from dist_kd import checkpoint
    from dist_kd.data.loader import EvalLoader, TrainLoader

    if trouble["where"] == "train":
        TrainLoader.batches = troubled(TrainLoader.batches, trouble)
    elif trouble["where"] == "evaluation":
        EvalLoader.batches = troubled(EvalLoader.batches, trouble)
    else:
        saves, save = [], checkpoint.save

        def troubled_save(*args, **named):
            saves.append(1)
            if len(saves) == 2:
                meet(trouble)
            return save(*args, **named)

        checkpoint.save = troubled_save


if __name__ == "__main__":
    from dist_kd.train import main

    trouble = json.loads(os.environ["TROUBLE"])
    # a launcher's second attempt meets none
    if int(os.environ["RANK"]) == trouble["rank"] and os.environ.get("TORCHELASTIC_RESTART_COUNT", "0") == "0":
        bring(trouble)
    sys.exit(main())
