"""webdataset is secured wherever it is imported; what is written is tested in test_pack.py."""

import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.parametrize("given", [None, "0"])
def test_webdataset_is_imported_secured(tmp_path, given):
    """Whatever the environment says: then webdataset runs no shell command and unpickles nothing."""
    code = (
        "import sys; from pathlib import Path; from dist_kd.data.tar_writer import Shard, write_shard; "
        "assert 'webdataset' not in sys.modules; write_shard(Shard(Path(sys.argv[1]), (), None, None, False)); "
        "print('secured', sys.modules['webdataset.utils'].enforce_security)"
    )
    env = {key: value for key, value in os.environ.items() if key != "WDS_SECURE"}
    env |= {"OMP_NUM_THREADS": "1"} | ({"WDS_SECURE": given} if given else {})
    words = [sys.executable, "-c", code, str(tmp_path / "a.tar")]
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=100)
    assert "secured True" in done.stdout, done.stderr


def test_webdataset_has_one_importer():
    """Which sets WDS_SECURE on the line before."""
    room = Path(__file__).parents[2] / "dist_kd"
    lines = {path: path.read_text().splitlines() for path in room.rglob("*.py")}
    found = [
        (path.name, text[number - 1].split("#")[0].strip())
        for path, text in lines.items()
        for number, line in enumerate(text)
        if line.strip().startswith(("import webdataset", "from webdataset", "import wids", "from wids"))
    ]
    assert found == [("tar_writer.py", 'os.environ["WDS_SECURE"] = "1"')]
