"""Processes that have not the same code, packages, settings and data are refused before the first step."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from dist.launching import launch

import dist_kd
from dist_kd.config import Config
from dist_kd.data.index import checksum, read_index, write_index
from dist_kd.world_digest import OF_A_NODE, differences

PACKAGE = Path(dist_kd.__file__).parent
LIMIT = 150  # seconds, of which two processes take 10 on an idle machine


def with_one_other_sample(folder: Path) -> None:
    """Flips a bit of the last training image, and indexes it as it then is: a set that is good, and another one."""
    index = read_index(folder)
    rows = np.array(index.rows)
    shard, row = index.locate(index.num_samples - 1)
    with open(index.shard_path(shard), "r+b") as file:
        file.seek(int(row["offset"]))
        image = bytearray(file.read(int(row["length"])))
        image[-1] ^= 1
        file.seek(int(row["offset"]))
        file.write(image)
    rows[-1]["checksum"] = checksum(bytes(image))
    write_index(dataclasses.replace(index, rows=rows))


@pytest.mark.timeout(2 * LIMIT)
def test_a_rank_that_has_something_else_is_named(origin, tmp_path):
    """Other code, another package, another setting and another sample on rank 1; what may differ does too."""
    there, run = tmp_path / "there", tmp_path / "run"
    shutil.copytree(origin, there / "data")
    with_one_other_sample(there / "data" / "train")
    shutil.copytree(PACKAGE, there / "code" / "dist_kd", ignore=shutil.ignore_patterns("__pycache__"))
    with open(there / "code" / "dist_kd" / "methods" / "kd.py", "a") as file:
        file.write("# one comment more\n")
    package = there / "code" / "safetensors-0.0.1.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: safetensors\nVersion: 0.0.1\n")
    unlike = {
        "path": [str(there / "code")],
        "words": {
            str(origin): str(there / "data"),
            "--log-steps=5": "--log-steps=7",
            "--workers=2": "--workers=1",
            "--no-in-memory": "--in-memory",
        },
    }
    said = launch(
        "torchrun", "tests/faults/unlike.py", "--data", str(origin), "--save-path", str(run), "--arch", "cnn_small",
        "--no-kd", "--image-size", "8", "--batch-size", "16", "--device-batch-size", "8", "--max-steps", "3",
        "--log-steps=5", "--workers=2", "--no-in-memory",
        expected=1, limit=LIMIT, variables={"UNLIKE": json.dumps(unlike), "PYTHONPATH": str(PACKAGE.parent)},
    )  # fmt: skip
    assert "exitcode  : 2 " in said  # torchrun's own is 1, whatever the processes' are
    status = json.loads((run / "status.json").read_text())
    assert (status["state"], status["kind"], status["step"]) == ("failed", "config", None)
    ours, theirs = (read_index(folder / "train").fingerprint for folder in (origin, there / "data"))
    assert ours != theirs
    for sentence in (
        f"the train data is `{ours}` on rank 0 (node ",
        f"and `{theirs}` on rank 1 (node ",
        "the code of dist_kd is `",
        "version of safetensors is `",
        "and `0.0.1` on rank 1",
        "setting log_steps is `5` on rank 0",
        "and `7` on rank 1",
        "their git revisions are ",
    ):
        assert sentence in status["message"], status["message"]
    for name in ("the val data", *(f"setting {name}" for name in OF_A_NODE)):
        assert f"{name} is" not in status["message"]
    assert said.count("config error: the processes of this run are not alike") == 1
    assert not (run / "metrics.jsonl").exists() and not list((run / "checkpoints").iterdir())
    assert not (run / "lock").exists()


def test_differences_name_ranks_and_values():
    nodes = ["n1"] * 4 + ["n2"] * 4
    alike = [{"setting seed": "0", "code": "a"} for _ in nodes]
    assert differences(alike, nodes) == []
    alike[5] = {"setting seed": "1", "code": "a"}
    assert differences(alike, nodes) == [
        "setting seed is `0` on ranks 0-4, 6-7 (nodes n1, n2) and `1` on rank 5 (node n2)"
    ]
    assert differences([{"a": "1"}, {}], ["n", "m"]) == ["a is `1` on rank 0 (node n) and `missing` on rank 1 (node m)"]
    assert len(differences([{str(k): "1" for k in range(20)}, {}], ["n", "m"])) == 7


def test_what_may_differ_is_a_setting_and_changes_no_collective():
    """A setting that does not exist any more, or on which steps, logs, saves or evaluations depend, may not be here."""
    assert set(Config.model_fields) >= OF_A_NODE
    fields = {name: field.json_schema_extra["result"] for name, field in Config.model_fields.items()}
    assert {name for name in OF_A_NODE if fields[name]} == {"data", "val_data"}  # compared by content
