"""Memory runs out in a real process: one sentence with the remedy, which works; other ranks leave soon after."""

import json
import re
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from dist.launching import launch

from dist_kd import out_of_memory
from dist_kd.config import Config
from dist_kd.contracts import World
from dist_kd.errors import DistKDError, OutOfMemoryError, says_memory_ran_out
from dist_kd.resume import _put_back
from dist_kd.runtime import Runtime

LIMIT = 240  # seconds for a start on a busy machine
LEFT = 90  # seconds in which all other ranks are gone; 30 of them are the launcher's patience
BATCH = 512
TRAIN = [
    "tests/faults/little_memory.py", "train", "--data", "digits", "--arch", "cnn_small", "--no-kd",
    "--image-size", "64", "--batch-size", str(BATCH), "--max-steps", "2", "--eval-steps", "100",
    "--mixed-precision", "no", "--cpu",
]  # fmt: skip
LITTLE = {"LITTLE_MEMORY": str(600 << 20), "LITTLE_MEMORY_RANK": "0"}  # a batch of 512 takes more than a GiB


def status(run):
    return json.loads((run / "status.json").read_text())


@pytest.mark.parametrize(
    ("words", "memory"),
    [
        ("could not create a primitive", True),  # oneDNN, in a convolution on a CPU whose memory was limited
        ("could not create a primitive descriptor for a convolution", False),  # there it is what was asked for
        ("[enforce fail at alloc_cpu.cpp:133] data. DefaultCPUAllocator: can't allocate memory", True),
        ("mat1 and mat2 shapes cannot be multiplied", False),
    ],
)
def test_what_says_that_memory_ran_out(words, memory):
    assert says_memory_ran_out(RuntimeError(words)) is memory


@pytest.mark.timeout(2 * LIMIT)
def test_a_host_without_memory_says_so_and_the_remedy_works(tmp_path):
    run = tmp_path / "run"
    words = [*TRAIN, "--save-path", str(run)]
    said = launch("plain", *words, "--device-batch-size", str(BATCH), expected=9, limit=LIMIT, variables=LITTLE)
    facts = status(run)
    assert (facts["state"], facts["kind"]) == ("failed", "memory")
    for part in (
        "the host of rank 0 ran out of memory in step 1, when ",
        f" GiB more were asked for; a micro-batch is `{BATCH} images of 64 x 64 pixels`: ",
        f"give --device-batch-size {BATCH // 2}: the global batch of {BATCH} stays",
    ):
        assert part in facts["message"]
    assert said.count("memory error: the host of rank 0") == 1 and "Traceback" not in said
    assert not (run / "lock").exists()


@pytest.mark.slow
@pytest.mark.timeout(5 * LIMIT)
def test_what_it_says_leads_to_a_batch_that_fits(tmp_path):
    """The same global batch in the same memory, by taking the number it names each time; the evaluation fits, too."""
    run, size, sizes = tmp_path / "run", BATCH, []
    while not sizes or status(run)["state"] != "done":
        sizes.append(size)
        assert len(sizes) < 8, sizes
        words = [*TRAIN, "--save-path", str(run), "--device-batch-size", str(size)]
        words += ["--allow-reshard"] if (run / "checkpoints" / "latest").exists() else []
        said = launch("plain", *words, expected=None, limit=LIMIT, variables=LITTLE)
        if status(run)["state"] != "done":
            assert status(run)["kind"] == "memory", said
            size = int(re.search(r"give --device-batch-size (\d+)", status(run)["message"])[1])
    assert sizes == [BATCH >> k for k in range(len(sizes))] and len(sizes) > 1


@pytest.mark.timeout(3 * LIMIT)
def test_a_network_whose_scoring_does_not_fit_is_told_so_and_the_remedy_works(tmp_path):
    run, little = tmp_path / "run", {**LITTLE, "LITTLE_MEMORY": str(100 << 20)}
    launch("plain", *TRAIN, "--save-path", str(run), "--device-batch-size", "32", variables=LITTLE, limit=LIMIT)
    score = ["tests/faults/little_memory.py", "evaluate", str(run), "--workers", "0", "--device-batch-size"]
    said = launch("plain", *score, "256", expected=9, limit=LIMIT, variables=little)
    assert re.fullmatch(
        r"memory error: the host of rank 0 ran out of memory while cnn_small was scored(, when .* more were asked for)?"
        r"; a batch is `256 images of 64 x 64 pixels`: give --device-batch-size 128; fewer --workers .*\n",
        said,
    )
    assert "on 359 samples" in launch("plain", *score, "16", limit=LIMIT, variables=little)


@pytest.mark.slow
@pytest.mark.timeout(2 * LIMIT)
def test_the_other_ranks_leave(tmp_path):
    """Bound: LEFT seconds from the status of the rank without memory to the end of the launcher."""
    run, seen = tmp_path / "run", []

    def watch(process: subprocess.Popen) -> None:
        deadline = time.monotonic() + LIMIT
        while not seen and process.poll() is None and time.monotonic() < deadline:
            if (run / "status.json").exists() and status(run)["state"] == "failed":
                seen.append(time.monotonic())
            time.sleep(0.05)

    # several processes need more of it before the first step: threads, connections, buckets of gradients
    little = {"LITTLE_MEMORY": str(1200 << 20), "LITTLE_MEMORY_RANK": "1"}
    larger = {"64": "128", str(BATCH): str(2 * BATCH)}
    words = [*(larger.get(word, word) for word in TRAIN), "--save-path", str(run), "--device-batch-size", str(BATCH)]
    said = launch("torchrun", *words, expected=1, limit=LIMIT, variables=little, meanwhile=watch)
    assert time.monotonic() - seen[0] < LEFT
    assert status(run)["kind"] == "memory" and "the host of rank 1 ran out of memory" in status(run)["message"]
    assert "rank 1: memory error: " in said


RESUMED = """
import resource, sys, torch
from pathlib import Path
from dist_kd import checkpoint, out_of_memory
from dist_kd.config import Config
from dist_kd.contracts import World
from dist_kd.runtime import Runtime
from dist_kd.train_state import TrainState

facts = {"settings": {}, "layout": dict.fromkeys(checkpoint.LAYOUT, 1), "data": "f"}
large, small = torch.zeros(50_000_000), torch.ones(2)
saved = []
for step, model, optimizer in ((1, large, small), (2, small, large)):
    content = checkpoint.Snapshot(TrainState(step=step), {"model": {"w": model}}, {"w": optimizer}, facts)
    saved.append(checkpoint.save(Path(sys.argv[1]), content, keep=2))
del large, content, model, optimizer
pages = int(Path("/proc/self/statm").read_text().split()[0])
limit = pages * resource.getpagesize() + (100 << 20)
resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
runtime = Runtime(None, World(), torch.device("cpu"), "no", "test")
for where in saved:
    try:
        with out_of_memory.told(Config(), runtime, lambda: None):
            checkpoint.load(where, "cpu")
    except Exception as error:
        print(type(error).__name__, error)
"""


def test_a_checkpoint_that_does_not_fit_is_not_called_damaged(tmp_path):
    """The weights in the first, the optimizer in the second: 200 MB each, where 100 MiB more may be had."""
    done = subprocess.run(
        [sys.executable, "-c", RESUMED, str(tmp_path)], capture_output=True, text=True, timeout=LIMIT, check=True
    )
    first, second = done.stdout.splitlines()
    ran_out = "OutOfMemoryError the host of rank 0 ran out of memory before the first step"
    assert first.startswith(f"{ran_out}; ")
    assert second.startswith(f"{ran_out}, when 0.19 GiB more were asked for; ")


def test_networks_that_do_not_fit_are_not_called_others():
    """As torch says it of a device, inside the sentence of the one that copies."""

    def no_room(tensors):
        raise RuntimeError("an exception occurred : ('CUDA out of memory. Tried to allocate 2.00 GiB.',)")

    run = SimpleNamespace(student=SimpleNamespace(load_state_dict=no_room))
    with pytest.raises(OutOfMemoryError) as caught, out_of_memory.told(Config(), runtime(), lambda: None):
        _put_back(run, SimpleNamespace(tensors={"model": {}}), None)
    assert "when 2.00 GiB more were asked for" in str(caught.value)


OF_RANK_0 = """
import numpy as np
from dist_kd import out_of_memory
from dist_kd.cli import parse
from dist_kd.errors import OutOfMemoryError
from dist_kd.runtime import start_runtime

config = parse(["--data", "x", "--cpu"], {}).config
runtime = start_runtime(config)
assert runtime.world.world_size == 2
try:
    with out_of_memory.told(config, runtime, lambda: None):
        runtime.on_main(lambda: np.empty(1 << 50, dtype=np.uint8))
except OutOfMemoryError as error:
    print(f"rank {runtime.world.rank}, alike {error.alike}: {error}\\n", end="", flush=True)
runtime.barrier()
runtime.close()
"""


@pytest.mark.timeout(2 * LIMIT)
def test_what_rank_0_met_for_all_is_told_as_its_own(tmp_path):
    script = tmp_path / "of_rank_0.py"
    script.write_text(OF_RANK_0)
    said = launch("torchrun", str(script), limit=LIMIT)
    for rank in (0, 1):  # that they are alike makes one of them say it
        assert f"rank {rank}, alike True: the host of rank 0 ran out of memory before the first step, when " in said


def runtime(rank=0, ranks=1):
    return Runtime(None, World(rank, ranks, rank, ranks), torch.device("cpu"), "no", "test")


@pytest.mark.parametrize(
    ("error", "parts"),
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of"),
            ["the GPU of rank 3", "when 2.00 GiB more were asked for", "give --device-batch-size 64:"],
        ),
        (
            MemoryError(),
            ["the host of rank 3 ran out of memory before the first step; ", "--no-in-memory"],
        ),
        (MemoryError("Unable to allocate 3.64 TiB for an array"), ["when 3.64 TiB more were asked for"]),
    ],
)
def test_what_is_said(error, parts):
    with pytest.raises(OutOfMemoryError) as caught, out_of_memory.told(Config(), runtime(3, 2), lambda: None):
        raise error
    assert caught.value.exit_code == 9 and not caught.value.alike
    for part in parts:
        assert part in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_allocators_say_is_understood():
    """torch's on a CPU and numpy's, for more than any machine has."""
    for ask in (lambda: torch.empty(1 << 50, dtype=torch.uint8), lambda: np.empty(1 << 50, dtype=np.uint8)):
        with (
            pytest.raises(OutOfMemoryError, match=r"when (1048576.00 GiB|1.00 PiB) more were asked for"),
            out_of_memory.told(Config(), runtime(), lambda: None),
        ):
            ask()


def test_other_errors_stay_what_they_are():
    for error in (RuntimeError("Connection closed by peer"), ValueError("x"), DistKDError("y")):
        with pytest.raises(type(error), match=str(error)), out_of_memory.told(Config(), runtime(), lambda: None):
            raise error


@pytest.mark.parametrize(
    ("words", "ranks", "expected"),
    [
        ({"batch_size": 256, "device_batch_size": 128}, 1, 64),
        ({"batch_size": 10, "device_batch_size": 5}, 1, 2),  # 5 does not halve, 2 divides 10
        ({"batch_size": 12, "device_batch_size": 6, "mixup": 0.2}, 1, 2),  # 3 is odd, and rows mix in pairs
        ({"batch_size": 4, "device_batch_size": 1}, 4, None),
    ],
)
def test_the_micro_batch_that_is_proposed_is_allowed(words, ranks, expected):
    assert out_of_memory.smaller(Config(**words), ranks) == expected
