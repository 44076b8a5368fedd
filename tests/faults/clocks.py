"""Processes with a wrong clock: what they ask of the time of day is wrong, and nothing else is (wrong_clock.c).

libfaketime changes how long Python's own sleeps take, which no wrong clock does, so this does without it.
"""

import atexit
import functools
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

DAY_S = 86400


@functools.cache
def _library() -> str:
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("a wrong clock needs a C compiler (Debian's package gcc)")
    folder = Path(tempfile.mkdtemp(prefix="wrong_clock-"))
    atexit.register(shutil.rmtree, folder)
    made = folder / "wrong_clock.so"
    source = Path(__file__).with_name("wrong_clock.c")
    subprocess.run([compiler, "-O1", "-shared", "-fPIC", "-o", made, source, "-ldl"], check=True, timeout=60)
    return str(made)


def wrong_clock(offset: Path) -> dict[str, str]:
    """The variables of a process whose clock is off by the seconds in the file `offset`, at any moment."""
    return {"LD_PRELOAD": _library(), "WRONG_CLOCK": str(offset)}
