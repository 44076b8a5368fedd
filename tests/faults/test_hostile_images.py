"""Image bombs in a shard: indexed, verified and trained over, within a stated memory, to the end."""

import json
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from data.tars import tar_of
from faults import hostile_bytes as hostile
from walks.training import train

from dist_kd.commands.main import main

GOOD = 76
MOST_BYTES = 600 << 20  # above what a process takes that does the same with good images

BOMBS = {
    "pixels.png": lambda canary: hostile.png(9000, 9000),
    "claims.jpg": lambda canary: hostile.jpeg_of_scans(8, 1).replace(b"\x08\x00\x08\x00\x08", b"\x08\xff\xff\xff\xff"),
    "scans.jpg": lambda canary: hostile.jpeg_of_scans(7900, 100_000),
    "stream.png": lambda canary: hostile.png(8, 8, pixels=zlib.compress(b"\xff" * (100 << 20), 9)),
    "code.png": lambda canary: hostile.pickled(canary),
    "large.webp": lambda canary: hostile.encoded("WEBP", 2000, lossless=True, method=0),  # 62 times what is said
}


@pytest.fixture(scope="module")
def bombs(tmp_path_factory) -> Path:
    """A set of 8x8 images, with a folder val of good ones and a folder train that has bombs among them."""
    folder = tmp_path_factory.mktemp("bombs")
    good = [(f"{n:03}", "png", hostile.encoded("PNG", number=n)) for n in range(GOOD)]
    bad = [(name.split(".")[0], name.split(".")[1], make(folder / "canary")) for name, make in BOMBS.items()]
    for split, images in (("val", good[:20]), ("train", [*good[:40], *bad, *good[40:]]), ("clean", good)):
        (folder / split).mkdir()
        members = [(f"{key}.{kind}", data) for key, kind, data in images]
        members += [(f"{key}.cls", str(n % 2).encode()) for n, (key, _, _) in enumerate(images)]
        tar_of(folder / split / "x.tar", sorted(members))
        assert main(["index", str(folder / split), "--jobs", "1", "--image-size", "8"]) == 0
    return folder


def test_verify_names_each_within_its_memory(bombs):
    """In one process each, that its peak may be compared."""
    code = (
        "import sys, resource; from dist_kd.commands.main import main; code = main(sys.argv[1:]);"
        "print(code, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)"
    )
    said, peaks = {}, {}
    for split in ("clean", "train"):
        command = [sys.executable, "-W", "error", "-c", code, "verify", str(bombs / split), "--jobs", "1"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=100)
        said[split] = done.stderr
        exit_code, peaks[split] = map(int, done.stdout.split()[-2:])
        assert exit_code == (3 if split == "train" else 0), done.stderr
    assert peaks["train"] - peaks["clean"] < MOST_BYTES
    lines = [line for line in said["train"].splitlines() if "libjpeg" not in line]
    assert len(lines) == len(BOMBS) and all(line.isprintable() for line in lines), said["train"]
    for name in BOMBS:
        assert sum(f"key `{name.split('.')[0]}`" in line for line in lines) == 1
    assert not (bombs / "canary").exists()


@pytest.mark.parametrize("more", [("--workers", "0", "--no-in-memory"), ("--in-memory",)])
def test_training_goes_on_around_them(bombs, tmp_path, more):
    assert train(tmp_path / "run", bombs, "--max-bad-fraction", "0.2", *more) == "done"
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [line for line in lines if "data/bad_samples" in line][-1]
    assert 0 < last["data/bad_samples"] == last["data/bad/decode"] <= 3 * len(BOMBS)
    assert not (bombs / "canary").exists()
