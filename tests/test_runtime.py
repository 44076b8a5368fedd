"""What a process is given before it trains."""

import os
import platform
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from dist.launching import launch

from dist_kd.contracts import World
from dist_kd.runtime import Runtime, StopRequests
from dist_kd.watchdog import BEAT_S, Progress, Watchdog

FAULTS = """
import resource, sys, torch
from dist_kd.cli import parse
from dist_kd.runtime import start_runtime
start_runtime(parse(["--data", "x", "--cpu"], {}).config)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(20):
        blocks = [torch.ones(10_000_000) for _ in range(3)]  # 40 MB each
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
faults()
print(faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc gives memory back so eagerly")
@pytest.mark.parametrize(("environment", "keeps"), [({}, True), ({"MALLOC_TOP_PAD_": "131072"}, False)])
def test_freed_memory_is_kept_unless_the_environment_says_how(environment, keeps):
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_TUNABLES"))}
    done = subprocess.run(
        [sys.executable, "-c", FAULTS],
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )
    # 60 blocks of 9,766 pages of 4 KiB; transparent huge pages would make it 60 x 19
    assert (int(done.stdout) < 100) == keeps, done.stdout


def test_a_folder_that_cannot_be_looked_into_stops_nothing():
    """A name that the file system refuses with an error of its own, as one that is away for a moment does."""
    away = Path("x" * 300)
    runtime = Runtime(None, World(), torch.device("cpu"), "no", "setting")
    assert not StopRequests(runtime, away, None).agreed()
    watch = Watchdog(away, World(), Progress(), 100, lambda sentence: None)
    watch.start()
    try:
        time.sleep(2 * BEAT_S[0])
        assert all(thread.is_alive() for thread in watch._threads)
    finally:
        watch.stop()


REFUSED = """
import threading
from dist_kd.cli import parse
from dist_kd.runtime import start_runtime

runtime = start_runtime(parse(["--data", "x", "--cpu"], {}).config)
assert runtime.world.world_size == 2
def fail():
    error = ValueError("the server said no")
    error.connection = threading.Lock()
    raise error
try:
    runtime.on_main(fail)
except Exception as error:
    print(f"rank {runtime.world.rank} has {type(error).__name__}: {error}", flush=True)
runtime.barrier()
runtime.close()
"""


def test_an_error_that_cannot_travel_is_told_to_all_ranks_in_words(tmp_path):
    script = tmp_path / "refused.py"
    script.write_text(REFUSED)
    said = launch("torchrun", str(script))
    assert "rank 0 has ValueError: the server said no\n" in said
    assert "rank 1 has RuntimeError: ValueError: the server said no\n" in said
