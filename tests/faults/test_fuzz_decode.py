"""Damaged images by the thousand: pixels or our own error; no crash, hang, warning, or memory beyond them."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).parent
MAX_PIXELS = 1_000_000
MOST_MB = 150  # growth: what such images take (20 bytes a pixel) and the allocator's habits


@pytest.mark.parametrize(
    ("count", "seed"), [(1000, 0), pytest.param(100_000, 1, marks=[pytest.mark.slow, pytest.mark.timeout(1200)])]
)
def test_damaged_images(tmp_path, count, seed):
    kept = tmp_path / "image"
    # every warning is an error, in whatever module: Pillow's are switched off by name
    command = [sys.executable, "-W", "error", str(HERE / "fuzz_decode.py"), str(count), str(seed), str(kept)]
    paths = os.pathsep.join([str(HERE.parents[1]), str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    process = subprocess.run(
        [*command, str(MAX_PIXELS)], env=os.environ | {"PYTHONPATH": paths}, capture_output=True, text=True
    )
    last = kept.read_bytes() if kept.exists() else b""
    assert process.returncode == 0, f"{process.stderr[-3000:]}\nthe image: {last.hex()}"
    decoded, refused, grown = map(int, process.stdout.split())
    assert decoded + refused == count and min(decoded, refused) > count // 20
    assert grown < MOST_MB
