import subprocess
import sys
from pathlib import Path

import pytest

from dist_kd.tracking.tensorboard import TensorboardTracker

pytest.importorskip("tensorboard")


def scalars(folder: Path, key: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    return [(event.step, event.value) for event in accumulator.Scalars(key)]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # tensorboard's own
def test_a_resumed_run_shows_each_step_once(tmp_path):
    first = TensorboardTracker(tmp_path)
    for step in range(1, 6):
        first.log({"train/loss": 10.0 + step}, step)
    first.close("failed")
    second = TensorboardTracker(tmp_path, resumed_step=3)
    for step in range(4, 7):
        second.log({"train/loss": 20.0 + step}, step)
    second.close("done")
    assert scalars(tmp_path, "train/loss") == [(1, 11), (2, 12), (3, 13), (4, 24), (5, 25), (6, 26)]


def test_without_the_package_the_error_names_the_extra(tmp_path):
    """The import is blocked the way Python itself offers: a None in sys.modules."""
    program = """
import sys
sys.modules["tensorboard"] = None
from pathlib import Path
from dist_kd.errors import ConfigError
from dist_kd.tracking import open_tracker
run_dir = Path(sys.argv[1])
(run_dir / "metrics.jsonl").write_text('{"step": 1, "kind": "train"}\\n')
try:
    open_tracker(run_dir, run_id="r", name="n", settings={}, total_steps=1, wandb=False, wandb_project="p",
                 tensorboard=True, resumed_step=None)
except ConfigError as error:
    assert "dist-kd[tensorboard]" in str(error)
    assert (run_dir / "metrics.jsonl").stat().st_size, "the error must come before anything is cut back"
else:
    raise SystemExit("no error")
"""
    subprocess.run([sys.executable, "-c", program, str(tmp_path)], check=True, timeout=60)


def test_a_disk_that_refuses_ends_it_with_one_error(tmp_path):
    """TensorBoard raises the same object at each call then, with a longer and longer traceback: memory for good."""
    code = """
import resource, signal, sys, time
from pathlib import Path
from dist_kd.tracking.tensorboard import TensorboardTracker
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (200, 200))
tracker, errors = TensorboardTracker(Path(sys.argv[1])), 0
for step in range(100):
    try:
        tracker.log({"train/loss": 1.0}, step)
    except OSError:
        errors += 1
    tracker._writer and time.sleep(0.1)  # until its thread has met the limit
tracker.close("done")
print(errors)
"""
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=100)
    assert done.stdout == "1\n", done.stderr
