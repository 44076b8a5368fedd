"""The README's shell blocks, run as written from the repository's root. The first is the demo, from make."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
BLOCKS = re.findall(r"```bash\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)


def run(block: str, limit: float) -> str:
    # as from a user's shell, also when the tests themselves were started by make
    hidden = ("RANK", "WORLD_SIZE", "PYTEST_CURRENT_TEST", "MAKELEVEL", "MAKEFLAGS", "MFLAGS")
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block], cwd=ROOT, env=env, capture_output=True, text=True, timeout=limit
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_the_blocks_are_these():
    assert len(BLOCKS) == 2
    assert BLOCKS[0].strip() == "make demo"


@pytest.mark.timeout(400)
def test_make_demo():
    if not (ROOT / ".venv" / ".installed").exists():
        pytest.skip("the demo's set-up is make's; run the tests by `make test`")
    said = run(BLOCKS[0], 380)
    assert "SIGTERM: checkpoint at step" in said
    assert "the counts are the trainer's own" in said
    for row in ("teacher", "student alone", "student distilled"):
        assert re.search(rf"^{row} +\d\d\.\d\d", said, re.MULTILINE), said
    last = said.strip().splitlines()[-1]
    assert re.match(r"(Distillation helped|No difference|Distillation hurt).*alone", last), last
    assert (ROOT / "runs" / "demo" / "report.html").stat().st_size < 1_000_000


@pytest.mark.timeout(300)
def test_the_commands():
    shutil.rmtree(ROOT / "runs" / "readme", ignore_errors=True)
    said = run(BLOCKS[1], 280)
    assert "cnn_small on 359 samples: top-1" in said
    assert (ROOT / "runs" / "readme" / "report.html").is_file()
