"""The entry point in processes of its own: no torch before the line is good, exit codes, path repair."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CARD = "--arch efficientnet_b0 --teacher-arch resnet152 --kd --T 4 --w 0.9 --save_path runs/exp --data shards"


def python(*words: str, cwd: Path = ROOT, **env: str) -> subprocess.CompletedProcess[str]:
    clean = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK", "DIST_KD_DATA", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *words], cwd=cwd, env=clean | env, capture_output=True, text=True, timeout=60
    )


def test_torch_is_not_imported_for_help_errors_or_settings():
    line = f"--config imagenet_kd {CARD} --augment crop+flip".split()
    code = f"""
import sys
from dist_kd.train import main
from dist_kd.cli import parse
parse({line!r}, {{}})
assert main(["--T", "3", "--arch", "resnet19", "--method", "x"]) == 2
try: main(["--help"])
except SystemExit as left: assert left.code == 0
print(sorted({{"torch", "torchvision", "accelerate", "webdataset", "timm", "wandb"}} & set(sys.modules)))
"""
    done = python("-c", code)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_error_is_printed_once_a_machine_and_every_rank_ends_with_2():
    """Also on a second machine, where somebody may have typed another line."""
    for rank, local, lines in (("0", "0", 3), ("1", "1", 0), ("2", "0", 3), ("3", "1", 0)):
        done = python("dist_kd/train.py", "--T", "4", RANK=rank, LOCAL_RANK=local)
        assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", lines), done.stderr
        assert "Traceback" not in done.stderr
        assert done.stderr.startswith("rank 2: config errors (2):") == (rank == "2")


def test_train_repairs_its_path_as_a_script(tmp_path):
    shutil.copytree(ROOT / "dist_kd", tmp_path / "dist_kd", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / "only_here.yaml").write_text("seed: 3\n")
    for words, cwd in (
        (["dist_kd/train.py"], tmp_path),
        ([str(tmp_path / "dist_kd" / "train.py")], ROOT),
        (["train.py"], tmp_path / "dist_kd"),  # its own folder is also the current one
        (["-m", "dist_kd.train"], tmp_path),
    ):
        done = python(*words, "--config", "only_here", "--print-config", cwd=cwd)
        assert "seed: 3  # file " in done.stdout, (words, done.stderr)


def test_a_closed_pipe_ends_quietly():
    code = "import os, sys; r, w = os.pipe(); os.dup2(w, 1); os.close(w); os.close(r)\n"
    code += "from dist_kd.commands.main import main\nsys.exit(main(['--help']))"
    done = python("-c", code)
    assert (done.returncode, done.stderr) == (141, "")
