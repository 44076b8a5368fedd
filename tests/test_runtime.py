"""What a process is given before it trains."""

import os
import platform
import subprocess
import sys

import pytest

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
